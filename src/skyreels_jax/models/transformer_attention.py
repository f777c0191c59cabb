"""The attentions of the transformer's blocks: video tokens to each other, and to text and image."""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from skyreels_jax.models.layers import Linear, WanRMSNorm
from skyreels_jax.models.transformer_config import Numerics
from skyreels_jax.ops.attention import PastKeyValues, attention
from skyreels_jax.ops.masks import Mask
from skyreels_jax.ops.positions import RopeTable, rope_apply
from skyreels_jax.shapes import Context, Tokens

_Heads = Float[Array, "B L N K"]
# Takes what :func:`skyreels_jax.ops.attention.attention` does.
AttentionFunction = Callable[..., _Heads]


class KeyValues(NamedTuple):
    """Keys (already normalised) and values of one attention, in the compute dtype."""

    key: Float[Array, "*layers B S N K"]
    value: Float[Array, "*layers B S N K"]


class FrameKeyValues(NamedTuple):
    """The same by frame, as they are kept over a run, stacked over the layers."""

    key: Float[Array, "*layers B F P N K"]
    value: Float[Array, "*layers B F P N K"]


class PastFrames(NamedTuple):
    """Keys and values of the frames before those of a call; the first ``count`` slots are filled.

    They are stacked over the layers along a leading axis. ``first`` is the position of the call's
    first frame, where that is not ``count``. With ``places`` the keys are un-rotated (and so are
    those that the call gives): the frame of a slot has the position that stands there for it.
    """

    key: Float[Array, "layers B slots P N K"]
    value: Float[Array, "layers B slots P N K"]
    count: Int[Array, ""]
    first: Int[Array, ""] | None = None
    places: Int[Array, " slots"] | None = None


class PastTokens(NamedTuple):
    """One layer's past token by token; ``rope`` has the angles of keys that are un-rotated yet."""

    states: PastKeyValues
    rope: RopeTable | None = None

    def rotated(self) -> PastKeyValues:
        """Keys as queries meet them."""
        key = self.states.key
        if self.rope is None:
            return self.states
        return self.states._replace(key=rope_apply(key, self.rope).astype(key.dtype))


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
    def key_values(self, x: Tokens, rope: RopeTable | None) -> KeyValues:
        """Keys and values of ``x`` [B, L, D]: what its tokens, and later ones, attend to.

        Without ``rope`` the keys are un-rotated.
        """
        key = self.split(self.norm_k(self.k(x)))
        key = key if rope is None else rope_apply(key, rope)
        return self.in_compute_dtype(key, self.split(self.v(x)))

    @jax.named_scope("self_attention")
    def __call__(
        self,
        x: Tokens,
        rope: RopeTable,
        *,
        mask: Mask | None = None,
        implementation: str | None = None,
        own: KeyValues | None = None,
        past: PastKeyValues | None = None,
        attend: AttentionFunction | None = None,
    ) -> Tokens:
        """Attend from ``x`` to itself, and to ``past`` where there is one.

        Args:
            x: modulated tokens ``[B, L, D]``.
            rope: angles of the tokens.
            mask: which tokens of ``x`` see each other; ``None`` for all.
            implementation: name of a path of :mod:`skyreels_jax.ops.attention`; ``None`` chooses.
            own: :meth:`key_values` of ``x``, where they were computed before.
            past: keys and values of earlier tokens, seen by all of ``x``.
            attend: computes attention; ``None`` is :func:`.attention`.
        """
        query = rope_apply(self.split(self.norm_q(self.q(x))), rope).astype(self.dtype)
        own = self.key_values(x, rope) if own is None else own
        heads = (attend or attention)(
            query, *own, mask=mask, past=past, implementation=implementation
        )
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
