"""The loop against the same run written out by hand, and what it promises about compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests import standins

from skyreels_jax.diffusion import unipc
from skyreels_jax.diffusion.frame_schedule import plan_blocks, schedule_frames
from skyreels_jax.diffusion.guidance import guidance_of
from skyreels_jax.diffusion.unipc import flow_sigmas
from skyreels_jax.errors import NumericsError, UnsupportedError
from skyreels_jax.sampling.denoiser import Denoiser, Sampling
from skyreels_jax.sampling.noise import draw_noise
from skyreels_jax.sampling.progress import Clock

SHAPE = (1, 16, 3, 4, 4)
SCHEDULE = flow_sigmas(5, 8.0)
# Latents are of size 6.
TOL = 2e-5  # measured at most 5.1e-6, the sums of a batch being ordered otherwise


def texts(batch: int = 1):
    rng = np.random.default_rng(5)
    shape = (2, batch, 6, standins.TEXT_DIM)
    return tuple(jnp.asarray(x, jnp.float32) for x in rng.standard_normal(shape))


jitted_step = jax.jit(unipc.step)


def by_hand(model, noise, schedule, scale, **given) -> np.ndarray:
    """A plain loop over the public parts: raw text, two calls a step, no donation."""
    positive, negative = texts(noise.shape[0])
    table = unipc.tabulate(schedule)
    x = jnp.moveaxis(noise, 2, 0)
    state = unipc.init(x)

    @jax.jit
    def velocity_at(x, t):
        x = jnp.moveaxis(x, 0, 2)
        good, bad = (model(x, t, model.prepare_context(w), **given) for w in (positive, negative))
        return jnp.moveaxis(bad + scale * (good - bad), 2, 0)

    for step, timestep in enumerate(schedule.timesteps):
        t = jnp.full(noise.shape[0], int(timestep), jnp.int32)
        row = table.at(np.array([step]))
        x, state = jitted_step(row, state, x, velocity_at(x, t), np.ones(1, bool))
    return np.asarray(jnp.moveaxis(x, 0, 2))


def run(
    denoiser, noise, schedule, guidance, *, attention=None, clip_fea=None, y=None, fps=None, **more
):
    positive, negative = texts(noise.shape[0])
    told = denoiser.condition(guidance, positive, negative, clip_fea=clip_fea, y=y, fps=fps)
    return denoiser.run(noise, told, Sampling(schedule, guidance, attention), **more)


@pytest.fixture(scope="module")
def model():
    return standins.transformer(standins.config())


@pytest.fixture(scope="module")
def denoiser(model):
    return Denoiser(model)


@pytest.fixture(scope="module")
def expected(model):
    return by_hand(model, draw_noise(3, SHAPE), SCHEDULE, 5.0)


@pytest.mark.parametrize("batched", [False, True])
def test_the_loop_is_the_run_written_out(denoiser, expected, batched: bool):
    result = run(denoiser, draw_noise(3, SHAPE), SCHEDULE, guidance_of(5.0, batched=batched))
    assert result.latents.dtype == jnp.float32
    assert len(result.step_seconds) == 5
    assert np.max(np.abs(np.asarray(result.latents) - expected)) < TOL


def test_two_videos_at_once_are_the_run_written_out(model, denoiser):
    noise = draw_noise(3, (2, *SHAPE[1:]))
    result = run(denoiser, noise, SCHEDULE, guidance_of(5.0, batched=True))
    by_itself = by_hand(model, noise, SCHEDULE, 5.0)
    assert np.max(np.abs(np.asarray(result.latents) - by_itself)) < TOL


# Measured 1.5, 1.7 and 0.056.
@pytest.mark.parametrize(
    ("schedule", "scale"), [(flow_sigmas(4, 8.0), 5.0), (flow_sigmas(5, 7.0), 5.0), (SCHEDULE, 4.9)]
)
def test_one_step_fewer_or_a_wrong_shift_or_scale_is_caught(denoiser, expected, schedule, scale):
    result = run(denoiser, draw_noise(3, SHAPE), schedule, guidance_of(scale))
    assert np.max(np.abs(np.asarray(result.latents) - expected)) > 100 * TOL


def test_all_that_conditions_the_model_reaches_it():
    """y, image features, frame rate and block length, each of which the stand-in adds in."""
    model = standins.Linear()
    noise = draw_noise(3, SHAPE)
    given = {"y": jnp.full((1, 20, 3, 4, 4), 0.25), "fps": jnp.ones(1, jnp.int32)}
    clip_fea = jnp.full((1, 7, 4), 0.5)
    plain = run(Denoiser(model), noise, SCHEDULE, guidance_of(5.0)).latents
    expected = by_hand(model, noise, SCHEDULE, 5.0, **given)
    for batched in (False, True):
        guidance = guidance_of(5.0, batched=batched)
        for extra in ({"y": given["y"]}, {"fps": given["fps"]}, {"clip_fea": clip_fea}):
            told = run(Denoiser(model), noise, SCHEDULE, guidance, **extra).latents
            assert np.max(np.abs(told - plain)) > 0.01
        blocks = run(Denoiser(model, block_length=2), noise, SCHEDULE, guidance).latents
        assert np.max(np.abs(blocks - plain)) > 0.01
        everything = run(Denoiser(model), noise, SCHEDULE, guidance, **given).latents
        assert np.max(np.abs(np.asarray(everything) - expected)) < TOL


def test_frames_together_and_frames_with_equal_timesteps_give_the_same(model, denoiser):
    noise = draw_noise(3, SHAPE)
    guidance = guidance_of(5.0)
    together = run(denoiser, noise, SCHEDULE, guidance)
    apart = schedule_frames(plan_blocks(3, 1), SCHEDULE.timesteps, ar_step=0)
    each = run(denoiser, noise, SCHEDULE, guidance, frame_schedule=apart)
    assert np.max(np.abs(np.asarray(together.latents) - np.asarray(each.latents))) < TOL


def test_frames_in_turn_each_take_every_step_and_given_ones_stay():
    """The stand-in treats frames alone, so frames one after the other end as frames together."""
    denoiser = Denoiser(standins.Linear())
    noise = draw_noise(3, SHAPE)
    guidance = guidance_of(5.0)
    together = run(denoiser, noise, SCHEDULE, guidance)
    in_turn = schedule_frames(plan_blocks(3, 1, prefix=1), SCHEDULE.timesteps, ar_step=2)
    result = run(denoiser, noise, SCHEDULE, guidance, frame_schedule=in_turn)
    assert len(result.step_seconds) == in_turn.iterations == 7
    np.testing.assert_array_equal(result.latents[:, :, 0], noise[:, :, 0])
    np.testing.assert_allclose(result.latents[:, :, 1:], together.latents[:, :, 1:], atol=TOL)
    assert not np.allclose(result.latents[:, :, 0], together.latents[:, :, 0], atol=0.1)


class Log:
    def __init__(self):
        self.lines = []

    def begin(self, stage, total=None):
        self.lines.append(("begin", stage, total))

    def advance(self, stage, done):
        self.lines.append(("advance", stage, done))

    def end(self, stage, seconds):
        self.lines.append(("end", stage))


def test_a_second_run_compiles_nothing_and_progress_counts_steps(denoiser):
    noise = draw_noise(3, SHAPE)
    run(denoiser, noise, SCHEDULE, guidance_of(5.0))
    log = Log()
    # Another length, shift, scale, noise: all of them are arguments of the same program.
    other = flow_sigmas(7, 3.0)
    run(denoiser, draw_noise(4, SHAPE), other, guidance_of(2.0), clock=Clock(log))
    steps = [("advance", "denoise", done) for done in range(1, 8)]
    assert log.lines == [("begin", "denoise", 7), *steps, ("end", "denoise")]


def test_a_new_shape_compiles_once_and_says_so(denoiser):
    clock = Clock(log := Log())
    for _ in range(2):
        run(denoiser, draw_noise(3, (1, 16, 1, 6, 4)), SCHEDULE, guidance_of(5.0), clock=clock)
    assert log.lines.count(("begin", "compile", None)) == 1
    assert clock.seconds["compile"] > 0


def test_the_callers_noise_survives_and_runs_repeat(denoiser):
    noise = draw_noise(3, SHAPE)
    before = np.array(noise)
    first = run(denoiser, noise, SCHEDULE, guidance_of(5.0)).latents
    second = run(denoiser, noise, SCHEDULE, guidance_of(5.0)).latents
    np.testing.assert_array_equal(first, second)
    np.testing.assert_array_equal(noise, before)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_prediction_that_is_not_finite_is_an_error_that_names_the_step(denoiser, bad: float):
    noise = draw_noise(3, SHAPE).at[0, 3, 1, 2, 2].set(bad)
    with pytest.raises(NumericsError, match=r"step 1 of 5 \(timestep 999\)"):
        run(denoiser, noise, SCHEDULE, guidance_of(5.0))


def test_a_value_that_overflows_later_names_the_later_step():
    model = standins.Linear()
    model.gain[...] = jnp.float32(3e19)
    with pytest.raises(NumericsError, match=r"step [23] of 5"):
        run(Denoiser(model), draw_noise(3, SHAPE), SCHEDULE, guidance_of(1.0))


def test_a_seed_is_its_noise_and_no_other():
    noise = draw_noise(42, (1, 16, 2, 4, 4))
    # Recorded once; the generator is the same on every backend.
    recorded = [-0.028305, 0.467132, 0.295703, 0.153546]
    np.testing.assert_allclose(noise[0, 0, 0, 0], recorded, atol=1e-6)
    np.testing.assert_array_equal(noise, draw_noise(42, (1, 16, 2, 4, 4)))
    for other in (43, 2**32 - 1):
        assert not np.array_equal(noise, draw_noise(other, (1, 16, 2, 4, 4)))
    values = np.concatenate([draw_noise(seed, (1, 16, 2, 4, 4)).ravel() for seed in range(100)])
    assert abs(values.mean()) < 0.02  # of 51,200 values, a deviation of 0.0044 is expected
    assert abs(values.std() - 1) < 0.02


def test_attention_is_chosen_by_run_and_compiled_apart(denoiser):
    noise = draw_noise(3, SHAPE)
    guidance = guidance_of(5.0)
    plain = run(denoiser, noise, SCHEDULE, guidance, attention="xla")
    clock = Clock(log := Log())
    tiled = run(denoiser, noise, SCHEDULE, guidance, attention="chunked", clock=clock)
    assert ("begin", "compile", None) in log.lines
    np.testing.assert_allclose(tiled.latents, plain.latents, atol=TOL)
    with pytest.raises(UnsupportedError, match="nowhere"):
        run(denoiser, noise, SCHEDULE, guidance, attention="nowhere")
