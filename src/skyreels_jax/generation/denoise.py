"""From noise to latents: the one loop, around one compiled step.

A step is everything between two evaluations of the timetable: the model call or calls, guidance and
the solver. It is compiled once for each shape, ahead of time, and its buffers are donated. The host
only hands in the next row of the timetable; it stays a bounded number of steps ahead of the device
and looks at nothing but one flag a step.
"""

import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from skyreels_jax.diffusion import unipc
from skyreels_jax.diffusion.forcing import Timetable, plan_blocks, timetable
from skyreels_jax.diffusion.guidance import Guidance
from skyreels_jax.diffusion.schedule import FlowSchedule
from skyreels_jax.errors import NumericsError
from skyreels_jax.generation.progress import Clock
from skyreels_jax.shapes import Context, Latents

# Steps handed to the device before the first of them is waited for: enough that it never idles.
IN_FLIGHT: Final = 2


class Conditioning(NamedTuple):
    """What the model is told besides latents and timesteps; the same in every step.

    ``contexts`` are prepared (keys and values of cross-attention), one for each model call of a
    step; ``y`` and ``fps`` already have the batch of a call.
    """

    contexts: tuple[Any, ...]
    y: Float[Array, "B Y F H W"] | None
    fps: Int[Array, " B"] | None


class Told(NamedTuple):
    """Shapes of what :meth:`Denoiser.condition` is given for one video."""

    text: jax.ShapeDtypeStruct
    clip_fea: jax.ShapeDtypeStruct | None
    y: jax.ShapeDtypeStruct | None
    fps: jax.ShapeDtypeStruct


class Row(NamedTuple):
    """One row of the timetable on its way to the device; ``P`` is 1 or the number of frames."""

    timestep: Int[Array | np.ndarray, " P"]
    update: Bool[Array | np.ndarray, " P"]
    coefficients: unipc.Coefficients


class Running(NamedTuple):
    """The loop's carry: latents, frames first as the solver wants them, and the solver's state."""

    x: Float[Array, "F B C H W"]
    solver: unipc.State


