"""The layers of the transformer: attentions, embedders, the block and the head.

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
    WanRMSNorm,
    gelu_exact,
    gelu_tanh,
    in_row_tiles,
    layer_norm,
    mul_add,
    mul_add_add,
)
from skyreels_jax.models.transformer_config import Numerics, TransformerConfig
from skyreels_jax.ops.attention import PastKeyValues, attention
from skyreels_jax.ops.linear import linear
from skyreels_jax.ops.masks import BlockCausal
from skyreels_jax.ops.positions import RopeTable, rope_apply
from skyreels_jax.shapes import Context, Tokens

_Heads = Float[Array, "B L N K"]
FrameTokens = Float[Array, "B F P D"]


class KeyValues(NamedTuple):
    """Keys (already normalised) and values of one attention, in the compute dtype."""

    key: Float[Array, "*layers B S N K"]
    value: Float[Array, "*layers B S N K"]


class CrossContext(NamedTuple):
    """What cross-attention needs of a prompt and an image, computed once and used at every step.

    Both are stacked over layers along a leading axis; ``image`` is ``None`` for t2v models.
    """

    text: KeyValues
    image: KeyValues | None


def last_counts(states: KeyValues, count: int) -> KeyValues:
    """``states`` of which the last token stands for ``count`` tokens alike.

    Its score must grow by ``log(count)``: keys get a feature with that over the scale of scores,
    which :func:`_attend_text` meets with a one.
    """
    width = states.key.shape[-1]
    share = jnp.zeros((*states.key.shape[:-1], 1), states.key.dtype)
    share = share.at[..., -1, :, :].set(math.log(count) * width**0.5)
    return KeyValues(jnp.concatenate([states.key, share], axis=-1), states.value)


def _attend_text(query: _Heads, text: KeyValues, implementation: str | None) -> _Heads:
    """Attention to text states, whose last may stand for many (:func:`last_counts`)."""
    width = query.shape[-1]
    if text.key.shape[-1] == width:
        return attention(query, *text, implementation=implementation)
    query = jnp.concatenate([query, jnp.ones((*query.shape[:-1], 1), query.dtype)], axis=-1)
    # Few keys, wider than their values: no kernel is made for that, and none is needed.
    return attention(query, *text, scale=width**-0.5, implementation="xla")


class _Projections(nnx.Module):
    """The four linears and two norms that every attention here has.

    Queries and keys are normalised over the full width, before it is split into heads.
    """

    def __init__(
        self, dim: int, num_heads: int, eps: float = 1e-6, *, numerics: Numerics, rngs: nnx.Rngs
    ):
        self.q = Linear(dim, dim, numerics=numerics, rngs=rngs)
        self.k = Linear(dim, dim, numerics=numerics, rngs=rngs)
        self.v = Linear(dim, dim, numerics=numerics, rngs=rngs)
        self.o = Linear(dim, dim, numerics=numerics, rngs=rngs)
        self.norm_q = WanRMSNorm(dim, eps, numerics=numerics)
        self.norm_k = WanRMSNorm(dim, eps, numerics=numerics)
        self.num_heads = num_heads
        self.dtype = numerics.compute

    def split(self, x: Context) -> _Heads:
        return x.reshape(*x.shape[:2], self.num_heads, -1)

    def in_compute_dtype(self, key: _Heads, value: _Heads) -> KeyValues:
        return KeyValues(key.astype(self.dtype), value.astype(self.dtype))

    def merge(self, heads: _Heads) -> Tokens:
        return self.o(heads.reshape(*heads.shape[:2], -1))


class WanSelfAttention(_Projections):
    """All video tokens attend to each other, or to those a mask allows, with rotary positions."""

    @jax.named_scope("self_attention")
    def key_values(self, x: Tokens, rope: RopeTable) -> KeyValues:
        """Keys and values of ``x`` [B, L, D]: what its tokens, and later ones, attend to."""
        key = rope_apply(self.split(self.norm_k(self.k(x))), rope)
        return self.in_compute_dtype(key, self.split(self.v(x)))

    @jax.named_scope("self_attention")
    def __call__(
        self,
        x: Tokens,
        rope: RopeTable,
        *,
        mask: BlockCausal | None = None,
        implementation: str | None = None,
        own: KeyValues | None = None,
        past: PastKeyValues | None = None,
    ) -> Tokens:
        """Attend from ``x`` to itself, and to ``past`` where there is one.

        Args:
            x: modulated tokens ``[B, L, D]``.
            rope: angles of the tokens.
            mask: which tokens of ``x`` see each other; ``None`` for all.
            implementation: name of a path of :mod:`skyreels_jax.ops.attention`; ``None`` chooses.
            own: :meth:`key_values` of ``x``, where they were computed before.
            past: keys and values of earlier tokens, seen by all of ``x``.
        """
        query = rope_apply(self.split(self.norm_q(self.q(x))), rope).astype(self.dtype)
        own = self.key_values(x, rope) if own is None else own
        heads = attention(query, *own, mask=mask, past=past, implementation=implementation)
        return self.merge(heads)


class WanT2VCrossAttention(_Projections):
    """Video tokens attend to all text tokens: the padding too, since the models learned with it."""

    def prepare(self, text: Context, image: Float[Array, "B I D"] | None = None) -> CrossContext:
        """Keys and values of ``text`` [B, S, D]; there is no ``image`` to attend to."""
        assert image is None
        key = self.split(self.norm_k(self.k(text)))
        return CrossContext(self.in_compute_dtype(key, self.split(self.v(text))), None)

    @jax.named_scope("cross_attention")
    def __call__(
        self, x: Tokens, context: CrossContext, *, implementation: str | None = None
    ) -> Tokens:
        """``x`` [B, L, D], normalised; ``context`` is one layer's."""
        query = self.split(self.norm_q(self.q(x))).astype(self.dtype)
        return self.merge(_attend_text(query, context.text, implementation))


