"""The UMT5 text encoder: T5 without its decoder, with a position bias of its own in every layer."""

from dataclasses import dataclass
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int

from skyreels_jax.models.layers import (
    ARE_WHOLE,
    NORMAL,
    Embedding,
    Linear,
    PutTogether,
    WanRMSNorm,
    gelu_tanh,
    scan_layers,
)
from skyreels_jax.models.transformer_config import Numerics
from skyreels_jax.ops.linear import exact_precision

# The relative position buckets of every published mT5 and UMT5.
BUCKETS: Final = 32
MAX_DISTANCE: Final = 128

_States = Float[Array, "B S D"]
_Heads = Float[Array, "B S N K"]


@dataclass(frozen=True, kw_only=True)
class Umt5Config:
    """The shape of one UMT5 encoder; :data:`UMT5_XXL` is the one of all released checkpoints.

    Attributes:
        vocab_size: rows of the embedding table (more than the tokenizer's ids).
        dim: width of the states.
        head_dim: width of a head; ``num_heads * head_dim`` need not be ``dim``.
        num_heads: heads of attention.
        ffn_dim: width inside the gated feed-forward.
        num_layers: blocks.
        eps: of the RMS norms.
    """

    vocab_size: int
    dim: int
    head_dim: int
    num_heads: int
    ffn_dim: int
    num_layers: int
    eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.dim, self.head_dim, self.num_heads, self.ffn_dim)
        if min(*sizes, self.num_layers) < 1:
            raise ValueError(f"{self}: every size must be at least 1")

    @property
    def attention_dim(self) -> int:
        """Width of queries, keys and values over all heads."""
        return self.num_heads * self.head_dim


UMT5_XXL: Final = Umt5Config(
    vocab_size=256_384, dim=4096, head_dim=64, num_heads=64, ffn_dim=10_240, num_layers=24
)


def position_buckets(distance: Int[np.ndarray, "*shape"]) -> Int[np.ndarray, "*shape"]:
    """The row of the bias table for each ``key index - query index``.

    Rows 16 to 31 are for keys after the query. Of each half the first 8 are distances 0 to 7, the
    other 8 grow with the logarithm up to 128, beyond which all are one (Raffel et al. 2020, 2.1).
    """
    half = BUCKETS // 2
    exact = half // 2
    far = np.maximum(np.abs(distance), exact)
    # Base 2 is exact at powers of two, where a bucket begins.
    growth = np.log2(far / exact) / np.log2(MAX_DISTANCE / exact)
    row = np.where(
        np.abs(distance) < exact,
        np.abs(distance),
        np.minimum(exact + np.floor(growth * (half - exact)).astype(np.int64), half - 1),
    )
    return np.where(distance > 0, half, 0) + row


def _projection(
    in_features: int, out_features: int, *, numerics: Numerics, rngs: nnx.Rngs
) -> Linear:
    """``x @ kernel`` with ``kernel [in, out]`` and no bias, in the compute dtype."""
    return Linear(
        in_features, out_features, numerics=numerics, rngs=rngs, init=NORMAL, use_bias=False
    )


class _PositionBias(nnx.Module):
    """What a layer adds to its scores for the distance between two tokens, per head."""

    def __init__(self, num_heads: int, *, numerics: Numerics, rngs: nnx.Rngs):
        shape = (BUCKETS, num_heads)
        self.embedding = nnx.Param(NORMAL(rngs.params(), shape, numerics.params))

    def __call__(self, length: int) -> Float[Array, "N S S"]:
        """Bias of every query (rows) and key (columns) of ``length`` tokens, float32.

        The bias depends on the distance alone: each query's row is a window of one line, which is
        faster than looking up every pair.
        """
        table = self.embedding[...].astype(jnp.float32).T
        line = table[:, position_buckets(np.arange(1 - length, length))]

        def row(query: Int[Array, ""]) -> Float[Array, "N S"]:
            return jax.lax.dynamic_slice_in_dim(line, length - 1 - query, length, axis=1)

        return jax.vmap(row, out_axes=1)(jnp.arange(length))


