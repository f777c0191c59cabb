"""Whole generations with small components: every stage in order, and every input to its place."""

import base64
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tests import standins
from tests.diffusion.diffusers_grid import diffusers_sigmas

from skyreels_jax import media
from skyreels_jax.components.encoders import condition_latents, prepare_image, to_frames
from skyreels_jax.components.protocols import Components
from skyreels_jax.diffusion.guidance import guidance_of
from skyreels_jax.diffusion.unipc import flow_sigmas
from skyreels_jax.errors import NumericsError, RequestError
from skyreels_jax.generation import video as video_module
from skyreels_jax.generation.request.resolve import resolve
from skyreels_jax.generation.request.settings import Request
from skyreels_jax.generation.video import generate
from skyreels_jax.generation.window_generator import starting_noise
from skyreels_jax.sampling.denoiser import Denoiser, Sampling

COMPONENTS = Components(standins.Words(), standins.Blocks(), standins.Glance())


def picture(height: int = 40, width: int = 60) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3)).astype(np.uint8)


def request(task: str = "t2v", **wishes):
    wishes = {"prompt": "a fox", "negative_prompt": "a hen", "seed": 7} | wishes
    return resolve(Request(**wishes), standins.checkpoint(task), memory=2**40)


@pytest.fixture(scope="module")
def text_denoiser():
    return Denoiser(standins.transformer(standins.config()))


@pytest.fixture(scope="module")
def image_denoiser():
    return Denoiser(standins.transformer(standins.image_config()))


def by_hand(denoiser, asked, *, clip_fea=None, y=None, fps=1):
    """The stages one after the other, with nothing shared but the loop."""
    guidance = guidance_of(asked.guidance_scale)
    texts = (standins.Words().encode([text]) for text in (asked.prompt, asked.negative_prompt))
    told = denoiser.condition(
        guidance,
        *map(jnp.asarray, texts),
        clip_fea=clip_fea,
        y=y,
        fps=jnp.array([fps], jnp.int32),
    )
    schedule = flow_sigmas(asked.steps, asked.shift)
    latents = denoiser.run(starting_noise(asked), told, Sampling(schedule, guidance)).latents[0]
    return np.concatenate([to_frames(x) for x in standins.Blocks().decode_pieces([latents])])


def test_text_becomes_a_video(text_denoiser):
    video = generate(COMPONENTS, lambda: text_denoiser, request())
    assert video.frames.shape == (9, 32, 48, 3)
    assert video.frames.dtype == np.uint8
    assert video.latents.shape == (16, 3, 4, 6)
    assert video.fps == 24
    np.testing.assert_array_equal(video.frames, by_hand(text_denoiser, request()))


def test_an_image_reaches_the_model_twice(image_denoiser):
    asked = request("i2v", image=picture())
    video = generate(COMPONENTS, lambda: image_denoiser, asked)
    prepared = prepare_image(picture(), 32, 48)
    clip_fea = jnp.asarray(standins.Glance().encode(prepared))[None]
    y = jnp.asarray(condition_latents(standins.Blocks(), prepared, None, 9))[None]
    expected = by_hand(image_denoiser, asked, clip_fea=clip_fea, y=y)
    np.testing.assert_array_equal(video.frames, expected)
    for broken in (
        {"clip_fea": clip_fea[:, :, ::-1], "y": y},
        {"clip_fea": clip_fea, "y": y[:, ::-1]},
    ):
        assert not np.array_equal(video.frames, by_hand(image_denoiser, asked, **broken))


