"""The contract of attention kernels: what a call consists of, and who can serve it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from skyreels_jax.ops.masks import CleanAndNoisy, Mask
from skyreels_jax.ops.target import Device


@dataclass(frozen=True)
class AttentionCall:
    """Everything a choice may depend on: ``query`` is ``[B, L, N, K]``, the keys have ``key_len``.

    ``dtype`` is the name of the operands' dtype; keys of earlier tokens are among the ``key_len``.
    """

    device: Device
    dtype: str
    query: tuple[int, int, int, int]
    key_len: int


class PastKeyValues(NamedTuple):
    """Keys and values of tokens before those of a call, all of which its queries see.

    The first ``length`` of the ``S`` slots are filled; how many is known when the program runs.
    A model's are stacked over its layers, along a leading axis.
    """

    key: Float[Array, "*layers B S N K"]
    value: Float[Array, "*layers B S N K"]
    length: Int[Array, ""]


@dataclass(frozen=True)
class AttentionPath:
    """One way to compute attention.

    ``compute(query, key, value, *, mask, scale)`` has the shapes of
    :func:`skyreels_jax.ops.attention.attention`; ``refusal`` says why a call cannot be served, or
    ``None``. Where ``takes_past``, ``compute`` has a keyword ``past`` for :class:`PastKeyValues`.
    """

    compute: Callable[..., Array]
    refusal: Callable[[AttentionCall], str | None]
    takes_past: bool = False


def by_query_block(
    unmasked: Callable[..., Float[Array, "B l N K"]],
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    *,
    mask: Mask | None,
    past: PastKeyValues | None = None,
) -> Float[Array, "B L N K"]:
    """Serve a mask with a kernel that has none: one call per query block, on the keys it sees.

    What a block sees is a prefix, or one and the block itself, so this is exact, and it computes no
    score that is masked away.
    With ``past`` the call's own keys stand before its slots, of which the first are filled, and
    ``unmasked`` is given how many keys count as ``key_value_seq_lengths``, as in
    :func:`jax.nn.dot_product_attention`.
    """
    if isinstance(mask, CleanAndNoisy):
        assert past is None, "the clean frames are what comes before the noisy ones"
        parts = [
            unmasked(query[:, rows], *(_joined(states, seen) for states in (key, value)))
            for rows, seen in mask.tiles()
        ]
        return jnp.concatenate(parts, axis=1)
    size = query.shape[1] if mask is None else mask.tokens_per_block
    blocks = []
    for start in range(0, query.shape[1], size):
        own = key.shape[1] if mask is None else mask.visible_keys(start, key.shape[1])
        rows, seen = query[:, start : start + size], [key[:, :own], value[:, :own]]
        lengths = {}
        if past is not None:
            # Softmax asks for no order of keys, and this one needs no write at a place that is
            # known only when the program runs.
            pairs = zip(seen, (past.key, past.value), strict=True)
            seen = [jnp.concatenate(pair, axis=1) for pair in pairs]
            lengths["key_value_seq_lengths"] = jnp.broadcast_to(past.length + own, query.shape[0])
        blocks.append(unmasked(rows, *seen, **lengths))
    return blocks[0] if len(blocks) == 1 else jnp.concatenate(blocks, axis=1)


def _joined(states: Float[Array, "B S N K"], seen: tuple[slice, ...]) -> Float[Array, "B s N K"]:
    return jnp.concatenate([states[:, part] for part in seen], axis=1)
