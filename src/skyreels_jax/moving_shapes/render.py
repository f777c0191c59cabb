"""Frames of a scene, with smooth edges."""

import math
from typing import Final

import numpy as np
from jaxtyping import Float

from skyreels_jax.moving_shapes.scene import Background, Colour, Scene, ShapeKind
from skyreels_jax.shapes import Frames

_RGB: Final[dict[Colour, tuple[int, int, int]]] = {
    "red": (215, 30, 35),
    "green": (35, 160, 60),
    "blue": (45, 75, 215),
    "yellow": (240, 220, 45),
    "purple": (145, 50, 175),
    "orange": (240, 130, 25),
}
# From the top of the frame to its bottom.
_GREYS: Final[dict[Background, tuple[int, int]]] = {
    "black": (12, 12),
    "white": (243, 243),
    "light grey": (180, 180),
    "dark grey": (75, 75),
    "gradient": (200, 40),
}
# Corners of a regular outline, and how far inside the corners the points between them lie.
_CORNERS: Final[dict[ShapeKind, int]] = {"square": 4, "triangle": 3, "star": 5}
# Angle of the first corner, from the right towards the bottom.
_FIRST_ANGLE: Final[dict[ShapeKind, float]] = {
    "square": math.pi / 4,
    "triangle": -math.pi / 2,
    "star": -math.pi / 2,
}
_STAR_WAIST: Final = 0.45


def render(
    scene: Scene, *, frames: int, fps: float | int, size: tuple[int, int] = (64, 64)
) -> Frames:
    """Frames ``[T, height, width, 3]``, uint8.

    Args:
        scene: what to draw; its unit of length is the shorter side, from the top left corner.
        frames: how many, from the start.
        fps: frames a second.
        size: height and width in pixels.
    """
    height, width = size
    unit = min(size)
    rows, columns = np.mgrid[:height, :width].astype(np.float32) + np.float32(0.5)
    video = np.empty((frames, height, width, 3), np.uint8)
    plain = _background(scene.background, size)
    for number in range(frames):
        image = plain
        for thing in scene.things:
            x, y, radius = (value * unit for value in thing.at(number / fps))
            share = _coverage(thing.kind, columns - x, rows - y, radius)[:, :, None]
            image = image + share * (np.array(_RGB[thing.colour], np.float32) - image)
        video[number] = np.rint(image)
    return video


def _background(name: Background, size: tuple[int, int]) -> Float[np.ndarray, "height width 3"]:
    height, width = size
    top, bottom = _GREYS[name]
    column = np.linspace(top, bottom, height, dtype=np.float32)
    return np.broadcast_to(column[:, None, None], (height, width, 3))


def _coverage(
    kind: ShapeKind,
    dx: Float[np.ndarray, "height width"],
    dy: Float[np.ndarray, "height width"],
    radius: float,
) -> Float[np.ndarray, "height width"]:
    """Which share of each pixel lies inside, from its centre's distance to the outline."""
    distance = np.hypot(dx, dy)
    if kind == "circle":
        return np.clip(radius - distance + 0.5, 0, 1)
    corners = _CORNERS[kind]
    # Every wedge from a corner to the middle of the side beside it looks like the first.
    wedge = 2 * math.pi / corners
    angle = (np.arctan2(dy, dx) - _FIRST_ANGLE[kind]) % wedge
    angle = np.minimum(angle, wedge - angle)
    x, y = distance * np.cos(angle), distance * np.sin(angle)
    inner = radius * (_STAR_WAIST if kind == "star" else math.cos(wedge / 2))
    end_x, end_y = inner * math.cos(wedge / 2), inner * math.sin(wedge / 2)
    length = math.hypot(end_x - radius, end_y)
    beyond = ((x - radius) * end_y - y * (end_x - radius)) / length
    return np.clip(0.5 - beyond, 0, 1)
