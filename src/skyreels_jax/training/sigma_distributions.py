"""Which sigmas a training step sees: one a video, or one a frame (diffusion forcing).

``sigma`` is the share of noise, 0 to below 1, as in inference
(:mod:`skyreels_jax.diffusion.unipc`): larger is noisier.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import Final, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from skyreels_jax.diffusion.unipc import NUM_TRAIN_TIMESTEPS

Sigmas = Float[Array, "B steps"]
# The sigma of frames that are given: the original's `addnoise_condition`, 20 of 1000.
KNOWN_FRAME_SIGMA: Final = 0.02


class DrawnSigmas(NamedTuple):
    """Sigmas of videos ``[B, F]``, and which of their frames are given instead of learned."""

    sigma: Sigmas
    known: Bool[Array, "B F"]


@runtime_checkable
class SigmaDistribution(Protocol):
    """A distribution of sigmas."""

    def sample(self, key: Array, batch: int, frames: int) -> Sigmas:
        """Sigmas ``[B, 1]`` of whole videos, or ``[B, F]`` of their frames."""
        ...


@dataclass(frozen=True)
class LogitNormal:
    """``sigmoid(mean + std * normal)``, one sigma a video, moved towards noise by ``shift``.

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
    """Uniform, one sigma a video, moved towards noise by ``shift``: 1 leaves it uniform."""

    shift: float = 1.0

    def __post_init__(self):
        if not self.shift > 0:
            raise ValueError(f"{self.shift=} should be positive")

    def sample(self, key: Array, batch: int, frames: int) -> Sigmas:
        """``[B, 1]``."""
        del frames
        return shifted(jax.random.uniform(key, (batch, 1)), self.shift)


@dataclass(frozen=True)
class IndependentFrames:
    """Every frame by itself, by the ``distribution`` of whole videos."""

    distribution: SigmaDistribution

    def sample(self, key: Array, batch: int, frames: int) -> Sigmas:
        """``[B, F]``."""
        return self.distribution.sample(key, batch * frames, 1).reshape(batch, frames)


@dataclass(frozen=True)
class ContinuedVideo:
    """One frame or more given, at :data:`KNOWN_FRAME_SIGMA`, the others at one other sigma.

    This is what extending a video asks for, and every window of a long one but the first.
    """

    distribution: SigmaDistribution

    def draw(self, key: Array, batch: int, frames: int) -> DrawnSigmas:
        """Sigmas and given frames; raises ValueError for a single frame."""
        if frames < 2:
            raise ValueError("a video of one latent frame cannot be continued")
        which, other = jax.random.split(key)
        known = jnp.arange(frames)[None] < jax.random.randint(which, (batch, 1), 1, frames)
        sigma = self.distribution.sample(other, batch, 1)
        return DrawnSigmas(jnp.where(known, KNOWN_FRAME_SIGMA, sigma), known)

    def sample(self, key: Array, batch: int, frames: int) -> Sigmas:
        """``[B, F]``; raises as :meth:`draw`."""
        return self.draw(key, batch, frames).sigma


@dataclass(frozen=True)
class NonDecreasing:
    """Sigmas that never decrease along a video: the frame-oriented probability propagation (FoPP).

    A frame and its timestep are drawn uniformly; later frames take some from there up, earlier ones
    from there down, each weighted by the number of non-decreasing ways to go on.

    Source: Sun et al., "AR-Diffusion" (arXiv 2503.07418), which SkyReels-V2 was trained with. The
    counts are binomial coefficients, here by their logarithms: 1000 timesteps and 25 frames have
    more ways than a float can hold.

    Attributes:
        count: of timesteps; ``t`` is ``sigma = t / count``.
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
        """The timesteps of one video, 0 to ``count - 1``."""
        onward = jnp.asarray(log_ways(self.count, frames))
        # Mirrored: ways to come from the first frame to timestep t at frame f.
        back = onward[::-1, ::-1]
        where, which, later, earlier = jax.random.split(key, 4)
        frame = jax.random.randint(where, (), 0, frames)
        drawn = jax.random.randint(which, (), 0, self.count)
        timesteps = jnp.arange(self.count)

        def spread(column: Array, key: Array, upward: bool) -> Int[Array, " F"]:
            def turn(current: Array, at: tuple[Array, Array]) -> tuple[Array, Array]:
                number, key = at
                legal = timesteps >= current if upward else timesteps <= current
                weights = jnp.where(legal, column[:, number], -jnp.inf)
                moves = number > frame if upward else number < frame
                current = jnp.where(moves, jax.random.categorical(key, weights), current)
                return current, current

            keys = jax.random.split(key, frames)
            return jax.lax.scan(turn, drawn, (jnp.arange(frames), keys), reverse=not upward)[1]

        ahead, behind = spread(onward, later, True), spread(back, earlier, False)
        return jnp.where(jnp.arange(frames) < frame, behind, ahead)


@dataclass(frozen=True)
class Mixed:
    """Each video by ``first`` with the given ``share``, else by ``second``."""

    first: SigmaDistribution
    second: SigmaDistribution
    share: float

    def __post_init__(self):
        if not 0 <= self.share <= 1:
            raise ValueError(f"{self.share=} should be between 0 and 1")

    def draw(self, key: Array, batch: int, frames: int) -> DrawnSigmas:
        """Sigmas ``[B, F]`` and given frames."""
        which, one, other = jax.random.split(key, 3)
        is_first = jax.random.bernoulli(which, self.share, (batch, 1))
        first = draw_sigmas(self.first, one, batch, frames)
        second = draw_sigmas(self.second, other, batch, frames)
        return DrawnSigmas(
            *(jnp.where(is_first, *pair) for pair in zip(first, second, strict=True))
        )

    def sample(self, key: Array, batch: int, frames: int) -> Sigmas:
        """``[B, F]``."""
        return self.draw(key, batch, frames).sigma


def draw_sigmas(
    distribution: SigmaDistribution, key: Array, batch: int, frames: int
) -> DrawnSigmas:
    """Sigmas of all frames, and which of these are given: none, where that is not drawn."""
    if isinstance(distribution, Mixed | ContinuedVideo):
        return distribution.draw(key, batch, frames)
    sigma = distribution.sample(key, batch, frames)
    return DrawnSigmas(
        jnp.broadcast_to(sigma, (batch, frames)), jnp.zeros((batch, frames), jnp.bool_)
    )


def shifted(sigma: Sigmas, shift: float) -> Sigmas:
    """``shift * sigma / (1 + (shift - 1) * sigma)``, as inference shifts its grid."""
    return shift * sigma / (1 + (shift - 1) * sigma)


@cache
def log_ways(count: int, frames: int) -> Float[np.ndarray, "timesteps F"]:
    """Logarithm of how many non-decreasing timesteps follow ``t`` at frame ``f``.

    ``S[t, f] = S[t + 1, f] + S[t, f + 1]`` with ones at the last timestep and the last frame: paths
    in a lattice, ``binomial(a + b, b)`` with ``a`` timesteps above and ``b`` frames after.
    """
    above = np.arange(count - 1, -1, -1)[:, None]
    after = np.arange(frames - 1, -1, -1)[None, :]
    log_factorial = np.array([math.lgamma(n + 1) for n in range(count + frames)])
    ways = log_factorial[above + after] - log_factorial[above] - log_factorial[after]
    return ways.astype(np.float32)
