"""Causal sampling with kept keys, against the same written out without them.

The reference (:mod:`tests.sampling.causal_reference`) is NumPy in float64 and computes every frame
so far in every call. Planted faults are arguments of the same compiled programs.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tests import standins
from tests.sampling.causal_reference import (
    PlainCausal,
    decibels,
    noise_of,
    rotate,
    seen_before,
)

from skyreels_jax.diffusion.few_steps import CausalSchedule, CausalWindow, warp
from skyreels_jax.diffusion.guidance import NoGuidance, guidance_of
from skyreels_jax.errors import NumericsError, RequestError
from skyreels_jax.models import transformer
from skyreels_jax.sampling import causal
from skyreels_jax.sampling.causal import CausalSampler
from skyreels_jax.sampling.causal_step import CausalStep
from skyreels_jax.sampling.denoiser import Denoiser
from skyreels_jax.sampling.kv_cache import WindowSlots

PLAIN = NoGuidance()
SIZE = (4, 4)
GRID = (2, 2)
STEPS = warp((1000, 500), 5.0)
# Of keys and values of about 1: the bound.
TOL = 1e-5  # measured at most 7.9e-7 where frames are given
# Of latents.
LEAST = 100.0  # dB; measured 112 to 114

slow = pytest.mark.slow
rng = np.random.default_rng(11)
TEXTS = rng.standard_normal((3, 6, standins.TEXT_DIM)).astype(np.float32)


class Sides:
    """A model with kept keys, and written out."""

    def __init__(self, config):
        self.model = standins.transformer(config)
        self.denoiser, self.plain = Denoiser(self.model), PlainCausal(self.model)

    def sampler(self, schedule, window, text=0, *, guidance=PLAIN, **given) -> CausalSampler:
        sampler = CausalSampler(self.denoiser, schedule, window, guidance, latent_size=SIZE, seed=3)
        sampler.change(self.conditioning(text, guidance, **given))
        return sampler

    def conditioning(self, text, guidance=PLAIN, **given):
        positive, negative = (jnp.asarray(TEXTS[n][None]) for n in (text, 2))
        given = {name: jnp.asarray(value[None], jnp.float32) for name, value in given.items()}
        return self.denoiser.condition(guidance, positive, negative, **given)


@pytest.fixture(scope="module")
def sides() -> Sides:
    return Sides(standins.config())


@pytest.fixture(scope="module")
def pictured() -> Sides:
    return Sides(standins.image_config())


def places(window: CausalWindow, seen: list[int], block: tuple[int, int]):
    """A frame's position, as a block sees it."""
    if window.positions == "absolute":
        return lambda frame: frame
    order = [*seen, *range(*block)]
    return order.index


def layout(schedule: CausalSchedule, window: CausalWindow, blocks):
    """What each block sees, and at which positions."""
    slots = window.frames - schedule.block
    seen = [seen_before(start, slots, window.sink) for start, _ in blocks]
    return seen, [places(window, *both) for both in zip(seen, blocks, strict=True)]


def as_seen(done: np.ndarray, timesteps: list[float]) -> np.ndarray:
    """Finished frames as those after them see them, each at its timestep."""
    if not any(timesteps):
        return done
    level = np.array(timesteps)[:, None, None] / 1000
    noise = noise_of(3, 0, range(done.shape[1]), SIZE, context=True)
    return (1 - level) * done + level * noise