def test_two_images_reach_a_first_last_frame_model():
    shape = standins.image_config(pos_embed_seq_len=514)
    denoiser = Denoiser(standins.transformer(shape))
    asked = request("flf2v", image=picture(), last_image=picture() // 2)
    video = generate(COMPONENTS, lambda: denoiser, asked)
    images = [prepare_image(image, 32, 48) for image in (picture(), picture() // 2)]
    features = np.concatenate([standins.Glance().encode(image) for image in images])
    y = condition_latents(standins.Blocks(), *images, 9)
    given = {"clip_fea": jnp.asarray(features)[None], "y": jnp.asarray(y)[None]}
    np.testing.assert_array_equal(video.frames, by_hand(denoiser, asked, **given))


def test_diffusion_forcing_keeps_an_image_as_its_first_frame(text_denoiser):
    asked = request("df", image=picture())
    video = generate(COMPONENTS, lambda: text_denoiser, asked)
    prepared = prepare_image(picture(), 32, 48, Image.Resampling.BICUBIC)
    first = standins.Blocks().encode(prepared.pixels[:, None])
    np.testing.assert_array_equal(video.latents[:, :1], first)
    without = generate(COMPONENTS, lambda: text_denoiser, request("df"))
    assert not np.allclose(video.latents[:, 1:], without.latents[:, 1:], atol=0.01)


def test_the_frame_rate_reaches_a_model_that_knows_it():
    denoiser = Denoiser(standins.transformer(standins.config(inject_sample_info=True)))
    for fps, index in ((16, 0), (24, 1), (30, 1)):
        asked = request("df", fps=fps)
        video = generate(COMPONENTS, lambda: denoiser, asked)
        assert video.fps == fps
        np.testing.assert_array_equal(video.frames, by_hand(denoiser, asked, fps=index))
        assert not np.array_equal(video.frames, by_hand(denoiser, asked, fps=1 - index))


@pytest.mark.parametrize(
    "change",
    [{"prompt": "a hen"}, {"negative_prompt": ""}, {"seed": 8}, {"steps": 4}, {"shift": 3.0}]
    + [{"guidance_scale": 2.0}, {"guidance_scale": 1.0}],
)
def test_every_setting_changes_the_video(text_denoiser, change: dict):
    base = generate(COMPONENTS, lambda: text_denoiser, request())
    changed = generate(COMPONENTS, lambda: text_denoiser, request(**change))
    assert not np.array_equal(base.latents, changed.latents)
    again = generate(COMPONENTS, lambda: text_denoiser, request())
    np.testing.assert_array_equal(base.latents, again.latents)


def test_batched_guidance_gives_the_same_video(text_denoiser):
    one_by_one = generate(COMPONENTS, lambda: text_denoiser, request())
    at_once = generate(COMPONENTS, lambda: text_denoiser, request(batched_guidance=True))
    # Measured 5.0e-6 on latents of size 5.
    np.testing.assert_allclose(at_once.latents, one_by_one.latents, atol=2e-5)


def test_guidance_of_one_never_encodes_the_negative_prompt(text_denoiser):
    class Listening(standins.Words):
        def encode(self, prompts):
            self.heard = list(prompts)
            return super().encode(prompts)

    words = Listening()
    generate(
        Components(words, standins.Blocks()), lambda: text_denoiser, request(guidance_scale=1.0)
    )
    assert words.heard == ["a fox"]


def test_noise_and_levels_can_be_given(text_denoiser):
    base = generate(COMPONENTS, lambda: text_denoiser, request())
    same = generate(
        COMPONENTS,
        lambda: text_denoiser,
        request(seed=8),
        noise=lambda _: starting_noise(request()),
    )
    np.testing.assert_array_equal(base.latents, same.latents)
    levels = diffusers_sigmas(3, 8.0)
    other = generate(COMPONENTS, lambda: text_denoiser, request(), schedule=levels)
    assert not np.array_equal(base.latents, other.latents)
    with pytest.raises(ValueError, match=r"\(1, 16, 3, 4, 6\)"):
        generate(
            COMPONENTS,
            lambda: text_denoiser,
            request(),
            noise=lambda _: jnp.zeros((1, 16, 2, 4, 6)),
        )


class Stages:
    def __init__(self):
        self.begun, self.ended, self.counted = [], [], {}

    def begin(self, stage, total=None):
        self.begun.append((stage, total))

    def advance(self, stage, done):
        self.counted.setdefault(stage, []).append(done)

    def end(self, stage, seconds):
        self.ended.append(stage)


def test_stages_come_in_order_are_counted_and_timed():
    denoiser = Denoiser(standins.transformer(standins.image_config()))
    stages = Stages()
    asked = request("i2v", image=picture())
    video = generate(COMPONENTS, lambda: denoiser, asked, progress=stages)
    expected = ["text", "image", "condition", "load", "compile", "compile", "denoise", "decode"]
    assert [stage for stage, _ in stages.begun] == stages.ended == expected
    assert dict(stages.begun)["denoise"] == 3
    assert stages.counted == {"denoise": [1, 2, 3], "decode": [1, 5, 9]}
    assert video.timings.stages.keys() == set(expected)
    assert len(video.timings.steps) == 3
    assert sum(video.timings.steps) <= video.timings.stages["denoise"]


def test_a_saved_video_carries_its_settings(text_denoiser, tmp_path: Path):
    video = generate(COMPONENTS, lambda: text_denoiser, request())
    assert video.save(tmp_path / "out.mp4", sidecar=True) == tmp_path / "out.mp4"
    settings = media.read_settings(tmp_path / "out.mp4")
    assert settings == video.settings
    assert settings["prompt"] == "a fox"
    assert settings["seed"] == 7
    assert settings["sources"]["shift"] == "preset tiny"
    assert settings["generator"].startswith("skyreels-jax ")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.json", "out.mp4"]
    frames, rate = media.read_video(tmp_path / "out.mp4")
    assert frames.shape == video.frames.shape
    assert rate == 24
    video.save(tmp_path / "bare.mp4", metadata=False)
    with pytest.raises(RequestError, match="carries no settings"):
        media.read_settings(tmp_path / "bare.mp4")


class Damaged(standins.Blocks):
    def decode_pieces(self, pieces):
        for number, chunk in enumerate(super().decode_pieces(pieces)):
            yield chunk if number < 1 else chunk * np.float32("nan")


def test_a_decoder_that_gives_nan_is_an_error_that_says_so(text_denoiser):
    components = Components(standins.Words(), Damaged())
    with pytest.raises(NumericsError, match="after frame 1 of 9"):
        generate(components, lambda: text_denoiser, request())


def test_image_requests_need_an_image_encoder(image_denoiser):
    components = Components(standins.Words(), standins.Blocks())
    with pytest.raises(ValueError, match="image encoder"):
        generate(components, lambda: image_denoiser, request("i2v", image=picture()))


def test_a_video_says_what_it_is_in_one_line_and_plays_in_a_notebook(
    text_denoiser, monkeypatch: pytest.MonkeyPatch
):
    made = generate(COMPONENTS, lambda: text_denoiser, request(prompt="a fox " * 50))
    said = repr(made)
    assert said.startswith("<Video: 9 frames of 48x32 at 24 fps, 0.4 s, 'a fox a fox")
    assert "\n" not in said and len(said) < 120
    shown = made._repr_html_()
    assert shown.startswith('<video controls loop muted autoplay src="data:video/mp4;base64,')
    content = base64.b64decode(shown.partition("base64,")[2].partition('"')[0])
    assert b"ftyp" in content[:16]
    monkeypatch.setattr(video_module, "_MAX_SHOWN_BYTES", len(content) - 1)
    assert made._repr_html_().startswith('<img src="data:image/jpeg;base64,')
