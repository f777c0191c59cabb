"""Attention modules and norms."""

from skyreels_jax.models.layers import WanLayerNorm, WanRMSNorm
from skyreels_jax.models.transformer_layers import (
    WanI2VCrossAttention,
    WanSelfAttention,
    WanT2VCrossAttention,
)

__all__ = [
    "WanI2VCrossAttention",
    "WanLayerNorm",
    "WanRMSNorm",
    "WanSelfAttention",
    "WanT2VCrossAttention",
]
