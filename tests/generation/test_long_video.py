"""Long videos with small components: as many frames as asked for, and they join."""

from fractions import Fraction
from typing import Any

import jax
import numpy as np
import pytest
from tests import standins

from skyreels_jax import media
from skyreels_jax.components.protocols import Components
from skyreels_jax.diffusion.unipc import flow_sigmas
from skyreels_jax.errors import RequestError, Stopped
from skyreels_jax.generation.request.resolve import resolve
from skyreels_jax.generation.request.settings import Request
from skyreels_jax.generation.store import MemoryStore
from skyreels_jax.generation.video import generate, stream_frames
from skyreels_jax.generation.window_generator import (
    WindowGenerator,
    conditioning_noise,
    frame_schedule_for,
    starting_noise,
)
from skyreels_jax.sampling.denoiser import Denoiser
from skyreels_jax.sampling.progress import Clock

COMPONENTS = Components(standins.Words(), standins.Blocks())
SIZE = {"height": 16, "width": 32, "steps": 2, "base_num_frames": 97}


def request(**wishes):
    wishes = {"prompt": "a fox", "negative_prompt": "a hen", "seed": 7, **SIZE} | wishes
    return resolve(Request(**wishes), standins.checkpoint("df"), memory=2**40)


@pytest.fixture(scope="module")
def denoiser():
    """Frames do not see each other, but for their text: quick, and joins are plain to see."""
    return Denoiser(standins.Linear())


@pytest.fixture(scope="module")
def transformer():
    return Denoiser(standins.transformer(standins.config()))


