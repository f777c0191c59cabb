"""Keys and values of finished blocks: made once, and read by all rows that follow.

Which blocks, and when, is :mod:`skyreels_jax.diffusion.block_reuse`; the reasons are in
docs/adr/0003-reuse-of-finished-blocks.md.
"""

from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from skyreels_jax.diffusion import unipc
from skyreels_jax.diffusion.block_reuse import Passes
from skyreels_jax.diffusion.guidance import Guidance
from skyreels_jax.models.layers import KeyValues
from skyreels_jax.sampling.step import Conditioning, Row, laid, told

# For each model call of a step.
Kept = tuple[KeyValues, ...]


def part(row: Row, frames: slice) -> Row:
    """The columns of ``frames`` alone, of a row that has one for every frame."""
    veil = row.veil
    return row._replace(
        timestep=row.timestep[frames],
        update=row.update[frames],
        coefficients=unipc.Coefficients(*(column[frames] for column in row.coefficients)),
        veil=None if veil is None else veil._replace(share=veil.share[frames]),
        first=np.array(frames.start, np.int32),
    )


def jobs(rows: Iterable[Row], passes: Passes) -> Iterator[tuple[Row, bool]]:
    """What is carried out, in order: parts of rows, and whether each is to be kept, not moved."""
    kept = 0
    for row, computed in zip(rows, passes.rows, strict=True):
        while kept < computed.first:
            yield part(row, slice(kept * passes.block, (kept + 1) * passes.block)), True
            kept += 1
        yield part(row, passes.slice_of(computed)), False


def keep(
    graph: nnx.GraphDef[Any],
    attention: str | None,
    parameters: nnx.State,
    conditioning: Conditioning,
    guidance: Guidance,
    row: Row,
    x: Float[Array, "F B C H W"],
    kept: Kept,
) -> Kept:
    """Lay the keys and values of a block that is finished behind those of the blocks before.

    Args:
        graph: the model, as the three that follow.
        attention: name of a path.
        parameters: of the model.
        conditioning: of all frames.
        guidance: of the run.
        row: the part of any row that holds the block's columns.
        x: all latents.
        kept: for each model call of a step, with room for the block.
    """
    model = nnx.merge(graph, parameters)
    states = []
    for room, (arguments, given) in zip(
        kept, told(conditioning, guidance, row, kept, x), strict=True
    ):
        own = model.keys_values(*arguments, **given, attention=attention)
        place = row.first * (own.key.shape[2] // len(row.timestep))
        states.append(laid(own, room, place, axis=2))
    return tuple(states)


def room(
    graph: nnx.GraphDef[Any],
    parameters: nnx.State,
    conditioning: Conditioning,
    guidance: Guidance,
    row: Row,
    x: Float[Array, "F B C H W"],
    blocks: int,
) -> Kept:
    """Zeros for the keys and values of as many ``blocks`` as ``row`` is a part with one of."""
    model = nnx.merge(graph, parameters)
    states = [
        model.keys_values(*arguments, **given)
        for arguments, given in told(conditioning, guidance, row, (), x)
    ]

    def zeros(leaf: Array) -> Array:
        return jnp.zeros((*leaf.shape[:2], blocks * leaf.shape[2], *leaf.shape[3:]), leaf.dtype)

    return tuple(jax.tree.map(zeros, states))
