"""Causal sampling without an end: block by block, each seeing a window of those before it.

All steps of a block, and the pass at timestep 0 that gives its keys and values, are one compiled
program, the same for every block of a size: which slots of the window's cache are filled, which are
written, and what positions frames have are arguments. Nothing is looked at on the host but one flag
a block, two blocks later.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from skyreels_jax.diffusion.few_steps import CausalSchedule, CausalWindow, StepRule, step_sigmas
from skyreels_jax.diffusion.guidance import Guidance, NoGuidance
from skyreels_jax.diffusion.step_cache import NoCache
from skyreels_jax.geometry import LATENT_CHANNELS
from skyreels_jax.models.transformer_attention import FrameKeyValues, PastFrames
from skyreels_jax.sampling.denoiser import Denoiser
from skyreels_jax.sampling.kv_cache import KVCache, WindowSlots, allocate, write_frames
from skyreels_jax.sampling.noise import noise_key
from skyreels_jax.sampling.progress import Clock, IterationReport, StepMonitor
from skyreels_jax.sampling.step import Conditioning, DenoisingStep, frame_noise
from skyreels_jax.shapes import Latents


class _Window(NamedTuple):
    """What goes from block to block: keys and values of each model call's past, and its latents."""

    kv_cache: KVCache
    latents: Float[Array, "B C slots H W"]


class _Block(NamedTuple):
    """Where a block stands: its first frame, how many slots are filled before it, and its own.

    With ``places`` positions are relative to the window: those of the frames in all slots.
    """

    first: Int[Array | np.ndarray, ""]
    count: Int[Array | np.ndarray, ""]
    slots: Int[Array | np.ndarray, " b"]
    places: Int[Array | np.ndarray, " slots"] | None


class _Steps(NamedTuple):
    """The way of a block from noise to data."""

    timesteps: Float[Array | np.ndarray, " T"]
    sigmas: Float[Array | np.ndarray, " points"]
    key: Array