class _Umt5Attention(nnx.Module):
    """Attention with a position bias and no scaling of the scores; softmax in float32."""

    def __init__(self, config: Umt5Config, *, numerics: Numerics, rngs: nnx.Rngs):
        outer, inner = config.dim, config.attention_dim
        self.q = _projection(outer, inner, numerics=numerics, rngs=rngs)
        self.k = _projection(outer, inner, numerics=numerics, rngs=rngs)
        self.v = _projection(outer, inner, numerics=numerics, rngs=rngs)
        self.o = _projection(inner, outer, numerics=numerics, rngs=rngs)
        self.num_heads = config.num_heads
        self.dtype = numerics.compute

    @jax.named_scope("attention")
    def __call__(
        self, x: _States, bias: Float[Array, "N S S"], mask: Bool[Array, "B S"]
    ) -> _States:
        """``x`` normalised; ``mask`` is False for keys that must not be attended."""
        query, key, value = (
            part(x).reshape(*x.shape[:2], self.num_heads, -1) for part in (self.q, self.k, self.v)
        )
        precision = exact_precision(self.dtype)
        scores = jnp.einsum(
            "BQNK,BSNK->BNQS",
            *(query, key),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        scores = jnp.where(mask[:, None, None, :], scores + bias[None], jnp.finfo(jnp.float32).min)
        weights = jax.nn.softmax(scores, axis=-1).astype(self.dtype)
        heads = jnp.einsum(
            "BNQS,BSNK->BQNK",
            *(weights, value),
            precision=precision,
            preferred_element_type=jnp.float32,
        )
        return self.o(heads.reshape(*x.shape[:2], -1))


class _Umt5FeedForward(nnx.Module):
    """``fc2(gelu(gate(x)) * fc1(x))``."""

    def __init__(self, config: Umt5Config, *, numerics: Numerics, rngs: nnx.Rngs):
        self.gate = _projection(config.dim, config.ffn_dim, numerics=numerics, rngs=rngs)
        self.fc1 = _projection(config.dim, config.ffn_dim, numerics=numerics, rngs=rngs)
        self.fc2 = _projection(config.ffn_dim, config.dim, numerics=numerics, rngs=rngs)

    @jax.named_scope("feed_forward")
    def __call__(self, x: _States) -> _States:
        """``x`` normalised; the product of the two branches is float32."""
        return self.fc2(gelu_tanh(self.gate(x)) * self.fc1(x).astype(jnp.float32))


class _Umt5Block(nnx.Module):
    """Attention and feed-forward, each normalised before and added after, in float32."""

    def __init__(self, config: Umt5Config, *, numerics: Numerics, rngs: nnx.Rngs):
        self.norm1 = WanRMSNorm(config.dim, config.eps, numerics=numerics)
        self.attn = _Umt5Attention(config, numerics=numerics, rngs=rngs)
        self.pos_embedding = _PositionBias(config.num_heads, numerics=numerics, rngs=rngs)
        self.norm2 = WanRMSNorm(config.dim, config.eps, numerics=numerics)
        self.ffn = _Umt5FeedForward(config, numerics=numerics, rngs=rngs)

    def __call__(self, x: _States, mask: Bool[Array, "B S"]) -> _States:
        """``x`` is the residual, float32 in and out."""
        bias = self.pos_embedding(x.shape[1])
        x = x + self.attn(self.norm1(x), bias, mask).astype(jnp.float32)
        return x + self.ffn(self.norm2(x)).astype(jnp.float32)


class Umt5Encoder(nnx.Module):
    """Token ids to text states.

    Matrix products are in ``dtype``; norms, softmax, position bias and the residual are float32.
    The blocks' parameters are stacked along a leading layer axis and run by ``scan_layers``.

    Attributes:
        parts: how they become whole, where devices have parts; whoever runs it may set another.
    """

    parts: PutTogether = ARE_WHOLE

    def __init__(
        self,
        config: Umt5Config,
        *,
        rngs: nnx.Rngs,
        dtype: DTypeLike = jnp.bfloat16,
        param_dtype: DTypeLike = jnp.bfloat16,
        kernel_dtype: DTypeLike | None = None,
    ):
        in_blocks = Numerics(dtype, param_dtype, kernel_dtype)
        numerics = in_blocks.unquantized()
        self.config = config
        self.token_embedding = Embedding(
            config.vocab_size, config.dim, numerics=numerics, rngs=rngs
        )

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap
        def stack(rngs: nnx.Rngs) -> _Umt5Block:
            return _Umt5Block(config, numerics=in_blocks, rngs=rngs)

        self.blocks = stack(rngs)
        self.norm = WanRMSNorm(config.dim, config.eps, numerics=numerics)

    def __call__(self, ids: Int[Array, "B S"], mask: Bool[Array, "B S"]) -> _States:
        """_States of all tokens, float32; rows where ``mask`` is False are exactly zero.

        Padding is never attended and distances are relative, so a prompt's states do not depend on
        how far it is padded.
        """
        graph, parameters = nnx.split(self.blocks)

        def layer(x: Array, of_layer: nnx.State, mask: Array) -> tuple[Array, None]:
            return nnx.merge(graph, self.parts.layer(of_layer))(x, mask), None

        x = self.parts.features(self.token_embedding(ids.reshape(-1)))
        x = x.reshape(*ids.shape, -1).astype(jnp.float32)
        x, _ = scan_layers(layer, x, parameters, mask)
        return jnp.where(mask[:, :, None], self.norm(x), 0)