class WanI2VCrossAttention(_Projections):
    """Two attentions with the same queries, to text and to image tokens, summed."""

    def __init__(
        self, dim: int, num_heads: int, eps: float = 1e-6, *, numerics: Numerics, rngs: nnx.Rngs
    ):
        super().__init__(dim, num_heads, eps, numerics=numerics, rngs=rngs)
        self.k_img = Linear(dim, dim, numerics=numerics, rngs=rngs)
        self.v_img = Linear(dim, dim, numerics=numerics, rngs=rngs)
        self.norm_k_img = WanRMSNorm(dim, eps, numerics=numerics)

    def prepare(self, text: Context, image: Float[Array, "B I D"] | None) -> CrossContext:
        """Keys and values of ``text`` [B, S, D] and of ``image`` [B, I, D]."""
        assert image is not None
        key = self.split(self.norm_k(self.k(text)))
        image_key = self.split(self.norm_k_img(self.k_img(image)))
        return CrossContext(
            self.in_compute_dtype(key, self.split(self.v(text))),
            self.in_compute_dtype(image_key, self.split(self.v_img(image))),
        )

    @jax.named_scope("cross_attention")
    def __call__(
        self, x: Tokens, context: CrossContext, *, implementation: str | None = None
    ) -> Tokens:
        """``x`` [B, L, D], normalised; ``context`` is one layer's."""
        assert context.image is not None
        query = self.split(self.norm_q(self.q(x))).astype(self.dtype)
        text = _attend_text(query, context.text, implementation)
        image = attention(query, *context.image, implementation=implementation)
        return self.merge(text.astype(jnp.float32) + image.astype(jnp.float32))


class Modulation(NamedTuple):
    """What one sub-layer takes of the timestep, per frame: ``[B, F or 1, 1, D]`` each."""

    shift: Float[Array, "B steps 1 D"]
    scale: Float[Array, "B steps 1 D"]
    gate: Float[Array, "B steps 1 D"]


class _BlockOutput(NamedTuple):
    """A block's tokens, and the keys and values of its self-attention."""

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
        mask: BlockCausal | None = None,
        implementation: str | None = None,
        past: PastKeyValues | None = None,
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
        """
        batch, frames, patches, dim = x.shape
        flat = (batch, frames * patches, dim)
        attn, ffn = self.modulations(e0)

        h = mul_add_add(layer_norm(x, eps=self.eps), attn.scale, attn.shift)
        h = h.reshape(flat)
        own = self.self_attn.key_values(h, rope)
        h = self.self_attn(h, rope, mask=mask, implementation=implementation, own=own, past=past)
        x = mul_add(x, h.reshape(x.shape), attn.gate)

        h = self.cross_attn(self.norm3(x).reshape(flat), context, implementation=implementation)
        x = x + h.reshape(x.shape).astype(jnp.float32)

        h = mul_add_add(layer_norm(x, eps=self.eps), ffn.scale, ffn.shift)
        x = mul_add(x, in_row_tiles(self.ffn, h), ffn.gate)
        return _BlockOutput(x.astype(self.dtype), own)


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

    def __call__(self, x: Float[Array, "B C F H W"]) -> Float[Array, "B F rows columns D"]:
        """Latents (and image condition) to one token a patch."""
        batch, channels, frames, height, width = x.shape
        _, p, q = self.patch_size
        x = x.reshape(batch, channels, frames, height // p, p, width // q, q)
        patches = x.transpose(0, 2, 3, 5, 4, 6, 1)  # [B, F, H', W', p, q, C]
        patches = patches.reshape(*patches.shape[:4], p * q * channels)
        kernel = self.kernel[...]
        return linear(
            patches, kernel.reshape(-1, kernel.shape[-1]), self.bias[...], dtype=self.dtype
        )


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
