"""From published weights to a JAX model."""

from skyreels_jax.hybrid import create_jax_model_from_config, load_torch_weights

__all__ = ["create_jax_model_from_config", "load_torch_weights"]
