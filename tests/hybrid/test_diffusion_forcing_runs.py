"""Diffusion forcing against diffusers' pipelines: asynchronous, causal, given frames, long videos.

Same small checkpoint, noise of every window, sigmas and inputs; float32. Diffusers' long videos
hand latents over, as ours do by default. Its loop is run with the sample cloned (see ``oracle``).
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import SkyReelsV2DiffusionForcingImageToVideoPipeline
from PIL import Image
from tests.fabricate import Checkpoints
from tests.hybrid import oracle

from skyreels_jax.diffusion.unipc import flow_sigmas
from skyreels_jax.generation.request.resolve import resolve
from skyreels_jax.generation.request.settings import Request
from skyreels_jax.generation.video import generate
from skyreels_jax.hybrid import HybridPipeline

STEPS, SHIFT = 4, 5.0
HEIGHT, WIDTH = 32, 48
COMMON: dict[str, Any] = {
    "prompt": "A cat on the lake",
    "negative_prompt": "sky",
    "height": HEIGHT,
    "width": WIDTH,
}
# dB. Measured 82.9 (together) to 89.3 (image and end); the mildest twin has 63.4.
ENOUGH = 75.0


def picture(seed: int) -> Image.Image:
    """A smooth image of the video's very size: how images are resized is tested elsewhere."""
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((WIDTH, HEIGHT), Image.Resampling.BICUBIC)


def noise(window: int, frames: int) -> np.ndarray:
    shape = (1, 16, frames, HEIGHT // 8, WIDTH // 8)
    return np.random.default_rng([3, window]).standard_normal(shape).astype(np.float32)


# Settings of both sides; blocks of one frame are never masked by diffusers.
LONG: dict[str, Any] = {"num_frames": 41, "base_num_frames": 17, "overlap_history": 5}
CASES: dict[str, dict[str, Any]] = {
    "together": {"num_frames": 21},
    "frame by frame": {"num_frames": 21, "ar_step": 1},
    "autoregressive": {"num_frames": 17, "ar_step": STEPS},
    "blocks, causal": {"num_frames": 21, "ar_step": 2, "causal_block_size": 3},
    "together, causal": {"num_frames": 21, "causal_block_size": 2},
    "long": LONG,
    "long, frame by frame": LONG | {"ar_step": 1},
    "long, blocks, causal": {"num_frames": 45, "base_num_frames": 21, "overlap_history": 5}
    | {"ar_step": 2, "causal_block_size": 2},
    "image": {"num_frames": 17, "image": picture(0)},
    "image, frame by frame": {"num_frames": 17, "image": picture(0), "ar_step": 1},
    "image and end": {"num_frames": 17, "image": picture(0), "last_image": picture(1)},
    "image, long": LONG | {"image": picture(0)},
}


@pytest.fixture(scope="module")
def theirs(checkpoints: Checkpoints) -> Callable[[str], np.ndarray]:
    text = oracle.load(checkpoints("df", "diffusers"))
    image = SkyReelsV2DiffusionForcingImageToVideoPipeline(**text.components)
    image.set_progress_bar_config(disable=True)

    @cache
    def run(case: str) -> np.ndarray:
        settings = CASES[case]
        pipeline: Any = image if "image" in settings else text
        scheduler = oracle.GivenLevels.from_config(pipeline.scheduler.config)
        scheduler.schedule = flow_sigmas(STEPS, SHIFT)
        pipeline.scheduler = scheduler
        real = type(pipeline).prepare_latents
        number = iter(range(100))

        def given(*args: Any, **kwargs: Any) -> Any:
            _, *rest = real(pipeline, *args, **kwargs)
            return torch.tensor(noise(next(number), rest[0])), *rest

        pipeline.prepare_latents = given
        pipeline.transformer._set_ar_attention(1)  # what an earlier run has left
        asked = {**COMMON, "base_num_frames": 97, "guidance_scale": 5.0, **settings}
        frames = pipeline(output_type="np", num_inference_steps=STEPS, **asked).frames[0]
        return np.rint(frames * 255).astype(np.uint8)

    return run


@pytest.fixture(scope="module")
def ours(checkpoints: Checkpoints) -> Callable[..., np.ndarray]:
    pipeline = HybridPipeline(
        checkpoints("df", "diffusers"), None, "cpu", jnp.float32, preprocessing="diffusers"
    )

    def run(case: str, **changes: Any) -> np.ndarray:
        settings = {**COMMON, "base_num_frames": 97, **CASES[case]}
        if "causal_block_size" in settings:
            settings["causal_attention"] = settings["causal_block_size"]
        settings |= {"steps": STEPS, "shift": SHIFT, "guidance_scale": 5.0, **changes}
        request = Request(seed=0, dtype="float32", **settings)
        return generate(
            pipeline.components,
            lambda: pipeline.denoiser,
            resolve(request, pipeline.checkpoint),
            noise=lambda window: jnp.asarray(noise(window.number, window.frames)),
        ).frames

    return run


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)))
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(name, marks=pytest.mark.slow if name.startswith("long, blocks") else ())
        for name in CASES
    ],
)
def test_a_video_is_that_of_diffusers(ours, theirs, case: str):
    expected = theirs(case)
    assert expected.std() > 20  # there is something to see
    result = ours(case)
    assert result.shape == expected.shape
    assert psnr(result, expected) >= ENOUGH


TWINS: list[tuple[str, dict[str, Any]]] = [
    ("frame by frame", {"ar_step": 2}),
    ("autoregressive", {"ar_step": STEPS - 1}),
    ("blocks, causal", {"causal_attention": None}),
    ("blocks, causal", {"causal_attention": 2}),
    ("blocks, causal", {"causal_block_size": 2}),
    ("together, causal", {"causal_attention": 1}),
    ("long", {"overlap_history": 9}),
    ("long", {"continuation": "pixels"}),
    ("long", {"ar_step": 1}),
    ("image", {"image": picture(2)}),
    ("image", {"addnoise_condition": 20}),
    ("image and end", {"last_image": None}),
    ("image and end", {"last_image": picture(2)}),
]


@pytest.mark.parametrize(
    ("case", "change"), TWINS, ids=[f"{case}: {next(iter(c))}" for case, c in TWINS]
)
def test_a_changed_setting_is_caught(ours, theirs, case: str, change: dict[str, Any]):
    assert psnr(ours(case, **change), theirs(case)) < ENOUGH
