"""Clips of moving shapes: an endless numbered series for each seed."""

import math
from typing import Final, NamedTuple

import numpy as np

from skyreels_jax.errors import RequestError
from skyreels_jax.moving_shapes.captions import caption
from skyreels_jax.moving_shapes.render import render
from skyreels_jax.moving_shapes.scene import (
    HELD_OUT,
    SMALLEST,
    SPEED,
    Scene,
    draw_held_out,
    draw_scene,
)
from skyreels_jax.shapes import Frames

RATES: Final = (16, 24)
# Lengths that a VAE takes: after the first frame, 4 share a latent.
LENGTHS: Final = tuple(range(5, 34, 4))
# Sides of the frame in pixels; a multiple of what a VAE and a patch of latents make of one.
SIDE_STEP: Final = 16
SIDES: Final = tuple(range(32, 513, SIDE_STEP))
# Seconds in which the smallest of the fast shapes crosses the whole frame: no path is longer.
CROSSING: Final = (1 - 2 * SMALLEST) / max(SPEED.values())
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
        frames: one of :data:`LENGTHS`.
        fps: one of :data:`RATES`.
        size: one of :data:`SIDES`: pixels of a side of the square frame.
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


def longest(fps: int) -> int:
    """The most frames at a rate: a fast thing can move straight on for all of them."""
    return max(count for count in LENGTHS if count / fps < CROSSING)


def check_clip(frames: int, fps: int, size: int) -> None:
    """Refuse what no clip can have.

    Raises:
        RequestError: what was given, the rule, and the nearest legal values.
    """
    if fps not in RATES:
        raise RequestError(f"fps {fps}: it must be {' or '.join(map(str, RATES))}")
    if frames not in LENGTHS:
        rule = f"it must be 4 k + 1, from {LENGTHS[0]} to {LENGTHS[-1]}"
        raise RequestError(f"frames {frames}: {rule}; nearest: {_nearest(frames, LENGTHS)}")
    if frames > longest(fps):
        raise RequestError(
            f"frames {frames} at {fps} fps: no clip is as long as the {CROSSING:.2f} s in which a "
            f"fast shape crosses the frame; at most {longest(fps)} frames at {fps} fps"
            + "".join(f", or {frames} at {rate}" for rate in RATES if frames <= longest(rate))
        )
    if size not in SIDES:
        rule = f"it must be a multiple of {SIDE_STEP}, from {SIDES[0]} to {SIDES[-1]}"
        raise RequestError(f"size {size}: {rule}; nearest: {_nearest(size, SIDES)}")


def _nearest(value: int, legal: tuple[int, ...]) -> str:
    """The legal values around one that is not."""
    below = max((other for other in legal if other < value), default=-math.inf)
    above = min((other for other in legal if other > value), default=math.inf)
    return " or ".join(str(int(near)) for near in (below, above) if math.isfinite(near))
