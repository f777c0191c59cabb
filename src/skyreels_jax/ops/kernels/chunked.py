"""Attention in tiles with a running softmax: memory linear in the number of tokens, any device.

The recurrence is that of Rabe and Staats, https://arxiv.org/abs/2112.05682, and of FlashAttention.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from skyreels_jax.ops.linear import exact_precision
from skyreels_jax.ops.masks import Mask

QUERY_CHUNK = 512
KEY_CHUNK = 1024


class Running(NamedTuple):
    """Softmax over the keys seen so far."""

    peak: Float[Array, "B N L"]
    total: Float[Array, "B N L"]
    weighted: Float[Array, "B N L K"]


def chunked_attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    *,
    mask: Mask | None,
    scale: float,
) -> Float[Array, "B L N K"]:
    """As the reference, one tile of scores at a time."""
    q_len, k_len = query.shape[1], key.shape[1]
    q_size, k_size = min(QUERY_CHUNK, q_len), min(KEY_CHUNK, k_len)
    key_tiles, value_tiles = tiles(key, k_size), tiles(value, k_size)
    precision = exact_precision(query.dtype)

    def one_query_tile(tile):
        q_start, q = tile

        @jax.checkpoint
        def step(state: Running, k_tile):
            k_start, k, v = k_tile
            scores = scale * jnp.einsum(
                "BLNK,BSNK->BNLS", q, k, precision=precision, preferred_element_type=jnp.float32
            )
            keys = k_start + jnp.arange(k_size)
            allowed = jnp.broadcast_to((keys < k_len)[None], (q_size, k_size))
            if mask is not None:
                allowed &= mask.allowed(q_start + jnp.arange(q_size), keys)
            scores = jnp.where(allowed[None, None], scores, -jnp.inf)
            return accumulate(state, scores, v), None

        batch, _, heads, width = q.shape
        start = Running(
            jnp.full((batch, heads, q_size), jnp.finfo(jnp.float32).min),
            jnp.zeros((batch, heads, q_size)),
            jnp.zeros((batch, heads, q_size, width)),
        )
        starts = jnp.arange(len(key_tiles)) * k_size
        state, _ = jax.lax.scan(step, start, (starts, key_tiles, value_tiles))
        out = state.weighted / state.total[..., None]
        return out.swapaxes(1, 2).astype(query.dtype)

    query_tiles = tiles(query, q_size)
    starts = jnp.arange(len(query_tiles)) * q_size
    out = jax.lax.map(one_query_tile, (starts, query_tiles))  # [tiles, B, l, N, K]
    out = jnp.moveaxis(out, 0, 1).reshape(query.shape[0], -1, *query.shape[2:])
    return out[:, :q_len]


def accumulate(state: Running, scores, value) -> Running:
    """Take in one more tile of keys."""
    peak = jnp.maximum(state.peak, scores.max(-1))
    weights = jnp.exp(scores - peak[..., None])
    shrink = jnp.exp(state.peak - peak)
    step = jnp.einsum(
        "BNLS,BSNK->BNLK",
        weights.astype(value.dtype),
        value,
        precision=exact_precision(value.dtype),
        preferred_element_type=jnp.float32,
    )
    return Running(
        peak,
        state.total * shrink + weights.sum(-1),
        state.weighted * shrink[..., None] + step,
    )


def tiles(x: Float[Array, "B L N K"], size: int) -> Float[Array, "tiles B l N K"]:
    """Cut along the tokens into tiles of ``size``, the last one filled up with zeros."""
    batch, length, *rest = x.shape
    count = -(-length // size)
    x = jnp.pad(x, ((0, 0), (0, count * size - length), (0, 0), (0, 0)))
    return jnp.moveaxis(x.reshape(batch, count, size, *rest), 1, 0)
