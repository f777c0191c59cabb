"""Legal sizes of a video, in pixels and in latents, and how friendlier words become one."""

import math
from collections.abc import Mapping
from typing import Final

from skyreels_jax.errors import RequestError

# Named resolutions by their 16:9 height and width; other aspects keep about the same area.
RESOLUTIONS: Final[Mapping[str, tuple[int, int]]] = {"540P": (544, 960), "720P": (720, 1280)}

# A latent is 8 pixels wide and a patch 2 latents; after the first frame, 4 frames share a latent.
SIZE_MULTIPLE: Final = 16
PIXELS_PER_LATENT: Final = 8
FRAMES_PER_LATENT: Final = 4
LATENT_CHANNELS: Final = 16


def latent_shape(num_frames: int, height: int, width: int) -> tuple[int, int, int]:
    """Latent frames, rows and columns of a legal video."""
    frames = (num_frames - 1) // FRAMES_PER_LATENT + 1
    return frames, height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT


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
        raise RequestError(f"resolution {name!r} is unknown; there are {', '.join(RESOLUTIONS)}")
    return with_aspect(RESOLUTIONS[name.upper()], aspect)


def with_aspect(size: tuple[int, int], aspect: str | None) -> tuple[int, int]:
    """The legal height and width nearest to ``size`` in area and ``aspect`` in shape.

    Raises:
        RequestError: the aspect is not two whole numbers, at most 8:1 apart.
    """
    if aspect is None:
        return size
    numbers = aspect.split(":")
    if len(numbers) != 2 or not all(number.isdecimal() and int(number) for number in numbers):
        raise RequestError(f"aspect {aspect!r} must be width:height, for example 16:9 or 9:16")
    ratio = int(numbers[0]) / int(numbers[1])
    if not 1 / 8 <= ratio <= 8:
        raise RequestError(f"aspect {aspect!r} must be between 1:8 and 8:1")
    area = size[0] * size[1]
    return _nearest(math.sqrt(area / ratio)), _nearest(math.sqrt(area * ratio))


def _nearest(length: float) -> int:
    return max(1, round(length / SIZE_MULTIPLE)) * SIZE_MULTIPLE


def frames_in(seconds: float, fps: int) -> int:
    """The legal number of frames nearest to ``seconds``: ``4 k + 1``."""
    return max(0, round((seconds * fps - 1) / FRAMES_PER_LATENT)) * FRAMES_PER_LATENT + 1
