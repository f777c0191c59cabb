"""One video on many devices: the mesh, what is cut along which of its axes, and the hooks."""
