"""An image as CLIP takes it, prepared as the original does or as diffusers does."""

from collections.abc import Callable
from types import MappingProxyType
from typing import Final, Literal

import numpy as np
from jaxtyping import Float
from PIL import Image

from skyreels_jax.components.protocols import ImageCondition
from skyreels_jax.models.clip_vision import PIXEL_MEAN, PIXEL_STD
from skyreels_jax.ops.resize import bicubic_resize

ClipPixels = Float[np.ndarray, "3 side side"]
ClipPreprocessing = Literal["original", "diffusers"]


def squash(image: ImageCondition, side: int = 224) -> ClipPixels:
    """The whole frame at video resolution, resampled to a square whatever its shape.

    This is what SkyReels-V2 was trained with. (The original resamples in bfloat16; here it is
    float32.)
    """
    return _normalise((bicubic_resize(image.pixels, side, side) + 1) / 2)


def centre_crop(image: ImageCondition, side: int = 224) -> ClipPixels:
    """The square in the middle of the image as given, as transformers' CLIPImageProcessor cuts it.

    The short edge becomes ``side`` (Pillow's antialiased bicubic on 8 bits), the long one is cut.
    """
    picture = Image.fromarray(image.source)
    short = min(picture.size)
    width, height = (side * edge // short for edge in picture.size)
    resized = np.asarray(picture.resize((width, height), Image.Resampling.BICUBIC))
    top, left = (height - side) // 2, (width - side) // 2
    square = resized[top : top + side, left : left + side]
    return _normalise(np.moveaxis(square, 2, 0).astype(np.float32) / np.float32(255))


PREPROCESSING: Final = MappingProxyType[ClipPreprocessing, Callable[..., ClipPixels]](
    {"original": squash, "diffusers": centre_crop}
)


def _normalise(pixels: ClipPixels) -> ClipPixels:
    """From [0, 1]."""
    return (pixels - PIXEL_MEAN[:, None, None]) / PIXEL_STD[:, None, None]
