"""Our sampler against the loops of the causal students of Wan, each written out by itself.

From their published settings: what a block's timesteps are, which frames it sees and where they
stand. The model is NumPy without a cache (:mod:`tests.sampling.causal_reference`).
"""

from collections.abc import Callable, Sequence

import jax.numpy as jnp
import numpy as np
import pytest
from tests import standins
from tests.sampling.causal_reference import PlainCausal, decibels, noise_of

from skyreels_jax.diffusion.few_steps import CausalSchedule, CausalWindow, warp
from skyreels_jax.diffusion.guidance import NoGuidance
from skyreels_jax.sampling.causal import CausalSampler
from skyreels_jax.sampling.denoiser import Denoiser

SIZE, SEED = (4, 4), 5
SHIFTED = (1000.0, 937.5, 1000 * 2.5 / 3, 625.0)
# Weights and latents are float32 on our side and float64 on the other. The issue asks for 80 dB.
LEAST = 100.0  # dB; measured 106 to 135
# A loop with one thing wrong, measured at most 70.2.
MOST = 75.0


class Film:
    """A video under way: its frames, and for each block what it saw of them and in which order."""

    def __init__(self, plain: PlainCausal):
        self.plain = plain
        self.frames = np.zeros((16, 0, *SIZE))
        self.blocks: list[tuple[int, int]] = []
        self.seen: list[list[int]] = []
        self.positions: list[Callable[[int], int]] = []
        self.texts: list[np.ndarray] = []

    @property
    def length(self) -> int:
        return self.frames.shape[1]

    def model(self, x, t, text, seen, position=lambda frame: frame) -> np.ndarray:
        """The velocity of a block after all frames so far, of which it sees some."""
        whole = np.concatenate([self.frames, x], axis=1)
        return self.plain.velocity(
            whole,
            [0.0] * self.length + list(np.broadcast_to(t, x.shape[1])),
            [*self.texts, text],
            [*self.blocks, (self.length, whole.shape[1])],
            [*self.seen, seen],
            [*self.positions, position],
        )[:, self.length :]

    def write(self, x, text, seen, position=lambda frame: frame) -> None:
        """The pass at t = 0: from now on later blocks see these frames so."""
        self.blocks.append((self.length, self.length + x.shape[1]))
        self.frames = np.concatenate([self.frames, x], axis=1)
        self.seen.append(list(seen))
        self.positions.append(position)
        self.texts.append(text)


def last_of(window: int, start: int, end: int) -> list[int]:
    """Frames before ``start`` that are among the last of the window, which ends at ``end``."""
    return list(range(max(0, end - window), start))


def few_steps(film, timesteps, text, size, seen, position=lambda frame: frame) -> np.ndarray:
    """x0 = x - sigma v; x' = (1 - sigma') x0 + sigma' noise; the last x0 is the block."""
    frames = range(film.length, film.length + size)
    x = noise_of(SEED, 0, frames, SIZE)
    for number, t in enumerate(timesteps):
        x0 = x - t / 1000 * film.model(x, t, text, seen, position)
        if number + 1 < len(timesteps):
            sigma = timesteps[number + 1] / 1000
            x = (1 - sigma) * x0 + sigma * noise_of(SEED, number + 1, frames, SIZE)
    film.write(x0, text, seen, position)
    return x0


def self_forcing(plain, texts, timesteps: Sequence[float] = SHIFTED, window=21) -> np.ndarray:
    film = Film(plain)
    for _ in range(8):
        start = film.length
        few_steps(film, timesteps, texts[0], 3, last_of(window, start, start + 3))
    return film.frames


def causal_forcing_by_frame(plain, texts, image, window=21) -> np.ndarray:
    film = Film(plain)
    film.write(image, texts[0], [])
    for _ in range(22):
        start = film.length
        few_steps(film, SHIFTED, texts[0], 1, last_of(window, start, start + 1))
    return film.frames


def causal_forcing_plus(plain, texts, first=SHIFTED) -> np.ndarray:
    film = Film(plain)
    for _ in range(22):
        start = film.length
        steps = first if start == 0 else (1000.0, SHIFTED[2])
        few_steps(film, steps, texts[0], 1, last_of(21, start, start + 1))
    return film.frames


