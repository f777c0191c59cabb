"""The pipeline of PyTorch encoders around the JAX transformer."""

from skyreels_jax.hybrid import HybridPipeline

__all__ = ["HybridPipeline"]
