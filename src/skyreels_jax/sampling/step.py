"""One step of denoising, as it is compiled: what goes in, what is kept, what is computed.

A step is everything between two evaluations of the timetable: the model call or calls, guidance and
the solver.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from skyreels_jax.diffusion import unipc
from skyreels_jax.diffusion.frame_schedule import Timetable
from skyreels_jax.diffusion.guidance import Guidance
from skyreels_jax.diffusion.sigmas import TRAIN_LEVELS
from skyreels_jax.diffusion.step_cache import Position, StepCache
from skyreels_jax.models.layers import KeyValues
from skyreels_jax.models.transformer import Before
from skyreels_jax.sampling.monitor import Report
from skyreels_jax.shapes import Context


class Conditioning(NamedTuple):
    """What the model is told besides latents and timesteps; the same in every step.

    ``contexts`` are prepared (keys and values of cross-attention), one for each model call of a
    step; ``y`` and ``fps`` already have the batch of a call.
    """

    contexts: tuple[Any, ...]
    y: Float[Array, "B Y F H W"] | None
    fps: Int[Array, " B"] | None


@dataclass(frozen=True, eq=False)
class PrefixNoise:
    """Noise that the model is shown on given frames, so that it does not copy their faults.

    The latents themselves stay clean. Source: ``addnoise_condition`` of SkyReels-V2's diffusion
    forcing; its noise is drawn from an unseeded generator, ours from ``key`` and the row.

    Attributes:
        level: timestep in 1 to 1000 that the frames are noised to, and that the model is told.
        frames: how many, from the first.
        key: of the noise.
        once: the same noise in every row. That is another run than the original's, equal in
            distribution in each row; given frames are then the same in all rows, and need not be
            computed anew.
    """

    level: int
    frames: int
    key: Array
    once: bool = False


class Veil(NamedTuple):
    """Noise over the model's input in one row: ``share`` of it in each frame."""

    share: Float[np.ndarray, " F"]
    key: Array


class Row(NamedTuple):
    """One row of the timetable on its way to the device; ``P`` is 1 or the number of frames.

    ``first`` is the frame that the columns begin with, where they are not all.
    """

    timestep: Int[Array | np.ndarray, " P"]
    update: Bool[Array | np.ndarray, " P"]
    coefficients: unipc.Coefficients
    position: Position
    veil: Veil | None
    first: Int[Array | np.ndarray, ""] | None = None


class Running(NamedTuple):
    """The loop's carry: latents, frames first as the solver wants them, and what is remembered.

    ``caches`` has an entry for each model call of a step.
    """

    x: Float[Array, "F B C H W"]
    solver: unipc.State
    caches: tuple[Any, ...]


def rows(
    frames: Timetable, table: unipc.Coefficients, prefix_noise: PrefixNoise | None
) -> Iterator[Row]:
    """What the compiled step is told, row by row of the timetable."""
    last = len(table.sigma) - 1
    columns = zip(frames.index, frames.timesteps, frames.update, strict=True)
    for number, (index, timestep, update) in enumerate(columns):
        # The timetable counts steps from 1; frames that rest are given any row of the table.
        coefficients = table.at(np.clip(index - 1, 0, last))
        position = Position(*(np.array(n, np.int32) for n in (number, frames.rows, 0)))
        timestep, veil = timestep.astype(np.int32), None
        if prefix_noise is not None:
            hidden = np.arange(len(timestep)) < prefix_noise.frames
            timestep = np.where(hidden, np.int32(prefix_noise.level), timestep)
            share = np.where(hidden, np.float32(prefix_noise.level / TRAIN_LEVELS), np.float32(0))
            key = prefix_noise.key
            veil = Veil(share, key if prefix_noise.once else jax.random.fold_in(key, number))
        yield Row(timestep, update, coefficients, position, veil)


def seen(tree: Any, row: Row, axis: int = 0) -> Any:
    """The frames of every array that ``row`` is about."""
    first, count = row.first, len(row.timestep)
    if first is None:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, count, axis), tree)


