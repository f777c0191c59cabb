"""The transformer."""

from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_layers import WanAttentionBlock

__all__ = ["WanAttentionBlock", "WanModel"]
