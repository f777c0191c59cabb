"""Functions of arrays that the transformer is made of."""

from skyreels_jax.models.layers import mul_add, mul_add_add
from skyreels_jax.ops.positions import rope_apply, rope_params, sinusoidal_embedding_1d

__all__ = ["mul_add", "mul_add_add", "rope_apply", "rope_params", "sinusoidal_embedding_1d"]
