"""From noise to latents: the one loop, around one compiled step.

The step (:mod:`~skyreels_jax.sampling.step`) is compiled once for each shape, ahead of time, and
its buffers are donated. The host only hands in the next row of the timetable; it stays a bounded
number of steps ahead of the device and looks at nothing but one flag a step.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from skyreels_jax.diffusion import unipc
from skyreels_jax.diffusion.block_reuse import Passes, passes
from skyreels_jax.diffusion.frame_schedule import Timetable, plan_blocks, timetable
from skyreels_jax.diffusion.guidance import Guidance
from skyreels_jax.diffusion.sigmas import FlowSchedule
from skyreels_jax.diffusion.step_cache import NoCache
from skyreels_jax.ops.attention import paths_after
from skyreels_jax.sampling.kv_cache import Kept, jobs, keep, room
from skyreels_jax.sampling.monitor import Watch
from skyreels_jax.sampling.progress import Clock
from skyreels_jax.sampling.sampling import Denoised, Job, Sampling, Told
from skyreels_jax.sampling.step import (
    Conditioning,
    PrefixNoise,
    Row,
    Running,
    copied,
    passages,
    prepare,
    rows,
    step,
)
from skyreels_jax.shapes import Context, Latents


@dataclass(frozen=True, eq=False)
class Denoiser:
    """A transformer ready to sample: taken apart once, with its compiled steps by shape.

    Keep one for as long as the model: it is what saves a second video the compilation.

    Attributes:
        model: has ``passage(x, t, context, *, y, fps, block_length, attention)`` and
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
        clip_fea, y, fps = copied(guidance, clip_fea, y, fps)
        prepared = []
        for context in guidance.contexts(positive, negative):
            arguments = (parameters, context, clip_fea)
            compiled = self._compiled(partial(prepare, graph), arguments, clock or Clock())
            prepared.append(compiled(*arguments))
        return Conditioning(tuple(prepared), y, fps)

    def run(
        self,
        noise: Latents,
        conditioning: Conditioning,
        sampling: Sampling,
        *,
        frames: Timetable | None = None,
        prefix_noise: PrefixNoise | None = None,
        clock: Clock | None = None,
        observe: Callable[[Float[Array, "F B C H W"]], None] | None = None,
    ) -> Denoised:
        """Take ``noise`` through the schedule.

        Args:
            noise: latents to start from, float32; frames the timetable never updates stay.
            conditioning: from :meth:`condition`, with the same guidance.
            sampling: how.
            frames: when each frame takes which step; ``None`` moves them all together.
            prefix_noise: over given frames; takes a timetable with a column for every frame.
            clock: where stages are timed and reported.
            observe: shown the latents after each step. It holds the run up, and must copy them.

        Raises:
            NumericsError: a prediction was not finite; says in which step.
            Stopped: somebody asked the clock to.
        """
        frames = together(sampling.schedule) if frames is None else frames
        clock = clock or Clock()
        graph, parameters = nnx.split(self.model)
        passes = self._passes(frames, noise.shape[2], sampling, prefix_noise)
        work = list(self._work(frames, sampling, prefix_noise, passes))
        fixed = (parameters, conditioning, sampling.guidance)
        kept = self._room(noise, fixed, passes, work)
        carry = self._start(noise, (*fixed, sampling.cache), kept, work[0][0], sampling)
        programs: dict[Job, jax.stages.Compiled] = {}
        for row, keeps in work:
            if (job := Job(len(row.timestep), keeps)) in programs:
                continue
            arguments = (*fixed, row, carry.x, kept)
            if not keeps:
                arguments = (*fixed, sampling.cache, kept, row, carry)
            function = self._bound(graph, sampling, keeps)
            last = len(arguments) - 1
            programs[job] = self._compiled(function, arguments, clock, donate=(last,))
        with clock.stage("denoise", frames.rows):
            watch = Watch(clock, frames)
            for row, keeps in work:
                program = programs[Job(len(row.timestep), keeps)]
                if keeps:
                    kept = program(*fixed, row, carry.x, kept)
                else:
                    carry, report = program(*fixed, sampling.cache, kept, row, carry)
                    watch.started(report)
                    if observe is not None:
                        observe(carry.x)
            watch.finish()
        latents = jnp.moveaxis(carry.x, 0, 2).astype(jnp.float32)
        return Denoised(latents, tuple(watch.seconds), watch.computed, watch.calls, passes)

    def programs(
        self,
        noise: jax.ShapeDtypeStruct,
        told: Told,
        sampling: Sampling,
        *,
        frames: Timetable,
        prefix_noise: PrefixNoise | None = None,
    ) -> list[tuple[jax.stages.Traced, int]]:
        """What :meth:`run` would compile, and how often each runs, the largest first.

        From shapes alone; the model may be abstract.
        """
        graph, parameters = nnx.split(self.model)

        def condition(parameters: nnx.State, told: Told) -> Conditioning:
            guidance = sampling.guidance
            clip_fea, y, fps = copied(guidance, *told[1:])
            contexts = guidance.contexts(told.text, told.text)
            prepared = (prepare(graph, parameters, context, clip_fea) for context in contexts)
            return Conditioning(tuple(prepared), y, fps)

        passes = self._passes(frames, noise.shape[2], sampling, prefix_noise)
        work = list(self._work(frames, sampling, prefix_noise, passes))
        conditioning = jax.eval_shape(condition, parameters, told)
        fixed = (parameters, conditioning, sampling.guidance)

        def start(x: Array, *fixed: Any) -> tuple[Any, Any]:
            kept = self._room(x, fixed, passes, work)
            return kept, self._start(x, (*fixed, sampling.cache), kept, work[0][0], sampling)

        kept, carry = jax.eval_shape(start, noise, *fixed)
        often = Counter(Job(len(row.timestep), keeps) for row, keeps in work)
        rows = {Job(len(row.timestep), keeps): row for row, keeps in work}
        traced = []
        for job in sorted(often, key=lambda job: (job.keeps, -job.columns)):
            arguments = (*fixed, rows[job], carry.x, kept)
            if not job.keeps:
                arguments = (*fixed, sampling.cache, kept, rows[job], carry)
            function = jax.jit(
                self._bound(graph, sampling, job.keeps), donate_argnums=len(arguments) - 1
            )
            traced.append((function.trace(*arguments), often[job]))
        return traced

    def _passes(
        self,
        frames: Timetable,
        count: int,
        sampling: Sampling,
        prefix_noise: PrefixNoise | None,
    ) -> Passes | None:
        """What must be computed, where that is less than everything."""
        can_follow = sampling.attention is None or sampling.attention in paths_after()
        if self.block_length is None or frames.update.shape[1] == 1 or not can_follow:
            return None
        if not isinstance(sampling.cache, NoCache):
            return None  # It would have to decide for each block.
        keeps = prefix_noise is None or prefix_noise.once
        found = passes(frames, count, self.block_length, keeps=keeps)
        return found if found.saves else None

    def _work(
        self,
        frames: Timetable,
        sampling: Sampling,
        prefix_noise: PrefixNoise | None,
        passes: Passes | None,
    ) -> Iterator[tuple[Row, bool]]:
        """Rows or parts of them in order, and whether each is a block to keep."""
        table = rows(frames, sampling.coefficients, prefix_noise)
        if passes is None:
            return ((row, False) for row in table)
        return jobs(table, passes)

    def _bound(self, graph: nnx.GraphDef[Any], sampling: Sampling, keeps: bool) -> partial[Any]:
        """The program of one kind of job, of arrays alone."""
        if keeps:
            return partial(keep, graph, sampling.attention)
        return partial(step, graph, self.block_length, sampling.attention)

    def _room(
        self,
        noise: Latents,
        fixed: tuple[Any, ...],
        passes: Passes | None,
        work: Sequence[tuple[Row, bool]],
    ) -> Kept:
        """For what is kept, nothing yet in it."""
        if passes is None or not passes.kept:
            return ()
        block = next(row for row, keeps in work if keeps)
        graph = nnx.split(self.model)[0]

        def states(noise: Latents, parameters: Any, conditioning: Any, guidance: Any) -> Kept:
            x = jnp.moveaxis(noise, 2, 0)
            return room(graph, parameters, conditioning, guidance, block, x, passes.kept)

        return zeros_of(jax.eval_shape(states, noise, *fixed))

    def _start(
        self, noise: Latents, fixed: tuple[Any, ...], kept: Kept, row: Row, sampling: Sampling
    ) -> Running:
        """The carry before the first step."""
        # A copy: the step donates its carry, and the caller's noise must survive.
        x = jnp.array(jnp.moveaxis(noise, 2, 0), dtype=sampling.latents, copy=True)
        graph = nnx.split(self.model)[0]

        def caches(x: Array, parameters: Any, conditioning: Any, guidance: Any, cache: Any) -> Any:
            call = partial(passages, graph, self.block_length, sampling.attention)
            evaluations = call(parameters, conditioning, guidance, row, kept, x)
            return tuple(cache.init(passage) for passage in evaluations)

        return Running(x, unipc.init(x), zeros_of(jax.eval_shape(caches, x, *fixed)))

    def _compiled(
        self,
        function: partial[Any],
        arguments: tuple[Any, ...],
        clock: Clock,
        donate: tuple[int, ...] = (),
    ) -> jax.stages.Compiled:
        """``function`` for the shapes of ``arguments``, compiled now or kept from before."""
        leaves, structure = jax.tree.flatten(arguments)
        shapes = tuple((np.shape(leaf), leaf.dtype) for leaf in leaves)
        # Of what is bound, the graph comes first; it is this model's in every call.
        key = (function.func, function.args[1:], structure, shapes)
        if key not in self._executables:
            with clock.stage("compile"):
                lowered = jax.jit(function, donate_argnums=donate).lower(*arguments)
                self._executables[key] = lowered.compile()
        return self._executables[key]


def zeros_of(shapes: Any) -> Any:
    """Arrays of zeros for a tree of shapes."""
    return jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)


def together(schedule: FlowSchedule) -> Timetable:
    """All frames take every step at once: a timetable of one column."""
    return timetable(plan_blocks(frames=1, block=1), schedule.timesteps, ar_step=0)
