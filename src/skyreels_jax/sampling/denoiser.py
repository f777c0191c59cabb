"""From noise to latents: the one loop, around one compiled step.

The step (:mod:`~skyreels_jax.sampling.step`) is compiled once for each shape, ahead of time, and
its buffers are donated. The host only hands in the next line of the frame schedule; it stays a
bounded number of iterations ahead of the device and looks at nothing but one flag an iteration.
"""

from collections import Counter
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int, PyTree

from skyreels_jax.diffusion import unipc
from skyreels_jax.diffusion.block_reuse import BlockReuse, plan_block_reuse
from skyreels_jax.diffusion.frame_schedule import FrameSchedule, synchronous_schedule
from skyreels_jax.diffusion.guidance import Guidance
from skyreels_jax.diffusion.step_cache import CacheState, NoCache, StepCache
from skyreels_jax.diffusion.unipc import FlowSchedule
from skyreels_jax.models.parallelism import SINGLE_DEVICE, Parallelism
from skyreels_jax.ops.attention import paths_with_past
from skyreels_jax.sampling.progress import Clock, StepMonitor
from skyreels_jax.sampling.run_plan import ProgramKey, RunPlan, work_items
from skyreels_jax.sampling.step import (
    Conditioning,
    ConditioningNoise,
    DenoisingStep,
    PreparedContext,
    iterations,
)
from skyreels_jax.shapes import Context, Latents


@dataclass(frozen=True)
class Sampling:
    """Settings of a run: the same for all windows of a video.

    Attributes:
        schedule: the sigmas.
        guidance: how the predictions of an iteration are combined.
        attention: name of an attention path; ``None`` chooses by platform and shape.
        cache: which model calls are left out.
        latents: dtype they have between iterations; bfloat16 is the original's diffusion forcing.
        exact: as the original's diffusion forcing to the letter: the sample that a frame's first
            step started from is overwritten, and finished blocks are computed in every iteration.
    """

    schedule: FlowSchedule
    guidance: Guidance
    attention: str | None = None
    cache: StepCache = NoCache()
    latents: str = "float32"
    exact: bool = False

    @property
    def coefficients(self) -> unipc.Coefficients:
        """The solver's table, for latents of this dtype."""
        return unipc.tabulate(
            self.schedule, rounded=self.latents != "float32", overwritten=self.exact
        )


class AbstractInputs(NamedTuple):
    """Shapes of what :meth:`Denoiser.condition` takes for one video, whatever the prompts."""

    text: jax.ShapeDtypeStruct
    clip_fea: jax.ShapeDtypeStruct | None
    y: jax.ShapeDtypeStruct | None
    fps: jax.ShapeDtypeStruct | None


