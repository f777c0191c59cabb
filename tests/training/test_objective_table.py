"""The table `objective` of a training file: which levels, and what their errors count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skyreels_jax.training.levels import KNOWN
from skyreels_jax.training.objective import cosmap
from skyreels_jax.training.video_task import Objective


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
