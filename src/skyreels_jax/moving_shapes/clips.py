"""Clips of moving shapes: an endless numbered series for each seed."""

import math
from typing import Final, NamedTuple

import numpy as np

from skyreels_jax.errors import RequestError
from skyreels_jax.moving_shapes.captions import caption
from skyreels_jax.moving_shapes.render import render
from skyreels_jax.moving_shapes.scene import (
    HELD_OUT,
    MIN_RADIUS,
    SPEED_PER_SECOND,
    Scene,
    draw_held_out,
    draw_scene,
)
from skyreels_jax.shapes import Frames

FRAME_RATES: Final = (16, 24)
# Lengths that a VAE takes: after the first frame, 4 share a latent.
CLIP_LENGTHS: Final = tuple(range(5, 34, 4))
# Sides of the frame in pixels; a multiple of what a VAE and a patch of latents make of one.
_SIDE_STEP: Final = 16
CLIP_SIZES: Final = tuple(range(32, 513, _SIDE_STEP))
# Seconds in which the smallest of the fast shapes crosses the whole frame: no path is longer.
_CROSSING_SECONDS: Final = (1 - 2 * MIN_RADIUS) / max(SPEED_PER_SECOND.values())
_COMBINATIONS: Final = tuple(sorted(HELD_OUT, key=str))


class Clip(NamedTuple):
    """A video and what it shows.

    Attributes:
        scene: what happens.
        caption: one of its wordings.
        frames: uint8 ``[T, size, size, 3]``.
    """

    scene: Scene
    caption: str
    frames: Frames


def clip(
    seed: int,
    index: int,
    frames: int = 17,
    fps: int = 16,
    size: int = 64,
    *,
    held_out: bool = False,
) -> Clip:
    """Clip ``index`` of a seed's series; it depends on no other clip.

    Scene and caption do not depend on ``size``; of other lengths or rates they differ, since things
    must stay inside the frame for as long as the clip lasts.

    Args:
        seed: of the series, not negative.
        index: from 0.
        frames: one of :data:`CLIP_LENGTHS`.
        fps: one of :data:`FRAME_RATES`.
        size: one of :data:`CLIP_SIZES`: pixels of a side of the square frame.
        held_out: one thing that moves as a combination that training never sees, each of them in
            turn; else a scene of the training distribution.

    Raises:
        RequestError: as :func:`check_clip` does.
    """
    check_clip(frames, fps, size)
    rng = np.random.default_rng([seed, index])
    # Up to the end of the last frame, as everywhere in training.
    seconds = frames / fps
    if held_out:
        scene = draw_held_out(rng, _COMBINATIONS[index % len(_COMBINATIONS)], seconds)
    else:
        scene = draw_scene(rng, seconds)
    text = caption(scene, rng)
    return Clip(scene, text, render(scene, frames=frames, fps=float(fps), size=(size, size)))


def max_frames(fps: int) -> int:
    """The most frames at a rate: a fast thing can move straight on for all of them."""
    return max(count for count in CLIP_LENGTHS if count / fps < _CROSSING_SECONDS)


def check_clip(frames: int, fps: int, size: int) -> None:
    """Refuse what no clip can have.

    Raises:
        RequestError: what was given, the rule, and the nearest legal values.
    """
    if fps not in FRAME_RATES:
        raise RequestError(f"fps {fps}: it must be {' or '.join(map(str, FRAME_RATES))}")
    if frames not in CLIP_LENGTHS:
        rule = f"it must be 4 k + 1, from {CLIP_LENGTHS[0]} to {CLIP_LENGTHS[-1]}"
        raise RequestError(f"frames {frames}: {rule}; nearest: {_nearest(frames, CLIP_LENGTHS)}")
    if frames > max_frames(fps):
        raise RequestError(
            f"frames {frames} at {fps} fps: no clip is as long as the "
            f"{_CROSSING_SECONDS:.2f} s in which a fast shape crosses the frame; at most "
            f"{max_frames(fps)} frames at {fps} fps"
            + "".join(
                f", or {frames} at {rate}" for rate in FRAME_RATES if frames <= max_frames(rate)
            )
        )
    if size not in CLIP_SIZES:
        rule = f"it must be a multiple of {_SIDE_STEP}, from {CLIP_SIZES[0]} to {CLIP_SIZES[-1]}"
        raise RequestError(f"size {size}: {rule}; nearest: {_nearest(size, CLIP_SIZES)}")


def _nearest(value: int, legal: tuple[int, ...]) -> str:
    """The legal values around one that is not."""
    below = max((other for other in legal if other < value), default=-math.inf)
    above = min((other for other in legal if other > value), default=math.inf)
    return " or ".join(str(int(near)) for near in (below, above) if math.isfinite(near))