def longlive(plain, texts, sink=3, again=True) -> np.ndarray:
    """Window 12 of which 3 are the sink; with a new prompt its keys are computed again."""
    film = Film(plain)

    def seen(start: int) -> list[int]:
        others = last_of(12 - sink, start, start + 3)
        return sorted({*range(min(sink, start)), *others})

    for _ in range(5):
        few_steps(film, SHIFTED, texts[0], 3, seen(film.length))
    kept, numbers = film.frames, seen(film.length)
    if again:
        film = Film(plain)
        for number in range(0, len(numbers), 3):
            shown = kept[:, numbers[number : number + 3]]
            film.write(shown, texts[1], range(number), numbers.__getitem__)
        numbers = [*numbers, *range(kept.shape[1], kept.shape[1] + 9)]
    made = []
    for _ in range(3):
        start = film.length
        if again:
            # Frame numbers of the film are not the video's; noise and positions are the latter's.
            frames = numbers[start : start + 3]
            see = [number for number, frame in enumerate(numbers) if frame in seen(frames[0])]
            x = noise_of(SEED, 0, range(frames[0], frames[-1] + 1), SIZE)
            for at, t in enumerate(SHIFTED):
                x0 = x - t / 1000 * film.model(x, t, texts[1], see, numbers.__getitem__)
                sigma = SHIFTED[at + 1] / 1000 if at < 3 else 0
                new = noise_of(SEED, at + 1, range(frames[0], frames[-1] + 1), SIZE)
                x = (1 - sigma) * x0 + sigma * new
            film.write(x, texts[1], see, numbers.__getitem__)
            made.append(x)
        else:
            made.append(few_steps(film, SHIFTED, texts[1], 3, seen(start)))
    return np.concatenate([kept, *made], axis=1)


def infinity_rope(plain, texts, relative=True) -> np.ndarray:
    """Window 6, sink 1: cached keys are turned by their place in the window at every call."""
    film = Film(plain)
    for _ in range(7):
        start = film.length
        seen = [0, *range(max(1, start - 2), start)] if start else []
        order = [*seen, *range(start, start + 3)]
        few_steps(film, SHIFTED, texts[0], 3, seen, order.index if relative else int)
    return film.frames


def causvid(plain, texts, timesteps=(1000.0, 757.0, 522.0)) -> np.ndarray:
    film = Film(plain)
    for _ in range(6):
        few_steps(film, timesteps, texts[0], 3, range(film.length))
    return film.frames


def krea(plain, texts, again=True) -> np.ndarray:
    """Keys of what a block sees are computed again before every block."""
    made, timesteps = np.zeros((16, 0, *SIZE)), (1000.0, 937.0, 833.0, 625.0)
    film = Film(plain)
    for _ in range(5):
        total = made.shape[1]
        numbers = list(range(max(0, total - 6), total + 3))
        if again:
            film = Film(plain)
            for number in range(0, len(numbers) - 3, 3):
                shown = made[:, numbers[number : number + 3]]
                film.write(shown, texts[0], range(number), numbers.__getitem__)
            position, seen = numbers.__getitem__, range(film.length)
        else:
            position, seen = int, numbers[:-3]
        frames = range(total, total + 3)
        x = noise_of(SEED, 0, frames, SIZE)
        for at, t in enumerate(timesteps):
            x0 = x - t / 1000 * film.model(x, t, texts[0], seen, position)
            sigma = timesteps[at + 1] / 1000 if at < 3 else 0
            x = (1 - sigma) * x0 + sigma * noise_of(SEED, at + 1, frames, SIZE)
        film.write(x, texts[0], seen, position)
        made = np.concatenate([made, x], axis=1)
    return made


def rolling_forcing(plain, texts, sink=3, relative=True) -> np.ndarray:
    """Five blocks at once, each a step behind the one before; the window is 21 with them."""
    film, begun = Film(plain), []
    timesteps = [*warp((1000, 800, 600, 400, 200), 5), 0]
    while film.length < 18:
        start = film.length
        seen = sorted({*range(min(sink, start)), *range(max(sink, start - 6 + sink), start)})
        starts = [start + 3 * number for number in range(len(begun) + 1)]
        blocks = [*begun, noise_of(SEED, 0, range(starts[-1], starts[-1] + 3), SIZE)]
        steps = list(range(len(blocks)))[::-1]
        order = [*seen, *range(start, starts[-1] + 3)]
        position = order.index if relative else int
        t = np.repeat([timesteps[step] for step in steps], 3)
        v = film.model(np.concatenate(blocks, axis=1), t, texts[0], seen, position)
        for number, step in enumerate(steps):
            of_block = v[:, 3 * number : 3 * number + 3]
            x0 = blocks[number] - timesteps[step] / 1000 * of_block
            sigma = timesteps[step + 1] / 1000
            new = noise_of(SEED, step + 1, range(starts[number], starts[number] + 3), SIZE)
            blocks[number] = (1 - sigma) * x0 + sigma * new
        if len(blocks) == 5:
            film.write(blocks.pop(0), texts[0], seen, position)
        begun = blocks
    return film.frames


@pytest.fixture(scope="module")
def sides() -> tuple[Denoiser, PlainCausal, np.ndarray]:
    model = standins.transformer(standins.config(dim=24, num_heads=2), seed=2)
    texts = np.random.default_rng(3).standard_normal((2, 6, standins.TEXT_DIM))
    return Denoiser(model), PlainCausal(model), texts.astype(np.float32)


