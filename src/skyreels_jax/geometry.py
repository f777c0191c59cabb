"""Legal sizes of a video, in pixels and in latents, and how friendlier words become one."""

import math
from collections.abc import Mapping
from fractions import Fraction
from typing import Final

from skyreels_jax.errors import RequestError

# Named resolutions by their 16:9 height and width; other aspects keep about the same area.
RESOLUTIONS: Final[Mapping[str, tuple[int, int]]] = {"540P": (544, 960), "720P": (720, 1280)}

# A latent is 8 pixels wide and a patch 2 latents; after the first frame, 4 frames share a latent.
SIZE_MULTIPLE: Final = 16
PIXELS_PER_LATENT: Final = 8
FRAMES_PER_LATENT: Final = 4
LATENT_CHANNELS: Final = 16

# Frame rates of television are whole numbers or these.
_NTSC: Final = tuple(Fraction(1000 * rate, 1001) for rate in (24, 30, 48, 60, 120))
# `29.97` and `23.976` as people write them are this near.
_NTSC_NEAR: Final = Fraction(1, 200)
MAX_FPS: Final = 240


def frame_rate(value: int | float | str | Fraction) -> int | Fraction:
    """Frames a second: whole, or a fraction with a small denominator.

    Args:
        value: such as 24, 29.97, ``"23.976"`` or ``"30000/1001"``; what is near a rate of NTSC
            television is that rate exactly.

    Raises:
        RequestError: it is no number, or not from 1 to 240.
    """
    try:
        rate = Fraction(value)
    except (ValueError, TypeError, ZeroDivisionError, OverflowError) as error:
        raise RequestError(
            f"fps {value!r} is no frame rate; for example 24, 29.97 or 30000/1001"
        ) from error
    rate = nearest_rate(rate)
    if not 1 <= rate <= MAX_FPS:
        raise RequestError(f"fps {value} must be from 1 to {MAX_FPS}")
    return rate


def nearest_rate(rate: Fraction) -> int | Fraction:
    """The rate of television that is meant, or a fraction with a small denominator."""
    near = next((ntsc for ntsc in _NTSC if abs(rate - ntsc) < _NTSC_NEAR), None)
    rate = near or rate.limit_denominator(1001)
    return int(rate) if rate.denominator == 1 else rate


def latent_shape(num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latent frames, rows and columns of a legal video."""
    return latent_frames(num_frames), height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT


def latent_frames(pixel_frames: int) -> int:
    """Latent frames of ``4 k + 1`` pixel frames."""
    return (pixel_frames - 1) // FRAMES_PER_LATENT + 1


def pixel_frames(latent_frames: int) -> int:
    """Pixel frames of some latent frames from the start of a video; 0 for none."""
    return FRAMES_PER_LATENT * (latent_frames - 1) + 1 if latent_frames else 0


def nearest_multiples(value: int, step: int = SIZE_MULTIPLE, offset: int = 0) -> list[int]:
    """The one or two positive numbers ``k * step + offset`` around ``value``."""
    below = (value - offset) // step * step + offset
    return [near for near in (below, below + step) if near > 0] or [offset or step]


def resolution(name: str, aspect: str | None = None) -> tuple[int, int]:
    """Height and width of a named resolution.

    Args:
        name: ``540P`` or ``720P``, in either case.
        aspect: width to height, such as ``9:16``; ``None`` for 16:9.

    Raises:
        RequestError: the name is unknown or the aspect is none.
    """
    if name.upper() not in RESOLUTIONS:
        raise RequestError(f"`resolution` {name!r} is unknown; there are {', '.join(RESOLUTIONS)}")
    return with_aspect(RESOLUTIONS[name.upper()], aspect)


def with_aspect(
    size: tuple[int, int], aspect: str | None, image: tuple[int, int] | None = None
) -> tuple[int, int]:
    """The legal height and width nearest to ``size`` in area and ``aspect`` in shape.

    Args:
        size: height and width.
        aspect: width to height, such as ``9:16``; ``image`` for that of the image; ``None`` keeps
            ``size``.
        image: height and width of what is given as image or video.

    Raises:
        RequestError: the aspect is not two whole numbers, at most 8:1 apart, or there is no image.
    """
    if aspect is None:
        return size
    numbers = aspect.split(":")
    if aspect == "image":
        if image is None:
            raise RequestError("`aspect` image takes the shape of an image or a video: give one")
        numbers = [str(image[1]), str(image[0])]
    if len(numbers) != 2 or not all(number.isdecimal() and int(number) for number in numbers):
        raise RequestError(
            f"`aspect` {aspect!r} must be width:height, for example 16:9 or 9:16, or image"
        )
    ratio = int(numbers[0]) / int(numbers[1])
    if not 1 / 8 <= ratio <= 8:
        raise RequestError(f"`aspect` {aspect!r} must be between 1:8 and 8:1")
    area = size[0] * size[1]
    return _nearest(math.sqrt(area / ratio)), _nearest(math.sqrt(area * ratio))


def _nearest(length: float) -> int:
    return max(1, round(length / SIZE_MULTIPLE)) * SIZE_MULTIPLE


def fps_entry(fps: int | Fraction) -> int:
    """A frame rate as fps embeddings know it: 16 is their first entry, every other the second."""
    return int(fps != 16)


def frames_in(seconds: float, fps: int | Fraction) -> int:
    """The legal number of frames nearest to ``seconds``: ``4 k + 1``."""
    return max(0, round((seconds * fps - 1) / FRAMES_PER_LATENT)) * FRAMES_PER_LATENT + 1
