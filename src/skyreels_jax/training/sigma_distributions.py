"""Which noise levels a training step sees: one a video, or one a frame (diffusion forcing).

A level ``sigma`` is the share of noise, 0 to below 1, as in inference
(:mod:`skyreels_jax.diffusion.sigmas`): larger is noisier.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Final, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from skyreels_jax.diffusion.sigmas import NUM_TRAIN_TIMESTEPS

Sigmas = Float[Array, "B steps"]
# Of frames that are given: that of the original's `addnoise_condition`, 20 of 1000.
KNOWN: Final = 0.02


@runtime_checkable
class Levels(Protocol):
    """A distribution of noise levels."""

    def sample(self, key: Array, batch: int, frames: int) -> Sigmas:
        """Levels ``[B, 1]`` of whole videos, or ``[B, F]`` of their frames."""
        ...


@dataclass(frozen=True)
class LogitNormal:
    """``sigmoid(mean + std * normal)``, one level a video, moved towards noise by ``shift``.

    Source: Esser et al., "Scaling Rectified Flow Transformers" (arXiv 2403.03206), section 3.1.
    """

    mean: float = 0.0
    std: float = 1.0
    shift: float = 1.0

    def __post_init__(self):
        if not (self.std > 0 and self.shift > 0):
            raise ValueError(f"{self.std=} and {self.shift=} should be positive")

    def sample(self, key: Array, batch: int, frames: int) -> Sigmas:
        """``[B, 1]``."""
        del frames
        normal = jax.random.normal(key, (batch, 1))
        return shifted(jax.nn.sigmoid(self.mean + self.std * normal), self.shift)


@dataclass(frozen=True)
class ShiftedUniform:
    """Uniform, one level a video, moved towards noise by ``shift``: 1 leaves it uniform."""

    shift: float = 1.0

    def __post_init__(self):
        if not self.shift > 0:
            raise ValueError(f"{self.shift=} should be positive")

    def sample(self, key: Array, batch: int, frames: int) -> Sigmas:
        """``[B, 1]``."""
        del frames
        return shifted(jax.random.uniform(key, (batch, 1)), self.shift)


@dataclass(frozen=True)
class EachFrame:
    """Every frame by itself, by ``levels`` of whole videos."""

    levels: Levels

    def sample(self, key: Array, batch: int, frames: int) -> Sigmas:
        """``[B, F]``."""
        return self.levels.sample(key, batch * frames, 1).reshape(batch, frames)


@dataclass(frozen=True)
class Continuation:
    """One frame or more given, at level :data:`KNOWN`, the others together by ``levels``.

    This is what extending a video asks for, and every window of a long one but the first.
    """

    levels: Levels

    def sample(self, key: Array, batch: int, frames: int) -> Sigmas:
        """``[B, F]``; raises ValueError for a single frame."""
        if frames < 2:
            raise ValueError("a video of one latent frame cannot be continued")
        which, level = jax.random.split(key)
        given = jax.random.randint(which, (batch, 1), 1, frames)
        sigma = self.levels.sample(level, batch, 1)
        return jnp.where(jnp.arange(frames)[None] < given, KNOWN, sigma)


@dataclass(frozen=True)
class NonDecreasing:
    """Levels that never decrease along a video: the frame-oriented probability propagation (FoPP).

    A frame and its level are drawn uniformly; later frames take levels from there up, earlier ones
    from there down, each weighted by the number of non-decreasing ways to go on.

    Source: Sun et al., "AR-Diffusion" (arXiv 2503.07418), which SkyReels-V2 was trained with. The
    counts are binomial coefficients, here by their logarithms: 1000 levels and 25 frames have more
    ways than a float can hold.

    Attributes:
        count: of levels; level ``t`` is ``sigma = t / count``.
        shift: towards noise, afterwards.
    """

    count: int = NUM_TRAIN_TIMESTEPS
    shift: float = 1.0

    def __post_init__(self):
        if not (self.count >= 1 and self.shift > 0):
            raise ValueError(f"{self.count=} should be at least 1 and {self.shift=} positive")

    def sample(self, key: Array, batch: int, frames: int) -> Sigmas:
        """``[B, F]``."""
        sample = jax.vmap(lambda key: self.sample_indices(key, frames))
        indices = sample(jax.random.split(key, batch))
        return shifted(indices.astype(jnp.float32) / self.count, self.shift)

    def sample_indices(self, key: Array, frames: int) -> Int[Array, " F"]:
        """The levels of one video, 0 to ``count - 1``."""
        onward = jnp.asarray(log_ways(self.count, frames))
        # Mirrored: ways to come from the first frame to level t at frame f.
        back = onward[::-1, ::-1]
        where, which, later, earlier = jax.random.split(key, 4)
        frame = jax.random.randint(where, (), 0, frames)
        level = jax.random.randint(which, (), 0, self.count)
        levels = jnp.arange(self.count)

        def walk(column: Array, key: Array, upward: bool) -> Int[Array, " F"]:
            def turn(current: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
                number, key = at
                legal = levels >= current if upward else levels <= current
                weights = jnp.where(legal, column[:, number], -jnp.inf)
                drawn = jax.random.categorical(key, weights)
                moves = number > frame if upward else number < frame
                current = jnp.where(moves, drawn, current)
                return current, current

            keys = jax.random.split(key, frames)
            return jax.lax.scan(turn, level, (jnp.arange(frames), keys), reverse=not upward)[1]

        ahead, behind = walk(onward, later, True), walk(back, earlier, False)
        return jnp.where(jnp.arange(frames) < frame, behind, ahead)


@dataclass(frozen=True)
class Mixed:
    """Each video by ``first`` with the given ``share``, else by ``second``."""

    first: Levels
    second: Levels
    share: float

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"{self.share=} should be between 0 and 1")

    def sample(self, key: Array, batch: int, frames: int) -> Sigmas:
        """``[B, F]``."""
        which, one, other = jax.random.split(key, 3)
        is_first = jax.random.bernoulli(which, self.share, (batch, 1))
        drawn = (
            jnp.broadcast_to(levels.sample(key, batch, frames), (batch, frames))
            for levels, key in ((self.first, one), (self.second, other))
        )
        return jnp.where(is_first, *drawn)


def shifted(sigma: Sigmas, shift: float) -> Sigmas:
    """``shift * sigma / (1 + (shift - 1) * sigma)``, as inference shifts its grid."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@cache
def log_ways(count: int, frames: int) -> Float[np.ndarray, "levels F"]:
    """Logarithm of how many non-decreasing levels follow level ``t`` at frame ``f``.

    ``S[t, f] = S[t + 1, f] + S[t, f + 1]`` with ones at the last level and the last frame: paths in
    a lattice, ``binomial(a + b, b)`` with ``a`` levels above and ``b`` frames after.
    """
    above = np.arange(count - 1, -1, -1)[:, None]
    after = np.arange(frames - 1, -1, -1)[None, :]
    log_factorial = np.array([math.lgamma(n + 1) for n in range(count + frames)])
    ways = log_factorial[above + after] - log_factorial[above] - log_factorial[after]
    return ways.astype(np.float32)