@dataclass(frozen=True, eq=False)
class Denoised:
    """Finished latents, float32.

    Attributes:
        latents: of all frames.
        step_seconds: of each iteration; compilation is not in them.
        computed: model calls that ran.
        calls: model calls that a run without a cache makes.
        reuse: which blocks of frames were computed, where not all were in every iteration.
        caches: what the step cache remembers at the end, for a run that goes on from there.
    """

    latents: Latents
    step_seconds: tuple[float, ...]
    computed: int
    calls: int
    reuse: BlockReuse | None = None
    caches: tuple[CacheState, ...] = ()

    @property
    def block_counts(self) -> tuple[int, int]:
        """Blocks computed, and how many all of them in every iteration would have been; or 0."""
        return (0, 0) if self.reuse is None else (self.reuse.computed, self.reuse.total)


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A transformer ready to sample: taken apart once, with its compiled steps by shape.

    Keep one for as long as the model: it is what saves a second video the compilation.

    Attributes:
        model: has ``staged`` and ``prepare_context``, as
            :class:`~skyreels_jax.models.transformer.WanModel` does.
        block_length: latent frames a block of block-causal attention, ``None`` for full attention.
        parallelism: on what devices the model is and runs.
    """

    model: nnx.Module
    block_length: int | None = None
    _executables: dict[Hashable, jax.stages.Compiled] = field(default_factory=dict, repr=False)
    parallelism: Parallelism = SINGLE_DEVICE

    def condition(
        self,
        guidance: Guidance,
        positive: Context,
        negative: Context | None,
        *,
        clip_fea: Float[Array, "B I image_dim"] | None = None,
        y: Float[Array, "B Y F H W"] | None = None,
        fps: Int[Array, " B"] | None = None,
        padding: int = 0,
        clock: Clock | None = None,
    ) -> Conditioning:
        """Prepare text and image states for every iteration of a run.

        Args:
            guidance: decides how many model calls an iteration has.
            positive: states of the prompt.
            negative: states of the negative prompt; not needed without guidance.
            clip_fea: image features (i2v).
            y: mask and image latents (i2v).
            fps: 0 for 16 frames a second, else 1.
            padding: so many rows at the end of both texts are zeros, and are computed as one:
                less work in every step of a small model.
            clock: where compilation is timed.
        """
        graph, parameters = nnx.split(self.model)
        clock = clock or Clock()

        def prepare(context: Context, clip_fea: Array | None) -> PreparedContext:
            context = context[:, : context.shape[1] - padding]
            arguments = (parameters, *self.parallelism.place((context, clip_fea)))
            # What is bound is the graph, this model's in every call.
            prepared = partial(_prepare, graph, padding=padding)
            return self.compiled(_prepare, prepared, arguments, (), clock)(*arguments)

        conditioning = _conditioning(guidance, prepare, (positive, negative), clip_fea, y, fps)
        return conditioning._replace(
            **self.parallelism.place({"y": conditioning.y, "fps": conditioning.fps})
        )

    def compiled(
        self,
        name: Callable[..., Any],
        function: Callable[..., Any],
        arguments: tuple[PyTree, ...],
        donated: tuple[int, ...],
        clock: Clock,
    ) -> jax.stages.Compiled:
        """The program of a function for such arguments, compiled unless it is there."""
        if (key := _program_key(name, arguments)) not in self._executables:
            with clock.stage("compile"):
                jitted = self.parallelism.jit(function, arguments, donated)
                self._executables[key] = jitted.lower(*arguments).compile()
        return self._executables[key]

    def run(
        self,
        noise: Latents,
        conditioning: Conditioning,
        sampling: Sampling,
        *,
        frame_schedule: FrameSchedule | None = None,
        conditioning_noise: ConditioningNoise | None = None,
        caches: tuple[CacheState, ...] | None = None,
        clock: Clock | None = None,
        observe: Callable[[Float[Array, "F B C H W"]], None] | None = None,
    ) -> Denoised:
        """Take ``noise`` through the schedule.

        Args:
            noise: latents to start from, float32; frames the schedule never updates stay.
            conditioning: from :meth:`condition`, with the same guidance.
            sampling: settings.
            frame_schedule: when each frame takes which step; ``None`` moves them all together.
            conditioning_noise: over known frames; takes a frame schedule with a column for each.
            caches: of an earlier run, which the step cache goes on from; they are used up.
            clock: where stages are timed and reported.
            observe: shown the latents after each iteration. It holds the run up, and must copy
                them.

        Raises:
            NumericsError: a prediction was not finite; says in which step.
            Stopped: somebody asked the clock to.
        """
        clock = clock or Clock()
        schedule = frame_schedule or synchronous_schedule(sampling.schedule.timesteps)
        frames = noise.shape[2]
        plan = self._plan(frames, conditioning, sampling, schedule, conditioning_noise)
        state = plan.start(noise)
        if caches is not None:
            state = state._replace(caches=caches)
        programs: dict[ProgramKey, jax.stages.Compiled] = {}
        for program, iteration in plan.programs.items():
            arguments = (plan.step, state, iteration)
            function = program.function
            programs[program] = self.compiled(function, function, arguments, (1,), clock)
        with clock.stage("denoise", schedule.iterations):
            monitor = StepMonitor(clock, schedule.describe)
            for iteration, program in plan.work:
                clock.on_submit()
                state, report = programs[program](plan.step, state, iteration)
                if report is not None:
                    monitor.submitted(report)
                    if observe is not None:
                        observe(state.x)
            monitor.finish()
        latents = jnp.moveaxis(state.x, 0, 2).astype(jnp.float32)
        seconds = tuple(monitor.seconds)
        counts = (monitor.computed, monitor.calls)
        return Denoised(latents, seconds, *counts, plan.reuse, state.caches)

    def programs(
        self,
        noise: jax.ShapeDtypeStruct,
        inputs: AbstractInputs,
        sampling: Sampling,
        *,
        frame_schedule: FrameSchedule,
        conditioning_noise: ConditioningNoise | None = None,
    ) -> list[tuple[jax.stages.Traced, int]]:
        """What :meth:`run` would compile, and how often each runs, the largest first.

        From shapes alone; the model may be abstract.
        """
        conditioning = self.abstract_conditioning(sampling.guidance, inputs)
        frames = noise.shape[2]
        plan = self._plan(frames, conditioning, sampling, frame_schedule, conditioning_noise)
        state = self.parallelism.place(jax.eval_shape(plan.start, noise))
        times = Counter(item.key for item in plan.work)
        largest_first = sorted(
            plan.programs.items(), key=lambda item: (item[0].fills_cache, -item[0].columns)
        )
        programs = []
        for key, given in largest_first:
            arguments = (plan.step, state, given)
            jitted = self.parallelism.jit(key.function, arguments, (1,))
            programs.append((jitted.trace(*arguments), times[key]))
        return programs

    def abstract_conditioning(self, guidance: Guidance, inputs: AbstractInputs) -> Conditioning:
        """Shapes of what :meth:`condition` gives; the model may be abstract."""
        graph, parameters = nnx.split(self.model)

        def condition(parameters: nnx.State, text: Context, *others: Array | None) -> Conditioning:
            prepare = partial(_prepare, graph, parameters)
            return _conditioning(guidance, prepare, (text, text), *others)

        return self.parallelism.place(jax.eval_shape(condition, parameters, *inputs))

    def _plan(
        self,
        frames: int,
        conditioning: Conditioning,
        sampling: Sampling,
        schedule: FrameSchedule,
        noise: ConditioningNoise | None,
    ) -> RunPlan:
        graph, parameters = nnx.split(self.model)
        step = DenoisingStep(
            graph,
            parameters,
            conditioning,
            sampling.guidance,
            sampling.cache,
            self.block_length,
            sampling.attention,
            self.parallelism,
        )
        reuse = self._plan_reuse(schedule, frames, sampling, noise)
        lines = iterations(schedule, sampling.coefficients, noise)
        return RunPlan(step, tuple(work_items(lines, reuse)), reuse, sampling.latents)

    def _plan_reuse(
        self,
        schedule: FrameSchedule,
        frames: int,
        sampling: Sampling,
        noise: ConditioningNoise | None,
    ) -> BlockReuse | None:
        """What must be computed, where that is less than everything."""
        takes_past = sampling.attention is None or sampling.attention in paths_with_past()
        if self.block_length is None or schedule.update.shape[1] == 1 or not takes_past:
            return None
        if sampling.exact or not isinstance(sampling.cache, NoCache):
            return None  # Sums in another order; and a cache would have to decide for each block.
        reusable = noise is None or noise.once
        reuse = plan_block_reuse(schedule, frames, self.block_length, reusable=reusable)
        return reuse if reuse.computed < reuse.total else None


def _program_key(function: Callable[..., object], arguments: tuple[PyTree, ...]) -> Hashable:
    """What decides a compiled program: the function; structure, shapes and places of arguments."""
    leaves, structure = jax.tree.flatten(arguments)
    # Arrays of the host have no place of their own.
    places = (getattr(leaf, "sharding", None) for leaf in leaves)
    shapes = ((np.shape(leaf), leaf.dtype) for leaf in leaves)
    return function, structure, tuple(zip(shapes, places, strict=True))


def _prepare(
    graph: nnx.GraphDef[Any],
    parameters: nnx.State,
    context: Context,
    clip_fea: Float[Array, "B I image_dim"] | None,
    padding: int = 0,
) -> PreparedContext:
    """Keys and values of cross-attention, the same in every iteration."""
    counted = {"padding": padding} if padding else {}
    return nnx.merge(graph, parameters).prepare_context(context, clip_fea, **counted)


def _conditioning(
    guidance: Guidance,
    prepare: Callable[[Context, Array | None], PreparedContext],
    texts: tuple[Context, Context | None],
    *inputs: Array | None,
) -> Conditioning:
    """Conditioning with each of ``inputs`` as often as a model call has every video."""
    clip_fea, y, fps = (
        None if value is None else jnp.concatenate([value] * guidance.copies) for value in inputs
    )
    contexts = guidance.contexts(*texts)
    return Conditioning(tuple(prepare(context, clip_fea) for context in contexts), y, fps)
