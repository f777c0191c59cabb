"""How the VAE's work on a chunk is laid out: over frames of any size and devices, and over layers.

A frame is whole and on one device, unless :mod:`.vae_tiling` cuts it into tiles or
:mod:`skyreels_jax.parallel.vae` spreads its rows. Layers run one after another, frame by frame, and
equal ones as a loop.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Final, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from skyreels_jax.models.vae_layers import Cache, ChunkFrames, LayerFrames, ResidualBlock
from skyreels_jax.ops.target import height_around, target_device

if TYPE_CHECKING:
    from skyreels_jax.models.vae import WanVae

_Run = Callable[[ChunkFrames, Cache], tuple[LayerFrames, Cache]]
# Of the two halves of each block.
_RunCache = Float[Array, "halves B past height width C"]
Chunk = np.ndarray | Array
# Of a tile it waits in the host's memory while others have their turn.
KeptFrames = PyTree[np.ndarray | Array]
_Grid = Sequence[Sequence[Chunk]]
# A chunk and what was kept of those before it to a result and what is kept.
ChunkStep = Callable[["nnx.GraphDef[WanVae]", nnx.State, Chunk, Cache], tuple[Array, Cache]]


@runtime_checkable
class Tiling(Protocol):
    """How a chunk ``[B, C, T, height, width]`` is cut into rows of tiles, and put together."""

    def cut(self, chunk: Chunk, unit: int) -> _Grid:
        """Rows of tiles; ``unit`` is how many pixels one element of the chunk is wide."""
        ...

    def join(self, rows: Sequence[Sequence[np.ndarray]], unit: int) -> np.ndarray:
        """The chunk again, from one result a tile; ``unit`` is that of the results."""
        ...

    def park(self, cache: PyTree) -> PyTree:
        """Where a tile's cache waits while the others are computed."""
        ...


@dataclass(frozen=True)
class WholeFrame:
    """No tiles."""

    def cut(self, chunk: Chunk, unit: int) -> _Grid:
        """The chunk itself."""
        del unit
        return [[chunk]]

    def join(self, rows: Sequence[Sequence[np.ndarray]], unit: int) -> np.ndarray:
        """The only result."""
        del unit
        return rows[0][0]

    def park(self, cache: PyTree) -> PyTree:
        """Where it is."""
        return cache


WHOLE: Final = WholeFrame()


@runtime_checkable
class FrameDevices(Protocol):
    """On what devices the rows of a frame are."""

    def run(
        self,
        step: ChunkStep,
        graph: "nnx.GraphDef[WanVae]",
        parameters: nnx.State,
        chunk: Chunk,
        cache: KeptFrames,
        unit: int,
    ) -> tuple[Chunk, Cache]:
        """What ``step`` gives; ``unit`` is how many pixels one element of the chunk is high."""
        ...

    def free(self, of_one: int | None) -> int | None:
        """Bytes that are free in all, where so many are on one device; ``None`` is unknown."""
        ...


@dataclass(frozen=True)
class WholeFrameDevice:
    """All rows are on the default device."""

    def run(
        self,
        step: ChunkStep,
        graph: "nnx.GraphDef[WanVae]",
        parameters: nnx.State,
        chunk: Chunk,
        cache: KeptFrames,
        unit: int,
    ) -> tuple[Chunk, Cache]:
        """The step itself."""
        del unit
        return step(graph, parameters, chunk, cache)

    def free(self, of_one: int | None) -> int | None:
        """The same."""
        return of_one


ON_ONE_DEVICE: Final = WholeFrameDevice()


def run_layers(
    layers: Sequence[nnx.Module], x: ChunkFrames, cache: Cache
) -> tuple[LayerFrames, Cache]:
    """One layer after another, each with its part of the cache.

    For TPUs, whose compiler takes seconds for each convolution that it sees, equal blocks in a row
    are one loop, with one cache.
    """
    runs = _runs(layers)
    kept = []
    for run, before in zip(runs, cache or (None,) * len(runs), strict=True):
        x, after = run(x, before)
        kept.append(after)
    return x, tuple(kept)


def _runs(layers: Sequence[nnx.Module]) -> list[_Run]:
    """Each layer, or each run of equal residual blocks as one."""
    if target_device().platform != "tpu":
        return [*layers]  # pyright: ignore[reportReturnType]
    runs: list[_Run] = []
    for width, group in groupby(layers, _own_width):
        run = [*group]
        runs += run if width is None else [partial(_run_equal, run)]  # pyright: ignore
    return runs


def _own_width(layer: nnx.Module) -> int | None:
    """Channels of a residual block that leaves their number alone; None for other layers."""
    if isinstance(layer, ResidualBlock) and layer.shortcut is None:
        return layer.norm1.scale.shape[0]
    return None


def _run_equal(
    blocks: Sequence[ResidualBlock],
    x: ChunkFrames,
    cache: _RunCache | None,
) -> tuple[LayerFrames, _RunCache]:
    """Residual blocks of one shape as a loop over blocks around a loop over their two halves.

    A half is a norm, SiLU and a convolution, the same program with other numbers. What is kept is
    one array, which the loops write in place.
    """
    halves = [
        (half, conv) for b in blocks for half, conv in ((b.norm1, b.conv1), (b.norm2, b.conv2))
    ]
    graph = nnx.graphdef(halves[0])
    parameters = jax.tree.map(lambda *leaves: jnp.stack(leaves), *map(nnx.state, halves))
    begins = cache is None
    if begins:
        taps, rows = halves[0][1].kernel.shape[:2]
        height = height_around(x.shape[2], rows // 2, rows // 2)
        cache = jnp.zeros((len(halves), x.shape[0], taps - 1, height, *x.shape[3:]), x.dtype)

    def half(k: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        x, cache = carry
        mine = jax.tree.map(lambda leaf: leaf[k], parameters)
        norm, conv = nnx.merge(graph, mine)
        out, kept = conv(jax.nn.silu(norm(x)), None if begins else cache[k])
        return out, cache.at[k].set(kept)

    def block(n: Array, carry: tuple[Array, Array]) -> tuple[Array, Array]:
        out, cache = jax.lax.fori_loop(0, 2, lambda k, carry: half(2 * n + k, carry), carry)
        return carry[0] + out, cache

    return jax.lax.fori_loop(0, len(blocks), block, (x, cache))


def run_by_frame(
    layers: Sequence[nnx.Module], x: ChunkFrames, cache: Cache
) -> tuple[LayerFrames, Cache]:
    """The same, for layers that leave time alone, holding one frame at a time between them."""
    if cache is None:
        return run_layers(layers, x, cache)

    def one(cache: Cache, frame: Array) -> tuple[Cache, Array]:
        out, cache = run_layers(layers, frame[:, None], cache)
        return cache, out[:, 0]

    cache, out = jax.lax.scan(one, cache, jnp.moveaxis(x, 1, 0))
    return jnp.moveaxis(out, 0, 1), cache
