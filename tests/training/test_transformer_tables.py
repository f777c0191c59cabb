"""The tables of a video training file: which levels, what errors count, which clips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skyreels_jax.errors import RequestError
from skyreels_jax.training.encoded import Source
from skyreels_jax.training.objective import cosmap
from skyreels_jax.training.sigma_distributions import KNOWN
from skyreels_jax.training.transformer_task import Objective, chances


def test_shares_are_those_of_videos():
    objective = Objective(frames=0.2, continued=0.4)
    sigma = np.asarray(objective.distribution().sample(jax.random.key(0), 8000, 5))
    whole = np.ptp(sigma, axis=1) == 0
    continued = ~whole & (sigma[:, 0] == np.float32(KNOWN))
    # Four deviations of a share of 8000.
    assert abs(np.mean(whole) - 0.4) < 0.022
    assert abs(np.mean(continued) - 0.4) < 0.022


def test_known_frames_count_nothing():
    sigma = jnp.asarray([[KNOWN, KNOWN, 0.5], [0.1, 0.2, 0.9]], jnp.float32)
    plain = np.asarray(Objective(continued=0.5).weight(sigma))
    np.testing.assert_array_equal(plain, [[0, 0, 1], [1, 1, 1]])
    weighted = Objective(continued=0.5, weighting="cosmap").weight(sigma)
    np.testing.assert_array_equal(weighted, plain * np.asarray(cosmap(sigma)))
    # Where no frames are given, the lowest levels are levels like others.
    np.testing.assert_array_equal(Objective(frames=0.5).weight(sigma), np.ones((2, 3)))


@pytest.mark.parametrize(
    "wrong", [{"frames": 0.7, "continued": 0.5}, {"continued": -0.1}, {"text_dropout": 1.0}]
)
def test_impossible_shares_are_refused(wrong):
    with pytest.raises(ValueError, match="should be shares"):
        Objective(**wrong)


def test_two_things_come_as_often_as_asked():
    source = Source(seed=3, frames=17, size=64)
    is_pair = np.array([len(source.scene(index)[0].things) == 2 for index in range(64)])
    assert 0 < is_pair.sum() < 64
    for share in (0.0, 0.06, 1.0):
        found = chances(source, 64, share)
        assert found.sum() == pytest.approx(1)
        assert found[is_pair].sum() == pytest.approx(share)
        assert len(set(found[is_pair])) == len(set(found[~is_pair])) == 1
    with pytest.raises(RequestError, match="cannot be had from 1 clips"):
        chances(source, 1, 0.5)
