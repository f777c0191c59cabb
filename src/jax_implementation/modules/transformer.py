"""The transformer."""

from skyreels_jax.models.transformer import WanAttentionBlock, WanModel

__all__ = ["WanAttentionBlock", "WanModel"]
