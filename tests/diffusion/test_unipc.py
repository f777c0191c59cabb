"""UniPC against diffusers' scheduler over whole runs, and frame by frame against itself."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from tests.diffusion.diffusers_grid import diffusers_sigmas

from skyreels_jax.diffusion import unipc
from skyreels_jax.diffusion.unipc import FlowSchedule, flow_sigmas

FRAMES, FRAME_SHAPE = 3, (2, 4)
# Maximum over all elements; samples are of size 3. Diffusers works its weights out in float32.
TOL = 1.5e-5  # measured at most 3.6e-6 over N = 1..50 (at N = 45, shift 3)


def noise(seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((FRAMES, *FRAME_SHAPE)).astype(np.float32)


def velocity(x: np.ndarray, timestep: float) -> np.ndarray:
    """Stands in for the model: smooth, nonlinear, dependent on the timestep."""
    level = np.float32(timestep / 1000)
    return (np.sin(2 * x) * (1 + level) + x * level - np.float32(0.3)).astype(np.float32)


def by_diffusers(schedule: FlowSchedule, x: np.ndarray) -> np.ndarray:
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )
    # Passed levels go through the (neutral) shift; the stored ones are set to be sure.
    scheduler.set_timesteps(schedule.num_steps, sigmas=schedule.sigmas[:-1].copy())
    scheduler.sigmas = torch.tensor(schedule.sigmas, dtype=torch.float32)
    scheduler.set_begin_index(0)
    sample = torch.from_numpy(x)
    for timestep, ours in zip(scheduler.timesteps, schedule.timesteps, strict=True):
        prediction = torch.from_numpy(velocity(sample.numpy(), float(ours)))
        sample = scheduler.step(prediction, timestep, sample, return_dict=False)[0]
    return sample.numpy()


jitted_step = jax.jit(unipc.step)


def by_us(schedule: FlowSchedule, x: np.ndarray, table: unipc.Coefficients | None = None):
    table = unipc.tabulate(schedule) if table is None else table
    sample, state = jnp.asarray(x), unipc.init(jnp.asarray(x))
    everyone = jnp.ones(1, bool)
    for index, timestep in enumerate(schedule.timesteps):
        prediction = jnp.asarray(velocity(np.asarray(sample), float(timestep)))
        row = table.at(np.array([index]))
        sample, state = jitted_step(row, state, sample, prediction, everyone)
    return np.asarray(sample)


@pytest.mark.parametrize("num_steps", [*range(1, 51)])
@pytest.mark.parametrize("shift", [1.0, 3.0, 8.0])
def test_a_run_equals_diffusers(num_steps: int, shift: float):
    schedule = flow_sigmas(num_steps, shift)
    assert np.max(np.abs(by_us(schedule, noise()) - by_diffusers(schedule, noise()))) < TOL


def test_a_run_on_diffusers_own_levels_equals_diffusers():
    schedule = diffusers_sigmas(30, 5.0)
    assert np.max(np.abs(by_us(schedule, noise()) - by_diffusers(schedule, noise()))) < TOL


def without_corrector(table: unipc.Coefficients) -> unipc.Coefficients:
    nothing = np.zeros_like(table.keep)
    return table._replace(
        from_sample=nothing + 1,
        from_start=nothing,
        from_current=nothing,
        from_previous=nothing,
        from_older=nothing,
    )


def of_first_order(table: unipc.Coefficients) -> unipc.Coefficients:
    return table._replace(
        add_current=table.add_current + table.add_previous,
        add_previous=np.zeros_like(table.add_previous),
    )


# Measured 5.6e-3 and 6.0e-2.
@pytest.mark.parametrize("broken", [without_corrector, of_first_order])
def test_a_solver_without_one_of_its_parts_is_caught(broken):
    schedule = flow_sigmas(10, 8.0)
    ours = by_us(schedule, noise(), broken(unipc.tabulate(schedule)))
    assert np.max(np.abs(ours - by_diffusers(schedule, noise()))) > 100 * TOL


# Measured 4.8e-2 and 2.4e-2.
@pytest.mark.parametrize("wrong", [flow_sigmas(9, 8.0), flow_sigmas(10, 7.5)])
def test_a_wrong_schedule_is_caught(wrong: FlowSchedule):
    expected = by_diffusers(flow_sigmas(10, 8.0), noise())
    assert np.max(np.abs(by_us(wrong, noise()) - expected)) > 100 * TOL


def test_colliding_timesteps_do_not_confuse_the_solver():
    """150 steps at shift 8 start with the same truncated timestep twice."""
    schedule = flow_sigmas(150, 8.0)
    assert len(set(schedule.timesteps.tolist())) < 150
    close = by_us(flow_sigmas(100, 8.0), noise())
    ours = by_us(schedule, noise())
    assert np.all(np.isfinite(ours))
    # Both runs follow one equation; measured 0.0007 apart, and 0.36 from a run of 8 steps.
    assert np.max(np.abs(ours - close)) < 0.003
    assert np.max(np.abs(ours - by_us(flow_sigmas(8, 8.0), noise()))) > 0.1


def test_frames_at_different_steps_each_take_their_own():
    """Frame f starts 2 f evaluations late and stops by itself: the result is the common run's."""
    schedule = flow_sigmas(6, 5.0)
    table = unipc.tabulate(schedule)
    x = noise()
    sample, state = jnp.asarray(x), unipc.init(jnp.asarray(x))
    for row in range(6 + 2 * (FRAMES - 1)):
        index = row - 2 * np.arange(FRAMES)
        update = (index >= 0) & (index < 6)
        index = np.clip(index, 0, 5)
        prediction = np.stack(
            [velocity(np.asarray(sample[f]), schedule.timesteps[index[f]]) for f in range(FRAMES)]
        )
        before = sample
        sample, state = jitted_step(
            table.at(index), state, sample, jnp.asarray(prediction), jnp.asarray(update)
        )
        np.testing.assert_array_equal(np.asarray(sample)[~update], np.asarray(before)[~update])
    # Not bit-equal: weights of one frame and of all compile to different fusions.
    np.testing.assert_allclose(np.asarray(sample), by_us(schedule, x), atol=2e-6)  # measured 0


