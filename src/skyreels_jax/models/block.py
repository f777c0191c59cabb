"""One block of the transformer: two attentions and a feed-forward, modulated by the timestep."""

from typing import NamedTuple

import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from skyreels_jax.models.layers import (
    CrossContext,
    KeyValues,
    Mlp,
    WanI2VCrossAttention,
    WanLayerNorm,
    WanSelfAttention,
    WanT2VCrossAttention,
    gelu_tanh,
    modulation_init,
)
from skyreels_jax.models.transformer_config import Numerics, TransformerConfig
from skyreels_jax.ops.attention import Earlier
from skyreels_jax.ops.masks import BlockCausal
from skyreels_jax.ops.norms import layer_norm, mul_add, mul_add_add
from skyreels_jax.ops.positions import RopeTable

FrameTokens = Float[Array, "B F P D"]


class Modulation(NamedTuple):
    """What one sub-layer takes of the timestep, per frame: ``[B, F or 1, 1, D]`` each."""

    shift: Float[Array, "B steps 1 D"]
    scale: Float[Array, "B steps 1 D"]
    gate: Float[Array, "B steps 1 D"]


class WanAttentionBlock(nnx.Module):
    """Self-attention, cross-attention and feed-forward, each added to the residual stream."""

    def __init__(self, config: TransformerConfig, *, numerics: Numerics, rngs: nnx.Rngs):
        dim, eps = config.dim, config.eps
        cross_attention = (
            WanI2VCrossAttention if config.model_type == "i2v" else WanT2VCrossAttention
        )
        self.self_attn = WanSelfAttention(dim, config.num_heads, eps, numerics=numerics, rngs=rngs)
        self.norm3 = WanLayerNorm(dim, eps, numerics=numerics)
        self.cross_attn = cross_attention(dim, config.num_heads, eps, numerics=numerics, rngs=rngs)
        self.ffn = Mlp((dim, config.ffn_dim, dim), gelu_tanh, numerics=numerics, rngs=rngs)
        self.modulation = nnx.Param(modulation_init(rngs, 6, dim, numerics))
        self.eps = eps
        self.dtype = numerics.compute

    def modulations(self, e0: Float[Array, "B steps 6 D"]) -> tuple[Modulation, Modulation]:
        """Of self-attention and of the feed-forward."""
        table = self.modulation[...].astype(jnp.float32)[None, None]
        rows = jnp.moveaxis(table + e0, 2, 0)[:, :, :, None]
        return Modulation(*rows[:3]), Modulation(*rows[3:])

    def __call__(
        self,
        x: FrameTokens,
        e0: Float[Array, "B steps 6 D"],
        context: CrossContext,
        rope: RopeTable,
        *,
        mask: BlockCausal | None = None,
        implementation: str | None = None,
    ) -> FrameTokens:
        """``x`` tokens by frame; the residual is float32 inside and rounded at the end."""
        return self.run(x, e0, context, rope, mask=mask, implementation=implementation)[0]

    def run(
        self,
        x: FrameTokens,
        e0: Float[Array, "B steps 6 D"],
        context: CrossContext,
        rope: RopeTable,
        *,
        mask: BlockCausal | None = None,
        implementation: str | None = None,
        earlier: Earlier | None = None,
    ) -> tuple[FrameTokens, KeyValues]:
        """The same behind ``earlier`` tokens; with the keys and values of self-attention."""
        batch, frames, patches, dim = x.shape
        flat = (batch, frames * patches, dim)
        attn, ffn = self.modulations(e0)

        h = mul_add_add(layer_norm(x, eps=self.eps), attn.scale, attn.shift)
        h, own = self.self_attn.attend(
            h.reshape(flat), rope, mask=mask, implementation=implementation, earlier=earlier
        )
        x = mul_add(x, h.reshape(x.shape), attn.gate)

        h = self.cross_attn(self.norm3(x).reshape(flat), context, implementation=implementation)
        x = x + h.reshape(x.shape).astype(jnp.float32)

        h = mul_add_add(layer_norm(x, eps=self.eps), ffn.scale, ffn.shift)
        x = mul_add(x, self.ffn(h), ffn.gate)
        return x.astype(self.dtype), own