def ours(sides, schedule, window, blocks: int, *, image=None, second: int = 0) -> np.ndarray:
    """Latents of some blocks, of which the last ``second`` have the second prompt."""
    denoiser, _, texts = sides
    said = [denoiser.condition(NoGuidance(), jnp.asarray(text[None]), None) for text in texts]
    sampler = CausalSampler(denoiser, schedule, window, latent_size=SIZE, seed=SEED)
    sampler.change(said[0])
    made = []
    if image is not None:
        sampler.given(image[None].astype(np.float32))
        made.append(image)
    for number in range(blocks):
        if second and number == blocks - second:
            sampler.change(said[1])
        made.append(np.asarray(sampler.next())[0])
    sampler.finish()
    return np.concatenate(made, axis=1)


FOUR = warp((1000, 750, 500, 250), 5)


def test_four_timesteps_are_warped_as_published():
    np.testing.assert_allclose(FOUR, SHIFTED, rtol=1e-12)
    np.testing.assert_allclose(np.round(FOUR, 1), (1000, 937.5, 833.3, 625))
    assert warp((1000, 757, 522), 1) == (1000, 757, 522)


@pytest.mark.slow
def test_self_forcing(sides):
    made = ours(sides, CausalSchedule(FOUR), CausalWindow(21), 8)
    assert decibels(made, self_forcing(*sides[1:])) > LEAST
    assert decibels(made, self_forcing(*sides[1:], (1000, 750, 500, 250))) < MOST
    assert decibels(made, self_forcing(*sides[1:], window=18)) < MOST


@pytest.mark.slow
def test_causal_forcing_by_frame_from_an_image(sides):
    image = np.random.default_rng(4).standard_normal((16, 1, *SIZE)).astype(np.float32)
    image = image.astype(np.float64)
    made = ours(sides, CausalSchedule(FOUR, 1), CausalWindow(21), 22, image=image)
    assert decibels(made, causal_forcing_by_frame(*sides[1:], image)) > LEAST
    assert decibels(made, causal_forcing_by_frame(*sides[1:], image, window=20)) < MOST


@pytest.mark.slow
def test_causal_forcing_plus_plus_has_more_steps_for_the_first_frame(sides):
    schedule = CausalSchedule((FOUR[0], FOUR[2]), 1, first_timesteps=FOUR)
    made = ours(sides, schedule, CausalWindow(21), 22)
    assert decibels(made, causal_forcing_plus(*sides[1:])) > LEAST
    assert decibels(made, causal_forcing_plus(*sides[1:], first=(FOUR[0], FOUR[2]))) < MOST


@pytest.mark.slow
def test_longlive_computes_keys_again_for_a_new_prompt(sides):
    window = CausalWindow(12, 3, recompute="prompt")
    made = ours(sides, CausalSchedule(FOUR), window, 8, second=3)
    assert decibels(made, longlive(*sides[1:])) > LEAST
    assert decibels(made, longlive(*sides[1:], again=False)) < MOST
    assert decibels(made, longlive(*sides[1:], sink=0)) < MOST


@pytest.mark.slow
def test_infinity_rope_turns_keys_by_their_place(sides):
    made = ours(sides, CausalSchedule(FOUR), CausalWindow(6, 1, "relative"), 7)
    assert decibels(made, infinity_rope(*sides[1:])) > LEAST
    assert decibels(made, infinity_rope(*sides[1:], relative=False)) < MOST


@pytest.mark.slow
def test_causvid_takes_timesteps_as_they_stand(sides):
    made = ours(sides, CausalSchedule((1000.0, 757.0, 522.0)), CausalWindow(21), 6)
    assert decibels(made, causvid(*sides[1:])) > LEAST
    assert decibels(made, causvid(*sides[1:], timesteps=warp((1000, 757, 522), 5))) < MOST


@pytest.mark.slow
def test_krea_computes_keys_again_before_every_block(sides):
    window = CausalWindow(9, recompute="block")
    made = ours(sides, CausalSchedule((1000.0, 937.0, 833.0, 625.0)), window, 5)
    assert decibels(made, krea(*sides[1:])) > LEAST
    assert decibels(made, krea(*sides[1:], again=False)) < MOST


@pytest.mark.slow
def test_rolling_forcing_has_five_blocks_under_way(sides):
    schedule = CausalSchedule(warp((1000, 800, 600, 400, 200), 5), rolling=True)
    made = ours(sides, schedule, CausalWindow(21, 3, "relative"), 6)
    assert decibels(made, rolling_forcing(*sides[1:])) > LEAST
    assert decibels(made, rolling_forcing(*sides[1:], sink=0)) < MOST
    assert decibels(made, rolling_forcing(*sides[1:], relative=False)) < MOST