@pytest.mark.parametrize("frames", [1, 5, 17, 33, 97, 177, 257, 737])
@pytest.mark.parametrize("block", [1, 3, 5])
@pytest.mark.parametrize("ar_step", [0, 1])
def test_exactly_the_frames_asked_for(denoiser, frames: int, block: int, ar_step: int):
    wishes = {"num_frames": frames, "base_num_frames": 97, "overlap_history": 17}
    asked = request(**wishes, causal_block_size=block, ar_step=ar_step)
    video = generate(COMPONENTS, lambda: denoiser, asked)
    assert len(video.frames) == frames
    assert video.latents.shape == (16, (frames + 3) // 4, 2, 4)


def made(denoiser, asked) -> tuple[np.ndarray, MemoryStore]:
    store = MemoryStore()
    generator = WindowGenerator(COMPONENTS, lambda: denoiser, asked, store=store)
    return np.concatenate(list(stream_frames(generator))), store


LONG = {"num_frames": 41, "base_num_frames": 17, "overlap_history": 5}


def test_latents_are_handed_over_as_they_are(transformer):
    frames, store = made(transformer, request(**LONG))
    windows = list(store.windows.values())
    assert [latents.shape[1] for latents in windows] == [5, 5, 5]
    for before, after in zip(windows, windows[1:], strict=False):
        np.testing.assert_array_equal(after[:, :2], before[:, -2:])
    # One decoding of all.
    whole = np.concatenate(list(COMPONENTS.vae.decode_pieces([store.latents])), 1)
    levels = np.rint((np.moveaxis(whole, 0, -1) / 2 + 0.5) * 255).astype(np.uint8)
    np.testing.assert_array_equal(frames, levels)


def test_pixels_are_handed_over_encoded_anew(transformer):
    asked = request(**LONG, continuation="pixels")
    frames, store = made(transformer, asked)
    windows, shown = list(store.windows.values()), 0
    for before, after in zip(windows, windows[1:], strict=False):
        decoded = np.concatenate(list(COMPONENTS.vae.decode_pieces([before])), axis=1)
        np.testing.assert_array_equal(after[:, :2], COMPONENTS.vae.encode(decoded[:, -5:]))
        shown += decoded.shape[1] - 5
    assert len(frames) == 41
    assert shown == 24
    latents, _ = made(transformer, request(**LONG))
    np.testing.assert_array_equal(frames[:17], latents[:17])
    assert not np.array_equal(frames[17:], latents[17:])


def test_each_window_has_noise_of_its_own_and_of_the_seed_alone():
    asked = request(**LONG)
    noises = [np.asarray(starting_noise(asked, window)) for window in asked.windows]
    assert not np.array_equal(noises[0], noises[1])
    assert not np.array_equal(noises[1], noises[2])
    again = request(**LONG, steps=9)
    np.testing.assert_array_equal(starting_noise(again, again.windows[2]), noises[2])


def test_prompts_reach_their_windows(transformer):
    one, _ = made(transformer, request(**LONG))
    two, _ = made(transformer, request(**LONG, prompt=["a fox", "a crow"]))
    by_frame, _ = made(transformer, request(**LONG, prompt={0: "a fox", 17: "a crow"}))
    np.testing.assert_array_equal(one[:17], two[:17])
    assert not np.array_equal(one[17:], two[17:])
    np.testing.assert_array_equal(two, by_frame)


def picture(value: int = 200, height: int = 16, width: int = 32) -> np.ndarray:
    return np.full((height, width, 3), value, np.uint8)


# Of that picture, by the small codec.
GIVEN = np.full((16, 2, 4), np.float32(2 * (200 / np.float32(255)) - 1))


def test_an_image_with_blocks_longer_than_it_is_kept(transformer):
    """The original overwrites it with noise (a block must be whole to be given)."""
    for wishes in ({"causal_block_size": 3}, {"causal_block_size": 3, "ar_step": 1}):
        video = generate(
            COMPONENTS, lambda: transformer, request(num_frames=17, image=picture(), **wishes)
        )
        np.testing.assert_allclose(video.latents[:, 0], GIVEN, atol=1e-6)  # measured 6e-8


def test_frames_past_the_last_whole_block_are_made(transformer):
    """The original leaves them noise."""
    asked = request(num_frames=21, causal_block_size=4, ar_step=1)
    table = frame_schedule_for(asked, flow_sigmas(asked.steps, asked.shift))
    assert (table.update.sum(axis=0) == asked.steps).all()
    assert table.update.shape[1] == 6


@pytest.mark.parametrize("wishes", [{}, {"causal_block_size": 5}, {"ar_step": 1}, LONG])
def test_an_end_frame_is_seen_by_the_last_window_and_never_shown(transformer, wishes: dict):
    """The original shows it in long videos, or cuts four frames off every window."""
    asked = {"num_frames": 25} | wishes
    plain, _ = made(transformer, request(**asked))
    ended, store = made(transformer, request(**asked, last_image=picture()))
    assert len(ended) == len(plain) == asked["num_frames"]
    windows = request(**asked).windows
    end = 4 * (windows[-1].first_new - 1) + 1 if windows[-1].number else 0
    np.testing.assert_array_equal(ended[:end], plain[:end])
    assert not np.array_equal(ended[end:], plain[end:])
    stored = {window: latents.shape[1] for window, latents in store.windows.items()}
    assert list(stored.values()) == [w.frames for w in windows]


def test_an_end_frame_without_a_start_frame_is_allowed_and_with_causal_attention_refused():
    assert request(num_frames=9, last_image=picture()).windows[0].end
    with pytest.raises(RequestError, match="earlier frames would never see it"):
        request(num_frames=9, last_image=picture(), causal_attention=1)


def test_noise_over_given_frames_is_the_seeds_and_leaves_them_clean(transformer):
    """The original draws it from an unseeded generator."""
    asked = request(num_frames=17, image=picture(), addnoise_condition=20)
    video = generate(COMPONENTS, lambda: transformer, asked)
    again = generate(COMPONENTS, lambda: transformer, asked)
    np.testing.assert_array_equal(video.frames, again.frames)
    np.testing.assert_allclose(video.latents[:, 0], GIVEN, atol=1e-6)  # measured 6e-8
    clean = generate(COMPONENTS, lambda: transformer, request(num_frames=17, image=picture()))
    assert not np.array_equal(video.latents[:, 1:], clean.latents[:, 1:])
    keys = [
        conditioning_noise(request(**LONG, addnoise_condition=20), w)
        for w in request(**LONG).windows
    ]
    assert keys[0] is None
    later = {tuple(jax.random.key_data(noise.key).tolist()) for noise in keys if noise is not None}
    assert len(later) == 2


def write_clip(path, frames: int, height: int, width: int, fps: int = 24):
    rng = np.random.default_rng(frames)
    small = rng.integers(0, 256, (frames, height // 8, width // 8, 3))
    clip = small.repeat(8, 1).repeat(8, 2).astype(np.uint8)
    media.write_video(path, clip, fps=Fraction(fps))
    return media.read_video(path)[0]


@pytest.mark.parametrize("continuation", ["latents", "pixels"])
def test_a_video_is_continued_and_keeps_its_own_frames(transformer, tmp_path, continuation):
    clip = write_clip(tmp_path / "clip.mp4", 21, 16, 32)
    wishes = {"num_frames": 33, "base_num_frames": 17, "overlap_history": 5, "fps": 24}
    asked = request(video=tmp_path / "clip.mp4", continuation=continuation, **wishes)
    frames, store = made(transformer, asked)
    windows = list(store.windows.values())
    # As in the original: 21 + 33 - 5.
    assert len(frames) == asked.output_frames == 49
    np.testing.assert_array_equal(frames[:21], clip)
    pixels = np.moveaxis(2 * (clip[-5:].astype(np.float32) / 255) - 1, -1, 0)
    given = COMPONENTS.vae.encode(pixels)
    np.testing.assert_allclose(windows[0][:, :2], given, atol=2e-6)  # measured 7.7e-7
    assert not (windows[0][:, 2:3] == windows[0][:, 1:2]).any()


def test_an_upright_video_is_cropped_not_stretched(transformer, tmp_path):
    """The original makes it square."""
    write_clip(tmp_path / "tall.mp4", 9, 48, 16)
    wishes = {"prompt": "a fox", "seed": 7, "steps": 1, "num_frames": 9, "overlap_history": 5}
    asked = resolve(
        Request(**wishes, video=tmp_path / "tall.mp4"), standins.checkpoint("df"), memory=2**40
    )
    assert (asked.height, asked.width) == (48, 32)
    frames, _ = made(transformer, asked)
    assert frames.shape == (13, 48, 32, 3)
    # Three times as high as wide, cropped to 3:2 around its centre and enlarged twofold.
    source = media.read_video(tmp_path / "tall.mp4")[0][0, 12:36].astype(int)
    shown = frames[0, ::2, ::2].astype(int)
    assert np.abs(source - shown).mean() < 12  # measured 5; of the whole clip squeezed 70


REFUSED = {
    "a wrong path": ({"video": "nowhere.mp4"}, "no such file"),
    "too short": ({"video": "clip", "overlap_history": 17}, "has 9 frames, fewer than"),
    "an image too": ({"video": "clip", "image": picture()}, "exclude each other"),
    "nothing new": ({"video": "clip", "overlap_history": 9, "num_frames": 9}, "at least 13"),
    "an image and one frame": ({"image": picture(), "num_frames": 1}, "leaves nothing to make"),
    "an overlap like no clip": ({"overlap_history": 6}, "4 k \\+ 1; nearest: 5 or 9"),
    "windows like no clip": ({"base_num_frames": 8}, "4 k \\+ 1; nearest: 5 or 9"),
    "all overlap": (LONG | {"overlap_history": 17}, "at most 13"),
    "a negative lag": ({"ar_step": -1}, "`ar_step` -1 must be between 0 and 1000"),
    "no block": ({"causal_block_size": 0}, "`causal_block_size` 0 must be between 1 and"),
    "nothing but noise": ({"addnoise_condition": 1000}, "between 0 and 999"),
    "an unknown hand-over": ({"continuation": "smoke"}, "there are latents, pixels"),
    "too many prompts": (LONG | {"prompt": list("abcd")}, "4 prompts for 3 windows"),
    "an empty prompt": (LONG | {"prompt": ["a", " "]}, "`prompt` is empty"),
}


@pytest.mark.parametrize("rule", REFUSED)
def test_bad_settings_are_refused_with_the_rule(tmp_path, rule: str):
    wishes, words = REFUSED[rule]
    if wishes.get("video") == "clip":
        write_clip(tmp_path / "clip.mp4", 9, 16, 32)
        wishes = wishes | {"video": tmp_path / "clip.mp4"}
    with pytest.raises(RequestError, match=words):
        request(**wishes)


@pytest.mark.parametrize("name", ["base_num_frames", "ar_step", "continuation", "causal_attention"])
def test_other_checkpoints_refuse_what_only_forcing_has(name: str):
    value: Any = "latents" if name == "continuation" else 5
    with pytest.raises(RequestError, match=f"`{name}`: only diffusion-forcing"):
        resolve(Request(prompt="a", **{name: value}), standins.checkpoint("t2v"), memory=2**40)


def test_a_stop_comes_between_two_steps(transformer):
    clock = Clock()

    class Stopping:
        def begin(self, stage, total=None): ...
        def end(self, stage, seconds): ...
        def advance(self, stage, done):
            if stage == "decode" and done >= 20:
                clock.stop.set()

    clock.progress = Stopping()
    generator = WindowGenerator(COMPONENTS, lambda: transformer, request(**LONG), clock=clock)
    shown = []
    with pytest.raises(Stopped):
        for frames in stream_frames(generator):
            shown.extend(frames)
    # The second window was finished; the third was not.
    assert len(shown) == 29


def test_settings_of_a_long_video_say_all():
    asked = request(**LONG, prompt=["a fox", "a crow"])
    settings = asked.settings()
    assert settings["prompt"] == ["a fox", "a crow", "a crow"]
    assert settings["forcing"]["overlap_history"] == 5
    assert settings["num_frames"] == 41
