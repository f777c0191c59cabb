"""Attention in tiles with a running softmax: memory linear in the number of tokens, any device.

The recurrence is that of Rabe and Staats, https://arxiv.org/abs/2112.05682.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from skyreels_jax.ops.kernels.contract import PastKeyValues
from skyreels_jax.ops.linear import exact_precision
from skyreels_jax.ops.masks import Mask
from skyreels_jax.ops.target import target_device


@dataclass(frozen=True)
class ScoreTiling:
    """How large a tile of scores may be, and whether all heads share one.

    A CPU works through the heads in turn, so that a tile (here 4 MiB) stays in its cache; an
    accelerator needs them side by side to be busy.
    """

    queries: int = 512
    keys: int = 2048
    heads_together: bool = False


_CACHED: Final = ScoreTiling()
_PARALLEL: Final = ScoreTiling(heads_together=True)


class RunningSoftmax(NamedTuple):
    """A softmax-weighted sum over the keys seen so far, with its largest score taken out."""

    peak: Float[Array, "*tiles l"]
    total: Float[Array, "*tiles l"]
    weighted: Float[Array, "*tiles l K"]


def chunked_attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    *,
    mask: Mask | None,
    scale: float,
    past: PastKeyValues | None = None,
    tiling: ScoreTiling | None = None,
) -> Float[Array, "B L N K"]:
    """The reference's result, one tile of scores at a time.

    Its gradient recomputes the tiles, so it is linear in memory too. Tiles that ``mask`` hides
    entirely are skipped. With ``past`` its filled tiles are visited first, and there is no
    gradient: how many they are is known only when the program runs.
    """
    if tiling is None:
        tiling = target_tiling()
    q_size, k_size = even_tile(query.shape[1], tiling.queries), even_tile(key.shape[1], tiling.keys)
    key_len = key.shape[1]

    def one_head(tiled):
        queries, keys, values, past_tiles = tiled
        q_starts, k_starts = (jnp.arange(len(x)) * x.shape[1] for x in (queries, keys))

        @jax.checkpoint
        def one_query_tile(tile):
            q_start, q = tile
            state = _nothing_seen(q) if past is None else _filled(q, past_tiles, past.length, scale)
            return _attend(state, q, q_start, (k_starts, keys, values), key_len, mask, scale)

        return jax.lax.map(one_query_tile, (q_starts, queries))

    past_tiles = None
    if past is not None:
        size = even_tile(past.key.shape[1], tiling.keys)
        past_tiles = (_tiles(past.key, size), _tiles(past.value, size))
    tiled = (_tiles(query, q_size), _tiles(key, k_size), _tiles(value, k_size), past_tiles)
    out = jax.vmap(one_head)(tiled) if tiling.heads_together else jax.lax.map(one_head, tiled)
    return _untile(out, query.shape)


def target_tiling() -> ScoreTiling:
    """The tiles for the device that is compiled for."""
    return _CACHED if target_device().platform == "cpu" else _PARALLEL


def begin_softmax(
    query: Float[Array, "B L N K"], tiling: ScoreTiling
) -> tuple[Float[Array, "BN tiles l K"], RunningSoftmax]:
    """The tiles of ``query``, and the state of each before the first key."""
    queries = _tiles(query, even_tile(query.shape[1], tiling.queries))
    return queries, _nothing_seen(queries)


def attend_some(
    state: RunningSoftmax,
    queries: Float[Array, "BN tiles l K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    *,
    visible: Callable[[Array, Array], Array] | None,
    scale: float,
    tiling: ScoreTiling,
) -> RunningSoftmax:
    """The state after some keys more: attention to all is the sum over parts of them.

    Args:
        state: from :func:`begin_softmax`, or after other keys.
        queries: in tiles, as :func:`begin_softmax` gives them.
        key: some of the keys.
        value: theirs.
        visible: from indices of queries and of these keys, which see which; ``None`` for all.
        scale: of the scores.
        tiling: as it was for the queries.
    """
    size = even_tile(key.shape[1], tiling.keys)
    key_len, keys, values = key.shape[1], _tiles(key, size), _tiles(value, size)
    q_starts, k_starts = (jnp.arange(x.shape[1]) * x.shape[2] for x in (queries, keys))

    def one_head(of_head):
        state, queries, keys, values = of_head

        def one_query_tile(tile):
            state, q_start, q = tile
            q_index = q_start + jnp.arange(q.shape[0])

            def step(state: RunningSoftmax, tile):
                k_start, k, v = tile
                k_index = k_start + jnp.arange(k.shape[0])
                seen = jnp.broadcast_to((k_index < key_len)[None, :], (len(q), len(k)))
                if visible is not None:
                    seen &= visible(q_index, k_index)

                def take_in(state: RunningSoftmax) -> RunningSoftmax:
                    scores = jnp.where(seen, _product(q, k, axis=1), -jnp.inf)
                    return _accumulate(state, scores, v, scale)

                return jax.lax.cond(seen.any(), take_in, lambda state: state, state), None

            return jax.lax.scan(step, state, (k_starts, keys, values))[0]

        return jax.lax.map(one_query_tile, (state, q_starts, queries))

    of_heads = (state, queries, keys, values)
    return (
        jax.vmap(one_head)(of_heads) if tiling.heads_together else jax.lax.map(one_head, of_heads)
    )


def finish_softmax(
    state: RunningSoftmax, query: Float[Array, "B L N K"]
) -> Float[Array, "B L N K"]:
    """Attention of ``query`` after the last key."""
    return _untile(state.weighted / state.total[..., None], query.shape).astype(query.dtype)


def even_tile(length: int, largest: int) -> int:
    """The size at most ``largest`` that cuts ``length`` most evenly, to fill up as little."""
    count = -(-length // largest)
    return -(-length // count)


def _nothing_seen(q: Float[Array, "*tiles l K"]) -> RunningSoftmax:
    """Before the first key."""
    # A finite floor rather than -inf: a difference of two floors is 0, not NaN.
    return RunningSoftmax(
        jnp.full(q.shape[:-1], jnp.finfo(jnp.float32).min, jnp.float32),
        jnp.zeros(q.shape[:-1], jnp.float32),
        jnp.zeros(q.shape, jnp.float32),
    )


def _filled(
    q: Float[Array, "l K"], tiles: tuple[Array, Array], length: Int[Array, ""], scale: float
) -> RunningSoftmax:
    """One tile of queries against the first ``length`` keys of ``tiles``, all of them seen."""
    keys, values = tiles
    size = keys.shape[1]

    def take_in(tile: Array, state: RunningSoftmax) -> RunningSoftmax:
        scores = _product(q, keys[tile], axis=1)
        is_filled = tile * size + jnp.arange(size) < length
        scores = jnp.where(is_filled[None, :], scores, -jnp.inf)
        return _accumulate(state, scores, values[tile], scale)

    return jax.lax.fori_loop(0, (length + size - 1) // size, take_in, _nothing_seen(q))


def _attend(
    state: RunningSoftmax,
    q: Float[Array, "l K"],
    q_start: Array,
    key_tiles: tuple[Array, Array, Array],
    key_len: int,
    mask: Mask | None,
    scale: float,
) -> Float[Array, "l K"]:
    """One tile of queries against all keys, those in ``state`` before."""
    k_starts, keys, _ = key_tiles
    is_filled_up = keys.shape[0] * keys.shape[1] > key_len
    q_index = q_start + jnp.arange(q.shape[0])

    @jax.checkpoint
    def take_in(state: RunningSoftmax, tile) -> RunningSoftmax:
        k_start, k, v = tile
        scores = _product(q, k, axis=1)
        k_index = k_start + jnp.arange(k.shape[0])
        if is_filled_up:
            scores = jnp.where((k_index < key_len)[None, :], scores, -jnp.inf)
        if mask is not None:
            scores = jnp.where(mask.allowed(q_index, k_index), scores, -jnp.inf)
        return _accumulate(state, scores, v, scale)

    def step(state: RunningSoftmax, tile):
        if mask is None:
            return take_in(state, tile), None
        is_seen = mask.any_allowed(q_index, tile[0] + jnp.arange(keys.shape[1]))
        return jax.lax.cond(is_seen, take_in, lambda state, _: state, state, tile), None

    state, _ = jax.lax.scan(step, state, key_tiles)
    return (state.weighted / state.total[:, None]).astype(q.dtype)


def _accumulate(
    state: RunningSoftmax, scores: Float[Array, "l s"], values: Float[Array, "s K"], scale: float
) -> RunningSoftmax:
    """Take in one more tile of keys.

    ``scores`` and the peak are scaled only inside the exponential: one pass less over the tile.
    """
    peak = jnp.maximum(state.peak, scores.max(axis=-1))
    weights = jnp.exp(scale * (scores - peak[:, None]))
    shrink = jnp.exp(scale * (state.peak - peak))
    return RunningSoftmax(
        peak,
        state.total * shrink + weights.sum(axis=-1),
        state.weighted * shrink[:, None] + _product(weights.astype(values.dtype), values),
    )


def _product(a: Array, b: Array, axis: int = 0) -> Float[Array, "l s"]:
    """``a``'s rows against ``axis`` of ``b``, summed in float32.

    Said with dimension numbers: XLA's CPU compiler widens bfloat16 operands that come transposed to
    float32, at half the speed.
    """
    return jax.lax.dot_general(
        a,
        b,
        (((1,), (axis,)), ((), ())),
        precision=exact_precision(a.dtype),
        preferred_element_type=jnp.float32,
    )


def _tiles(x: Float[Array, "B L N K"], size: int) -> Float[Array, "BN tiles l K"]:
    """Every head on its own, its tokens in tiles of ``size``, the last filled up with zeros."""
    batch, length, heads, width = x.shape
    count = -(-length // size)
    x = jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, count * size - length), (0, 0)))
    return x.reshape(batch * heads, count, size, width)


def _untile(x: Float[Array, "BN tiles l K"], shape: tuple[int, ...]) -> Float[Array, "B L N K"]:
    """The inverse of :func:`_tiles`, for tokens of ``shape``."""
    batch, length, heads, width = shape
    return x.reshape(batch, heads, -1, width)[:, :, :length].swapaxes(1, 2)
