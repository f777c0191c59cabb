"""Step caches in whole runs of a small transformer: counted, and never compiled anew."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from tests import standins

from skyreels_jax.checkpoints import Guess
from skyreels_jax.components.protocols import Components
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.request.resolve import resolve
from skyreels_jax.generation.request.settings import Request
from skyreels_jax.generation.video import generate
from skyreels_jax.presets import PRESETS
from skyreels_jax.sampling.denoiser import Denoiser

COMPONENTS = Components(standins.Words(), standins.Blocks(), standins.Glance())


# The polynomial of this model is positive at the large changes of random weights; most others are
# negative there, and nothing runs again at any threshold.
def checkpoint(task: str, preset: str | None = "SkyReels-V2-DF-1.3B-540P"):
    known = standins.checkpoint(task, Path("model"))
    guess = Guess(None if preset is None else PRESETS[preset], "said so")
    return dataclasses.replace(known, guess=guess)


def video(denoiser, task="df", threshold: float | None = None, **wishes):
    asked = {"prompt": "a fox", "negative_prompt": "a hen", "seed": 7, "steps": 12} | wishes
    request = resolve(Request(**asked), checkpoint(task), memory=2**40)
    if threshold is not None:  # some are out of reach of users
        cache = dataclasses.replace(request.cache, threshold=threshold)
        request = dataclasses.replace(request, cache=cache)
    return generate(COMPONENTS, lambda: denoiser, request)


@pytest.fixture(scope="module")
def denoiser():
    return Denoiser(standins.transformer(standins.config()))


LONG = {"num_frames": 25, "base_num_frames": 17, "overlap_history": 5, "ar_step": 1}


@pytest.mark.parametrize("wishes", [{}, {"ar_step": 2}, LONG, {"batched_guidance": True}], ids=str)
@pytest.mark.parametrize("cache", ["teacache", "easycache"])
def test_calls_are_left_out_counted_and_nothing_is_compiled_for_another_threshold(
    denoiser, cache: str, wishes: dict
):
    plain = video(denoiser, **wishes)
    assert plain.timings.computed == plain.timings.calls > 0
    first = video(denoiser, cache=cache, threshold=1e9, **wishes)
    programs = len(denoiser._executables)
    again = video(denoiser, cache=cache, threshold=1e-9, **wishes)
    assert len(denoiser._executables) == programs
    assert first.timings.calls == again.timings.calls == plain.timings.calls
    assert first.timings.computed < 0.6 * first.timings.calls
    assert again.timings.computed > first.timings.computed
    assert not np.array_equal(first.frames, plain.frames)


@pytest.mark.parametrize("cache", ["teacache", "easycache"])
def test_threshold_zero_is_no_cache(denoiser, cache: str):
    plain = video(denoiser)
    zero = video(denoiser, cache=cache, cache_threshold=0.0)
    np.testing.assert_array_equal(zero.latents, plain.latents)
    assert zero.timings.computed == zero.timings.calls


def test_image_to_video_has_caches_too():
    denoiser = Denoiser(standins.transformer(standins.image_config()))
    image = np.zeros((32, 48, 3), np.uint8)
    kept = video(denoiser, "i2v", image=image, cache="easycache", threshold=1e9)
    assert kept.timings.computed < 0.6 * kept.timings.calls


@pytest.mark.parametrize(
    ("wishes", "preset", "words"),
    [
        ({"cache": "magic"}, "SkyReels-V2-DF-14B-540P", "there are none, teacache, easycache"),
        ({"cache": "teacache"}, None, "use easycache, or say by `preset`"),
        ({"cache_threshold": 0.1}, None, "without `cache`"),
        ({"cache": "easycache", "cache_threshold": -0.1}, None, "from 0 to 1"),
        ({"cache": "easycache", "cache_threshold": float("nan")}, None, "from 0 to 1"),
        ({"cache": "easycache", "use_ret_steps": True}, None, "is a setting of the cache teacache"),
    ],
)
def test_bad_caches_are_refused(wishes: dict, preset, words: str):
    with pytest.raises(RequestError, match=words):
        resolve(Request(prompt="a", **wishes), checkpoint("df", preset), memory=2**40)
