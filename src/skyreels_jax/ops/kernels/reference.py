"""The plain definition of attention, quadratic in memory: what the other paths are held against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from skyreels_jax.ops.kernels.contract import PastKeyValues
from skyreels_jax.ops.linear import exact_precision
from skyreels_jax.ops.masks import Mask


def reference_attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N V"],
    *,
    mask: Mask | None,
    scale: float,
    past: PastKeyValues | None = None,
) -> Float[Array, "B L N V"]:
    """Scores, softmax and average as written in the textbook; scores and softmax in float32."""
    own = (query.shape[1], key.shape[1])
    allowed = None if mask is None else jnp.asarray(mask.as_array(*own))
    if past is not None:
        filled = jnp.arange(past.key.shape[1]) < past.length
        filled = jnp.broadcast_to(filled, (own[0], len(filled)))
        seen = jnp.ones(own, bool) if allowed is None else allowed
        allowed = jnp.concatenate([filled, seen], axis=1)
        key = jnp.concatenate([past.key, key], axis=1)
        value = jnp.concatenate([past.value, value], axis=1)
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
