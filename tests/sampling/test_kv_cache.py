"""Runs that keep finished blocks and leave waiting ones out, against runs that compute everything.

Both are float32; sums are ordered otherwise where attention reads kept keys.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests import standins

from skyreels_jax.diffusion.frame_schedule import plan_blocks, schedule_frames
from skyreels_jax.diffusion.guidance import guidance_of
from skyreels_jax.diffusion.teacache import TeaCache
from skyreels_jax.diffusion.unipc import flow_sigmas
from skyreels_jax.models import transformer
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.sampling import kv_cache
from skyreels_jax.sampling import step as sampling_step
from skyreels_jax.sampling.denoiser import AbstractInputs, Denoised, Denoiser, Sampling
from skyreels_jax.sampling.noise import draw_noise
from skyreels_jax.sampling.step import ConditioningNoise

SCHEDULE = flow_sigmas(6, 8.0)
# Of latents up to 6; the bound is 1e-5 of them.
TOL = 2e-5  # measured at most 4.8e-6

# Frames, block of the table, block of attention, given frames, ar_step; noise over given frames:
# whether it is the same in every row. Then blocks computed, and in all rows together.
CASES: dict[str, tuple[tuple[int, ...], bool | None, tuple[int, int]]] = {
    "frame by frame": ((5, 1, 1, 0, 2), None, (34, 70)),
    "blocks of two": ((6, 2, 2, 0, 3), None, (20, 36)),
    "an image first": ((7, 2, 2, 1, 3), None, (32, 48)),
    "other blocks in the table": ((7, 1, 2, 3, 2), None, (23, 48)),
    "a short last block": ((11, 4, 4, 0, 6), None, (20, 54)),
    "given frames, all others together": ((9, 3, 3, 3, 0), None, (13, 18)),
    "given frames under fresh noise": ((7, 2, 3, 3, 2), False, (22, 24)),
    "given frames under one noise": ((7, 2, 3, 3, 2), True, (15, 24)),
}
FAST = ("blocks of two", "given frames under one noise")
each_case = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=title, marks=() if title in FAST else pytest.mark.slow)
        for title, case in CASES.items()
    ],
)


@pytest.fixture(scope="module")
def model() -> WanModel:
    return standins.transformer(standins.config())


def texts(batch: int = 1):
    rng = np.random.default_rng(5)
    shape = (2, batch, 6, standins.TEXT_DIM)
    return tuple(jnp.asarray(x, jnp.float32) for x in rng.standard_normal(shape))


def run(model, case, *, plain: bool = False, path: str | None = None, **more: Any) -> Denoised:
    (frames, block, attention, prefix, ar_step), once, _ = case
    denoiser = Denoiser(model, block_length=attention)
    if plain:
        object.__setattr__(denoiser, "_plan_reuse", lambda *_: None)
    noise = draw_noise(3, (1, 16, frames, 4, 4))
    timed = schedule_frames(
        plan_blocks(frames, block, prefix=prefix), SCHEDULE.timesteps, ar_step=ar_step
    )
    noise_on_prefix = (
        None if once is None else ConditioningNoise(200, prefix, jax.random.key(7), once)
    )
    guidance = guidance_of(5.0, batched=more.pop("batched", False))
    told = denoiser.condition(guidance, *texts(), **more)
    sampling = Sampling(SCHEDULE, guidance, path)
    return denoiser.run(
        noise, told, sampling, frame_schedule=timed, conditioning_noise=noise_on_prefix
    )


def furthest(model, case, **more: Any) -> float:
    left = run(model, case, plain=True, **more)
    right = run(model, case, **more)
    assert left.reuse is None
    assert right.block_counts == case[2]
    return float(np.max(np.abs(np.asarray(left.latents) - np.asarray(right.latents))))


@each_case
def test_what_is_left_out_changes_nothing(model, case):
    assert furthest(model, case, path="xla") < TOL


# That every path sees earlier keys as the definition does is tests/ops/test_attention.py's.
@pytest.mark.slow
@each_case
def test_what_is_left_out_changes_nothing_in_tiles(model, case):
    assert furthest(model, case, path="chunked") < TOL


@pytest.mark.slow
def test_with_both_prompts_in_one_call_too(model):
    assert furthest(model, CASES["blocks of two"], batched=True) < TOL


def test_with_an_image_condition_too():
    model = standins.transformer(standins.image_config())
    rng = np.random.default_rng(0)
    y = jnp.asarray(rng.standard_normal((1, 20, 6, 4, 4)), jnp.float32)
    clip = jnp.asarray(rng.standard_normal((1, 257, 4)), jnp.float32)
    assert furthest(model, CASES["blocks of two"], y=y, clip_fea=clip) < TOL


def broken_positions(monkeypatch: pytest.MonkeyPatch) -> None:
    true = transformer.rope_table
    monkeypatch.setattr(transformer, "rope_table", lambda grid, dim, **_: true(grid, dim))


def broken_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every block is laid over the first."""
    true = kv_cache.append_block
    monkeypatch.setattr(
        sampling_step, "append_block", lambda cache, block, slot: true(cache, block, 0 * slot)
    )