@dataclass(frozen=True)
class Denoised:
    """Finished latents, float32, and the seconds of each step (compilation is not in them)."""

    latents: Latents
    step_seconds: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A transformer ready to sample: taken apart once, with its compiled steps by shape.

    Keep one for as long as the model: it is what saves a second video the compilation.

    Attributes:
        model: takes ``(x, t, context, *, y, fps, block_length, attention)`` and has
            ``prepare_context``, as :class:`~skyreels_jax.models.transformer.WanModel` does.
        block_length: latent frames a block of block-causal attention, ``None`` for full attention.
    """

    model: nnx.Module
    block_length: int | None = None
    _executables: dict[Any, jax.stages.Compiled] = field(default_factory=dict, repr=False)

    def condition(
        self,
        guidance: Guidance,
        positive: Context,
        negative: Context | None,
        *,
        clip_fea: Float[Array, "B I image_dim"] | None = None,
        y: Float[Array, "B Y F H W"] | None = None,
        fps: Int[Array, " B"] | None = None,
        clock: Clock | None = None,
    ) -> Conditioning:
        """Prepare text and image states for every step of a run.

        Args:
            guidance: decides how many model calls a step has.
            positive: states of the prompt.
            negative: states of the negative prompt; not needed without guidance.
            clip_fea: image features (i2v).
            y: mask and image latents (i2v).
            fps: 0 for 16 frames a second, else 1.
            clock: where compilation is timed.
        """
        graph, parameters = nnx.split(self.model)
        clip_fea, y, fps = _copied(guidance, clip_fea, y, fps)
        prepared = []
        for context in guidance.contexts(positive, negative):
            arguments = (parameters, context, clip_fea)
            prepare = self._compiled(partial(_prepare, graph), arguments, clock or Clock())
            prepared.append(prepare(*arguments))
        return Conditioning(tuple(prepared), y, fps)

    def run(
        self,
        noise: Latents,
        schedule: FlowSchedule,
        conditioning: Conditioning,
        guidance: Guidance,
        *,
        frames: Timetable | None = None,
        attention: str | None = None,
        clock: Clock | None = None,
    ) -> Denoised:
        """Take ``noise`` through the schedule.

        Args:
            noise: latents to start from, float32; frames the timetable never updates stay.
            schedule: the noise levels.
            conditioning: from :meth:`condition`, with the same guidance.
            guidance: how a step's predictions are combined.
            frames: when each frame takes which step; ``None`` moves them all together.
            attention: name of an attention path; ``None`` chooses by platform and shape.
            clock: where stages are timed and reported.

        Raises:
            NumericsError: a prediction was not finite; says in which step.
        """
        frames = together(schedule) if frames is None else frames
        clock = clock or Clock()
        graph, parameters = nnx.split(self.model)
        carry = _start(noise)
        rows = list(_rows(frames, unipc.tabulate(schedule)))
        step = partial(_step, graph, self.block_length, attention)
        fixed = (parameters, conditioning, guidance)
        compiled = self._compiled(step, (*fixed, rows[0], carry), clock, donate=(4,))
        with clock.stage("denoise", frames.rows):
            watch = _Watch(clock, frames)
            for row in rows:
                carry, finite = compiled(*fixed, row, carry)
                watch.started(finite)
            watch.finish()
        return Denoised(jnp.moveaxis(carry.x, 0, 2), tuple(watch.seconds))

    def trace(
        self,
        noise: jax.ShapeDtypeStruct,
        schedule: FlowSchedule,
        told: Told,
        guidance: Guidance,
        *,
        frames: Timetable,
        attention: str | None,
    ) -> jax.stages.Traced:
        """The step that :meth:`run` would compile, from shapes alone; the model may be abstract."""
        graph, parameters = nnx.split(self.model)

        def condition(parameters: nnx.State, told: Told) -> Conditioning:
            clip_fea, y, fps = _copied(guidance, told.clip_fea, told.y, told.fps)
            contexts = guidance.contexts(told.text, told.text)
            prepared = (_prepare(graph, parameters, context, clip_fea) for context in contexts)
            return Conditioning(tuple(prepared), y, fps)

        row = next(_rows(frames, unipc.tabulate(schedule)))
        step = partial(_step, graph, self.block_length, attention)
        conditioning = jax.eval_shape(condition, parameters, told)
        carry = jax.eval_shape(_start, noise)
        jitted = jax.jit(step, donate_argnums=(4,))
        return jitted.trace(parameters, conditioning, guidance, row, carry)

    def _compiled(
        self,
        function: partial[Any],
        arguments: tuple[Any, ...],
        clock: Clock,
        donate: tuple[int, ...] = (),
    ) -> jax.stages.Compiled:
        """``function`` for the shapes of ``arguments``, compiled now or kept from before."""
        leaves, structure = jax.tree.flatten(arguments)
        shapes = tuple((np.shape(leaf), np.dtype(leaf.dtype)) for leaf in leaves)
        # Of what is bound, the graph comes first; it is this model's in every call.
        key = (function.func, function.args[1:], structure, shapes)
        if key not in self._executables:
            with clock.stage("compile"):
                lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
                self._executables[key] = lowered.compile()
        return self._executables[key]


def together(schedule: FlowSchedule) -> Timetable:
    """All frames take every step at once: a timetable of one column."""
    return timetable(plan_blocks(frames=1, block=1), schedule.timesteps, ar_step=0)


def draw_noise(seed: int, shape: tuple[int, ...]) -> Latents:
    """Standard normal latents; the generator is named so that the seed means the same everywhere.

    Args:
        seed: 0 to 2**32 - 1.
        shape: of the latents, ``(B, C, F, H, W)``.
    """
    return jax.random.normal(jax.random.key(seed, impl="threefry2x32"), shape, jnp.float32)


def _rows(frames: Timetable, table: unipc.Coefficients) -> Iterator[Row]:
    last = len(table.sigma) - 1
    for index, timestep, update in zip(frames.index, frames.timesteps, frames.update, strict=True):
        # The timetable counts steps from 1; frames that rest are given any row of the table.
        step = np.clip(index - 1, 0, last)
        yield Row(timestep.astype(np.int32), update, table.at(step))


def _start(noise: Latents) -> Running:
    # A copy: the step donates its carry, and the caller's noise must survive.
    x = jnp.array(jnp.moveaxis(noise, 2, 0), dtype=jnp.float32, copy=True)
    return Running(x, unipc.init(x))


def _copied(guidance: Guidance, *values: Array | None) -> tuple[Array | None, ...]:
    """Each value as often as guidance has every video in the batch of a call."""
    return tuple(
        None if value is None else jnp.concatenate([value] * guidance.copies) for value in values
    )


def _prepare(
    graph: nnx.GraphDef[Any],
    parameters: nnx.State,
    context: Context,
    clip_fea: Float[Array, "B I image_dim"] | None,
) -> Any:
    return nnx.merge(graph, parameters).prepare_context(context, clip_fea)


def _step(
    graph: nnx.GraphDef[Any],
    block_length: int | None,
    attention: str | None,
    parameters: nnx.State,
    conditioning: Conditioning,
    guidance: Guidance,
    row: Row,
    carry: Running,
) -> tuple[Running, Bool[Array, ""]]:
    """The carry after one row, and whether the predictions were finite."""
    model = nnx.merge(graph, parameters)
    x = jnp.concatenate([jnp.moveaxis(carry.x, 0, 2)] * guidance.copies)
    batch = x.shape[0]
    # One timestep for all frames is told per video: the same result with less work.
    shape = (batch,) if len(row.timestep) == 1 else (batch, len(row.timestep))
    t = jnp.broadcast_to(row.timestep, shape)
    predictions = tuple(
        model(
            x,
            t,
            context,
            y=conditioning.y,
            fps=conditioning.fps,
            block_length=block_length,
            attention=attention,
        )
        for context in conditioning.contexts
    )
    velocity = jnp.moveaxis(guidance.combine(predictions), 2, 0)
    following, solver = unipc.step(row.coefficients, carry.solver, carry.x, velocity, row.update)
    return Running(following, solver), jnp.all(jnp.isfinite(velocity))


@dataclass
class _Watch:
    """Follows the device: waits for old steps, checks and times them, reports progress."""

    clock: Clock
    frames: Timetable
    pending: deque[Bool[Array, ""]] = field(default_factory=deque)
    seconds: list[float] = field(default_factory=list)
    last: float = field(default_factory=time.perf_counter)

    def started(self, finite: Bool[Array, ""]) -> None:
        self.pending.append(finite)
        if len(self.pending) > IN_FLIGHT:
            self.settle()

    def finish(self) -> None:
        while self.pending:
            self.settle()

    def settle(self) -> None:
        finite = bool(self.pending.popleft())
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now
        done = len(self.seconds)
        if not finite:
            timestep = self.frames.timesteps[done - 1].max()
            raise NumericsError(
                f"the transformer's prediction in step {done} of {self.frames.rows} (timestep "
                f"{timestep}) holds NaN or infinity: its weights, the conditioning or the given "
                "noise do, or a value overflowed; check the weights (`skyreels-jax info`) and try "
                "--dtype float32"
            )
        self.clock.progress.advance("denoise", done)
