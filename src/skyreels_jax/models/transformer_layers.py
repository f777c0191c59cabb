"""The layers of the transformer: embedders, the block and the head.

A block is two attentions and a feed-forward, modulated by the timestep of each frame.
"""

import math
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float

from skyreels_jax.models.layers import (
    XAVIER,
    ZEROS,
    Linear,
    Mlp,
    WanLayerNorm,
    gelu_exact,
    gelu_tanh,
    in_row_tiles,
    layer_norm,
    mul_add,
    mul_add_add,
)
from skyreels_jax.models.transformer_attention import (
    AttentionFunction,
    CrossContext,
    KeyValues,
    PastTokens,
    WanI2VCrossAttention,
    WanSelfAttention,
    WanT2VCrossAttention,
)
from skyreels_jax.models.transformer_config import Numerics, TransformerConfig
from skyreels_jax.ops.linear import linear
from skyreels_jax.ops.masks import Mask
from skyreels_jax.ops.positions import RopeTable

FrameTokens = Float[Array, "B F P D"]


class Modulation(NamedTuple):
    """What one sub-layer takes of the timestep, per frame: ``[B, F or 1, 1, D]`` each."""

    shift: Float[Array, "B steps 1 D"]
    scale: Float[Array, "B steps 1 D"]
    gate: Float[Array, "B steps 1 D"]


class _BlockOutput(NamedTuple):
    """A block's tokens, and their keys (un-rotated if those of the past are) and values."""

    tokens: FrameTokens
    key_values: KeyValues


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
        self.modulation = nnx.Param(_modulation_init(rngs, 6, dim, numerics))
        self.eps = eps
        self.dtype = numerics.compute

    def modulations(self, e0: Float[Array, "B steps 6 D"]) -> tuple[Modulation, Modulation]:
        """Modulations of self-attention and of the feed-forward."""
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
        mask: Mask | None = None,
        implementation: str | None = None,
        past: PastTokens | None = None,
        attend: AttentionFunction | None = None,
    ) -> _BlockOutput:
        """Run the block; the residual is float32 inside and rounded at the end.

        Args:
            x: tokens by frame ``[B, F, P, D]``.
            e0: projected time embedding of each frame, or of all (one step).
            context: this layer's keys and values of text and image.
            rope: angles of the tokens.
            mask: which tokens see each other; ``None`` for all.
            implementation: name of a path of :mod:`skyreels_jax.ops.attention`; ``None`` chooses.
            past: this layer's keys and values of earlier frames, seen by all of ``x``.
            attend: computes attention of ``x`` to itself; ``None`` is :func:`.attention`.
        """
        flat = (x.shape[0], x.shape[1] * x.shape[2], x.shape[3])
        how = {"implementation": implementation}
        attn, ffn = self.modulations(e0)

        h = mul_add_add(layer_norm(x, eps=self.eps), attn.scale, attn.shift)
        h = h.reshape(flat)
        kept = own = self.self_attn.key_values(h, rope)
        if past is not None and past.rope is not None:
            kept = self.self_attn.key_values(h, None)
        before = None if past is None else past.rotated()
        h = self.self_attn(h, rope, mask=mask, own=own, past=before, attend=attend, **how)
        x = mul_add(x, h.reshape(x.shape), attn.gate)

        h = self.cross_attn(self.norm3(x).reshape(flat), context, **how)
        x = x + h.reshape(x.shape).astype(jnp.float32)

        h = mul_add_add(layer_norm(x, eps=self.eps), ffn.scale, ffn.shift)
        x = mul_add(x, in_row_tiles(self.ffn, h), ffn.gate)
        return _BlockOutput(x.astype(self.dtype), kept)