def broken_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks are kept as if they were still noisy."""
    true = sampling_step.DenoisingStep.fill_cache

    def noisy(self, state, iteration):
        return true(self, state, iteration._replace(timestep=iteration.timestep + 500))

    monkeypatch.setattr(sampling_step.DenoisingStep, "fill_cache", noisy)


# Measured 0.31, 0.55 and 0.013.
@pytest.mark.parametrize("fault", [broken_positions, broken_order, broken_time])
def test_a_fault_in_what_is_kept_is_caught(model, monkeypatch, fault):
    case = CASES["frame by frame"]
    plain = run(model, case, plain=True).latents
    fault(monkeypatch)
    broken = run(model, case).latents
    assert np.max(np.abs(np.asarray(plain) - np.asarray(broken))) > 100 * TOL


def test_a_cache_of_steps_computes_all_blocks(model):
    denoiser = Denoiser(model, block_length=2)
    timed = schedule_frames(plan_blocks(6, 2), SCHEDULE.timesteps, ar_step=3)
    guidance = guidance_of(1.0)
    told = denoiser.condition(guidance, texts()[0], None)
    first, last = (np.array(n, np.int32) for n in (1, 1))
    cache = TeaCache(np.float32(0.1), np.array([1.0, 0.0], np.float32), first, last, False)
    result = denoiser.run(
        draw_noise(3, (1, 16, 6, 4, 4)),
        told,
        Sampling(SCHEDULE, guidance, None, cache),
        frame_schedule=timed,
    )
    assert result.block_counts == (0, 0)


def test_a_path_that_cannot_read_kept_keys_computes_all_blocks(model):
    denoiser = Denoiser(model, block_length=2)
    timed = schedule_frames(plan_blocks(6, 2), SCHEDULE.timesteps, ar_step=3)
    sampling = Sampling(SCHEDULE, guidance_of(1.0), "tokamax")
    assert denoiser._plan_reuse(timed, 6, sampling, None) is None


def test_programs_are_few_and_counted_from_shapes_alone(model):
    """25 blocks of one frame need rows of six lengths; five of them are compiled, and one keeps."""
    denoiser = Denoiser(model, block_length=1)
    timed = schedule_frames(plan_blocks(25, 1), SCHEDULE.timesteps, ar_step=1)
    guidance = guidance_of(5.0)
    text = jax.ShapeDtypeStruct((1, 6, standins.TEXT_DIM), jnp.float32)
    programs = denoiser.programs(
        jax.ShapeDtypeStruct((1, 16, 25, 4, 4), jnp.float32),
        AbstractInputs(text, None, None, None),
        Sampling(SCHEDULE, guidance),
        frame_schedule=timed,
    )
    assert len(programs) == 6
    assert sum(times for _, times in programs) == timed.iterations + 24
