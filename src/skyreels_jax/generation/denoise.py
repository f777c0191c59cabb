"""From noise to latents: the one loop, around one compiled step.

The step (:mod:`~skyreels_jax.generation.step`) is compiled once for each shape, ahead of time, and
its buffers are donated. The host only hands in the next row of the timetable; it stays a bounded
number of steps ahead of the device and looks at nothing but one flag a step.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from skyreels_jax.diffusion import unipc
from skyreels_jax.diffusion.forcing import Timetable, plan_blocks, timetable
from skyreels_jax.diffusion.guidance import Guidance
from skyreels_jax.diffusion.schedule import FlowSchedule
from skyreels_jax.diffusion.step_cache import NoCache, StepCache
from skyreels_jax.generation.progress import Clock
from skyreels_jax.generation.step import (
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
from skyreels_jax.generation.watch import Watch
from skyreels_jax.shapes import Context, Latents


@dataclass(frozen=True)
class Sampling:
    """How a run is taken: the same for all windows of a video.

    Attributes:
        schedule: the noise levels.
        guidance: how a step's predictions are combined.
        attention: name of an attention path; ``None`` chooses by platform and shape.
        cache: which model calls are left out.
    """

    schedule: FlowSchedule
    guidance: Guidance
    attention: str | None = None
    cache: StepCache = NoCache()


class Told(NamedTuple):
    """What :meth:`Denoiser.condition` is given for one video: ``jax.ShapeDtypeStruct`` each."""

    text: Any
    clip_fea: Any
    y: Any
    fps: Any


@dataclass(frozen=True, eq=False)
class Denoised:
    """Finished latents, float32.

    Attributes:
        latents: of all frames.
        step_seconds: of each step; compilation is not in them.
        computed: model calls that ran.
        calls: model calls that a run without a cache makes.
    """

    latents: Latents
    step_seconds: tuple[float, ...]
    computed: int
    calls: int


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
    ) -> Denoised:
        """Take ``noise`` through the schedule.

        Args:
            noise: latents to start from, float32; frames the timetable never updates stay.
            conditioning: from :meth:`condition`, with the same guidance.
            sampling: how.
            frames: when each frame takes which step; ``None`` moves them all together.
            prefix_noise: over given frames; takes a timetable with a column for every frame.
            clock: where stages are timed and reported.

        Raises:
            NumericsError: a prediction was not finite; says in which step.
            Stopped: somebody asked the clock to.
        """
        frames = together(sampling.schedule) if frames is None else frames
        clock = clock or Clock()
        graph, parameters = nnx.split(self.model)
        table = list(rows(frames, unipc.tabulate(sampling.schedule), prefix_noise))
        compute = partial(step, graph, self.block_length, sampling.attention)
        fixed = (parameters, conditioning, sampling.guidance, sampling.cache)
        carry = self._start(noise, fixed, table[0], sampling)
        compiled = self._compiled(compute, (*fixed, table[0], carry), clock, donate=(5,))
        with clock.stage("denoise", frames.rows):
            watch = Watch(clock, frames)
            for row in table:
                carry, report = compiled(*fixed, row, carry)
                watch.started(report)
            watch.finish()
        latents = jnp.moveaxis(carry.x, 0, 2)
        return Denoised(latents, tuple(watch.seconds), watch.computed, watch.calls)

    def trace(
        self,
        noise: jax.ShapeDtypeStruct,
        told: Told,
        sampling: Sampling,
        *,
        frames: Timetable,
    ) -> jax.stages.Traced:
        """The step that :meth:`run` would compile, from shapes alone; the model may be abstract."""
        graph, parameters = nnx.split(self.model)

        def condition(parameters: nnx.State, told: Told) -> Conditioning:
            guidance = sampling.guidance
            clip_fea, y, fps = copied(guidance, *told[1:])
            contexts = guidance.contexts(told.text, told.text)
            prepared = (prepare(graph, parameters, context, clip_fea) for context in contexts)
            return Conditioning(tuple(prepared), y, fps)

        row = next(rows(frames, unipc.tabulate(sampling.schedule), None))
        compute = partial(step, graph, self.block_length, sampling.attention)
        conditioning = jax.eval_shape(condition, parameters, told)
        fixed = (parameters, conditioning, sampling.guidance, sampling.cache)
        carry = jax.eval_shape(
            lambda x, *fixed: self._start(x, fixed, row, sampling), noise, *fixed
        )
        return jax.jit(compute, donate_argnums=(5,)).trace(*fixed, row, carry)

    def _start(
        self, noise: Latents, fixed: tuple[Any, ...], row: Row, sampling: Sampling
    ) -> Running:
        """The carry before the first step."""
        # A copy: the step donates its carry, and the caller's noise must survive.
        x = jnp.array(jnp.moveaxis(noise, 2, 0), dtype=jnp.float32, copy=True)
        graph = nnx.split(self.model)[0]

        def caches(x: Array, parameters: Any, conditioning: Any, guidance: Any, cache: Any) -> Any:
            call = partial(passages, graph, self.block_length, sampling.attention)
            evaluations = call(parameters, conditioning, guidance, row, x)
            return tuple(cache.init(passage) for passage in evaluations)

        shapes = jax.eval_shape(caches, x, *fixed)
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
        return Running(x, unipc.init(x), zeros)

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


def together(schedule: FlowSchedule) -> Timetable:
    """All frames take every step at once: a timetable of one column."""
    return timetable(plan_blocks(frames=1, block=1), schedule.timesteps, ar_step=0)


def draw_noise(seed: int, shape: tuple[int, ...], window: int = 0) -> Latents:
    """Standard normal latents of one window of a video.

    Args:
        seed: 0 to 2**32 - 1.
        shape: of the latents, ``(B, C, F, H, W)``.
        window: its number; each has noise of its own.
    """
    return jax.random.normal(noise_key(seed, window), shape, jnp.float32)


def noise_key(seed: int, window: int) -> Array:
    """The generator is named so that a seed means the same everywhere."""
    key = jax.random.key(seed, impl="threefry2x32")
    return jax.random.fold_in(key, window) if window else key
