"""Distances of arrays, their budgets, and archives on disk."""

import dataclasses
import zipfile
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tests.fabricate import Checkpoints

from skyreels_jax.errors import RequestError
from skyreels_jax.ops.positions import rope_apply, rope_table
from skyreels_jax.parity.compare import (
    BASELINE_FACTOR,
    LAYER_BUDGET,
    compare_activations,
    compare_stages,
    distance,
)
from skyreels_jax.parity.diagnosis import attention_faults, hypotheses
from skyreels_jax.parity.plan import ParityPlan, plan_comparison, synthetic_image
from skyreels_jax.parity.recording import arrays, load_call, save_call, writing
from skyreels_jax.parity.verdict import distance_json

B = np.array([3.0, -4.0], np.float32)


def test_a_distance_in_every_measure():
    found = distance("x", np.array([3.0, -3.5], np.float32), B, 0.2)
    assert found.max_abs == 0.5
    assert found.normalised == pytest.approx(0.5 / 3.5)
    assert found.relative_l2 == pytest.approx(0.1)
    assert found.cosine == pytest.approx(23 / (5 * np.hypot(3, 3.5)))
    assert found.scale == pytest.approx(23 / 25 - 1)
    assert found.passed
    assert not dataclasses.replace(found, budget=0.09).passed


def test_a_common_factor_fails_where_the_distance_would_pass():
    found = distance("x", B * np.float32(1 + 5e-6), B, LAYER_BUDGET)
    assert found.relative_l2 < LAYER_BUDGET
    assert not found.passed
    assert dataclasses.replace(found, scale=0.0).passed


@pytest.mark.parametrize("bad", [np.zeros(3, np.float32), np.array([np.nan, 1], np.float32)])
def test_what_cannot_be_measured_is_infinitely_far(bad: np.ndarray):
    found = distance("x", bad, B, 1.0)
    assert found.relative_l2 == np.inf
    assert not found.passed
    assert np.isfinite(distance_json(found)["relative_l2"])  # JSON has no infinity


def test_nothing_is_as_far_from_nothing_as_it_should_be():
    zero = np.zeros(2, np.float32)
    assert distance("x", zero, zero, 0.0).passed
    assert distance("x", B, zero, 0.0).relative_l2 == np.inf


def test_activations_in_bfloat16_are_held_against_the_reference_s_own_rounding():
    theirs, ours, rounded = ({"a": B * f} for f in (1.0, 1.011, 1.01))
    (found,) = compare_activations(["a", "b"], ours, theirs, 3, rounded)
    assert found.bf16_baseline == pytest.approx(0.01, rel=1e-3)
    assert found.budget == pytest.approx(BASELINE_FACTOR * 0.01, rel=1e-3)
    assert (found.step, found.passed) == (3, True)
    (found,) = compare_activations(["a"], {"a": B * 1.013}, theirs, 3, rounded)
    assert not found.passed


def test_an_activation_of_one_side_alone_is_an_error():
    with pytest.raises(RequestError, match="only one side"):
        list(compare_activations(["a"], {}, {"a": B}, 0))


def test_a_missing_stage_is_a_failure():
    found = list(compare_stages({"text": B}, {"text": B, "latents.2": B}))
    assert [(d.name, d.step, d.passed) for d in found] == [
        ("text", None, True),
        ("latents.2", 1, False),
    ]


def test_archives_are_written_as_values_come_and_read_as_they_are_asked_for(tmp_path: Path):
    values = {"a": B, "blocks.0.norm1": np.arange(24, dtype=np.float32).reshape(2, 3, 4)}
    with writing(tmp_path / "x.npz") as record:
        for name, value in values.items():
            record(name, value)
        assert not (tmp_path / "x.npz").exists()
    read = arrays(tmp_path / "x.npz")
    assert list(read) == list(values)
    for name, value in values.items():
        np.testing.assert_array_equal(read[name], value)


