"""Causal sampling without an end: block by block, each seeing a window of those before it.

All steps of a block, and the pass at timestep 0 that gives its keys and values, are one compiled
program, the same for every block of a size: which slots of the window's cache are filled, which are
written, and what positions frames have are arguments. Nothing is looked at on the host but one flag
a block, two blocks later.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import groupby

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from skyreels_jax.diffusion.few_steps import CausalSchedule, CausalWindow, step_sigmas
from skyreels_jax.diffusion.guidance import Guidance, NoGuidance
from skyreels_jax.diffusion.step_cache import NoCache
from skyreels_jax.geometry import LATENT_CHANNELS
from skyreels_jax.sampling.causal_step import BlockPlace, BlockSteps, CausalStep, KeptWindow
from skyreels_jax.sampling.denoiser import AbstractInputs, Denoiser
from skyreels_jax.sampling.kv_cache import WindowSlots, allocate
from skyreels_jax.sampling.noise import noise_key
from skyreels_jax.sampling.progress import Clock, IterationReport, StepMonitor
from skyreels_jax.sampling.step import Conditioning, DenoisingStep
from skyreels_jax.shapes import Latents


@dataclass(eq=False)
class CausalSampler:
    """Makes a video's latents block by block, for as long as it is asked to.

    ::

        sampler = CausalSampler(denoiser, schedule, window, latent_size=(12, 20), seed=1)
        sampler.change(denoiser.condition(NoGuidance(), text, None))
        first, second = sampler.next(), sampler.next()

    The same seed gives the same frames, however many of them are made. Compiled programs are the
    denoiser's: another sampler of the same shapes compiles nothing. Not for several threads.

    Attributes:
        denoiser: the transformer.
        schedule: how each block is made.
        window: what it sees.
        guidance: how the predictions of a step are combined.
        latent_size: height and width of the latents.
        seed: of all noise.
        attention: name of an attention path; ``None`` chooses.
        clock: where compilation is timed, steps are counted, and which may be asked to stop.
        batch: videos at once.
        frames: latent frames so far, given ones included.
    """

    denoiser: Denoiser
    schedule: CausalSchedule
    window: CausalWindow
    guidance: Guidance = NoGuidance()
    latent_size: tuple[int, int] = (60, 104)
    seed: int = 0
    attention: str | None = None
    clock: Clock | None = None
    batch: int = 1
    frames: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        slots = self.window.slots(self.schedule.at_once)
        self.clock = self.clock or Clock()
        self._held = WindowSlots(slots, self.window.sink)
        self._starts: dict[int, int] = {}
        self._monitor = StepMonitor(self.clock, self._describe)
        self._under_way: dict[int, range] = {}
        self._made = 0
        self._begun: Latents | None = None
        self._key = noise_key(self.seed, 0)
        self._step: CausalStep | None = None
        self._state: KeptWindow | None = None
        self._programs: dict[tuple[str, int, int, float], jax.stages.Compiled] = {}

    def change(self, conditioning: Conditioning) -> None:
        """Take another prompt (or the first one) from the next block on.

        What is kept of the past stays as the earlier prompt made it, or is computed again where
        the window says so.

        Args:
            conditioning: from :meth:`.Denoiser.condition`, with the same guidance. The last frame
                of its ``y`` (i2v) stands for all after it.
        """
        graph, parameters = nnx.split(self.denoiser.model)
        step = DenoisingStep(
            graph,
            parameters,
            conditioning,
            self.guidance,
            NoCache(),
            attention=self.attention,
            parallelism=self.denoiser.parallelism,
        )
        self._step = self._seeing(CausalStep(step, self.schedule.rule), self.window.context_noise)
        self._programs = {}
        if self.window.recompute == "prompt":
            self._recompute(self.window.change_noise)

    def _seeing(self, step: CausalStep, noise: float | int) -> CausalStep:
        """The step, with finished frames seen under so much noise."""
        # A key of its own: steps of blocks draw from the other.
        key = noise_key(self.seed, 1) if noise else None
        return replace(step, context_noise=noise, context_key=key)

    def given(self, latents: Latents | Float[np.ndarray, "B C F H W"]) -> None:
        """Frames that are there already: an image's latent, or a video's, to go on from.

        Their keys and values are computed at timestep 0, block by block; where the number of frames
        is no multiple of a block's, the rest is the first block, as a lone image is.

        Args:
            latents: ``[B, 16, F, H, W]``.

        Raises:
            RequestError: positions end before the last frame.
        """
        self.window.check_length(self.frames + latents.shape[2])
        for piece in self.schedule.blocks_of(latents.shape[2]):
            self._keep(jnp.asarray(latents[:, :, piece], jnp.float32), self.frames)
            self.frames += piece.stop - piece.start

    def next(self) -> Latents:
        """The next block ``[B, 16, frames, H, W]``, float32, on the device; it is not waited for.

        At most three blocks are under way: a fourth call waits for the first of them.

        Raises:
            RequestError: absolute positions end here.
            NumericsError: a prediction in a block before this one was not finite; says in which.
            Stopped: the clock was asked to.
        """
        size, timesteps = self.schedule.block_at(self.frames)
        self.window.check_length(self.frames + max(size, self.schedule.at_once))
        if self.window.recompute == "block":
            self._recompute()
        steps = BlockSteps(np.array(timesteps, np.float32), step_sigmas(timesteps), self._key)
        latents = self._roll(steps) if self.schedule.rolling else self._make(size, steps)
        self.frames += size
        return latents

    def _make(self, size: int, steps: BlockSteps) -> Latents:
        """A block by itself."""
        step, state = self._started()
        arguments = (step, state, self._next_block(self.frames, size), steps)
        program = self._program(CausalStep.make_block, arguments, size, len(steps.timesteps))
        self._submit()
        self._state, latents, report = program(*arguments)
        self._submitted(size, report)
        return latents

    def trace_block(self, inputs: AbstractInputs) -> jax.stages.Traced:
        """The program that makes a block of usual size, which is the same however full the window.

        From shapes alone, the model may be abstract; for a sampler of its own, and a schedule that
        does not roll.
        """
        self.change(self.denoiser.abstract_conditioning(self.guidance, inputs))
        assert self._step is not None
        window = jax.eval_shape(lambda step: self._empty_window(step, jnp.zeros), self._step)
        state = self.denoiser.parallelism.place(window)
        timesteps = self.schedule.timesteps
        steps = BlockSteps(np.array(timesteps, np.float32), step_sigmas(timesteps), self._key)
        arguments = (self._step, state, self._next_block(0, self.schedule.block), steps)
        jitted = self.denoiser.parallelism.jit(CausalStep.make_block, arguments, (1,))
        return jitted.trace(*arguments)

    def _roll(self, steps: BlockSteps) -> Latents:
        """Step all blocks under way, with a new one each time, until the oldest is finished."""
        size, count = self.schedule.block, len(steps.timesteps)
        step, state = self._started()
        begun = self._begun
        if begun is None:
            batch, channels, _, *latent = state.latents.shape
            shape = (batch, channels, 0, *latent)
            begun = self.denoiser.parallelism.zeros(shape, jnp.float32)
        while True:
            filled = len(self._held.held)
            if (frames := begun.shape[2]) == (count - 1) * size:
                block = self._next_block(self.frames, size)
            else:
                places = self._held.places() if self.window.positions == "relative" else None
                first, filled = (np.array(n, np.int32) for n in (self.frames, filled))
                block = BlockPlace(first, filled, np.zeros(size, np.int32), places)
            arguments = (step, state, block, steps, begun)
            program = self._program(CausalStep.roll_blocks, arguments, frames, count)
            self._submit()
            state, begun, latents, report = program(*arguments)
            self._state, self._begun = state, begun
            self._submitted(frames + size, report)
            if latents.shape[2]:
                return latents

    def _submit(self) -> None:
        assert self.clock is not None
        self.clock.on_submit()

    def _submitted(self, count: int, report: IterationReport) -> None:
        """Frames from the first unfinished one on are on their way."""
        self._made += 1
        self._under_way[self._made] = range(self.frames, self.frames + count)
        self._monitor.submitted(report)
        self._monitor.seconds.clear()  # Nobody asks, and a stream may have no end.

    def finish(self) -> None:
        """Wait for all blocks.

        Raises:
            NumericsError: a prediction was not finite; says in which block.
        """
        self._monitor.finish()

    def _started(self) -> tuple[CausalStep, KeptWindow]:
        """The step, and the window, which is empty at first."""
        if self._step is None:
            raise ValueError("a causal sampler needs a conditioning first: call `change`")
        if self._state is None:
            self._state = self._empty_window(self._step, self.denoiser.parallelism.zeros)
        return self._step, self._state

    def _empty_window(
        self, step: CausalStep, make: Callable[[tuple[int, ...], DTypeLike], Array]
    ) -> KeptWindow:
        """Zeros by ``make``."""
        slots = self._held.slots
        frame = jax.ShapeDtypeStruct(
            (self.batch, LATENT_CHANNELS, 1, *self.latent_size), jnp.float32
        )
        zero = np.zeros((), np.int32)
        none = BlockPlace(zero, zero, np.zeros(1, np.int32), None)
        shapes = jax.eval_shape(CausalStep.key_values, step, (), none, frame)
        latents = make((self.batch, LATENT_CHANNELS, slots, *self.latent_size), jnp.float32)
        return KeptWindow(allocate(shapes, slots, make), latents)

    def _next_block(self, first: int, size: int) -> BlockPlace:
        """The next block's place; its slots are taken."""
        places = self._held.places() if self.window.positions == "relative" else None
        count = np.array(len(self._held.held), np.int32)
        slots = self._held.take(first, size)
        self._starts |= dict.fromkeys(range(first, first + size), first)
        self._starts = {frame: self._starts[frame] for frame in self._held.held}
        return BlockPlace(np.array(first, np.int32), count, slots, places)

    def _keep(self, latents: Latents, first: int, noise: float | int | None = None) -> None:
        """Write finished frames into the window; under other noise than usual where it is given."""
        step, state = self._started()
        if noise is not None:
            step = self._seeing(step, noise)
        shape = (self.batch, *latents.shape[1:])
        latents = self.denoiser.parallelism.place(jnp.broadcast_to(latents, shape))
        arguments = (step, state, self._next_block(first, shape[2]), latents)
        program = self._program(CausalStep.keep_block, arguments, shape[2], 0)
        self._state = program(*arguments)

    def _recompute(self, noise: float | int | None = None) -> None:
        """Compute all that is kept again, in order of time; seen under such noise, or as usual."""
        if self._state is None or not self._held.held:
            return
        held, starts = self._held.in_order(), self._starts
        kept = jnp.take(self._state.latents, np.array([slot for _, slot in held]), axis=2)
        self._held = WindowSlots(self._held.slots, self.window.sink)
        self._starts = {}
        for piece in _runs([frame for frame, _ in held], starts):
            first, start = held[piece.start][0], starts[held[piece.start][0]]
            self._keep(kept[:, :, piece], first, noise)
            self._starts |= {frame: start for frame, _ in held[piece]}

    def _program(
        self, function: Callable[..., object], arguments: tuple, size: int, steps: int
    ) -> jax.stages.Compiled:
        """The compiled program of a block of this size."""
        key = (function.__name__, size, steps, arguments[0].context_noise)
        if key not in self._programs:
            assert self.clock is not None
            compiled = self.denoiser.compiled(function, function, arguments, (1,), self.clock)
            self._programs[key] = compiled
        return self._programs[key]

    def _describe(self, done: int) -> str:
        """A block that was made, for a message."""
        frames = self._under_way.pop(done)
        return f"block {done} (latent frames {frames.start} to {frames.stop - 1})"


def _runs(frames: list[int], starts: dict[int, int]) -> Iterator[slice]:
    """Slices of neighbouring frames that were made as one block."""
    for _, run in groupby(enumerate(frames), key=lambda at: (starts[at[1]], at[1] - at[0])):
        indices = [index for index, _ in run]
        yield slice(indices[0], indices[-1] + 1)