def written_out(
    sides,
    schedule,
    window,
    count,
    *,
    texts=None,
    scale=1.0,
    y=None,
    clip=None,
    done=None,
    noises=(),
):
    """The latents of ``count`` blocks, every one of which computes all frames before it anew.

    ``noises`` are the timesteps at which the first frames are seen, where they have their own.
    """
    done = np.zeros((16, 0, *SIZE)) if done is None else done
    blocks = [(s.start, s.stop) for s in schedule.blocks_of(done.shape[1])]
    texts = [0] * (count + len(blocks)) if texts is None else texts
    for _ in range(count):
        first = done.shape[1]
        size, timesteps = schedule.block_at(first)
        blocks.append((first, first + size))
        frames = range(first, first + size)
        seen, positions = layout(schedule, window, blocks)
        at = np.minimum(np.arange(first + size), 10**6 if y is None else y.shape[1] - 1)
        under = [*noises, *[window.context_noise] * first][:first]

        def velocity(x, timestep, said):
            both = np.concatenate([as_seen(done, under), x], axis=1)  # noqa: B023
            times = under + [timestep] * size  # noqa: B023
            image = {} if y is None else {"y": y[:, at], "clip": clip}  # noqa: B023
            text = [TEXTS[n] for n in said]
            out = sides.plain.velocity(both, times, text, blocks, seen, positions, **image)  # noqa: B023
            return out[:, first:]  # noqa: B023

        x, sigmas = noise_of(3, 0, frames, SIZE), [*(t / 1000 for t in timesteps), 0]
        for step, timestep in enumerate(timesteps):
            v = velocity(x, timestep, texts[: len(blocks)])
            if scale != 1:
                other = velocity(x, timestep, [2] * len(blocks))
                v = other + scale * (v - other)
            sigma, following = sigmas[step : step + 2]
            if schedule.rule == "euler":
                x = x + (following - sigma) * v
            else:
                new = noise_of(3, step + 1, frames, SIZE)
                x = (1 - following) * (x - sigma * v) + following * new
        done = np.concatenate([done, x], axis=1)
    return done


def made(sampler: CausalSampler, count: int) -> np.ndarray:
    return np.concatenate([np.asarray(sampler.next())[0] for _ in range(count)], axis=1)


def furthest(sides, sampler, latents, *, texts=None, window=None, numbers=None, y=None, clip=None):
    """How far kept keys and values are from those that all of ``latents`` computed at once have.

    ``numbers`` are the frames' own, where they are not all of the video's.
    """
    schedule, window = sampler.schedule, window or sampler.window
    blocks = [(s.start, s.stop) for s in schedule.blocks_of(latents.shape[1])]
    seen, positions = layout(schedule, window, blocks)
    if numbers is not None and window.positions == "absolute":
        positions = [lambda frame: numbers[frame]] * len(blocks)
    texts = [0] * len(blocks) if texts is None else texts
    image = {}
    if y is not None:
        at = np.minimum(np.arange(latents.shape[1]), y.shape[1] - 1)
        image = {"y": y[:, at], "clip": clip}
    times = np.zeros(latents.shape[1])
    sides.plain.velocity(
        latents, times, [TEXTS[n] for n in texts], blocks, seen, positions, **image
    )
    numbers = list(range(latents.shape[1])) if numbers is None else numbers
    (kept,) = sampler._state.kv_cache
    errors = []
    for layer, (key, value) in enumerate(sides.plain.kept):
        for slot, frame in enumerate(sampler._held.held):
            at = numbers.index(frame)
            turned = key[[at]]
            if window.positions == "absolute":
                turned = rotate(turned, [frame], GRID)
            for ours, theirs in ((kept.key, turned[0]), (kept.value, value[at])):
                errors.append(np.max(np.abs(np.asarray(ours[layer, 0, slot]) - theirs)))
    return max(errors)


def latents_of(frames: int) -> np.ndarray:
    return np.random.default_rng(frames).standard_normal((16, frames, *SIZE)).astype(np.float32)


# Block, window and sink; frames that are given, past the ring's end.
KEPT = {
    "1, 4, 1": (1, 4, 1, 9),
    "2, 6, 0": (2, 6, 0, 13),
    "3, 9, 3": (3, 9, 3, 15),
    "3, 8, 1": (3, 8, 1, 16),
    "5, 11, 2": (5, 11, 2, 25),
    "a sink alone": (2, 5, 3, 10),
    "all of it": (3, 21, 0, 12),
}


@pytest.mark.parametrize("positions", ["absolute", "relative"])
@pytest.mark.parametrize(
    "case",
    [pytest.param(c, id=n, marks=() if n == "2, 6, 0" else slow) for n, c in KEPT.items()],
)
def test_kept_keys_are_those_of_all_frames_at_once(sides, case, positions):
    block, frames, sink, total = case
    schedule, window = CausalSchedule(STEPS, block), CausalWindow(frames, sink, positions)
    sampler = sides.sampler(schedule, window)
    latents = latents_of(total)
    sampler.given(latents[None])
    assert sampler._held.held != list(range(total)) or total <= frames - block
    assert furthest(sides, sampler, latents) < TOL
    # Measured 0.025 to 0.16.
    if total > frames - block:
        # A frame more or less; of a sink alone, all but one.
        longer = (frames + 1 if sink == 0 else frames - 1), sink
        other = (block + 1, 1) if sink == frames - block else longer
        other = CausalWindow(*other, positions)
        assert furthest(sides, sampler, latents, window=other) > 100 * TOL