def test_a_frame_updated_when_it_should_rest_is_caught():
    schedule = flow_sigmas(4, 5.0)
    table = unipc.tabulate(schedule)
    x = jnp.asarray(noise())
    v = jnp.asarray(velocity(noise(), 999.0))
    row = table.at(np.array([0]))
    resting, _ = jitted_step(row, unipc.init(x), x, v, jnp.array([True, False, True]))
    moving, _ = jitted_step(row, unipc.init(x), x, v, jnp.ones(1, bool))
    assert not np.array_equal(resting[1], moving[1])
    np.testing.assert_array_equal(resting[0], moving[0])


def test_rows_can_be_looked_up_on_the_device():
    table = unipc.tabulate(flow_sigmas(5, 3.0))
    index = np.array([4, 0, 2])
    on_device = jax.jit(lambda t, i: t.at(i))(jax.tree.map(jnp.asarray, table), index)
    for ours, expected in zip(
        jax.tree.leaves(on_device), jax.tree.leaves(table.at(index)), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(ours), expected)


def test_the_last_step_returns_the_data_estimate():
    schedule = flow_sigmas(1, 8.0)
    x = jnp.asarray(noise())
    v = jnp.asarray(velocity(noise(), 999.0))
    row = unipc.tabulate(schedule).at(np.array([0]))
    sample, _ = jitted_step(row, unipc.init(x), x, v, jnp.ones(1, bool))
    estimate = np.asarray(x) - np.float32(schedule.sigmas[0]) * np.asarray(v)
    np.testing.assert_allclose(np.asarray(sample), estimate, atol=1e-6)  # measured 2.4e-7


