"""A block of causal sampling, as it is compiled: its steps, and the pass that keeps its keys.

Which slots of the window's cache are filled, which are written, and what positions frames have are
arguments, so that one program makes every block of a size.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from skyreels_jax.diffusion.few_steps import StepRule, moved
from skyreels_jax.diffusion.step_cache import StagedForward
from skyreels_jax.diffusion.unipc import NUM_TRAIN_TIMESTEPS
from skyreels_jax.models.transformer_attention import FrameKeyValues, PastFrames
from skyreels_jax.sampling.kv_cache import KVCache, write_frames
from skyreels_jax.sampling.progress import IterationReport
from skyreels_jax.sampling.step import DenoisingStep, frame_noise
from skyreels_jax.shapes import Latents


class KeptWindow(NamedTuple):
    """What goes from block to block: keys and values of each model call's past, and its latents."""

    kv_cache: KVCache
    latents: Float[Array, "B C slots H W"]


class BlockPlace(NamedTuple):
    """Where a block stands: its first frame, how many slots are filled before it, and its own.

    With ``places`` positions are relative to the window: those of the frames in all slots.
    """

    first: Int[Array | np.ndarray, ""]
    count: Int[Array | np.ndarray, ""]
    slots: Int[Array | np.ndarray, " b"]
    places: Int[Array | np.ndarray, " slots"] | None