def one_slot_off(patch):
    take = WindowSlots.take
    patch.setattr(WindowSlots, "take", lambda self, *a: (take(self, *a) + 1) % self.slots)


def a_sink_that_leaves(patch):
    patch.setattr(causal, "WindowSlots", lambda slots, sink: WindowSlots(slots, 0))


def positions_one_off(patch):
    block = causal.CausalSampler._next_block

    def off(self, first, size):
        given = block(self, first, size)
        return given._replace(
            first=given.first + np.int32(first > 2),
            places=None if given.places is None else (given.places + 1) % len(given.places),
        )

    patch.setattr(causal.CausalSampler, "_next_block", off)


def a_slot_too_many(patch):
    block = causal.CausalSampler._next_block

    def off(self, first, size):
        given = block(self, first, size)
        return given._replace(count=np.maximum(given.count - 1, 0))

    patch.setattr(causal.CausalSampler, "_next_block", off)


FAULTS = (one_slot_off, a_sink_that_leaves, positions_one_off, a_slot_too_many)


@pytest.mark.parametrize("positions", ["absolute", pytest.param("relative", marks=slow)])
def test_blocks_are_those_written_out_and_one_program_makes_them(sides, positions, monkeypatch):
    """Past the ring's end; with every planted fault that is an argument of the program."""
    schedule, window = CausalSchedule(STEPS, 2), CausalWindow(5, 1, positions)
    before = len(sides.denoiser._executables)
    got = made(sides.sampler(schedule, window), 6)
    # That of the prompt, if it is the first, and that of a block.
    assert len(sides.denoiser._executables) - before <= 2
    count = len(sides.denoiser._executables)
    assert decibels(got, written_out(sides, schedule, window, 6)) > LEAST
    for fault in FAULTS:
        with monkeypatch.context() as patch:
            fault(patch)
            broken = made(sides.sampler(schedule, window), 6)
        assert decibels(broken, got) < 60, fault.__name__  # measured 0.04 to 33
    longer = sides.sampler(schedule, window)
    np.testing.assert_array_equal(made(longer, 12)[:, :12], got)
    assert len(sides.denoiser._executables) == count


def test_finished_frames_are_seen_under_noise_of_their_own(sides):
    schedule = CausalSchedule(STEPS, 2)
    window = CausalWindow(5, 1, "relative", "never", 300)
    got = made(sides.sampler(schedule, window), 5)
    assert decibels(got, written_out(sides, schedule, window, 5)) > LEAST  # measured 112.8
    # Computed again, frames have the same noise.
    again = sides.sampler(schedule, window)
    again.next()
    before = jax.tree.map(np.asarray, again._state.kv_cache)
    again._recompute()
    jax.tree.map(partial(np.testing.assert_allclose, atol=TOL), again._state.kv_cache, before)
    for other in (0, 280):
        clean = dataclasses.replace(window, context_noise=other)
        assert decibels(made(sides.sampler(schedule, clean), 5), got) < 60, other
    with pytest.raises(RequestError, match="below 1000"):
        CausalWindow(5, context_noise=1000)