class PatchEmbedding(nnx.Module):
    """A convolution whose stride is its kernel: each patch times one matrix."""

    def __init__(self, config: TransformerConfig, *, numerics: Numerics, rngs: nnx.Rngs):
        self.patch_size = config.patch_size
        # Initialised as the matrix it is, not as a convolution with a receptive field.
        flat = (math.prod(config.patch_size) * config.in_dim, config.dim)
        kernel = XAVIER(rngs.params(), flat, numerics.params)
        self.kernel = nnx.Param(kernel.reshape(*config.patch_size, config.in_dim, config.dim))
        self.bias = nnx.Param(jnp.zeros((config.dim,), numerics.params))
        self.dtype = numerics.compute

    def __call__(self, patches: Float[Array, "*batch values"]) -> Float[Array, "*batch D"]:
        """A token of each of :meth:`patches`."""
        kernel = self.kernel[...].reshape(-1, self.kernel.shape[-1])
        return linear(patches, kernel, self.bias[...], dtype=self.dtype)

    def patches(self, x: Float[Array, "B C F H W"]) -> Float[Array, "B F rows columns values"]:
        """The values of each patch, the condition within: rows, columns, channels in this order."""
        batch, channels, frames, height, width = x.shape
        _, p, q = self.patch_size
        x = x.reshape(batch, channels, frames, height // p, p, width // q, q)
        patches = x.transpose(0, 2, 3, 5, 4, 6, 1)  # [B, F, H', W', p, q, C]
        return patches.reshape(*patches.shape[:4], p * q * channels)


class ImageEmbedding(nnx.Module):
    """Image encoder states to context tokens of the model's width; float32 out."""

    # torch's default, where every other norm of the model has config.eps.
    EPS: Final = 1e-5

    def __init__(self, config: TransformerConfig, *, numerics: Numerics, rngs: nnx.Rngs):
        assert config.image_dim is not None
        width = config.image_dim
        if config.pos_embed_seq_len is not None:
            shape = (config.pos_embed_seq_len, width)
            self.pos_embed = nnx.Param(jnp.zeros(shape, numerics.params))
        else:
            self.pos_embed = None
        self.norm1 = WanLayerNorm(width, self.EPS, numerics=numerics)
        self.fc1 = Linear(width, width, numerics=numerics, rngs=rngs)
        self.fc2 = Linear(width, config.dim, numerics=numerics, rngs=rngs)
        self.norm2 = WanLayerNorm(config.dim, self.EPS, numerics=numerics)

    def __call__(self, image: Float[Array, "B I image_dim"]) -> Float[Array, "B I D"]:
        """All tokens of the penultimate layer of the image encoder to context tokens."""
        image = image.astype(jnp.float32)
        if self.pos_embed is not None:
            image = image + self.pos_embed[...].astype(jnp.float32)[None]
        return self.norm2(self.fc2(gelu_exact(self.fc1(self.norm1(image)))))


class Head(nnx.Module):
    """Modulated norm and the projection to patches, in float32."""

    def __init__(self, config: TransformerConfig, *, numerics: Numerics, rngs: nnx.Rngs):
        self.modulation = nnx.Param(_modulation_init(rngs, 2, config.dim, numerics))
        self.linear = Linear(
            config.dim,
            config.out_dim * math.prod(config.patch_size),
            numerics=numerics.in_float32(),
            rngs=rngs,
            init=ZEROS,
        )
        self.eps = config.eps

    @jax.named_scope("head")
    def __call__(
        self, x: Float[Array, "B F P D"], e: Float[Array, "B steps D"]
    ) -> Float[Array, "B F P patch"]:
        """``x`` tokens by frame; ``e`` time embedding of each frame, or of all (one step)."""
        table = self.modulation[...].astype(jnp.float32)[None, None]
        shift, scale = jnp.moveaxis(table + e[:, :, None], 2, 0)[:, :, :, None]
        return self.linear(mul_add_add(layer_norm(x, eps=self.eps), scale, shift))


def _modulation_init(rngs: nnx.Rngs, rows: int, dim: int, numerics: Numerics) -> Array:
    """``N(0, 1) / sqrt(dim)``."""
    return nnx.initializers.normal(dim**-0.5)(rngs.params(), (rows, dim), numerics.params)
