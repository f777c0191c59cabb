"""Sizes and lengths of clips: few shapes, so that a step is compiled few times."""

import math
from dataclasses import dataclass

import numpy as np

from skyreels_jax.geometry import FRAMES_PER_LATENT, SIZE_MULTIPLE
from skyreels_jax.training.videos.recipe import FolderDataset, sides_of


@dataclass(frozen=True, order=True)
class Bucket:
    """Clips of one shape, and how many of them a step takes."""

    frames: int
    height: int
    width: int
    batch: int

    def __str__(self) -> str:
        return f"{self.width} x {self.height} x {self.frames}"


def bucket_size(height: int, width: int, dataset: FolderDataset) -> tuple[int, int]:
    """Height and width of the clips of a picture: multiples of 16.

    With buckets, of all sizes that have at most the area of ``resolution``, as wide as they can be
    for their height, the one nearest in aspect, and of those the largest; with
    ``bucket_no_upscale`` at most the picture's own area. Without, ``resolution`` itself.
    """
    assert dataset.resolution is not None
    full_width, full_height = sides_of(dataset.resolution)
    if not dataset.enable_bucket:
        return full_height, full_width
    area = full_width * full_height
    if dataset.bucket_no_upscale:
        area = max(min(area, height * width), SIZE_MULTIPLE**2)
    sizes = [
        (side, int(area / side) // SIZE_MULTIPLE * SIZE_MULTIPLE)
        for side in range(SIZE_MULTIPLE, area // SIZE_MULTIPLE + 1, SIZE_MULTIPLE)
    ]

    def distance(size: tuple[int, int]) -> tuple[float, int]:
        return abs(math.log(size[1] / size[0]) - math.log(width / height)), -size[0] * size[1]

    return min((size for size in sizes if size[1]), key=distance)


def extractions(total: int, dataset: FolderDataset) -> list[tuple[int, int]]:
    """Beginning and length of each clip of a video of ``total`` frames; empty if it is too short.

    See :class:`~skyreels_jax.training.videos.recipe.FolderDataset`.
    """
    if not dataset.is_video:
        return [(0, 1)]
    if dataset.frame_extraction == "full":
        frames = min(total, dataset.max_frames)
        return [(0, frames - (frames - 1) % FRAMES_PER_LATENT)] if total else []
    found: list[tuple[int, int]] = []
    for frames in sorted(dataset.target_frames):
        last = total - frames
        if last < 0:
            continue
        if dataset.frame_extraction == "head":
            starts = [0]
        elif dataset.frame_extraction == "chunk":
            starts = list(range(0, last + 1, frames))
        elif dataset.frame_extraction == "slide":
            starts = list(range(0, last + 1, dataset.frame_stride))
        else:
            spread = np.linspace(0, last, dataset.frame_sample)
            starts = sorted({int(start) for start in spread})
        found += [(start, frames) for start in starts]
    return found


def cropped_share(height: int, width: int, bucket: Bucket) -> float:
    """The share of a picture that is cut away at its sides, or above and below."""
    ratio = (width / height) / (bucket.width / bucket.height)
    return 1 - min(ratio, 1 / ratio)


def shortest(dataset: FolderDataset) -> int:
    """Frames of the shortest clip that is cut."""
    return 1 if dataset.frame_extraction == "full" else min(dataset.target_frames, default=1)