def test_frames_before_another_prompt_are_seen_under_more_noise(sides):
    schedule = CausalSchedule(STEPS, 2)
    window = CausalWindow(12, 0, "relative", "prompt", 300, 950)
    sampler = sides.sampler(schedule, window)
    before = made(sampler, 3)
    sampler.change(sides.conditioning(1))
    got = made(sampler, 2)

    def expected(*noises):
        after = {"texts": [1] * 5, "done": before.astype(np.float64), "noises": noises}
        return written_out(sides, schedule, window, 2, **after)[:, 6:]

    # Those after it are seen as usual.
    assert decibels(got, expected(*[950] * 6)) > LEAST  # measured 112.4
    for other in ([], [930] * 6, [950] * 8, [950] * 5):
        assert decibels(got, expected(*other)) < 60, other  # measured 21 to 35
    # A second one computes all of it again, from frames without noise.
    sampler.change(sides.conditioning(0))
    fresh = sides.sampler(schedule, dataclasses.replace(window, context_noise=950))
    fresh.given(np.concatenate([before, got], axis=1)[None])
    kept = (jax.tree.map(np.asarray, each._state.kv_cache) for each in (sampler, fresh))
    jax.tree.map(partial(np.testing.assert_allclose, atol=TOL), *kept)


def test_noise_before_another_prompt_is_of_what_is_computed_again():
    with pytest.raises(RequestError, match="change_noise 900 with recompute never"):
        CausalWindow(5, change_noise=900)
    with pytest.raises(RequestError, match="change_noise 1000: .* below 1000"):
        CausalWindow(5, recompute="prompt", change_noise=1000)


@pytest.mark.parametrize(
    ("schedule", "window"),
    [
        (CausalSchedule(STEPS, 1, "euler"), CausalWindow(4)),
        (CausalSchedule(STEPS, 5), CausalWindow(12, 2)),
        (CausalSchedule(STEPS, 3, first_block=1), CausalWindow(8, 1)),
        (CausalSchedule(STEPS, 1, first_timesteps=(1000, 900, 500)), CausalWindow(3, 1)),
    ],
    ids=["Euler", "five", "first block", "first timesteps"],
)
@slow
def test_every_way_of_making_a_block(sides, schedule, window):
    got = made(sides.sampler(schedule, window), 5)
    assert decibels(got, written_out(sides, schedule, window, 5)) > LEAST
    other = dataclasses.replace(schedule, rule="renoise" if schedule.rule == "euler" else "euler")
    assert decibels(got, written_out(sides, other, window, 5)) < 40


@slow
@pytest.mark.parametrize("batched", [False, True])
def test_guidance_keeps_keys_for_both_prompts(sides, batched):
    schedule, window, guidance = (
        CausalSchedule(STEPS, 2),
        CausalWindow(5, 1),
        guidance_of(3.0, batched=batched),
    )
    got = made(sides.sampler(schedule, window, guidance=guidance), 4)
    assert decibels(got, written_out(sides, schedule, window, 4, scale=3.0)) > LEAST
    assert decibels(got, written_out(sides, schedule, window, 4, scale=2.9)) < 60


@slow
@pytest.mark.parametrize("positions", ["absolute", "relative"])
def test_an_image_condition_goes_on_and_an_image_is_a_first_frame(pictured, positions):
    schedule, window = CausalSchedule(STEPS, 2), CausalWindow(5, 1, positions)
    y = np.random.default_rng(1).standard_normal((20, 4, *SIZE))
    clip = np.random.default_rng(2).standard_normal((257, 4))
    sampler = pictured.sampler(schedule, window, y=y, clip_fea=clip)
    image = latents_of(1)
    sampler.given(image[None])
    got = made(sampler, 4)
    image = image.astype(np.float64)
    expected = written_out(pictured, schedule, window, 4, y=y, clip=clip, done=image)
    assert decibels(got, expected[:, 1:]) > LEAST
    whole = np.concatenate([image, got], axis=1)
    assert furthest(pictured, sampler, whole, y=y, clip=clip) < TOL
    assert furthest(pictured, sampler, whole, y=y[:, :3], clip=clip) > 100 * TOL
    lone = written_out(pictured, schedule, window, 4, y=y, clip=clip, done=0 * image)
    assert decibels(got, lone[:, 1:]) < 60  # measured 44.8


