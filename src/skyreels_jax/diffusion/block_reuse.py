"""Which blocks of frames a run must compute under block-causal attention, and when.

A frame sees the frames of its own block of attention and of earlier ones. An iteration therefore
needs no block behind the last one that moves; and a block that is finished, with all before it, has
the same keys and values from then on: they are computed once and cached.

Blocks here are those of attention, cut from frame 0 on; the frame schedule's may be others.
"""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Bool, Int

from skyreels_jax.diffusion.frame_schedule import FrameSchedule

# Each length is a program to compile, two where the last block is short. Five blocks, the common
# case, have none more.
_MAX_LENGTHS: Final = 5


class BlockRange(NamedTuple):
    """What one iteration computes: ``count`` blocks from ``first`` on; those before are cached."""

    first: int
    count: int


@dataclass(frozen=True)
class BlockReuse:
    """Which blocks are computed in all iterations of a run.

    Attributes:
        block: frames of a block of attention.
        frames: of the video; the last block may be short.
        iterations: what each iteration computes.
    """

    block: int
    frames: int
    iterations: tuple[BlockRange, ...]

    @property
    def blocks(self) -> int:
        """Blocks of the video."""
        return -(-self.frames // self.block)

    @property
    def cached(self) -> int:
        """Blocks whose keys and values are cached; never the last."""
        return max(computed.first for computed in self.iterations)

    @property
    def computed(self) -> int:
        """Computations of one block, those that fill the cache among them."""
        return self.cached + sum(computed.count for computed in self.iterations)

    @property
    def total(self) -> int:
        """Computations of one block if every iteration computed all of them."""
        return len(self.iterations) * self.blocks

    def frames_of(self, computed: BlockRange) -> slice:
        """The frames of a range of blocks."""
        start = computed.first * self.block
        return slice(start, min(start + computed.count * self.block, self.frames))


def plan_block_reuse(
    schedule: FrameSchedule,
    frames: int,
    block: int,
    *,
    reusable: bool = True,
    most: int = _MAX_LENGTHS,
) -> BlockReuse:
    """What must be computed so that every frame that moves is as if everything were.

    Args:
        schedule: with a column for each frame, or one for all.
        frames: of the video.
        block: frames of a block of attention.
        reusable: whether the model's input of resting frames stays the same; otherwise nothing is
            ever finished.
        most: different numbers of blocks that iterations may compute. They compute more than they
            must where that makes such numbers fewer; they are exact nevertheless.
    """
    starts = np.arange(0, frames, block)
    count = schedule.iterations
    update, timesteps = (
        np.broadcast_to(x, (count, frames)) for x in (schedule.update, schedule.timesteps)
    )
    moves = np.logical_or.reduceat(update, starts, axis=1)
    settled = np.logical_and.reduceat(_settled(update, timesteps), starts, axis=1)
    needed = len(starts) - moves[:, ::-1].argmax(axis=1)
    finished = np.cumprod(settled, axis=1).sum(axis=1) if reusable else np.zeros(count, int)
    counts = [int(count) for count in needed - finished]
    lengths = choose_lengths(Counter(counts), most)
    ranges = []
    for first, count in zip(finished, counts, strict=True):
        longer = lengths[bisect_left(lengths, count)]
        ranges.append(BlockRange(min(int(first), len(starts) - longer), longer))
    return BlockReuse(block, frames, tuple(ranges))


def _settled(
    update: Bool[np.ndarray, "I F"], timesteps: Int[np.ndarray, "I F"]
) -> Bool[np.ndarray, "I F"]:
    """Frames that from this iteration on neither move nor have another timestep."""
    stays = ~update & (timesteps == timesteps[-1])
    return np.logical_and.accumulate(stays[::-1], axis=0)[::-1]


def choose_lengths(counts: Counter[int], most: int) -> tuple[int, ...]:
    """At most ``most`` of the lengths in ``counts``, ascending, which together cost the least.

    Each of the ``counts[n]`` iterations that need length ``n`` takes the next chosen length.
    """
    lengths = sorted(counts)

    @cache
    def best(start: int, left: int) -> tuple[float, tuple[int, ...]]:
        """Cost of the lengths from ``start`` on, and the choice among them."""
        if start == len(lengths):
            return 0.0, ()
        if left == 0:
            return float("inf"), ()
        options: list[tuple[float, tuple[int, ...]]] = []
        for end in range(start, len(lengths)):
            number = sum(counts[n] for n in lengths[start : end + 1])
            cost, rest = best(end + 1, left - 1)
            options.append((number * lengths[end] + cost, (lengths[end], *rest)))
        return min(options)

    return best(0, most)[1]
