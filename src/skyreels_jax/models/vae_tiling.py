"""Frames cut into overlapping tiles, and what becomes of each joined without seams.

Each tile passes through the VAE as if it were the whole frame, with a cache of its own. Where two
results overlap, the later fades in linearly. As in diffusers, so that results are equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import numpy as np
from jaxtyping import PyTree

from skyreels_jax.errors import RequestError
from skyreels_jax.models.vae_layers import PIXEL_STRIDE
from skyreels_jax.models.vae_runs import Chunk


@dataclass(frozen=True)
class Tiles:
    """Square tiles: a :class:`~skyreels_jax.models.vae_runs.Tiling`.

    The device holds one of them, and the caches of the others wait on the host.

    Attributes:
        size: pixels of a tile's side.
        stride: pixels from one tile to the next; the rest of a tile fades into its neighbours.
    """

    size: int = 256
    stride: int = 192

    def __post_init__(self) -> None:
        if self.size % PIXEL_STRIDE or self.stride % PIXEL_STRIDE:
            raise RequestError(f"{self} must have sizes that are multiples of {PIXEL_STRIDE}")
        if not self.size // 2 <= self.stride <= self.size:
            raise RequestError(f"{self} must have a stride of half its size to all of it")

    def cut(self, chunk: Chunk, unit: int) -> list[list[Chunk]]:
        """Tiles from the upper left; those at the right and lower border may be smaller."""
        size, stride = self.size // unit, self.stride // unit
        height, width = chunk.shape[-2:]
        return [
            [chunk[..., i : i + size, j : j + size] for j in _starts(width, size, stride)]
            for i in _starts(height, size, stride)
        ]

    def join(self, rows: Sequence[Sequence[np.ndarray]], unit: int) -> np.ndarray:
        """Each tile faded into the one above, then into the one at its left, and cut to stride."""
        stride, overlap = self.stride // unit, (self.size - self.stride) // unit
        faded: list[list[np.ndarray]] = []
        for i, row in enumerate(rows):
            faded.append([])
            for j, result in enumerate(row):
                tile = result.copy()
                if i:
                    _fade(faded[i - 1][j], tile, overlap, axis=-2)
                if j:
                    _fade(faded[i][j - 1], tile, overlap, axis=-1)
                faded[i].append(tile)
        return np.concatenate(
            [
                np.concatenate([_cut(tile, stride, i, j, faded) for j, tile in enumerate(row)], -1)
                for i, row in enumerate(faded)
            ],
            axis=-2,
        )

    def park(self, cache: PyTree) -> PyTree:
        """On the host."""
        return jax.device_get(cache)


def _starts(length: int, size: int, stride: int) -> range:
    """Where tiles begin: none where all that it has is the overlap of the one before."""
    return range(0, max(1, length - (size - stride)), stride)


def _fade(before: np.ndarray, tile: np.ndarray, overlap: int, axis: int) -> None:
    """Let ``tile`` begin, along ``axis``, as ``before`` ends."""
    before, tile = np.moveaxis(before, axis, 0), np.moveaxis(tile, axis, 0)
    ramp = np.arange(overlap, dtype=np.float32) / np.float32(max(1, overlap))
    ramp = ramp.reshape(-1, *[1] * (tile.ndim - 1))
    tile[:overlap] = before[len(before) - overlap :] * (1 - ramp) + tile[:overlap] * ramp


def _cut(tile: np.ndarray, stride: int, i: int, j: int, grid: list[list[np.ndarray]]) -> np.ndarray:
    """What of a tile no later one replaces: all of it at the border."""
    rows = None if i == len(grid) - 1 else stride
    columns = None if j == len(grid[i]) - 1 else stride
    return tile[..., :rows, :columns]
