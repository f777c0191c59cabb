"""A stream whose blocks roll: what the sampler makes that is called directly, in order."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from tests import standins
from tests.sampling.causal_reference import PlainCausal, decibels
from tests.sampling.test_causal_family import LEAST, MOST, rolling_forcing

from skyreels_jax.causal_presets import CAUSAL_PRESETS
from skyreels_jax.components.encoders import to_frames
from skyreels_jax.components.protocols import Components
from skyreels_jax.diffusion.few_steps import CausalSchedule, CausalWindow
from skyreels_jax.diffusion.guidance import NoGuidance
from skyreels_jax.generation.live import LiveStream, causal_sampler
from skyreels_jax.generation.request.live import LiveRequest
from skyreels_jax.generation.request.resolve_live import resolve_live
from skyreels_jax.recognition import CausalGuess
from skyreels_jax.sampling.causal import CausalSampler
from skyreels_jax.sampling.denoiser import Denoiser
from skyreels_jax.sampling.progress import Clock

TIMESTEPS = (1000.0, 700.0)
# Two latent frames a block, two blocks under way, two frames before them.
ROLLING = {"causal_block_size": 2, "window": 6, "sink": 1, "rule": "renoise", "seed": 3}
ROLLING |= {"timesteps": TIMESTEPS, "rolling": True, "guidance_scale": 1.0}
PARTS = Components(standins.Words(), standins.Blocks())


@dataclass
class Streamed:
    """A stream, the latents of its blocks, and calls of the model up to each."""

    stream: LiveStream
    latents: list[np.ndarray] = field(default_factory=list)
    calls: list[int] = field(default_factory=list)

    def whole(self) -> np.ndarray:
        """All latents so far, ``[16, F, H, W]``."""
        return np.concatenate(self.latents, axis=1)


@pytest.fixture(scope="module")
def denoiser() -> Denoiser:
    return Denoiser(standins.transformer(standins.config(dim=24, num_heads=2), seed=2))


def streamed(denoiser: Denoiser, student: str | None = None, **settings: Any) -> Streamed:
    checkpoint = standins.checkpoint("df")
    if student is not None:
        causal = CausalGuess(CAUSAL_PRESETS[student], "made for a test")
        checkpoint = replace(checkpoint, guess=replace(checkpoint.guess, causal=causal))
    settings = {"prompt": "a fox", "height": 32, "width": 32} | settings
    request = resolve_live(LiveRequest.of(settings, dtype="float32"), checkpoint, memory=2**40)
    clock, calls = Clock(), [0]

    def count() -> None:
        calls[0] += 1

    clock.on_submit = count

    def watched(*arguments: Any) -> CausalSampler:
        sampler = causal_sampler(*arguments)
        make = sampler.next

        def keep() -> Any:
            made.latents.append(np.asarray((latents := make())[0]))
            made.calls.append(calls[0])
            return latents

        sampler.next = keep
        return sampler

    stream = LiveStream(PARTS, lambda: denoiser, request, clock=clock, sampler=watched)
    made = Streamed(stream)
    return made


def directly(
    denoiser: Denoiser,
    blocks: int,
    *,
    rolling: bool = True,
    image: np.ndarray | None = None,
    change: tuple[int, str] | None = None,
) -> np.ndarray:
    """Latents of the sampler, with another prompt from a block on."""

    def said(prompt: str):
        text = jnp.asarray(PARTS.text_encoder.encode([prompt]))
        return denoiser.condition(NoGuidance(), text, None, fps=jnp.array([1], jnp.int32))

    sampler = CausalSampler(
        denoiser,
        CausalSchedule(TIMESTEPS, 2, rolling=rolling),
        CausalWindow(6, 1, "relative"),
        latent_size=(4, 4),
        seed=3,
    )
    sampler.change(said("a fox"))
    if image is not None:
        sampler.given(image[None])

    def made() -> Iterator[np.ndarray]:
        for block in range(blocks):
            if change is not None and block == change[0]:
                sampler.change(said(change[1]))
            yield np.asarray(sampler.next())[0]

    return np.concatenate(list(made()), axis=1)


def frames_of(latents: np.ndarray) -> np.ndarray:
    return to_frames(np.concatenate(list(PARTS.vae.decode_pieces([latents])), axis=1))


def test_it_is_the_sampler_called_directly(denoiser: Denoiser):
    run = streamed(denoiser, **ROLLING)
    pieces = list(islice(run.stream, 4))
    assert [len(piece) for piece in pieces] == [5, 8, 8, 8]
    expected = directly(denoiser, len(run.latents))
    np.testing.assert_array_equal(run.whole(), expected)
    np.testing.assert_array_equal(np.concatenate(pieces), frames_of(expected)[:29])
    # Twin: finished one by one they are other frames.
    apart = directly(denoiser, len(run.latents), rolling=False)
    assert decibels(apart, expected) < MOST
    other = streamed(denoiser, **ROLLING | {"rolling": False})
    next(other.stream)
    np.testing.assert_array_equal(other.whole(), apart[:, :2])


def test_the_first_frames_come_after_as_many_calls_as_steps_then_one_a_block(denoiser: Denoiser):
    """The block that is shown first has had two steps, with another begun behind it."""
    run = streamed(denoiser, **ROLLING, seconds=1)
    assert sum(map(len, run.stream)) == 25
    assert run.calls == [2, 3, 4, 5]
    apart = streamed(denoiser, **ROLLING | {"rolling": False}, seconds=1)
    assert sum(map(len, apart.stream)) == 25
    assert apart.calls == [1, 2, 3, 4]  # Twin: all steps of a block are one call of a program.


def test_an_image_is_the_first_frame_of_it(denoiser: Denoiser):
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8)
    run = streamed(denoiser, **ROLLING, image=image)
    first, second = islice(run.stream, 2)
    assert (len(first), len(second)) == (9, 8)
    assert run.stream._begun is not None
    known = run.stream._begun.given
    pixels = image.transpose(2, 0, 1)[:, None] / np.float32(127.5) - 1
    np.testing.assert_allclose(known, standins.Blocks().encode(pixels), atol=1e-6)
    expected = directly(denoiser, len(run.latents), image=known)
    np.testing.assert_array_equal(run.whole(), expected)
    np.testing.assert_array_equal(first, frames_of(np.concatenate([known, expected], 1))[:9])
    assert decibels(run.whole(), directly(denoiser, len(run.latents))) < MOST  # Twin.


def test_another_prompt_is_for_all_blocks_under_way(denoiser: Denoiser):
    """It changes the block that is finished next, which has its last step by it."""
    run = streamed(denoiser, **ROLLING)
    next(run.stream)
    run.stream.change("a whale")
    list(islice(run.stream, 3))
    blocks = len(run.latents)
    changed = directly(denoiser, blocks, change=(1, "a whale"))
    np.testing.assert_array_equal(run.whole(), changed)
    as_before = directly(denoiser, blocks)
    np.testing.assert_array_equal(as_before[:, :2], changed[:, :2])
    later = directly(denoiser, blocks, change=(2, "a whale"))
    for other in (as_before, later):  # Twins.
        assert decibels(other[:, 2:4], changed[:, 2:4]) < MOST


def test_stop_leaves_what_was_begun(denoiser: Denoiser):
    run = streamed(denoiser, **ROLLING)
    list(islice(run.stream, 2))
    run.stream.stop()
    assert list(run.stream) == []
    assert run.calls == [2, 3]
    assert run.stream._begun is None


@pytest.mark.slow
def test_a_stream_of_its_student_is_rolling_forcing_written_out(denoiser: Denoiser):
    def made(**settings: Any) -> np.ndarray:
        run = streamed(denoiser, "rolling-forcing", seed=5, **settings)
        list(islice(run.stream, 6))
        return run.whole()[:, :18]

    text = PARTS.text_encoder.encode(["a fox"])
    expected = rolling_forcing(PlainCausal(denoiser.model), text)
    assert decibels(made(), expected) > LEAST  # Measured 108.9.
    assert decibels(made(rolling=False), expected) < MOST  # 10.4
    assert decibels(made(sink=0), expected) < MOST  # 26.3