class BlockSteps(NamedTuple):
    """The way of a block from noise to data."""

    timesteps: Float[Array | np.ndarray, " T"]
    sigmas: Float[Array | np.ndarray, " points"]
    key: Array


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("step", "context_key"),
    meta_fields=("rule", "context_noise"),
)
@dataclass(frozen=True, eq=False)
class CausalStep:
    """A block as a function of the window, with all that is constant between two prompts.

    With ``context_noise``, a timestep, keys and values are of finished frames noised so far, each
    frame by noise of its own from ``context_key``, the same whenever they are computed again.
    """

    step: DenoisingStep
    rule: StepRule
    context_noise: float | int = 0
    context_key: PyTree = None

    def make_block(
        self, window: KeptWindow, block: BlockPlace, steps: BlockSteps
    ) -> tuple[KeptWindow, Latents, IterationReport]:
        """All steps of a block from pure noise; its keys and values are in the window after it."""
        noise = partial(_noise, steps.key, window, block.first, len(block.slots))

        def step(
            carry: tuple[Latents, Bool[Array, ""]], given: tuple[Array, ...]
        ) -> tuple[tuple[Latents, Bool[Array, ""]], None]:
            x, finite = carry
            number, timestep, sigma, following = given
            velocity = self.velocity(window.kv_cache, block, x, timestep)
            finite &= jnp.all(jnp.isfinite(velocity))
            new = noise(number + 1) if self.rule == "renoise" else None
            return (moved(x, velocity, sigma, following, new), finite), None

        count = len(steps.timesteps)
        sigmas = jnp.asarray(steps.sigmas)
        lines = (jnp.arange(count), jnp.asarray(steps.timesteps), sigmas[:-1], sigmas[1:])
        start = (noise(jnp.int32(0)), jnp.bool_(True))
        (x, finite), _ = jax.lax.scan(step, start, lines)
        calls = len(self.step.conditioning.contexts) * (count + 1)
        report = IterationReport(finite, jnp.ones(calls, bool))
        return self.keep_block(window, block, x), x, report

    def roll_blocks(
        self,
        window: KeptWindow,
        block: BlockPlace,
        steps: BlockSteps,
        begun: Float[Array, "B C before H W"],
    ) -> tuple[
        KeptWindow,
        Float[Array, "B C after H W"],
        Float[Array, "B C finished H W"],
        IterationReport,
    ]:
        """One step of all blocks under way and of a new one, which see each other.

        ``begun`` are the blocks under way, the oldest first and nearest to its end. Where there
        are as many as steps, the oldest is finished: its keys are in the window after it.

        Returns:
            The window; blocks under way; the finished block, or none of its frames; a report.
        """
        size, count = len(block.slots), len(steps.timesteps)
        blocks = begun.shape[2] // size + 1
        starts = [block.first + size * n for n in range(blocks)]
        draw = partial(_noise, steps.key, window)
        x = jnp.concatenate([begun, draw(starts[-1], size, jnp.int32(0))], axis=2)
        # The newest takes the first step.
        done = np.arange(blocks)[::-1]
        at = np.repeat(done, size)
        velocity = self.velocity(window.kv_cache, block, x, jnp.asarray(steps.timesteps)[at])
        new = None
        if self.rule == "renoise":
            drawn = [draw(starts[n], size, jnp.int32(done[n] + 1)) for n in range(blocks)]
            new = jnp.concatenate(drawn, axis=2)
        sigmas = jnp.asarray(steps.sigmas)
        sigma, following = (sigmas[n].reshape(1, 1, -1, 1, 1) for n in (at, at + 1))
        x = moved(x, velocity, sigma, following, new)
        finite = jnp.all(jnp.isfinite(velocity))
        report = IterationReport(finite, jnp.ones(len(self.step.conditioning.contexts), bool))
        if blocks < count:
            return window, x, x[:, :, :0], report
        oldest = x[:, :, :size]
        return self.keep_block(window, block, oldest), x[:, :, size:], oldest, report

    def keep_block(self, window: KeptWindow, block: BlockPlace, x: Latents) -> KeptWindow:
        """The window with the finished block ``x`` in it."""
        seen = x
        if self.context_key is not None:
            level = jnp.float32(self.context_noise / NUM_TRAIN_TIMESTEPS)
            noise = _noise(self.context_key, window, block.first, x.shape[2], jnp.int32(0))
            seen = (1 - level) * x + level * noise
        new = KeptWindow(self.key_values(window.kv_cache, block, seen), x)
        return write_frames(window, new, jnp.asarray(block.slots))

    def key_values(self, cache: KVCache, block: BlockPlace, x: Latents) -> KVCache:
        """Keys and values of a finished block as it is seen later, for each model call."""
        calls = self._calls(cache, block, x, jnp.float32(self.context_noise))
        return tuple(FrameKeyValues(*staged.key_values()) for staged in calls)

    def velocity(
        self, cache: KVCache, block: BlockPlace, x: Latents, timestep: Float[Array, "*F"]
    ) -> Latents:
        """The prediction for a block at a timestep, or for frames each at its own; guided."""
        calls = self._calls(cache, block, x, timestep)
        predictions = tuple(staged.head(staged.blocks(staged.tokens)) for staged in calls)
        return self.step.guidance.combine(predictions)

    def _calls(
        self, cache: KVCache, block: BlockPlace, x: Latents, timestep: Float[Array, "*F"]
    ) -> Iterator[StagedForward]:
        first = jnp.asarray(block.first) if block.places is None else None
        places = None if block.places is None else jnp.asarray(block.places)
        pasts = [PastFrames(*kept, jnp.asarray(block.count), first, places) for kept in cache]
        y = self.step.conditioning.y
        if y is not None:
            # A condition's last frame stands for all after it.
            at = jnp.minimum(block.first + jnp.arange(x.shape[2]), y.shape[2] - 1)
            y = jnp.take(y, at, axis=2)
        rows = jnp.concatenate([x] * self.step.guidance.copies)
        t = jnp.broadcast_to(timestep, (len(rows), *timestep.shape))
        return self.step.model_calls(rows, t, y, pasts)


def _noise(
    key: Array,
    window: KeptWindow,
    first: Int[Array | np.ndarray, ""],
    count: int,
    step: Int[Array, ""],
) -> Latents:
    """What ``count`` frames from ``first`` on are given after a step; before the first, after 0."""
    batch, channels, _, *size = window.latents.shape
    frames = jax.ShapeDtypeStruct((count, batch, channels, *size), jnp.float32)
    return jnp.moveaxis(frame_noise(jax.random.fold_in(key, step), first, frames), 0, 2)
