"""The transformer and its parts."""

from jax_implementation.modules.attention import (
    WanI2VCrossAttention,
    WanLayerNorm,
    WanRMSNorm,
    WanSelfAttention,
    WanT2VCrossAttention,
)
from jax_implementation.modules.transformer import WanAttentionBlock, WanModel
from jax_implementation.modules.utils import (
    mul_add,
    mul_add_add,
    rope_apply,
    rope_params,
    sinusoidal_embedding_1d,
)

__all__ = [
    "WanAttentionBlock",
    "WanI2VCrossAttention",
    "WanLayerNorm",
    "WanModel",
    "WanRMSNorm",
    "WanSelfAttention",
    "WanT2VCrossAttention",
    "mul_add",
    "mul_add_add",
    "rope_apply",
    "rope_params",
    "sinusoidal_embedding_1d",
]
