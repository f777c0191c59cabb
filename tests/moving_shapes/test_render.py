"""Frames against geometry: areas, places, colours."""

import math
from dataclasses import replace

import numpy as np
import pytest

from skyreels_jax.moving_shapes.render import _GREYS, _RGB, _STAR_WAIST, render
from skyreels_jax.moving_shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    GROWTH_PER_SECOND,
    SHAPE_KINDS,
    SPEED_PER_SECOND,
    SPEEDS,
    Scene,
    Thing,
    unit_vector,
)

STILL = Thing("circle", "red", "still", None, None, 0.47, 0.52, 0.23)
# Of a shape whose corners lie on a circle of radius 1.
AREA = {
    "circle": math.pi,
    "square": 2.0,
    "triangle": 3 * math.sqrt(3) / 4,
    "star": 5 * _STAR_WAIST * math.sin(math.pi / 5),
}


def coverage(thing: Thing, *, frames: int = 1, size: int = 64) -> np.ndarray:
    """Share of each pixel that is covered, ``[T, size, size]``, from what the red channel shows."""
    scene = Scene((replace(thing, colour="red"),), "black")
    seen = render(scene, frames=frames, fps=16.0, size=(size, size))[..., 0].astype(np.float64)
    return (seen - _GREYS["black"][0]) / (_RGB["red"][0] - _GREYS["black"][0])


def centroid(share: np.ndarray) -> tuple[float, float]:
    """In pixels, of one frame."""
    rows, columns = np.mgrid[: share.shape[0], : share.shape[1]] + 0.5
    return float(np.sum(columns * share) / share.sum()), float(np.sum(rows * share) / share.sum())


@pytest.mark.parametrize("kind", SHAPE_KINDS)
@pytest.mark.parametrize(("size", "limit"), [(64, 4e-3), (256, 4e-4)])
def test_the_area_is_that_of_the_shape(kind, size, limit):
    share = coverage(replace(STILL, kind=kind), size=size)
    measured = share.sum() / (STILL.radius * size) ** 2
    # Measured: at most 2.2e-3 at 64 pixels (the star) and 1.9e-4 at 256 (the triangle).
    assert abs(measured / AREA[kind] - 1) < limit
    # The negative twin: a triangle and a star differ by 1.8 %, others by more.
    others = [AREA[other] for other in SHAPE_KINDS if other != kind]
    assert min(abs(measured / other - 1) for other in others) > 0.01


def test_a_star_has_a_waist_and_a_triangle_points_up():
    star, triangle = (coverage(replace(STILL, kind=k), size=256)[0] for k in ("star", "triangle"))
    rows = np.flatnonzero(triangle.sum(1) > 0.5)
    widths = triangle.sum(1)[rows]
    assert widths[-3] > 10 * widths[2]
    assert np.all(np.diff(widths[:-2]) > -0.5)
    # Along the circle halfway out, a star is left and entered five times; a triangle three times.
    for shape, corners, at in ((star, 5, 0.7), (triangle, 3, 0.7)):
        angles = np.linspace(0, 2 * math.pi, 2000, endpoint=False)
        radius = STILL.radius * 256 * at
        columns = (STILL.x * 256 + radius * np.cos(angles)).astype(int)
        inside = shape[(STILL.y * 256 + radius * np.sin(angles)).astype(int), columns] > 0.5
        assert np.sum(inside != np.roll(inside, 1)) == 2 * corners


@pytest.mark.parametrize("kind", SHAPE_KINDS)
@pytest.mark.parametrize("colour", COLOURS)
def test_the_middle_has_the_colour(kind, colour):
    scene = Scene((replace(STILL, kind=kind, colour=colour),), "white")
    frame = render(scene, frames=1, fps=16.0)[0]
    middle = tuple(frame[round(0.52 * 64), round(0.47 * 64)])
    assert middle == _RGB[colour]
    assert all(middle != _RGB[other] for other in COLOURS if other != colour)


@pytest.mark.parametrize("background", BACKGROUNDS)
def test_the_background_is_grey_from_top_to_bottom(background):
    frame = render(Scene((STILL,), background), frames=1, fps=16.0)[0]
    edges = frame[:, [0, -1]]
    assert np.all(edges == edges[:, :1, :1])
    column = edges[:, 0, 0].astype(int)
    assert (column[0], column[-1]) == _GREYS[background]
    assert np.all(np.diff(column) <= 0)
    assert (column[0] != column[-1]) == (background == "gradient")


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_the_centroid_moves_at_the_speed(direction, speed):
    dx, dy = unit_vector(direction)
    start = {"x": 0.5 - 0.2 * dx, "y": 0.5 - 0.2 * dy}
    thing = replace(STILL, motion="move", direction=direction, speed=speed, radius=0.15, **start)
    video = coverage(thing, frames=17)
    first, last = centroid(video[0]), centroid(video[-1])
    moved = np.subtract(last, first) / 64
    expected = SPEED_PER_SECOND[speed] * np.array([dx, dy])
    # Measured: at most 2.1e-4 sides of the frame in a second, and 2.1e-4 off the place.
    assert np.max(np.abs(moved - expected)) < 1e-3
    assert np.max(np.abs(np.array(first) / 64 - [start["x"], start["y"]])) < 1e-3
    # The negative twin: backwards, or at the other speed.
    assert np.max(np.abs(moved + expected)) > 0.1
    assert abs(np.hypot(*moved) - SPEED_PER_SECOND[SPEEDS[1 - SPEEDS.index(speed)]]) > 0.2


def test_what_grows_covers_more_by_the_square_of_its_growth():
    areas = coverage(replace(STILL, motion="grow", radius=0.2), frames=17).sum((1, 2))
    # Measured: 1.0e-4.
    assert abs(areas[-1] / areas[0] / GROWTH_PER_SECOND**2 - 1) < 5e-4
    assert abs(areas[-1] / areas[0] / GROWTH_PER_SECOND - 1) > 0.3


def test_a_later_thing_hides_an_earlier_one():
    other = replace(STILL, colour="blue")
    for things in ((STILL, other), (other, STILL)):
        frame = render(Scene(things, "black"), frames=1, fps=16.0)[0]
        assert tuple(frame[33, 30]) == _RGB[things[1].colour]


def test_the_same_moment_looks_the_same_at_every_rate():
    scene = Scene((replace(STILL, motion="move", direction="up", speed="fast", y=0.7),), "gradient")
    slow, fast = (render(scene, frames=n + 1, fps=float(n)) for n in (16, 24))
    assert np.array_equal(slow[[0, 8, 16]], fast[[0, 12, 24]])
    assert not np.array_equal(slow[8], fast[11])


def test_a_wide_frame_keeps_shapes_as_they_are():
    scene = Scene((replace(STILL, x=0.5, y=0.5),), "black")
    wide, square = (render(scene, frames=1, fps=16.0, size=(64, w))[0] for w in (96, 64))
    assert wide.shape == (64, 96, 3)
    assert np.array_equal(wide[:, :64], square)
    assert np.all(wide[:, 64:] == _GREYS["black"][0])
    assert not np.array_equal(wide[:, 1:65], square)


def test_edges_are_smooth_and_frames_are_reproducible():
    share = coverage(STILL)
    # Around a circle of 15 pixels' radius 82 pixels are neither in nor out.
    assert 60 < np.sum((share > 0.05) & (share < 0.95)) < 200
    scene = Scene((STILL,), "white")
    assert np.array_equal(render(scene, frames=2, fps=16.0), render(scene, frames=2, fps=16.0))
