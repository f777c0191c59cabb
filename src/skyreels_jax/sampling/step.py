"""One iteration of denoising, as it is compiled: what goes in, what is carried, what is computed.

An iteration is everything between two lines of the frame schedule: the model call or calls,
guidance and the solver.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int, PyTree

from skyreels_jax.diffusion import unipc
from skyreels_jax.diffusion.frame_schedule import FrameSchedule
from skyreels_jax.diffusion.guidance import Guidance
from skyreels_jax.diffusion.step_cache import CacheState, Position, StagedForward, StepCache
from skyreels_jax.diffusion.unipc import NUM_TRAIN_TIMESTEPS
from skyreels_jax.models.parallelism import SINGLE_DEVICE, Parallelism
from skyreels_jax.models.transformer_attention import FrameKeyValues, PastFrames
from skyreels_jax.sampling.kv_cache import KVCache, append_block
from skyreels_jax.sampling.progress import IterationReport
from skyreels_jax.shapes import Timesteps

_Tree = TypeVar("_Tree")
# Keys and values of cross-attention, as the model made them of text and image states.
PreparedContext = PyTree[Array]


class Conditioning(NamedTuple):
    """Inputs of the model besides latents and timesteps; the same in every iteration.

    ``contexts`` are prepared (keys and values of cross-attention), one for each model call of an
    iteration; ``y`` and ``fps`` already have the batch of a call.
    """

    contexts: tuple[PreparedContext, ...]
    y: Float[Array, "B Y F H W"] | None
    fps: Int[Array, " B"] | None


@dataclass(frozen=True, eq=False)
class ConditioningNoise:
    """Noise that the model sees on known frames, so that it does not copy their faults.

    The latents themselves stay clean. Source: ``addnoise_condition`` of SkyReels-V2's diffusion
    forcing; its noise is drawn from an unseeded generator, ours from ``key`` and the iteration.

    Attributes:
        timestep: 1 to 1000, that the frames are noised to, and that the model is given for them.
        frames: how many, from the first.
        key: of the noise.
        once: the same noise in every iteration. That is another run than the original's, equal in
            distribution in each iteration; known frames are then the same in all of them, and need
            not be computed anew.
    """

    timestep: int
    frames: int
    key: Array
    once: bool = False


class _NoiseMix(NamedTuple):
    """Noise in the model's input of one iteration: ``weight`` of it in each frame."""

    weight: Float[np.ndarray, " F"]
    key: Array


class Iteration(NamedTuple):
    """One line of the frame schedule on its way to the device; ``P`` is 1 or the number of frames.

    ``first`` is the frame that the columns begin with, where they are not all.
    """

    timestep: Int[Array | np.ndarray, " P"]
    update: Bool[Array | np.ndarray, " P"]
    coefficients: unipc.Coefficients
    position: Position
    noise: _NoiseMix | None
    first: Int[Array | np.ndarray, ""] | None = None

    def columns(self, frames: slice) -> "Iteration":
        """The columns of ``frames`` alone, of an iteration that has one for every frame."""
        noise = self.noise
        return self._replace(
            timestep=self.timestep[frames],
            update=self.update[frames],
            coefficients=unipc.Coefficients(*(column[frames] for column in self.coefficients)),
            noise=None if noise is None else noise._replace(weight=noise.weight[frames]),
            first=np.array(frames.start, np.int32),
        )


