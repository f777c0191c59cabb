"""Images into conditions, against the steps of the original written with its own libraries."""

import numpy as np
import pytest
from diffusers.video_processor import VideoProcessor
from PIL import Image
from tests import standins

from skyreels_jax.components.encoders import (
    condition_latents,
    encode_first_frame,
    prepare_image,
    to_frames,
)


def picture(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(height).integers(0, 256, (height, width, 3)).astype(np.uint8)


@pytest.mark.parametrize("size", [(32, 48), (64, 96), (30, 45)])
def test_an_image_of_the_right_aspect_is_prepared_as_diffusers_does(size: tuple[int, int]):
    image = picture(*size)
    expected = VideoProcessor(vae_scale_factor=8).preprocess(Image.fromarray(image), 32, 48)
    ours = prepare_image(image, 32, 48)
    np.testing.assert_array_equal(ours.pixels, expected[0].numpy())
    np.testing.assert_array_equal(ours.source, image)


@pytest.mark.parametrize(
    ("size", "kept"),
    [
        ((40, 100), (slice(0, 40), slice(20, 80))),  # too wide: 40 x 60 in the middle
        ((100, 30), (slice(40, 60), slice(0, 30))),  # too high: 20 x 30 in the middle
    ],
)
def test_other_aspects_are_cropped_around_the_centre(size, kept):
    image = picture(*size)
    cropped = Image.fromarray(np.ascontiguousarray(image[kept]))
    expected = VideoProcessor(vae_scale_factor=8).preprocess(cropped, 32, 48)
    np.testing.assert_array_equal(prepare_image(image, 32, 48).pixels, expected[0].numpy())
    stretched = VideoProcessor(vae_scale_factor=8).preprocess(Image.fromarray(image), 32, 48)
    assert not np.array_equal(prepare_image(image, 32, 48).pixels, stretched[0].numpy())


def test_diffusion_forcing_resizes_as_pillow_does_by_default():
    image = picture(64, 96)
    expected = np.asarray(Image.fromarray(image).resize((48, 32))) / np.float32(127.5) - 1
    ours = prepare_image(image, 32, 48, Image.Resampling.BICUBIC).pixels
    # Measured 1.2e-7: the original divides by 127.5, diffusers by 255 before it doubles.
    np.testing.assert_allclose(np.moveaxis(ours, 0, -1), expected, atol=5e-7)
    assert np.abs(ours - prepare_image(image, 32, 48).pixels).max() > 0.01


@pytest.mark.parametrize("size", [(1, 1), (1, 500), (500, 1)])
def test_the_thinnest_images_still_give_a_frame(size: tuple[int, int]):
    assert prepare_image(picture(*size), 32, 48).pixels.shape == (3, 32, 48)


class Recorder(standins.Blocks):
    def encode(self, pixels: np.ndarray) -> np.ndarray:
        self.seen = pixels
        return super().encode(pixels)


def test_a_first_frame_is_followed_by_mid_grey_and_masked():
    vae = Recorder()
    first = prepare_image(picture(32, 48), 32, 48)
    y = condition_latents(vae, first, None, 9)
    assert y.shape == (20, 3, 4, 6)
    assert y.dtype == np.float32
    np.testing.assert_array_equal(vae.seen[:, 0], first.pixels)
    assert not vae.seen[:, 1:].any()
    np.testing.assert_array_equal(y[:4, 0], 1)
    np.testing.assert_array_equal(y[:4, 1:], 0)
    np.testing.assert_array_equal(y[4:], vae.encode(vae.seen))


def test_a_last_frame_marks_one_of_the_four_of_its_latent():
    vae = Recorder()
    first, last = (prepare_image(picture(size, 48), 32, 48) for size in (32, 31))
    y = condition_latents(vae, first, last, 9)
    np.testing.assert_array_equal(vae.seen[:, -1], last.pixels)
    assert y[:4, :, 0, 0].T.tolist() == [[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 0, 1]]


def test_a_single_frame_is_all_known():
    first = prepare_image(picture(32, 48), 32, 48)
    assert condition_latents(standins.Blocks(), first, None, 1)[:4].min() == 1
    assert encode_first_frame(standins.Blocks(), first).shape == (16, 1, 4, 6)


def test_levels_are_rounded_and_clipped():
    values = np.array([-1.5, -1, -0.9999, 0, 0.003, 0.9999, 1, 7])
    frames = to_frames(np.broadcast_to(values[:, None, None], (3, 8, 1, 1)).astype(np.float32))
    # By truncation the fourth would be 127 and the sixth 254.
    assert frames[:, 0, 0, 0].tolist() == [0, 0, 0, 128, 128, 255, 255, 255]
    assert frames.shape == (8, 1, 1, 3)
