"""Images as the transformer is given them, and latents and pixels as NumPy meets them.

Source: SkyReels-V2's image-to-video pipeline (``resizecrop``, ``VideoProcessor.preprocess``) and
Wan 2.1's mask.
"""

from collections import deque
from fractions import Fraction
from pathlib import Path

import numpy as np
from jaxtyping import Float
from PIL import Image

from skyreels_jax.components.protocols import Autoencoder, ImageCondition
from skyreels_jax.geometry import FRAMES_PER_LATENT
from skyreels_jax.media import RgbImage, stream_video
from skyreels_jax.shapes import Frames, HostLatents, Pixels


def prepare_image(
    image: RgbImage,
    height: int,
    width: int,
    resampling: Image.Resampling = Image.Resampling.LANCZOS,
) -> ImageCondition:
    """Crop ``image`` around its centre to the video's aspect and resize it.

    The resized image is rounded to 8 bits before it is scaled, as in both references. The original
    resizes by Lanczos for image-to-video and bicubically for diffusion forcing.
    """
    fitted = Image.fromarray(image).crop(_centre_box(image, height, width))
    resized = np.asarray(fitted.resize((width, height), resampling))
    pixels = 2 * (resized.astype(np.float32) / 255) - 1
    return ImageCondition(image, np.ascontiguousarray(np.moveaxis(pixels, -1, 0)))


def _centre_box(image: RgbImage, height: int, width: int) -> tuple[float, float, float, float]:
    """The largest centred box of the target's aspect, in the truncated sizes of the original."""
    rows, columns = image.shape[:2]
    if rows / columns > height / width:
        kept_rows, kept_columns = max(1, int(columns * height / width)), columns
    else:
        kept_rows, kept_columns = rows, max(1, int(rows * width / height))
    left, top = (columns - kept_columns) / 2, (rows - kept_rows) / 2
    return left, top, left + kept_columns, top + kept_rows


def condition_latents(
    vae: Autoencoder, first: ImageCondition, last: ImageCondition | None, num_frames: int
) -> Float[np.ndarray, "Y F H W"]:
    """Mask and latents of a video of which only the first frame (and the last) is known.

    Unknown frames are mid-grey. The four mask channels are the pixel frames of each latent, 1 where
    the frame is known; the first latent stands for its one frame four times.
    """
    video = np.zeros((3, num_frames, *first.pixels.shape[1:]), np.float32)
    known = np.zeros(num_frames, np.float32)
    video[:, 0], known[0] = first.pixels, 1
    if last is not None:
        video[:, -1], known[-1] = last.pixels, 1
    latents = vae.encode(video).astype(np.float32)
    by_latent = np.concatenate([np.repeat(known[:1], FRAMES_PER_LATENT), known[1:]])
    mask = by_latent.reshape(-1, FRAMES_PER_LATENT).T[:, :, None, None]
    return np.concatenate([np.broadcast_to(mask, (FRAMES_PER_LATENT, *latents.shape[1:])), latents])


def to_frames(pixels: Pixels) -> Frames:
    """Pixels in [-1, 1] as 8-bit frames, rounded to nearest; values outside are clipped.

    The original truncates, which darkens a video by half a level on average.
    """
    levels = np.rint((np.clip(pixels, -1, 1) / 2 + 0.5) * 255)
    return np.ascontiguousarray(np.moveaxis(levels.astype(np.uint8), 0, -1))


def encode_first_frame(vae: Autoencoder, image: ImageCondition) -> HostLatents:
    """The single latent frame of an image, as diffusion forcing continues it."""
    return vae.encode(image.pixels[:, None]).astype(np.float32)


def encode_last_frames(
    vae: Autoencoder, video: Path, count: int, size: tuple[int, int], fps: int | Fraction
) -> HostLatents:
    """Latents of the last ``count`` frames (``4k + 1``) of a file, as a video of their own.

    Frames are taken at ``fps`` and cropped to the aspect of ``size``, where the original stretches
    them.
    """
    last = deque(stream_video(video, fps), maxlen=count)
    images = [prepare_image(frame, *size, Image.Resampling.BICUBIC) for frame in last]
    return vae.encode(np.stack([image.pixels for image in images], axis=1)).astype(np.float32)
