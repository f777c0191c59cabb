"""Which blocks of frames a run must compute under block-causal attention, and when.

A frame sees the frames of its own block of attention and of earlier ones. A row of the timetable
therefore needs no block behind the last one that moves; and a block that is finished, with all
before it, has the same keys and values from then on: they are made once and kept.

Blocks here are those of attention, cut from frame 0 on; the timetable's may be others.
"""

from bisect import bisect_left
from collections import Counter
from dataclasses import dataclass
from functools import cache
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Bool

from skyreels_jax.diffusion.frame_schedule import Timetable

# Each is a program to compile, two where the last block is short. Five blocks, the common case,
# have none more.
MOST_LENGTHS: Final = 5


class Pass(NamedTuple):
    """What one row computes: ``count`` blocks from ``first`` on; those before it are kept."""

    first: int
    count: int


@dataclass(frozen=True)
class Passes:
    """All rows of a run.

    Attributes:
        block: frames of a block of attention.
        frames: of the video; the last block may be short.
        rows: what each row computes.
    """

    block: int
    frames: int
    rows: tuple[Pass, ...]

    @property
    def blocks(self) -> int:
        """Blocks of the video."""
        return -(-self.frames // self.block)

    @property
    def kept(self) -> int:
        """Blocks whose keys and values are made and kept; never the last."""
        return max(row.first for row in self.rows)

    @property
    def computed(self) -> int:
        """Passes of one block, those that make keys and values among them."""
        return self.kept + sum(row.count for row in self.rows)

    @property
    def saves(self) -> bool:
        """Whether these are fewer than all blocks in every row."""
        return self.computed < len(self.rows) * self.blocks

    def slice_of(self, row: Pass) -> slice:
        """The frames that ``row`` computes."""
        start = row.first * self.block
        return slice(start, min(start + row.count * self.block, self.frames))


def passes(
    table: Timetable, frames: int, block: int, *, keeps: bool = True, most: int = MOST_LENGTHS
) -> Passes:
    """What must be computed so that every frame that moves is as if everything were.

    Args:
        table: with a column for each frame, or one for all.
        frames: of the video.
        block: frames of a block of attention.
        keeps: whether what the model is given of resting frames stays the same; otherwise nothing
            is ever finished.
        most: different numbers of blocks in a row. Rows compute more than they must where that
            makes them fewer; they are exact nevertheless.
    """
    starts = np.arange(0, frames, block)
    update, told = (
        np.broadcast_to(x, (table.rows, frames)) for x in (table.update, table.timesteps)
    )
    moves = np.logical_or.reduceat(update, starts, axis=1)
    settled = np.logical_and.reduceat(_settled(update, told), starts, axis=1)
    needed = len(starts) - moves[:, ::-1].argmax(axis=1)
    finished = np.cumprod(settled, axis=1).sum(axis=1) if keeps else np.zeros(table.rows, int)
    counts = [int(count) for count in needed - finished]
    lengths = fewest(Counter(counts), most)
    rows = []
    for first, count in zip(finished, counts, strict=True):
        longer = lengths[bisect_left(lengths, count)]
        rows.append(Pass(min(int(first), len(starts) - longer), longer))
    return Passes(block, frames, tuple(rows))


def _settled(update: Bool[np.ndarray, "R F"], told: np.ndarray) -> Bool[np.ndarray, "R F"]:
    """Frames that from this row on neither move nor are told another timestep."""
    stays = ~update & (told == told[-1])
    return np.logical_and.accumulate(stays[::-1], axis=0)[::-1]


def fewest(counts: Counter[int], most: int) -> tuple[int, ...]:
    """At most ``most`` of the lengths in ``counts``, ascending, which together cost the least.

    Each of the ``counts[n]`` rows that need length ``n`` takes the next chosen length.
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
            rows = sum(counts[n] for n in lengths[start : end + 1])
            cost, rest = best(end + 1, left - 1)
            options.append((rows * lengths[end] + cost, (lengths[end], *rest)))
        return min(options)

    return best(0, most)[1]
