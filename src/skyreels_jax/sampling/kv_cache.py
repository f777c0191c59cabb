"""The cache of keys and values: of finished blocks of frames, computed once and read from then on.

Which blocks, and when, is :mod:`skyreels_jax.diffusion.block_reuse`; the reasons are in
docs/adr/0003-reuse-of-finished-blocks.md.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from skyreels_jax.models.transformer_attention import FrameKeyValues

# One entry for each model call of an iteration; empty without reuse.
KVCache = tuple[FrameKeyValues, ...]


def allocate(
    block: KVCache,
    blocks: int,
    make: Callable[[tuple[int, ...], DTypeLike], Array] = jnp.zeros,
) -> KVCache:
    """Zeros by ``make`` with a slot for each frame of ``blocks`` blocks, shaped as ``block``."""

    def zeros(leaf: Array | jax.ShapeDtypeStruct) -> Array:
        return make((*leaf.shape[:2], blocks * leaf.shape[2], *leaf.shape[3:]), leaf.dtype)

    return jax.tree.map(zeros, block)


def append_block(cache: KVCache, block: KVCache, slot: Int[Array, ""]) -> KVCache:
    """``cache`` with the keys and values of ``block`` written from ``slot`` on."""
    return jax.tree.map(
        lambda slots, new: jax.lax.dynamic_update_slice_in_dim(slots, new, slot, axis=2),
        cache,
        block,
    )
