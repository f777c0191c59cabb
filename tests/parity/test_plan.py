"""What a plan takes over, refuses and asks of either side."""

from pathlib import Path

import numpy as np
import pytest
from tests.fabricate import Checkpoints

from skyreels_jax.errors import RequestError
from skyreels_jax.parity.plan import ParityPlan, plan_comparison, side_names, synthetic_image

SMALL = {"height": 32, "width": 48, "num_frames": 9}


@pytest.mark.parametrize(
    ("wrong", "rule"),
    [
        ({"reference": "luck"}, "--reference 'luck' does not exist; there are diffusers, "),
        ({"dtype": "float16"}, "--dtype 'float16' does not exist; there are float32, bfloat16"),
        ({"layers": "some"}, "--layers 'some' does not exist; there are all, blocks, none"),
        ({"num_tests": 0}, "--num_tests 0 must be at least 1"),
        ({"num_frames": 8}, "`num_frames` 8 must be 4 k"),
        ({"steps": 0}, "`steps` 0 must be between 1 and 1000"),
    ],
)
def test_a_refusal_says_the_rule(checkpoints: Checkpoints, wrong, rule: str):
    with pytest.raises(RequestError, match=rule):
        plan_comparison(checkpoints("df", "original"), **(SMALL | wrong))


def test_what_is_not_given_comes_from_the_checkpoint(checkpoints: Checkpoints):
    plan = plan_comparison(checkpoints("t2v", "original"))
    defaults = plan.checkpoint().defaults
    assert plan.num_frames == defaults.num_frames.value
    assert (plan.reference, plan.dtype, plan.device) == ("diffusers", "float32", "cpu")
    assert plan.seeds == (0,)
    assert list(plan.tests) == [0]


@pytest.mark.parametrize(("steps", "traced"), [(1, (0,)), (2, (0, 1)), (8, (0, 4, 7))])
def test_first_middle_and_last_step_are_traced_once(
    checkpoints: Checkpoints, steps: int, traced: tuple[int, ...]
):
    assert plan_comparison(checkpoints("df", "original"), steps=steps, **SMALL).traced == traced


def test_a_plan_comes_back_from_its_file_with_words_of_any_language(
    checkpoints: Checkpoints, tmp_path: Path
):
    words = {"prompt": "狐狸 in the snöw", "num_tests": 2}
    plan = plan_comparison(checkpoints("df", "original"), **words, **SMALL)
    plan.save(tmp_path / "plan.json")
    assert "狐狸" in (tmp_path / "plan.json").read_text("utf-8")
    back = ParityPlan.load(tmp_path / "plan.json")
    assert back == plan
    assert isinstance(back.seeds, tuple)


def test_each_test_asks_for_its_own_seed_in_one_window(checkpoints: Checkpoints):
    plan = plan_comparison(checkpoints("df", "original"), num_tests=2, seed=7, steps=2, **SMALL)
    asked = [plan.request(test, None) for test in plan.tests]
    assert [request.seed for request in asked] == [7, 8]
    assert {(request.num_frames, request.steps) for request in asked} == {(9, 2)}


def test_the_reference_is_first_and_bfloat16_has_a_baseline(checkpoints: Checkpoints):
    folder = checkpoints("df", "original")

    def sides(only: str | None = None, **settings: str) -> list[str]:
        return side_names(plan_comparison(folder, **SMALL, **settings), only)

    assert sides() == ["reference", "jax"]
    assert sides(dtype="bfloat16") == ["reference", "bf16_baseline", "jax"]
    assert sides(dtype="bfloat16", reference="original-numerics")[1] == "bf16_baseline"
    assert sides(reference="hybrid") == ["reference", "jax"]
    assert sides("jax") == ["jax"]
    assert sides("torch", dtype="bfloat16") == ["reference"]


def test_a_picture_is_smooth_but_for_one_disc():
    picture = synthetic_image(3, 64, 96).astype(int)
    assert picture.std() > 5
    jumps = np.abs(np.diff(picture, axis=1)).max(-1) > 16
    # The edge of a disc crosses a row at most twice.
    assert jumps.any()
    assert jumps.sum(1).max() <= 2
