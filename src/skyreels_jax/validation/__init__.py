"""Proof of the port: the same work in PyTorch and in JAX, layer by layer and frame by frame."""
