import numpy as np
import pytest
import torch
from diffusers import SkyReelsV2DiffusionForcingPipeline
from hypothesis import given, settings
from hypothesis import strategies as st

from skyreels_jax.diffusion.frame_schedule import BlockPlan, plan_blocks, schedule_frames
from skyreels_jax.errors import RequestError


def evenly(steps: int) -> np.ndarray:
    return np.linspace(999, 30, steps).astype(np.int32)


def reference(frames: int, steps: int, ar_step: int, prefix: int, block: int):
    """diffusers' table; it needs nothing of the pipeline it is a method of."""
    matrix, index, mask, _ = SkyReelsV2DiffusionForcingPipeline.generate_timestep_matrix(
        None,  # pyright: ignore[reportArgumentType]
        frames,
        torch.from_numpy(evenly(steps)),
        frames,
        ar_step,
        prefix,
        block,
    )
    return matrix.numpy(), index.numpy(), mask.numpy()


def random_legal_setting(rng: np.random.Generator) -> tuple[int, int, int, int, int]:
    """Frames, steps, ar_step, prefix and block for which the original is defined."""
    block = int(rng.integers(1, 7))
    blocks = int(rng.integers(1, 9))
    steps = int(rng.integers(1, 40))
    ar_step = int(rng.integers(0, steps + 4))
    ready = int(rng.integers(0, blocks))
    return blocks * block, steps, ar_step, ready * block, block


@pytest.mark.parametrize("times", [200, pytest.param(2000, marks=pytest.mark.slow)])
def test_tables_equal_the_references_on_random_legal_settings(times: int):
    rng = np.random.default_rng(0)
    for _ in range(times):
        setting = random_legal_setting(rng)
        frames, steps, ar_step, prefix, block = setting
        plan = plan_blocks(frames, block, prefix=prefix)
        ours = schedule_frames(plan, evenly(steps), ar_step=ar_step)
        matrix, index, mask = reference(*setting)
        np.testing.assert_array_equal(ours.timesteps, matrix, err_msg=str(setting))
        np.testing.assert_array_equal(ours.index, index, err_msg=str(setting))
        np.testing.assert_array_equal(ours.update, mask, err_msg=str(setting))


def test_another_lag_is_caught_by_the_same_comparison():
    ours = schedule_frames(plan_blocks(10, 5), evenly(8), ar_step=3)
    matrix, *_ = reference(10, 8, 2, 0, 5)
    assert ours.timesteps.shape != matrix.shape or (ours.timesteps != matrix).any()


def test_the_worked_example_drawn_out():
    """Six frames, four steps, blocks of two, two iterations apart: spec section 7.4."""
    table = schedule_frames(plan_blocks(6, 2), [999, 749, 499, 249], ar_step=2)
    assert table.timesteps[:, ::2].tolist() == [
        [999, 999, 999],
        [749, 999, 999],
        [499, 999, 999],
        [249, 749, 999],
        [0, 499, 999],
        [0, 249, 749],
        [0, 0, 499],
        [0, 0, 249],
    ]
    first_updates = table.update[:, ::2].argmax(axis=0)
    assert first_updates.tolist() == [0, 2, 4]


@pytest.mark.parametrize(
    ("frames", "block", "ar_step", "prefix", "iterations"),
    [(25, 1, 0, 0, 30), (25, 5, 5, 0, 50), (25, 5, 5, 5, 45), (25, 1, 5, 0, 150)],
)
def test_the_number_of_iterations(
    frames: int, block: int, ar_step: int, prefix: int, iterations: int
):
    table = schedule_frames(plan_blocks(frames, block, prefix=prefix), evenly(30), ar_step=ar_step)
    assert table.iterations == iterations


@settings(max_examples=400, deadline=None)
@given(data=st.data())
def test_every_frame_takes_every_step_once_in_order_and_ends_clean(data: st.DataObject):
    frames = data.draw(st.integers(1, 400), label="frames")
    block = data.draw(st.integers(1, 8), label="block")
    prefix = data.draw(st.integers(0, min(frames - 1, 40)), label="prefix")
    steps = data.draw(st.integers(1, 12), label="steps")
    ar_step = data.draw(st.integers(0, 14), label="ar_step")
    table = schedule_frames(
        plan_blocks(frames, block, prefix=prefix), evenly(steps), ar_step=ar_step
    )

    assert not table.update[:, :prefix].any()
    assert (table.timesteps[:, :prefix] == 0).all()
    for frame in {prefix, (prefix + frames) // 2, frames - 1}:
        taken = table.index[table.update[:, frame], frame]
        assert taken.tolist() == list(range(1, steps + 1))
    # Each frame's noise only falls; a later frame is never cleaner than an earlier one.
    assert (np.diff(table.index, axis=0) >= 0).all()
    assert (np.diff(table.index, axis=1) <= 0).all()
    # After the last iteration nothing is left to do.
    assert (table.index[-1] >= steps).all()


def test_an_image_prefix_is_kept_when_blocks_are_longer_than_it():
    """The original overwrites it with noise: spec section 10, item 3."""
    plan = plan_blocks(25, 5, prefix=1)
    assert plan.lengths == (1, 5, 5, 5, 5, 4)
    table = schedule_frames(plan, evenly(30), ar_step=5)
    assert not table.update[:, 0].any()
    *_, mask = reference(25, 30, 5, 1, 5)
    assert mask[:, 0].sum() == 30


def test_frames_after_the_last_whole_block_are_denoised():
    """The original leaves them as noise: spec section 10, item 4."""
    table = schedule_frames(plan_blocks(26, 5), evenly(30), ar_step=5)
    assert table.update.sum(axis=0).tolist() == [30] * 26
    matrix, *_ = reference(26, 30, 5, 0, 5)
    assert matrix.shape[1] == 25


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: plan_blocks(5, 0), "at least 1"),
        (lambda: plan_blocks(5, 1, prefix=5), "leaves none"),
        (lambda: BlockPlan((1, 2), ready=2), "nothing to generate"),
        (lambda: BlockPlan(()), "at least one block"),
        (lambda: schedule_frames(plan_blocks(5, 1), [9], ar_step=-1), "negative"),
    ],
)
def test_what_makes_no_sense_is_refused_with_the_rule(call, words: str):
    with pytest.raises(RequestError, match=words):
        call()
