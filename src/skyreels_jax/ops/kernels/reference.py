"""The plain definition of attention, quadratic in memory: what the other paths are held against."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from skyreels_jax.ops.linear import exact_precision
from skyreels_jax.ops.masks import Mask


def reference_attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    *,
    mask: Mask | None,
    scale: float,
) -> Float[Array, "B L N K"]:
    """Scores, softmax and average as written in the textbook; scores and softmax in float32."""
    precision = exact_precision(query.dtype)
    scores = jnp.einsum(
        "BLNK,BSNK->BNLS", query, key, precision=precision, preferred_element_type=jnp.float32
    )
    scores = scores * scale
    if mask is not None:
        allowed = mask.as_array(query.shape[1], key.shape[1])
        scores = jnp.where(allowed[None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1).astype(value.dtype)
    out = jnp.einsum(
        "BNLS,BSNK->BLNK", weights, value, precision=precision, preferred_element_type=jnp.float32
    )
    return out.astype(query.dtype)
