"""The plain definition of attention, quadratic in memory: what the other paths are held against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from skyreels_jax.ops.kernels.contract import Earlier
from skyreels_jax.ops.linear import exact_precision
from skyreels_jax.ops.masks import Mask


def reference_attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N V"],
    *,
    mask: Mask | None,
    scale: float,
) -> Float[Array, "B L N V"]:
    """Scores, softmax and average as written in the textbook; scores and softmax in float32."""
    allowed = None if mask is None else jnp.asarray(mask.as_array(query.shape[1], key.shape[1]))
    return _textbook(query, key, value, allowed, scale)


def reference_attention_after(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B L N K"],
    value: Float[Array, "B L N K"],
    *,
    earlier: Earlier,
    mask: Mask | None,
    scale: float,
) -> Float[Array, "B L N K"]:
    """The same over the filled places of ``earlier`` and the call's own keys."""
    places, own = earlier.key.shape[1], (query.shape[1], key.shape[1])
    filled = jnp.broadcast_to(jnp.arange(places) < earlier.count, (own[0], places))
    seen = jnp.ones(own, bool) if mask is None else jnp.asarray(mask.as_array(*own))
    keys = jnp.concatenate([earlier.key, key], axis=1)
    values = jnp.concatenate([earlier.value, value], axis=1)
    return _textbook(query, keys, values, jnp.concatenate([filled, seen], axis=1), scale)


def _textbook(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N V"],
    allowed: Bool[Array, "L S"] | None,
    scale: float,
) -> Float[Array, "B L N V"]:
    precision = exact_precision(query.dtype)
    scores = jnp.einsum(
        "BLNK,BSNK->BNLS", query, key, precision=precision, preferred_element_type=jnp.float32
    )
    scores = scores * scale
    if allowed is not None:
        scores = jnp.where(allowed[None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum(
        "BNLS,BSNK->BLNK", weights, value, precision=precision, preferred_element_type=jnp.float32
    )
    return out.astype(query.dtype)
