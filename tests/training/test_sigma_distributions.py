"""Noise levels: FoPP against exact enumeration, the others against their definitions."""

from collections import Counter
from fractions import Fraction
from functools import cache
from itertools import product
from math import comb

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skyreels_jax.training.objective import cosmap
from skyreels_jax.training.sigma_distributions import (
    KNOWN_FRAME_SIGMA,
    ContinuedVideo,
    IndependentFrames,
    LogitNormal,
    Mixed,
    NonDecreasing,
    ShiftedUniform,
    log_ways,
)

DRAWS = 40_000


@cache
def ways(count: int, frames: int, level: int, frame: int) -> int:
    """By the recurrence, in whole numbers: non-decreasing levels of the frames that follow."""
    if frame == frames - 1 or level == count - 1:
        return 1
    return ways(count, frames, level + 1, frame) + ways(count, frames, level, frame + 1)


def probability(levels: tuple[int, ...], count: int) -> Fraction:
    """Of a video's levels, over all frames that may have been drawn first."""
    frames, total = len(levels), Fraction(0)
    for first in range(frames):
        term = Fraction(1, frames * count)
        for frame in range(first + 1, frames):
            legal = range(levels[frame - 1], count)
            weights = {t: ways(count, frames, t, frame) for t in legal}
            term *= Fraction(weights[levels[frame]], sum(weights.values()))
        for frame in range(first - 1, -1, -1):
            legal = range(levels[frame + 1] + 1)
            mirror = {t: ways(count, frames, count - 1 - t, frames - 1 - frame) for t in legal}
            term *= Fraction(mirror[levels[frame]], sum(mirror.values()))
        total += term
    return total


@pytest.fixture(scope="module", params=[(4, 3), (3, 4), (6, 2)], ids=str)
def drawn(request):
    count, frames = request.param
    keys = jax.random.split(jax.random.key(1), DRAWS)
    sampler = NonDecreasing(count)
    indices = jax.jit(jax.vmap(lambda key: sampler.sample_indices(key, frames)))(keys)
    return count, frames, Counter(map(tuple, np.asarray(indices).tolist()))


def chi_square(counts: Counter, expected: dict[tuple[int, ...], float]) -> float:
    return sum((counts[levels] - n) ** 2 / n for levels, n in expected.items())


def test_fopp_has_its_exact_distribution(drawn):
    count, frames, counts = drawn
    legal = [v for v in product(range(count), repeat=frames) if list(v) == sorted(v)]
    exact = {levels: probability(levels, count) for levels in legal}
    assert sum(exact.values()) == 1
    assert set(counts) == set(legal)
    expected = {levels: float(p) * DRAWS for levels, p in exact.items()}
    freedom = len(legal) - 1
    # Mean `freedom`, variance twice that: five deviations. Measured 0.5 to 1.0 of the mean.
    assert chi_square(counts, expected) < freedom + 5 * np.sqrt(2 * freedom)
    # A uniform choice among the legal videos is another distribution.
    uniform = dict.fromkeys(legal, DRAWS / len(legal))
    assert chi_square(counts, uniform) > 10 * freedom


def test_levels_of_real_sizes_never_decrease_and_reach_both_ends():
    sigma = np.asarray(NonDecreasing().sample(jax.random.key(0), 512, 25))
    assert sigma.shape == (512, 25)
    assert np.all(np.diff(sigma, axis=1) >= 0)
    assert (sigma.min(), sigma.max()) == (0.0, pytest.approx(0.999))
    # Middle frames are at all levels.
    assert abs(sigma[:, 12].mean() - 0.5) < 0.05


def test_ways_are_those_of_whole_numbers():
    for level, frame in product(range(5), range(4)):
        found = np.exp(log_ways(5, 4)[level, frame])
        assert found == pytest.approx(ways(5, 4, level, frame), rel=1e-5)
    assert np.exp(log_ways(1000, 25)[0, 0] / 100) == pytest.approx(
        comb(1023, 24) ** (1 / 100), rel=1e-5
    )


@pytest.mark.parametrize("shift", [1.0, 8.0])
def test_shifted_levels_have_the_shifted_median(shift: float):
    for levels in (ShiftedUniform(shift), LogitNormal(shift=shift)):
        sigma = np.asarray(levels.sample(jax.random.key(2), 20_000, 3))
        assert sigma.shape == (20_000, 1)
        assert sigma.min() >= 0 and sigma.max() < 1.0001
        median = shift * 0.5 / (1 + (shift - 1) * 0.5)
        assert abs(np.median(sigma) - median) < 0.01


def test_frames_by_themselves_are_independent():
    sigma = np.asarray(IndependentFrames(ShiftedUniform()).sample(jax.random.key(3), 5000, 4))
    assert sigma.shape == (5000, 4)
    correlation = np.corrcoef(sigma.T) - np.eye(4)
    assert np.max(np.abs(correlation)) < 0.06


@pytest.mark.slow
def test_a_mixture_is_of_both_kinds():
    mixed = Mixed(ShiftedUniform(), NonDecreasing(), 0.25)
    sigma = np.asarray(mixed.sample(jax.random.key(4), 4000, 5))
    together = np.mean(np.ptp(sigma, axis=1) == 0)
    assert abs(together - 0.25) < 0.03
    assert jnp.all(jnp.diff(sigma, axis=1) >= 0)


def test_a_continuation_knows_its_first_frames():
    sigma = np.asarray(ContinuedVideo(LogitNormal(shift=4.0)).sample(jax.random.key(5), 4000, 5))
    known = sigma == np.float32(KNOWN_FRAME_SIGMA)
    given = known.sum(axis=1)
    # In front, at least one, never all, each number alike.
    assert np.all(known == (np.arange(5) < given[:, None]))
    assert Counter(given).keys() == {1, 2, 3, 4}
    assert max(abs(n - 1000) for n in Counter(given).values()) < 130
    # The others share one level, of the distribution given.
    others = np.where(known, sigma[:, 4:], sigma)
    assert np.all(others == sigma[:, 4:])
    assert abs(np.median(sigma[:, 4]) - 0.8) < 0.01
    with pytest.raises(ValueError, match="one latent frame"):
        ContinuedVideo(LogitNormal()).sample(jax.random.key(5), 1, 1)


@pytest.mark.parametrize(
    "make",
    [
        lambda: LogitNormal(std=0.0),
        lambda: ShiftedUniform(-1.0),
        lambda: NonDecreasing(0),
        lambda: Mixed(ShiftedUniform(), ShiftedUniform(), 1.5),
    ],
)
def test_impossible_distributions_are_refused(make):
    with pytest.raises(ValueError, match="should be"):
        make()


def test_cosmap_is_the_density_of_its_levels():
    # "t = 1 - 1 / (tan(pi / 2 * u) + 1)" for uniform u: its density is du / dt.
    u = np.linspace(0.01, 0.99, 2001)
    t = 1 - 1 / (np.tan(np.pi / 2 * u) + 1)
    density = np.gradient(u, t)
    found = np.asarray(cosmap(jnp.asarray(t, jnp.float32)[None]))[0]
    # Measured: 5e-7 within, the differences being coarse at both ends.
    np.testing.assert_allclose(found[1:-1], density[1:-1], rtol=1e-5)
