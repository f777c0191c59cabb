"""The parts of the transformer: linears, norms, attentions, embedders and the head.

Every part takes a :class:`Numerics` and follows one rule: what enters a matrix product is rounded
to ``numerics.compute``, everything else happens in float32. Parameter names are the original's,
with its numbered ``Sequential`` entries named ``fc1`` and ``fc2``.
"""

import math
from collections.abc import Callable
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from skyreels_jax.models.transformer_config import Numerics, TransformerConfig
from skyreels_jax.ops.attention import Earlier, attention
from skyreels_jax.ops.linear import linear
from skyreels_jax.ops.masks import BlockCausal
from skyreels_jax.ops.norms import layer_norm, mul_add_add, rms_norm
from skyreels_jax.ops.positions import RopeTable, rope_apply
from skyreels_jax.shapes import Context, Tokens

Initializer = nnx.Initializer
Heads = Float[Array, "B L N K"]

XAVIER: Final = nnx.initializers.xavier_uniform()
NORMAL: Final = nnx.initializers.normal(0.02)
ZEROS: Final = nnx.initializers.zeros_init()


def silu(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """``x * sigmoid(x)`` in float32."""
    return jax.nn.silu(x.astype(jnp.float32))


def gelu_tanh(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """GELU by its tanh approximation, in float32: text embedder and feed-forwards."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True)


def gelu_exact(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """GELU by the error function, in float32: the image embedder."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False)


class Linear(nnx.Module):
    """``x @ kernel + bias`` with ``kernel [in, out]``; the result is in the compute dtype."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        numerics: Numerics,
        rngs: nnx.Rngs,
        init: Initializer = XAVIER,
    ):
        shape = (in_features, out_features)
        self.kernel = nnx.Param(init(rngs.params(), shape, numerics.params))
        self.bias = nnx.Param(jnp.zeros((out_features,), numerics.params))
        self.dtype = numerics.compute

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """Along the last axis of ``x``."""
        return linear(x, self.kernel[...], self.bias[...], dtype=self.dtype)


class Mlp(nnx.Module):
    """Two linears with an activation between them; ``init`` is that of both kernels."""

    def __init__(
        self,
        widths: tuple[int, int, int],
        activation: Callable[[Array], Array],
        *,
        numerics: Numerics,
        rngs: nnx.Rngs,
        init: tuple[Initializer, Initializer] = (XAVIER, XAVIER),
    ):
        first, hidden, last = widths
        self.fc1 = Linear(first, hidden, numerics=numerics, rngs=rngs, init=init[0])
        self.fc2 = Linear(hidden, last, numerics=numerics, rngs=rngs, init=init[1])
        self.activation = activation

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """Along the last axis of ``x``; the activation is computed in float32."""
        return self.fc2(self.activation(self.fc1(x)))


class WanRMSNorm(nnx.Module):
    """RMS norm over the last axis with a scale; float32 out."""

    def __init__(self, dim: int, eps: float = 1e-5, *, numerics: Numerics):
        self.scale = nnx.Param(jnp.ones((dim,), numerics.params))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Along the last axis of ``x``."""
        return rms_norm(x, self.scale[...], self.eps)


class WanLayerNorm(nnx.Module):
    """Layer norm over the last axis with scale and bias; float32 out.

    The norms before modulation have no parameters: they are ``ops.norms.layer_norm``.
    """

    def __init__(self, dim: int, eps: float = 1e-6, *, numerics: Numerics):
        self.scale = nnx.Param(jnp.ones((dim,), numerics.params))
        self.bias = nnx.Param(jnp.zeros((dim,), numerics.params))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Along the last axis of ``x``."""
        return layer_norm(x, self.scale[...], self.bias[...], eps=self.eps)


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
    which :func:`attend_text` meets with a one.
    """
    width = states.key.shape[-1]
    share = jnp.zeros((*states.key.shape[:-1], 1), states.key.dtype)
    share = share.at[..., -1, :, :].set(math.log(count) * width**0.5)
    return KeyValues(jnp.concatenate([states.key, share], axis=-1), states.value)


def attend_text(query: Heads, text: KeyValues, implementation: str | None) -> Heads:
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

    def split(self, x: Context) -> Heads:
        return x.reshape(*x.shape[:2], self.num_heads, -1)

    def keys_values(self, key: Heads, value: Heads) -> KeyValues:
        return KeyValues(key.astype(self.dtype), value.astype(self.dtype))

    def merge(self, heads: Heads) -> Tokens:
        return self.o(heads.reshape(*heads.shape[:2], -1))


class WanSelfAttention(_Projections):
    """All video tokens attend to each other, or to those a mask allows, with rotary positions."""

    def __call__(
        self,
        x: Tokens,
        rope: RopeTable,
        *,
        mask: BlockCausal | None = None,
        implementation: str | None = None,
    ) -> Tokens:
        """``x`` [B, L, D], modulated; ``implementation`` names a path of ``ops.attention``."""
        return self.attend(x, rope, mask=mask, implementation=implementation)[0]

    @jax.named_scope("self_attention")
    def attend(
        self,
        x: Tokens,
        rope: RopeTable,
        *,
        mask: BlockCausal | None = None,
        implementation: str | None = None,
        earlier: Earlier | None = None,
    ) -> tuple[Tokens, KeyValues]:
        """The same, to ``earlier`` tokens too; with the keys and values of ``x``."""
        query = rope_apply(self.split(self.norm_q(self.q(x))), rope).astype(self.dtype)
        key = rope_apply(self.split(self.norm_k(self.k(x))), rope)
        own = self.keys_values(key, self.split(self.v(x)))
        heads = attention(query, *own, mask=mask, earlier=earlier, implementation=implementation)
        return self.merge(heads), own


class WanT2VCrossAttention(_Projections):
    """Video tokens attend to all text tokens: the padding too, since the models learned with it."""

    def prepare(self, text: Context, image: Float[Array, "B I D"] | None = None) -> CrossContext:
        """Keys and values of ``text`` [B, S, D]; there is no ``image`` to attend to."""
        assert image is None
        key = self.split(self.norm_k(self.k(text)))
        return CrossContext(self.keys_values(key, self.split(self.v(text))), None)

    @jax.named_scope("cross_attention")
    def __call__(
        self, x: Tokens, context: CrossContext, *, implementation: str | None = None
    ) -> Tokens:
        """``x`` [B, L, D], normalised; ``context`` is one layer's."""
        query = self.split(self.norm_q(self.q(x))).astype(self.dtype)
        return self.merge(attend_text(query, context.text, implementation))


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
            self.keys_values(key, self.split(self.v(text))),
            self.keys_values(image_key, self.split(self.v_img(image))),
        )

    @jax.named_scope("cross_attention")
    def __call__(
        self, x: Tokens, context: CrossContext, *, implementation: str | None = None
    ) -> Tokens:
        """``x`` [B, L, D], normalised; ``context`` is one layer's."""
        assert context.image is not None
        query = self.split(self.norm_q(self.q(x))).astype(self.dtype)
        text = attend_text(query, context.text, implementation)
        image = attention(query, *context.image, implementation=implementation)
        return self.merge(text.astype(jnp.float32) + image.astype(jnp.float32))


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


class Embedding(nnx.Module):
    """A row of a table for each id; ids past the table give NaN rather than another row."""

    def __init__(self, rows: int, dim: int, *, numerics: Numerics, rngs: nnx.Rngs):
        self.embedding = nnx.Param(NORMAL(rngs.params(), (rows, dim), numerics.params))

    def __call__(self, ids: Int[Array, " B"]) -> Float[Array, "B D"]:
        """Rows of the table, as stored."""
        return (
            self.embedding[...]
            .at[ids]
            .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        )


class Head(nnx.Module):
    """Modulated norm and the projection to patches, in float32."""

    def __init__(self, config: TransformerConfig, *, numerics: Numerics, rngs: nnx.Rngs):
        self.modulation = nnx.Param(modulation_init(rngs, 2, config.dim, numerics))
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


def modulation_init(rngs: nnx.Rngs, rows: int, dim: int, numerics: Numerics) -> Array:
    """``N(0, 1) / sqrt(dim)``."""
    return nnx.initializers.normal(dim**-0.5)(rngs.params(), (rows, dim), numerics.params)
