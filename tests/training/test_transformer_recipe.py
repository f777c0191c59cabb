"""The tables of a video training file: which sigmas, what errors count, which clips."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skyreels_jax.errors import RequestError
from skyreels_jax.training.batches import draw_probabilities
from skyreels_jax.training.clip_source import ClipSource
from skyreels_jax.training.objective import cosmap
from skyreels_jax.training.sigma_distributions import KNOWN_FRAME_SIGMA, LogitNormal, draw_sigmas
from skyreels_jax.training.transformer_recipe import Objective


@pytest.mark.slow
def test_shares_are_those_of_videos():
    objective = Objective(frames=0.2, continued=0.4)
    sigma = np.asarray(objective.distribution().sample(jax.random.key(0), 8000, 5))
    whole = np.ptp(sigma, axis=1) == 0
    continued = ~whole & (sigma[:, 0] == np.float32(KNOWN_FRAME_SIGMA))
    # Four deviations of a share of 8000.
    assert abs(np.mean(whole) - 0.4) < 0.022
    assert abs(np.mean(continued) - 0.4) < 0.022


def test_given_frames_are_known_and_nearly_clean_ones_are_not():
    objective = Objective(frames=0.5, continued=0.5)
    asked = jax.random.key(0), 2000, 5
    drawn = draw_sigmas(objective.distribution(), *asked)
    sigma, known = map(np.asarray, drawn)
    assert np.all(sigma[known] == np.float32(KNOWN_FRAME_SIGMA))
    assert abs(np.mean(known.any(axis=1)) - 0.5) < 0.022
    assert not known.all(axis=1).any()
    # FoPP's first frames are often as clean as given ones, and are to be learned.
    nearly_clean = ~known.any(axis=1) & (sigma[:, 0] <= KNOWN_FRAME_SIGMA)
    assert nearly_clean.mean() > 0.02
    # The same sigmas as ever follow from a key.
    np.testing.assert_array_equal(sigma, objective.distribution().sample(*asked))
    assert not draw_sigmas(LogitNormal(), jax.random.key(0), 3, 5).known.any()


def test_a_weight_is_of_sigmas_alone():
    sigma = jnp.asarray([[KNOWN_FRAME_SIGMA, 0.5], [0.1, 0.9]], jnp.float32)
    np.testing.assert_array_equal(Objective(continued=0.5).weight(sigma), np.ones((2, 2)))
    weighted = Objective(continued=0.5, weighting="cosmap").weight(sigma)
    np.testing.assert_array_equal(weighted, cosmap(sigma))


@pytest.mark.parametrize(
    "wrong", [{"frames": 0.7, "continued": 0.5}, {"continued": -0.1}, {"text_dropout": 1.0}]
)
def test_impossible_shares_are_refused(wrong):
    with pytest.raises(ValueError, match="should be shares"):
        Objective(**wrong)


def test_two_things_come_as_often_as_asked():
    source = ClipSource(seed=3, frames=17, size=64)
    is_pair = np.array([len(source.scene(index)[0].things) == 2 for index in range(64)])
    assert 0 < is_pair.sum() < 64
    for share in (0.0, 0.06, 1.0):
        found = draw_probabilities(source, 64, share)
        assert found.sum() == pytest.approx(1)
        assert found[is_pair].sum() == pytest.approx(share)
        assert len(set(found[is_pair])) == len(set(found[~is_pair])) == 1
    with pytest.raises(RequestError, match="cannot be had from 1 clips"):
        draw_probabilities(source, 1, 0.5)