class SamplerState(NamedTuple):
    """What goes from iteration to iteration: latents, frames first as the solver wants them.

    ``caches`` has an entry for each model call of an iteration, as ``kv_cache`` has if it is used.
    """

    x: Float[Array, "F B C H W"]
    solver: unipc.SolverState
    caches: tuple[CacheState, ...]
    kv_cache: KVCache


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("parameters", "conditioning", "guidance", "cache"),
    meta_fields=("graph", "block_length", "attention", "parallelism"),
)
@dataclass(frozen=True, eq=False)
class DenoisingStep:
    """An iteration as a function of state and schedule, with all that is constant over a run.

    A pytree: other weights, conditioning, guidance scales and cache thresholds compile nothing
    anew.

    Attributes:
        graph: structure of the model.
        parameters: of the model.
        conditioning: of all frames.
        guidance: how the predictions of an iteration are combined.
        cache: which model calls are left out.
        block_length: latent frames a block of block-causal attention, ``None`` for full attention.
        attention: name of an attention path; ``None`` chooses by platform and shape.
        parallelism: on what devices the model runs.
    """

    graph: nnx.GraphDef[Any]
    parameters: nnx.State
    conditioning: Conditioning
    guidance: Guidance
    cache: StepCache
    block_length: int | None = None
    attention: str | None = None
    parallelism: Parallelism = SINGLE_DEVICE

    def advance(
        self, state: SamplerState, iteration: Iteration
    ) -> tuple[SamplerState, IterationReport]:
        """Move the frames of ``iteration``; the report is for the host."""
        predictions, caches, computed = [], [], []
        calls = self.staged_calls(state, iteration)
        for number, (cache_state, staged) in enumerate(zip(state.caches, calls, strict=True)):
            position = iteration.position._replace(call=jnp.int32(number))
            prediction, cache_state, runs = self.cache.call(cache_state, position, staged)
            predictions.append(prediction)
            caches.append(cache_state)
            computed.append(runs)
        velocity = jnp.moveaxis(self.guidance.combine(tuple(predictions)), 2, 0)
        moving = (state.x, state.solver)
        x, solver = _read_frames(moving, iteration)
        moved = unipc.step(iteration.coefficients, solver, x, velocity, iteration.update)
        x, solver = _write_frames(moving, moved, iteration)
        report = IterationReport(jnp.all(jnp.isfinite(velocity)), jnp.stack(computed))
        return SamplerState(x, solver, tuple(caches), state.kv_cache), report

    def fill_cache(self, state: SamplerState, iteration: Iteration) -> tuple[SamplerState, None]:
        """Cache keys and values of the block in ``iteration``, which is finished; nothing moves."""
        block = self.key_values(state, iteration)
        slot = jnp.asarray(iteration.first)
        return state._replace(kv_cache=append_block(state.kv_cache, block, slot)), None

    def key_values(self, state: SamplerState, iteration: Iteration) -> KVCache:
        """Keys and values of the one block in ``iteration``, for each model call."""
        calls = self.staged_calls(state, iteration, within_block=True)
        return tuple(FrameKeyValues(*staged.key_values()) for staged in calls)

    def initial_caches(self, state: SamplerState, iteration: Iteration) -> tuple[CacheState, ...]:
        """The step cache's states before the first iteration."""
        return tuple(map(self.cache.init, self.staged_calls(state, iteration)))

    def staged_calls(
        self, state: SamplerState, iteration: Iteration, *, within_block: bool = False
    ) -> Iterator[StagedForward]:
        """The model calls of an iteration, each still to be carried out.

        ``within_block``: the frames are one block of attention and need no mask.
        """
        x, t = self.model_inputs(state.x, iteration)
        y = _read_frames(self.conditioning.y, iteration, axis=2)
        pasts = [PastFrames(*kept, jnp.asarray(iteration.first)) for kept in state.kv_cache]
        return self.model_calls(x, t, y, pasts, None if within_block else self.block_length)

    def model_calls(
        self,
        x: Float[Array, "rows C F H W"],
        t: Timesteps,
        y: Float[Array, "rows Y F H W"] | None,
        pasts: Sequence[PastFrames],
        block_length: int | None = None,
    ) -> Iterator[StagedForward]:
        """A call of the model for each context, with its own past where there are any."""
        model = nnx.merge(self.graph, self.parameters)
        model.parallelism = self.parallelism
        for number, context in enumerate(self.conditioning.contexts):
            yield model.staged(
                x,
                t,
                context,
                y=y,
                fps=self.conditioning.fps,
                block_length=block_length,
                attention=self.attention,
                past=pasts[number] if pasts else None,
            )

    def model_inputs(
        self, x: Float[Array, "F B C H W"], iteration: Iteration
    ) -> tuple[Float[Array, "rows C columns H W"], Int[Array, "rows *columns"]]:
        """Latents and timesteps of a model call, of the frames of ``iteration``."""
        x = _read_frames(x, iteration)
        if iteration.noise is not None:
            weight = jnp.asarray(iteration.noise.weight).reshape(-1, 1, 1, 1, 1)
            x = x.astype(jnp.float32)
            x = (1 - weight) * x + weight * frame_noise(iteration.noise.key, iteration.first, x)
        x = jnp.concatenate([jnp.moveaxis(x, 0, 2)] * self.guidance.copies)
        # One timestep for all frames is given per video: the same result with less work.
        batch, columns = x.shape[0], len(iteration.timestep)
        shape = (batch,) if columns == 1 else (batch, columns)
        return x, jnp.broadcast_to(iteration.timestep, shape)


def iterations(
    schedule: FrameSchedule, table: unipc.Coefficients, noise: ConditioningNoise | None
) -> Iterator[Iteration]:
    """What the compiled step is given, line by line of the frame schedule.

    Args:
        schedule: when each frame takes which step.
        table: the solver's coefficients of all steps.
        noise: over known frames; takes a schedule with a column for every frame.
    """
    last = len(table.sigma) - 1
    lines = zip(schedule.index, schedule.timesteps, schedule.update, strict=True)
    for number, (index, timestep, update) in enumerate(lines):
        # The schedule counts steps from 1; frames that rest are given any entry of the table.
        coefficients = table.at(np.clip(index - 1, 0, last))
        position = Position(*(np.array(n, np.int32) for n in (number, schedule.iterations, 0)))
        timestep, mix = timestep.astype(np.int32), None
        if noise is not None:
            noised = np.arange(len(timestep)) < noise.frames
            timestep = np.where(noised, np.int32(noise.timestep), timestep)
            sigma = np.float32(noise.timestep / NUM_TRAIN_TIMESTEPS)
            key = noise.key if noise.once else jax.random.fold_in(noise.key, number)
            mix = _NoiseMix(np.where(noised, sigma, np.float32(0)), key)
        yield Iteration(timestep, update, coefficients, position, mix)


def _read_frames(tree: _Tree, iteration: Iteration, axis: int = 0) -> _Tree:
    """The frames of every array that ``iteration`` has a column for."""
    first, count = iteration.first, len(iteration.timestep)
    if first is None:
        return tree
    return jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, first, count, axis), tree)


def _write_frames(tree: _Tree, frames: _Tree, iteration: Iteration) -> _Tree:
    """``tree`` with ``frames``, those of ``iteration``, in place of its own."""
    if (first := iteration.first) is None:
        return frames
    return jax.tree.map(
        lambda old, new: jax.lax.dynamic_update_slice_in_dim(old, new, first, 0), tree, frames
    )


def frame_noise(
    key: Array,
    first: Int[Array | np.ndarray, ""] | None,
    x: Float[Array, "F B C H W"] | jax.ShapeDtypeStruct,
) -> Float[Array, "F B C H W"]:
    """Normal noise; each frame of the video has its own, whichever of them ``x`` holds."""
    numbers = jnp.arange(x.shape[0]) + (0 if first is None else first)
    keys = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers)
    return jax.vmap(lambda key: jax.random.normal(key, x.shape[1:], x.dtype))(keys)
