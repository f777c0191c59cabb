"""Which blocks are computed: counted, and enough for every frame that moves."""

from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from skyreels_jax.diffusion.block_reuse import BlockReuse, choose_lengths, plan_block_reuse
from skyreels_jax.diffusion.frame_schedule import FrameSchedule, plan_blocks, schedule_frames
from skyreels_jax.diffusion.unipc import flow_sigmas


def table(frames: int, block: int, steps: int, ar_step: int, prefix: int = 0) -> FrameSchedule:
    levels = flow_sigmas(steps, 8.0).timesteps
    return schedule_frames(plan_blocks(frames, block, prefix=prefix), levels, ar_step=ar_step)


def test_the_usual_asynchronous_run_computes_154_of_250_blocks():
    """25 latent frames in 5 blocks, 30 steps, 5 rows behind one another."""
    found = plan_block_reuse(table(25, 5, 30, 5), 25, 5)
    assert len(found.iterations) == 50
    assert found.total == 250
    assert found.cached == 4
    assert found.computed == 154
    assert found.computed < found.total


def test_frame_by_frame_it_is_a_tenth():
    """25 blocks of one frame, one after the other: 25 * 30 steps and 24 to keep, of 750 * 25."""
    found = plan_block_reuse(table(25, 1, 30, 30), 25, 1)
    assert (found.computed, found.total) == (25 * 30 + 24, 750 * 25)


def test_blocks_that_move_together_save_nothing():
    found = plan_block_reuse(table(6, 2, 4, 0), 6, 2)
    assert found.computed == found.total


def test_a_prefix_is_kept_from_the_first_row_on():
    found = plan_block_reuse(table(9, 3, 4, 0, prefix=3), 9, 3)
    assert {row.first for row in found.iterations} == {1}
    assert found.computed == 1 + 2 * 4


def test_where_given_frames_change_in_every_row_nothing_is_kept():
    found = plan_block_reuse(table(9, 3, 4, 2, prefix=3), 9, 3, reusable=False)
    assert found.cached == 0
    assert {row.first for row in found.iterations} == {0}
    assert [row.count for row in found.iterations] == [2, 2, 3, 3, 3, 3]


settings_of_runs = st.tuples(
    st.integers(2, 14), st.integers(1, 5), st.integers(1, 5), st.integers(2, 6), st.integers(0, 7)
)


@settings(deadline=None)
@given(settings_of_runs, st.integers(0, 6), st.integers(1, 5))
def test_every_row_computes_what_moves_and_has_kept_only_what_is_settled(run, prefix, most):
    frames, block, of_table, steps, ar_step = run
    prefix = min(prefix, frames - 1)
    timed = table(frames, of_table, steps, ar_step, prefix)
    found = plan_block_reuse(timed, frames, block, most=most)
    assert_enough(found, timed)
    assert len({row.count for row in found.iterations}) <= most


def assert_enough(found: BlockReuse, timed: FrameSchedule) -> None:
    for number, row in enumerate(found.iterations):
        part = found.frames_of(row)
        moving = np.flatnonzero(timed.update[number])
        assert part.start % found.block == 0
        assert part.start <= moving.min()
        assert moving.max() < part.stop <= found.frames
        # What lies before neither moves nor is told anything else from here on.
        assert not timed.update[number:, : part.start].any()
        assert (timed.timesteps[number:, : part.start] == timed.timesteps[-1, : part.start]).all()


def test_a_row_too_short_is_caught():
    timed = table(6, 2, 4, 2)
    found = plan_block_reuse(timed, 6, 2)
    rows = [row._replace(count=row.count - 1) for row in found.iterations]
    with pytest.raises(AssertionError):
        assert_enough(BlockReuse(found.block, found.frames, tuple(rows)), timed)


@given(st.dictionaries(st.integers(1, 9), st.integers(1, 20), min_size=1), st.integers(1, 4))
def test_the_lengths_chosen_are_the_cheapest_of_all_choices(counts, most):
    def cost(lengths):
        return sum(
            rows * min(length for length in lengths if length >= needed)
            for needed, rows in counts.items()
        )

    longest = max(counts)
    others = [length for length in counts if length != longest]
    choices = [
        (*some, longest)
        for size in range(min(most - 1, len(others)) + 1)
        for some in combinations(others, size)
    ]
    assert cost(choose_lengths(Counter(counts), most)) == min(map(cost, choices))
