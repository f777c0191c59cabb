"""The cache of keys and values: of finished blocks of frames, computed once and read from then on.

Which blocks, and when, is :mod:`skyreels_jax.diffusion.block_reuse`; the reasons are in
docs/adr/0003-reuse-of-finished-blocks.md.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Int

from skyreels_jax.models.transformer_attention import FrameKeyValues

# One entry for each model call of an iteration; empty without reuse.
KVCache = tuple[FrameKeyValues, ...]
_Tree = TypeVar("_Tree")


def allocate(
    block: KVCache,
    slots: int,
    make: Callable[[tuple[int, ...], DTypeLike], Array] = jnp.zeros,
) -> KVCache:
    """Zeros by ``make`` with a slot for each of ``slots`` frames, otherwise shaped as ``block``."""

    def zeros(leaf: Array | jax.ShapeDtypeStruct) -> Array:
        return make((*leaf.shape[:2], slots, *leaf.shape[3:]), leaf.dtype)

    return jax.tree.map(zeros, block)


def append_block(cache: KVCache, block: KVCache, slot: Int[Array, ""]) -> KVCache:
    """``cache`` with the keys and values of ``block`` written from ``slot`` on."""
    return jax.tree.map(
        lambda slots, new: jax.lax.dynamic_update_slice_in_dim(slots, new, slot, axis=2),
        cache,
        block,
    )


def write_frames(slots: _Tree, frames: _Tree, where: Int[Array | np.ndarray, " b"]) -> _Tree:
    """``slots`` with each of ``frames`` written where it is said; past the end is nowhere.

    Frames, and their slots, are axis 2 of every array.
    """

    def written(old: Array, new: Array) -> Array:
        here = old.at[:, :, where]
        return here.set(new.astype(old.dtype), mode="drop", unique_indices=True)

    return jax.tree.map(written, slots, frames)


@dataclass
class WindowSlots:
    """Which latent frame is in which slot of a window's cache: a ring behind a sink.

    Slots are filled in order; once they are, a new frame takes the place of the oldest that is not
    in the sink. Attention asks for no order of slots, and the host keeps this list.

    Attributes:
        slots: how many there are.
        sink: the first of them, whose frames stay.
        held: number of the frame in each slot that is filled.
    """

    slots: int
    sink: int
    held: list[int] = field(default_factory=list)

    def take(self, first: int, count: int) -> Int[np.ndarray, " b"]:
        """Slots for ``count`` frames from ``first`` on; ``slots`` and more where none."""
        taken: list[int] = []
        for frame in range(first, first + count):
            slot = len(self.held)
            if slot < self.slots:
                self.held.append(frame)
            elif self.slots > self.sink:
                ring = self.held[self.sink :]
                slot = self.sink + ring.index(min(ring))
                self.held[slot] = frame
            # A long block may take a slot twice: its later frame stays.
            taken = [-1 if slot == other else other for other in taken]
            taken.append(slot)
        # Slots past the end are written nowhere; no two may be the same.
        spare = self.slots + np.arange(count)
        slots = np.array(taken)
        return np.where((slots < 0) | (slots >= self.slots), spare, slots).astype(np.int32)

    def places(self) -> Int[np.ndarray, " slots"]:
        """The place in the window of each slot's frame: the sink first, the others by time."""
        order = np.argsort(self.held)
        places = np.arange(self.slots, dtype=np.int32)
        places[order] = np.arange(len(order))
        return places

    def in_order(self) -> list[tuple[int, int]]:
        """Frames that are held, by time, each with its slot."""
        return sorted((frame, slot) for slot, frame in enumerate(self.held))