@partial(jax.tree_util.register_dataclass, data_fields=("step",), meta_fields=("rule",))
@dataclass(frozen=True, eq=False)
class _CausalStep:
    """A block as a function of the window, with all that is constant between two prompts."""

    step: DenoisingStep
    rule: StepRule

    def make_block(
        self, window: _Window, block: _Block, steps: _Steps
    ) -> tuple[_Window, Latents, IterationReport]:
        """All steps of a block from pure noise; its keys and values are in the window after it."""
        count, channels, _, *size = window.latents.shape
        frames = jax.ShapeDtypeStruct((len(block.slots), count, channels, *size), jnp.float32)

        def noise(number: Int[Array, ""]) -> Latents:
            key = jax.random.fold_in(steps.key, number)
            return jnp.moveaxis(frame_noise(key, block.first, frames), 0, 2)

        def step(
            carry: tuple[Latents, Bool[Array, ""]], given: tuple[Array, ...]
        ) -> tuple[tuple[Latents, Bool[Array, ""]], None]:
            x, finite = carry
            number, timestep, sigma, following = given
            velocity = self.velocity(window, block, x, timestep)
            finite &= jnp.all(jnp.isfinite(velocity))
            if self.rule == "euler":
                x = x + (following - sigma) * velocity
            else:
                data = x - sigma * velocity
                x = (1 - following) * data + following * noise(number + 1)
            return (x, finite), None

        count = len(steps.timesteps)
        sigmas = jnp.asarray(steps.sigmas)
        lines = (jnp.arange(count), jnp.asarray(steps.timesteps), sigmas[:-1], sigmas[1:])
        start = (noise(jnp.int32(0)), jnp.bool_(True))
        (x, finite), _ = jax.lax.scan(step, start, lines)
        calls = len(self.step.conditioning.contexts) * (count + 1)
        report = IterationReport(finite, jnp.ones(calls, bool))
        return self.keep_block(window, block, x), x, report

    def keep_block(self, window: _Window, block: _Block, x: Latents) -> _Window:
        """The window with the finished block ``x`` in it."""
        new = _Window(self.key_values(window.kv_cache, block, x), x)
        slots = jnp.asarray(block.slots)
        return jax.tree.map(lambda old, frames: write_frames(old, frames, slots, 2), window, new)

    def key_values(self, cache: KVCache, block: _Block, x: Latents) -> KVCache:
        """Keys and values of a finished block, for each model call."""
        calls = self._calls(cache, block, x, jnp.float32(0))
        return tuple(FrameKeyValues(*staged.key_values()) for staged in calls)

    def velocity(
        self, window: _Window, block: _Block, x: Latents, timestep: Float[Array, ""]
    ) -> Latents:
        """The prediction for a block, guided."""
        calls = self._calls(window.kv_cache, block, x, timestep)
        predictions = tuple(staged.head(staged.blocks(staged.tokens)) for staged in calls)
        return self.step.guidance.combine(predictions)

    def _calls(self, cache: KVCache, block: _Block, x: Latents, timestep: Float[Array, ""]):
        first = jnp.asarray(block.first) if block.places is None else None
        places = None if block.places is None else jnp.asarray(block.places)
        pasts = [PastFrames(*kept, jnp.asarray(block.count), first, places) for kept in cache]
        y = self.step.conditioning.y
        if y is not None:
            # A condition's last frame stands for all after it.
            at = jnp.minimum(block.first + jnp.arange(x.shape[2]), y.shape[2] - 1)
            y = jnp.take(y, at, axis=2)
        rows = jnp.concatenate([x] * self.step.guidance.copies)
        return self.step.model_calls(rows, jnp.full(len(rows), timestep), y, pasts)


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
        slots = self.window.slots(self.schedule.block)
        self.clock = self.clock or Clock()
        self._held = WindowSlots(slots, self.window.sink)
        self._starts: dict[int, int] = {}
        self._monitor = StepMonitor(self.clock, self._describe)
        self._under_way: dict[int, range] = {}
        self._made = 0
        self._key = noise_key(self.seed, 0)
        self._step: _CausalStep | None = None
        self._state: _Window | None = None
        self._programs: dict[tuple[str, int, int], jax.stages.Compiled] = {}

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
        self._step = _CausalStep(step, self.schedule.rule)
        self._programs = {}
        if self.window.recompute is True:
            self._recompute()

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
        self.window.check_length(self.frames + size)
        if self.window.recompute == "block":
            self._recompute()
        step, state = self._started()
        steps = _Steps(np.array(timesteps, np.float32), step_sigmas(timesteps), self._key)
        block = self._next_block(self.frames, size)
        assert self.clock is not None
        self.clock.on_submit()
        arguments = (step, state, block, steps)
        program = self._program(_CausalStep.make_block, arguments, size, len(timesteps))
        self._state, latents, report = program(*arguments)
        self._made += 1
        self._under_way[self._made] = range(self.frames, self.frames + size)
        self.frames += size
        self._monitor.submitted(report)
        return latents

    def finish(self) -> None:
        """Wait for all blocks.

        Raises:
            NumericsError: a prediction was not finite; says in which block.
        """
        self._monitor.finish()

    def _started(self) -> tuple[_CausalStep, _Window]:
        """The step, and the window, which is empty at first."""
        if self._step is None:
            raise ValueError("a causal sampler needs a conditioning first: call `change`")
        if self._state is None:
            slots = self._held.slots
            make = self.denoiser.parallelism.zeros
            frame = jax.ShapeDtypeStruct(
                (self.batch, LATENT_CHANNELS, 1, *self.latent_size), jnp.float32
            )
            zero = np.zeros((), np.int32)
            none = _Block(zero, zero, np.zeros(1, np.int32), None)
            shapes = jax.eval_shape(_CausalStep.key_values, self._step, (), none, frame)
            latents = make((self.batch, LATENT_CHANNELS, slots, *self.latent_size), jnp.float32)
            self._state = _Window(allocate(shapes, slots, make), latents)
        return self._step, self._state

    def _next_block(self, first: int, size: int) -> _Block:
        """The next block's place; its slots are taken."""
        places = self._held.places() if self.window.positions == "relative" else None
        count = np.array(len(self._held.held), np.int32)
        slots = self._held.take(first, size)
        self._starts |= dict.fromkeys(range(first, first + size), first)
        self._starts = {frame: self._starts[frame] for frame in self._held.held}
        return _Block(np.array(first, np.int32), count, slots, places)

    def _keep(self, latents: Latents, first: int) -> None:
        """Write finished frames into the window."""
        step, state = self._started()
        shape = (self.batch, *latents.shape[1:])
        latents = self.denoiser.parallelism.place(jnp.broadcast_to(latents, shape))
        arguments = (step, state, self._next_block(first, shape[2]), latents)
        program = self._program(_CausalStep.keep_block, arguments, shape[2], 0)
        self._state = program(*arguments)

    def _recompute(self) -> None:
        """Compute all that is kept again, in order of time."""
        if self._state is None or not self._held.held:
            return
        held, starts = self._held.in_order(), self._starts
        kept = jnp.take(self._state.latents, np.array([slot for _, slot in held]), axis=2)
        self._held = WindowSlots(self._held.slots, self.window.sink)
        self._starts = {}
        for piece in _runs([frame for frame, _ in held], starts):
            first, start = held[piece.start][0], starts[held[piece.start][0]]
            self._keep(kept[:, :, piece], first)
            self._starts |= {frame: start for frame, _ in held[piece]}

    def _program(
        self, function: Callable[..., object], arguments: tuple, size: int, steps: int
    ) -> jax.stages.Compiled:
        """The compiled program of a block of this size."""
        key = (function.__name__, size, steps)
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