def test_an_interrupted_archive_is_not_there_and_a_name_comes_once(tmp_path: Path):
    with pytest.raises(ValueError, match="recorded twice"), writing(tmp_path / "x.npz") as record:
        record("a", B)
        record("a", B)
    assert list(tmp_path.iterdir()) == []


def test_an_archive_with_objects_is_refused(tmp_path: Path):
    np.savez(tmp_path / "x.npz", a=B, b=np.array([{}], dtype=object))
    with pytest.raises(ValueError, match="allow_pickle"):
        _ = arrays(tmp_path / "x.npz")["b"]
    assert zipfile.is_zipfile(tmp_path / "x.npz")


def test_a_call_comes_back(tmp_path: Path):
    call = {"hidden_states": B, "fps": [1], "enable_diffusion_forcing": True, "return_dict": False}
    with writing(tmp_path / "x.npz") as record:
        save_call(record, 2, call)
    back = load_call(arrays(tmp_path / "x.npz"), 2)
    np.testing.assert_array_equal(back.pop("hidden_states"), B)
    assert back == {"fps": [1], "enable_diffusion_forcing": True, "return_dict": False}


def test_a_plan_takes_from_the_checkpoint_what_is_not_given(checkpoints: Checkpoints, tmp_path):
    plan = plan_comparison(checkpoints("i2v", "diffusers"), num_tests=3, seed=5, steps=9)
    assert plan.seeds == (5, 6, 7)
    assert plan.traced == (0, 4, 8)
    assert (plan.task, plan.steps, plan.layers, plan.dtype) == ("i2v", 9, "all", "float32")
    plan.save(tmp_path / "plan.json")
    assert ParityPlan.load(tmp_path / "plan.json") == plan


def test_a_plan_that_cannot_be_is_refused(checkpoints: Checkpoints):
    with pytest.raises(RequestError, match="multiple of 16"):
        plan_comparison(checkpoints("t2v", "diffusers"), height=40, width=48)


def test_pictures_are_decided_by_their_seed():
    one, again, other = (synthetic_image(seed, 64, 96) for seed in (0, 0, 1))
    assert one.shape == (64, 96, 3)
    np.testing.assert_array_equal(one, again)
    assert np.mean(one != other) > 0.5


def test_the_rotation_of_hypotheses_is_that_of_the_model():
    x = np.random.default_rng(0).standard_normal((1, 24, 2, 16)).astype(np.float32)
    ours = np.asarray(rope_apply(jnp.asarray(x), rope_table((2, 3, 4), 16)))
    np.testing.assert_allclose(
        attention_faults.rotate(x, attention_faults.rotations((2, 3, 4), 16)), ours, atol=1e-6
    )
    swapped = attention_faults.rotate(x, attention_faults.rotations((2, 3, 4), 16, (0, 2, 1)))
    assert np.max(np.abs(swapped - ours)) > 0.1


def test_the_attention_of_hypotheses_is_the_textbooks():
    rng = np.random.default_rng(1)
    q, k, v = (rng.standard_normal((1, 5, 1, 4)) for _ in range(3))
    weights = np.exp(q[0, :, 0] @ k[0, :, 0].T / 2)
    expected = (weights / weights.sum(1, keepdims=True)) @ v[0, :, 0]
    np.testing.assert_allclose(attention_faults.attend(q, k, v)[0], expected)
    np.testing.assert_allclose(
        attention_faults.attend(q, k, v, allowed=np.eye(5, dtype=bool))[0], v[0, :, 0]
    )


def test_lines_are_fitted_by_frame_and_feature():
    x = np.random.default_rng(2).standard_normal((1, 2, 9, 3))
    a, b = np.full((1, 2, 3), 1.5), np.arange(6.0).reshape(1, 2, 3)
    found = hypotheses.fit_line(x, a[:, :, None] * x + b[:, :, None])
    np.testing.assert_allclose(found[0], a)
    np.testing.assert_allclose(found[1], b, atol=1e-12)
    np.testing.assert_allclose(hypotheses.fit_slope(x, a[:, :, None] * x), a)