def by_diffusers_step_by_step(schedule: FlowSchedule, samples: list[np.ndarray]):
    """Each next sample in bfloat16, from the given samples and what the scheduler remembers."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )
    scheduler.set_timesteps(schedule.num_steps, sigmas=schedule.sigmas[:-1].copy())
    scheduler.sigmas = torch.tensor(schedule.sigmas, dtype=torch.float32)
    scheduler.set_begin_index(0)
    for x, timestep, ours in zip(samples, scheduler.timesteps, schedule.timesteps, strict=True):
        prediction = torch.from_numpy(velocity(x, float(ours)))
        sample = torch.from_numpy(x).bfloat16()
        yield scheduler.step(prediction, timestep, sample, return_dict=False)[0].float().numpy()


def rounded_run(schedule: FlowSchedule, table: unipc.Coefficients) -> list[np.ndarray]:
    """All samples of a run whose samples are bfloat16, the first one included."""
    sample = jnp.asarray(rounding_noise(), jnp.bfloat16)
    state, samples = unipc.init(sample), [np.asarray(sample, np.float32)]
    for index, timestep in enumerate(schedule.timesteps):
        prediction = jnp.asarray(velocity(samples[-1], float(timestep)))
        row = table.at(np.array([index]))
        sample, state = jitted_step(row, state, sample, prediction, jnp.ones(1, bool))
        samples.append(np.asarray(sample, np.float32))
    return samples


def rounding_noise() -> np.ndarray:
    return np.random.default_rng(4).standard_normal((3, 64, 64)).astype(np.float32)


def share_that_differs(schedule: FlowSchedule, table: unipc.Coefficients) -> float:
    samples = rounded_run(schedule, table)
    theirs = by_diffusers_step_by_step(schedule, samples[:-1])
    return float(np.mean([ours != them for ours, them in zip(samples[1:], theirs, strict=True)]))


def as_on_a_cpu(table: unipc.Coefficients) -> unipc.Coefficients:
    """PyTorch rounds a number that stands before a bfloat16 array to bfloat16, on a CPU alone.

    On CUDA, where the original runs, it multiplies with the number as it is, and so do we.
    """
    return table._replace(
        keep=table.keep.astype(jnp.bfloat16).astype(np.float32),
        from_start=table.from_start.astype(jnp.bfloat16).astype(np.float32),
    )


# A sum in another order falls now and then on the other side of a rounding boundary.
ROUNDING_SHARE = 2e-4  # measured 2.0e-5 (8 steps) and 1.1e-5 (30 steps)


@pytest.mark.parametrize("schedule", [flow_sigmas(8, 8.0), flow_sigmas(30, 8.0)])
def test_bfloat16_samples_are_rounded_where_diffusers_and_the_original_round(schedule):
    table = as_on_a_cpu(unipc.tabulate(schedule, rounded=True))
    assert share_that_differs(schedule, table) < ROUNDING_SHARE


def test_weights_that_are_not_rounded_are_caught():  # measured 3.6e-3
    schedule = flow_sigmas(30, 8.0)
    table = as_on_a_cpu(unipc.tabulate(schedule))
    assert share_that_differs(schedule, table) > 10 * ROUNDING_SHARE


def by_diffusers_with_views(schedule: FlowSchedule, x: np.ndarray) -> np.ndarray:
    """The scheduler is given the array that the loop then writes its answer into."""
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
    )
    scheduler.set_timesteps(schedule.num_steps, sigmas=schedule.sigmas[:-1].copy())
    scheduler.sigmas = torch.tensor(schedule.sigmas, dtype=torch.float32)
    scheduler.set_begin_index(0)
    sample = torch.from_numpy(x.copy())
    for timestep, ours in zip(scheduler.timesteps, schedule.timesteps, strict=True):
        prediction = torch.from_numpy(velocity(sample.numpy(), float(ours)))
        sample[:] = scheduler.step(prediction, timestep, sample[:], return_dict=False)[0]
    return sample.numpy()


# Measured 3.4e-1 and 3.6e-3; in a run of two steps nothing comes of the corrected sample.
@pytest.mark.parametrize(("num_steps", "apart"), [(1, 0), (2, 0), (3, 0.1), (30, 100 * TOL)])
def test_a_start_that_is_overwritten_is_that_of_a_scheduler_given_views(
    num_steps: int, apart: float
):
    schedule = flow_sigmas(num_steps, 8.0)
    ours = by_us(schedule, noise(), unipc.tabulate(schedule, overwritten=True))
    theirs = by_diffusers_with_views(schedule, noise())
    assert np.max(np.abs(ours - theirs)) < TOL  # measured at most 3.6e-6
    assert np.max(np.abs(by_us(schedule, noise()) - theirs)) >= apart
