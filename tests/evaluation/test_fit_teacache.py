import numpy as np
import pytest

from skyreels_jax.evaluation.fit_teacache import fit_polynomial, record_changes
from skyreels_jax.evaluation.scores import MINI_CLIP
from skyreels_jax.generation.window_generator import WindowGenerator
from skyreels_jax.pipeline import Pipeline

CAPTION = "a red star moves slowly to the right on a black background"
STEPS = 8


def request(**changes):
    return {**MINI_CLIP, "prompt": CAPTION, "steps": STEPS, "seed": 1, "ar_step": 0, **changes}


@pytest.fixture(scope="module")
def pipeline():
    return Pipeline.from_pretrained("mini", dtype="float32", keep=True)


def test_a_polynomial_is_found_again():
    change = np.linspace(0.01, 0.3, 20)
    coefficients = (40.0, -20.0, 3.0, 0.5, 0.02)
    fit = fit_polynomial(change, np.polyval(coefficients, change))
    np.testing.assert_allclose(fit.coefficients, coefficients, rtol=1e-6)  # measured 1e-11
    assert fit.explained > 0.999999
    shuffled = np.random.default_rng(0).permutation(np.polyval(coefficients, change))
    assert fit_polynomial(change, shuffled).explained < 0.7


def test_too_few_changes_are_refused():
    change = np.array([0.1, 0.2, 0.3, 0.4] * 5)
    with pytest.raises(ValueError, match="4 different changes do not tell 5 coefficients"):
        fit_polynomial(change, change)


def test_changes_are_those_of_the_model(pipeline):
    changes = record_changes(pipeline, [request(), request(seed=2)])
    # Two calls in every step but the first, in two videos.
    assert len(changes.residual) == 2 * 2 * (STEPS - 1)
    assert len(changes.embedding) == len(changes.projected) == len(changes.residual)
    # The embedding knows the timestep alone: both calls and both videos see the same.
    for values in (changes.embedding, changes.projected):
        assert len(np.unique(np.round(values, 6))) == STEPS - 1
        assert (values > 0).all()
    assert len(np.unique(np.round(changes.residual, 6))) > STEPS - 1
    assert (changes.residual > 0).all()


@pytest.mark.slow
def test_recording_does_not_change_the_video(pipeline, monkeypatch):
    before = pipeline(**request())
    recorded, make = [], WindowGenerator.make
    monkeypatch.setattr(
        WindowGenerator, "make", lambda *a: recorded.append(make(*a)) or recorded[-1]
    )
    record_changes(pipeline, [request()])
    monkeypatch.undo()
    # Another compiled program of the same sums: measured 0.
    np.testing.assert_allclose(recorded[0], before.latents, atol=1e-4)
    np.testing.assert_array_equal(pipeline(**request()).frames, before.frames)
