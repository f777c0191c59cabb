"""The import paths of the described system; everything is defined in :mod:`skyreels_jax`."""
