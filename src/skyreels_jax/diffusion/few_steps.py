"""Causal video in a few steps: what a block's steps are, and what of the past it sees.

Blocks of latent frames are made one after the other, each from pure noise through the same few
timesteps. The model predicts the velocity ``v``; with ``sigma = timestep / 1000`` the data it means
is ``x0 = x - sigma v``, and the next sample is ``(1 - sigma') x0 + sigma' noise`` with new noise
(the consistency sampler that distilled students learn), or an Euler step of the flow.

Source: CausVid (arXiv 2412.07772) and Self-Forcing (arXiv 2506.08009); the sink is LongLive's
(arXiv 2509.22622), positions within the window are Infinity-RoPE's (arXiv 2511.20649).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final, Literal

import numpy as np
from jaxtyping import Array, Float

from skyreels_jax.diffusion.unipc import NUM_TRAIN_TIMESTEPS
from skyreels_jax.errors import RequestError
from skyreels_jax.shapes import ROPE_FRAMES, Latents

StepRule = Literal["renoise", "euler"]
WindowPositions = Literal["absolute", "relative"]
# When keys and values of earlier latent frames are computed anew: never, when the prompt changes,
# or before every block.
Recomputation = Literal["never", "prompt", "block"]
_RULES: Final = ("renoise", "euler")
_POSITIONS: Final = ("absolute", "relative")
_RECOMPUTATIONS: Final = ("never", "prompt", "block")


def warp(timesteps: Sequence[float | int], shift: float | int) -> tuple[float, ...]:
    """Timesteps moved towards noise: ``shift s / (1 + (shift - 1) s)`` of each sigma ``s``.

    1000, 750, 500, 250 become 1000, 937.5, 833.3, 625 by a shift of 5.
    """
    if not shift > 0:
        raise RequestError(f"a shift of {shift} for timesteps: it must be positive, 1 changes none")
    sigmas = [timestep / NUM_TRAIN_TIMESTEPS for timestep in timesteps]
    return tuple(
        NUM_TRAIN_TIMESTEPS * (shift * sigma / (1 + (shift - 1) * sigma)) for sigma in sigmas
    )


@dataclass(frozen=True)
class CausalSchedule:
    """How each block is made.

    Attributes:
        timesteps: in (0, 1000], noisiest first.
        block: latent frames that are made at once.
        rule: ``renoise`` takes the predicted data and new noise, ``euler`` follows the flow.
        first_block: frames of the video's first block, if it is another number.
        first_timesteps: its timesteps, if they are others.
        rolling: each block runs a step behind the one before it; as many as there are steps are
            under way at once, and see each other (Rolling Forcing, arXiv 2509.25161).
    """

    timesteps: tuple[float | int, ...]
    block: int = 3
    rule: StepRule = "renoise"
    first_block: int | None = None
    first_timesteps: tuple[float | int, ...] | None = None
    rolling: bool = False

    def __post_init__(self) -> None:
        for timesteps in (self.timesteps, self.first_timesteps):
            if timesteps is not None:
                _check_timesteps(timesteps)
        if self.block < 1 or (self.first_block is not None and self.first_block < 1):
            raise RequestError(
                f"blocks of {self.block} latent frames, the first of {self.first_block}: "
                "each takes at least 1"
            )
        if self.rolling and (self.first_block or self.first_timesteps):
            raise RequestError("blocks that roll are all alike: the first has no size or timesteps")
        if self.rule not in _RULES:
            raise RequestError(f"step rule {self.rule!r}; there are {' and '.join(_RULES)}")

    @property
    def at_once(self) -> int:
        """Frames of a call of the model, at most."""
        return self.block * (len(self.timesteps) if self.rolling else 1)

    def block_at(self, frame: int) -> tuple[int, tuple[float | int, ...]]:
        """Frames and timesteps of the block that begins with latent frame ``frame``."""
        if frame:
            return self.block, self.timesteps
        return self.first_block or self.block, self.first_timesteps or self.timesteps

    def blocks_of(self, frames: int) -> Iterator[slice]:
        """Given frames as blocks: what ``block`` does not divide comes first, as an image does."""
        start, end = 0, frames % self.block or self.block
        while start < frames:
            yield slice(start, end)
            start, end = end, end + self.block


def are_timesteps(timesteps: Sequence[float | int]) -> bool:
    """Whether all are in (0, 1000] and each is less than the one before."""
    falling = all(a > b for a, b in pairwise(timesteps))
    return falling and all(0 < t <= NUM_TRAIN_TIMESTEPS for t in timesteps)


def _check_timesteps(timesteps: tuple[float | int, ...]) -> None:
    """Refuse timesteps that are none, out of range, or do not fall."""
    if not timesteps or not are_timesteps(timesteps):
        raise RequestError(
            f"timesteps {', '.join(f'{t:g}' for t in timesteps) or '(none)'}: at least one, "
            f"falling, each above 0 and at most {NUM_TRAIN_TIMESTEPS}"
        )


def step_sigmas(timesteps: Sequence[float | int]) -> Float[np.ndarray, " points"]:
    """The sigma of each timestep, and 0 after the last; float32."""
    return np.array([*timesteps, 0], np.float64).astype(np.float32) / NUM_TRAIN_TIMESTEPS


def moved(
    x: Latents,
    velocity: Latents,
    sigma: Float[Array, "..."],
    following: Float[Array, "..."],
    noise: Latents | None,
) -> Latents:
    """``x`` at the following sigma: new ``noise`` on the data that is meant, or an Euler step.

    Sigmas are one for all, or broadcast against latents ``[B, C, F, H, W]``.
    """
    if noise is None:
        return x + (following - sigma) * velocity
    return (1 - following) * (x - sigma * velocity) + following * noise


@dataclass(frozen=True)
class CausalWindow:
    """What a block sees: itself and latent frames before it.

    Attributes:
        frames: that are seen at most, a block of usual size included.
        sink: the first frames of the video, of which so many are seen for ever.
        positions: ``absolute`` counts frames from the video's first and ends at 1024; ``relative``
            counts within the window, the sink first, and has no end.
        recompute: when the window's keys and values are computed again: ``never``, when the
            ``prompt`` changes, or before every ``block``.
        context_noise: timestep to which finished frames are noised before their keys and values are
            computed (Self-Forcing's ``context_noise``); what a model got wrong in them is then less
            of what it goes on from.
        change_noise: the same for frames before another prompt, where those are computed again
            (``None``: as ``context_noise``). The nearer to 1000, the sooner blocks show what is
            told instead of going on with what was, and the less things stay where they were.
    """

    frames: int
    sink: int = 0
    positions: WindowPositions = "absolute"
    recompute: Recomputation = "never"
    context_noise: float | int = 0
    change_noise: float | int | None = None

    def __post_init__(self) -> None:
        for name in ("context_noise", "change_noise"):
            noise = getattr(self, name)
            if noise is not None and not 0 <= noise < NUM_TRAIN_TIMESTEPS:
                raise RequestError(
                    f"{name} {noise:g}: a timestep of at least 0, below {NUM_TRAIN_TIMESTEPS}"
                )
        if self.positions not in _POSITIONS:
            raise RequestError(
                f"positions {self.positions!r}; there are {' and '.join(_POSITIONS)}"
            )
        if self.recompute not in _RECOMPUTATIONS:
            raise RequestError(
                f"recompute {self.recompute!r}; there are {', '.join(_RECOMPUTATIONS)}"
            )
        if self.change_noise is not None and self.recompute != "prompt":
            raise RequestError(
                f"change_noise {self.change_noise:g} with recompute {self.recompute}: it is of "
                "what is computed again for another prompt; set recompute to prompt, or leave it "
                "out"
            )
        if self.sink < 0 or self.frames > ROPE_FRAMES:
            raise RequestError(
                f"a window of {self.frames} latent frames with a sink of {self.sink}: at most "
                f"{ROPE_FRAMES}, and a sink of at least 0"
            )

    def slots(self, block: int) -> int:
        """Frames that are kept before ``block`` frames which are made at once.

        Raises:
            RequestError: not one is, or the sink does not fit.
        """
        slots = self.frames - block
        if slots < max(1, self.sink):
            raise RequestError(
                f"a window of {self.frames} latent frames: with {block} made at once and a sink "
                f"of {self.sink} it needs at least {block + max(1, self.sink)}"
            )
        return slots

    def check_length(self, frames: int) -> None:
        """Refuse a video of so many latent frames, if positions end before it does.

        Raises:
            RequestError: it is too long; says what has no end.
        """
        if self.positions == "absolute" and frames > ROPE_FRAMES:
            raise RequestError(
                f"a video of {frames} latent frames with absolute positions: they end at "
                f"{ROPE_FRAMES}; positions relative to the window have no end"
            )
