"""The sigmas against the published timesteps and against diffusers' scheduler."""

import numpy as np
import pytest
from diffusers import UniPCMultistepScheduler
from tests.diffusion.diffusers_grid import diffusers_sigmas

from skyreels_jax.diffusion.unipc import FlowSchedule, flow_sigmas, schedule_from_sigmas

# What the original's scheduler hands its model, printed from it.
PUBLISHED = {
    (30, 8.0): """999 995 991 986 980 975 969 963 956 948 941 932 922 912 901 888 874 859 841 822
        799 773 743 708 666 615 551 470 363 216""",
    (30, 5.0): """999 992 985 978 969 961 952 942 931 920 908 895 882 867 850 833 813 792 768 742
        713 681 644 603 555 499 434 356 262 146""",
    (30, 3.0): """999 988 976 963 950 937 922 907 891 874 856 837 817 796 773 749 723 696 666 634
        599 562 521 476 428 374 315 249 176 93""",
    (50, 5.0): """999 995 991 987 982 978 973 968 963 957 952 946 940 934 927 920 913 906 898 890
        882 873 863 854 843 833 821 809 796 783 768 753 737 720 701 681 660 636 611 584 555 522
        487 448 405 356 302 241 172 92""",
    (50, 8.0): """999 997 994 991 989 986 983 979 976 973 969 965 961 957 953 948 944 939 934 928
        922 916 910 903 896 888 880 871 862 852 841 830 817 804 789 773 756 737 716 692 666 636
        603 565 521 470 409 337 249 140""",
}


def table(key: tuple[int, float]) -> list[int]:
    return [int(word) for word in PUBLISHED[key].split()]


@pytest.mark.parametrize("key", PUBLISHED)
def test_the_published_timesteps_are_reproduced(key: tuple[int, float]):
    assert flow_sigmas(*key).timesteps.tolist() == table(key)


@pytest.mark.parametrize("wrong", [(29, 8.0), (30, 7.9), (30, 5.0)])
def test_a_wrong_step_count_or_shift_gives_other_timesteps(wrong: tuple[int, float]):
    assert flow_sigmas(*wrong).timesteps.tolist() != table((30, 8.0))


def test_diffusers_grid_has_other_timesteps():
    ours, theirs = flow_sigmas(30, 8.0), diffusers_sigmas(30, 8.0)
    assert np.sum(ours.timesteps != theirs.timesteps) == 16
    assert theirs.timesteps[-1] == 221
    assert np.max(np.abs(ours.sigmas - theirs.sigmas)) == pytest.approx(0.0052, abs=1e-4)


@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 30, 50])
@pytest.mark.parametrize("shift", [1.0, 3.0, 5.0, 8.0])
def test_diffusers_grid_is_diffusers_own(num_steps: int, shift: float):
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=shift
    )
    scheduler.set_timesteps(num_steps)
    ours = diffusers_sigmas(num_steps, shift)
    np.testing.assert_array_equal(ours.sigmas, scheduler.sigmas.numpy().astype(np.float64))
    np.testing.assert_array_equal(ours.timesteps, scheduler.timesteps.numpy())


def test_one_step_goes_from_the_highest_sigma_to_zero():
    schedule = flow_sigmas(1, 8.0)
    assert schedule.timesteps.tolist() == [999]
    assert schedule.sigmas[1] == 0


def test_sigmas_stay_apart_where_truncated_timesteps_collide():
    schedule = flow_sigmas(150, 8.0)
    assert len(set(schedule.timesteps.tolist())) < schedule.num_steps
    assert np.all(np.diff(schedule.sigmas) < 0)


@pytest.mark.parametrize(("num_steps", "shift"), [(0, 8.0), (30, 1e5), (30, np.nan), (30, 0.0)])
def test_sigmas_that_cannot_be_told_apart_are_refused(num_steps: int, shift: float):
    with pytest.raises(ValueError, match="sigmas must fall|at least one"):
        flow_sigmas(num_steps, shift)


@pytest.mark.parametrize("sigmas", [[1.0, 0.5, 0.0], [0.9, 0.9, 0.0], [0.9, 0.5, 0.1]])
def test_a_schedule_must_fall_from_below_one_to_zero(sigmas: list[float]):
    with pytest.raises(ValueError, match="sigmas must fall"):
        FlowSchedule(np.array(sigmas), np.array([900, 500]))


def test_sigmas_can_be_given():
    schedule = schedule_from_sigmas(np.array([0.75, 0.5]))
    assert schedule.sigmas.tolist() == [0.75, 0.5, 0.0]
    assert schedule.timesteps.tolist() == [750, 500]