@slow
@pytest.mark.parametrize("positions", ["absolute", "relative"])
@pytest.mark.parametrize("recompute", ["never", "prompt"])
def test_a_prompt_that_changes(sides, positions, recompute):
    """Keys stay as the earlier prompt made them, or all that are kept become the new one's."""
    schedule, window = CausalSchedule(STEPS, 2), CausalWindow(6, 2, positions, recompute)
    sampler = sides.sampler(schedule, window)
    got = made(sampler, 5)
    sampler.change(sides.conditioning(1))
    after = made(sampler, 3)
    latents = np.concatenate([got, after], axis=1)
    if recompute == "never":
        texts = [0] * 5 + [1] * 3
        assert furthest(sides, sampler, latents, texts=texts) < TOL
        assert furthest(sides, sampler, latents, texts=[0] * 8) > 100 * TOL
        expected = written_out(sides, schedule, window, 8, texts=texts)
        assert decibels(latents, expected) > LEAST
        return
    # As a video of the frames that were kept, at their own positions, and those after.
    numbers = [0, 1, 8, 9, *range(10, 16)]
    shown = latents[:, numbers]
    as_new = [1] * 5
    assert furthest(sides, sampler, shown, texts=as_new, numbers=numbers) < TOL
    as_before = [0, 0, 1, 1, 1]
    assert furthest(sides, sampler, shown, texts=as_before, numbers=numbers) > 100 * TOL


def test_slots_are_a_ring_behind_a_sink():
    slots = WindowSlots(4, 1)
    assert list(slots.take(0, 3)) == [0, 1, 2]
    assert list(slots.take(3, 3)) == [3, 1, 2]
    assert (slots.held, list(slots.places())) == ([0, 4, 5, 3], [0, 2, 3, 1])
    # Five frames have room for the last three alone; what has none goes past the end.
    assert list(slots.take(6, 5)) == [4, 5, 2, 3, 1]
    assert slots.held == [0, 10, 8, 9]
    alone = WindowSlots(2, 2)
    assert list(alone.take(0, 3)) == [0, 1, 4]


def test_positions_end_or_do_not(sides):
    window = CausalWindow(5, 1)
    window.check_length(1024)
    with pytest.raises(RequestError, match="1024; positions relative to the window"):
        window.check_length(1025)
    dataclasses.replace(window, positions="relative").check_length(10**6)
    sampler = CausalSampler(sides.denoiser, CausalSchedule(STEPS, 2), window)
    sampler.frames = 1023
    with pytest.raises(RequestError, match="1025 latent frames"):
        sampler.next()


def test_values_that_are_not_finite_name_their_block():
    model = standins.Linear()

    class WithKeys(standins.Linear):
        """The hand-made velocity, with keys that no one reads."""

        def staged(self, x, t, context, *, past=None, **given):
            staged = model.staged(x, t, context, **given)
            keys = jnp.zeros((1, len(x), x.shape[2], 1, 1, 1))
            # Large from the fifth frame on.
            gain = 1 if past is None else jnp.where(past.first >= 4, jnp.inf, 1.0)
            return staged._replace(head=lambda x: x * gain, key_values=lambda: (keys, keys))

    denoiser = Denoiser(WithKeys())
    sampler = CausalSampler(
        denoiser, CausalSchedule(STEPS, 2), CausalWindow(4), latent_size=SIZE, seed=1
    )
    sampler.change(denoiser.condition(NoGuidance(), jnp.asarray(TEXTS[:1]), None))
    for _ in range(3):
        sampler.next()
    with pytest.raises(NumericsError, match=r"block 3 \(latent frames 4 to 5\)"):
        sampler.finish()


@slow
@pytest.mark.parametrize("fault", ["time", "rotation"])
def test_a_fault_in_the_program_is_caught(sides, monkeypatch, fault):
    """Keys at another timestep than 0, and relative keys that are rotated already."""
    schedule, window = CausalSchedule(STEPS, 2), CausalWindow(6, 0, "relative")
    if fault == "time":
        calls = CausalStep._calls
        monkeypatch.setattr(
            CausalStep,
            "_calls",
            lambda self, cache, block, x, t: calls(self, cache, block, x, t + 5),
        )
    else:
        tokens = transformer.PastTokens
        monkeypatch.setattr(transformer, "PastTokens", lambda states, rope: tokens(states))
    jax.clear_caches()  # a traced function is not traced again
    broken = Sides(standins.config())
    sampler = broken.sampler(schedule, window)
    latents = latents_of(13)
    sampler.given(latents[None])
    assert furthest(sides, sampler, latents) > 100 * TOL  # measured 0.163 and 2.78
    jax.clear_caches()