def laid(part: Any, whole: Any, first: Array | np.ndarray | None, axis: int = 0) -> Any:
    """``whole`` with ``part`` in its place, from ``first`` on; ``None``: it is all."""
    if first is None:
        return part
    return jax.tree.map(
        lambda new, old: jax.lax.dynamic_update_slice_in_dim(old, new, first, axis), part, whole
    )


def copied(guidance: Guidance, *values: Array | None) -> tuple[Array | None, ...]:
    """Each value as often as guidance has every video in the batch of a call."""
    return tuple(
        None if value is None else jnp.concatenate([value] * guidance.copies) for value in values
    )


def prepare(
    graph: nnx.GraphDef[Any],
    parameters: nnx.State,
    context: Context,
    clip_fea: Float[Array, "B I image_dim"] | None,
) -> Any:
    """Keys and values of cross-attention, the same in every step."""
    return nnx.merge(graph, parameters).prepare_context(context, clip_fea)


def told(
    conditioning: Conditioning,
    guidance: Guidance,
    row: Row,
    kept: tuple[KeyValues, ...],
    x: Float[Array, "F B C H W"],
) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """What each model call of a step is given: latents, timesteps, context, and the rest."""
    x = seen(x, row)
    if row.veil is not None:
        x, share = x.astype(jnp.float32), jnp.asarray(row.veil.share).reshape(-1, 1, 1, 1, 1)
        x = (1 - share) * x + share * frame_noise(row.veil.key, row.first, x)
    x = jnp.concatenate([jnp.moveaxis(x, 0, 2)] * guidance.copies)
    # One timestep for all frames is told per video: the same result with less work.
    batch, frames = x.shape[0], len(row.timestep)
    t = jnp.broadcast_to(row.timestep, (batch,) if frames == 1 else (batch, frames))
    given = {"y": seen(conditioning.y, row, axis=2), "fps": conditioning.fps}
    for number, context in enumerate(conditioning.contexts):
        if kept:
            assert row.first is not None
            given["before"] = Before(jnp.asarray(row.first), kept[number])
        yield (x, t, context), given


def frame_noise(
    key: Array, first: Int[Array | np.ndarray, ""] | None, x: Float[Array, "F B C H W"]
) -> Float[Array, "F B C H W"]:
    """Normal; each frame of the video has its own, whichever of them ``x`` holds."""
    numbers = jnp.arange(x.shape[0]) + (0 if first is None else first)
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)


def passages(
    graph: nnx.GraphDef[Any],
    block_length: int | None,
    attention: str | None,
    parameters: nnx.State,
    conditioning: Conditioning,
    guidance: Guidance,
    row: Row,
    kept: tuple[KeyValues, ...],
    x: Float[Array, "F B C H W"],
) -> Iterator[Any]:
    """The model calls of a step, each still to be carried out."""
    model = nnx.merge(graph, parameters)
    for arguments, given in told(conditioning, guidance, row, kept, x):
        yield model.passage(*arguments, **given, block_length=block_length, attention=attention)


def step(
    graph: nnx.GraphDef[Any],
    block_length: int | None,
    attention: str | None,
    parameters: nnx.State,
    conditioning: Conditioning,
    guidance: Guidance,
    cache: StepCache,
    kept: tuple[KeyValues, ...],
    row: Row,
    carry: Running,
) -> tuple[Running, Report]:
    """The carry after one row, and what the host is told of it."""
    calls = passages(
        graph, block_length, attention, parameters, conditioning, guidance, row, kept, carry.x
    )
    answers = [
        cache.call(state, row.position._replace(call=jnp.int32(number)), passage)
        for number, (state, passage) in enumerate(zip(carry.caches, calls, strict=True))
    ]
    predictions, caches, computed = zip(*answers, strict=True)
    velocity = jnp.moveaxis(guidance.combine(predictions), 2, 0)
    x, solver = seen((carry.x, carry.solver), row)
    following = unipc.step(row.coefficients, solver, x, velocity, row.update)
    following = laid(following, (carry.x, carry.solver), row.first)
    report = Report(jnp.all(jnp.isfinite(velocity)), jnp.stack(computed))
    return Running(following[0], following[1], caches), report
