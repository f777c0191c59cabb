"""Scenes: what is drawn how often, what never, and where things are at a time."""

import math
import signal
from collections import Counter
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from skyreels_jax.moving_shapes.scene import (
    _MAX_SECONDS,
    _MOTION_SHARES,
    _PAIR_SHARE,
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    HELD_OUT,
    MAX_RADIUS,
    MIN_RADIUS,
    MOTIONS,
    SHAPE_KINDS,
    SPEED_PER_SECOND,
    SPEEDS,
    Combination,
    Scene,
    Thing,
    draw_held_out,
    draw_scene,
    held_out,
    is_held_out,
    unit_vector,
)

SECONDS = 17 / 16
DRAWS = 3000
RIGHT = Thing("circle", "red", "move", "right", "fast", 0.5, 0.5, 0.2)


@pytest.fixture(scope="module")
def drawn() -> list[Scene]:
    return [draw_scene(np.random.default_rng([0, i]), SECONDS) for i in range(DRAWS)]


def combinations(scenes: list[Scene]) -> set[Combination]:
    return {
        Combination(thing.colour, thing.kind, thing.direction)
        for scene in scenes
        for thing in scene.things
        if thing.direction is not None
    }


def outside(thing: Thing) -> float:
    """How far the thing reaches past the frame, at any time of a clip."""
    places = [thing.at(t) for t in np.linspace(0, SECONDS, 6)]
    return max(max(r - x, x + r - 1, r - y, y + r - 1) for x, y, r in places)


def test_every_colour_and_kind_holds_one_direction_out_and_every_direction_is_held_out():
    assert len(held_out()) == len(HELD_OUT) == 24
    pairs = Counter((c.colour, c.kind) for c in HELD_OUT)
    assert pairs == Counter(product(COLOURS, SHAPE_KINDS))
    assert {c.direction for c in HELD_OUT} == set(DIRECTIONS)


def test_what_is_held_out_is_never_drawn_and_all_else_is(drawn: list[Scene]):
    everything = {Combination(*names) for names in product(COLOURS, SHAPE_KINDS, DIRECTIONS)}
    assert combinations(drawn) == everything - HELD_OUT
    # The negative twin: one such scene among them is seen.
    rng = np.random.default_rng(0)
    one = draw_held_out(rng, held_out()[0], SECONDS)
    assert combinations([*drawn, one]) & HELD_OUT == {held_out()[0]}


def test_a_held_out_scene_moves_as_asked():
    for number, combination in enumerate(held_out()):
        scene = draw_held_out(np.random.default_rng(number), combination, SECONDS)
        (thing,) = scene.things
        assert is_held_out(thing)
        assert combinations([scene]) == {combination}
        assert outside(thing) <= 0
        turned = DIRECTIONS[(DIRECTIONS.index(combination.direction) + 1) % 8]
        assert not is_held_out(replace(thing, direction=turned))
        assert is_held_out(replace(thing, motion="bounce"))
        assert not is_held_out(replace(thing, motion="still", direction=None, speed=None))


def off(values: list[str], shares: dict[str, float]) -> float:
    """The largest distance between counted and expected shares, in standard deviations."""
    counts = Counter(values)
    assert counts.keys() == shares.keys()
    return max(
        abs(counts[n] / len(values) - p) / math.sqrt(p * (1 - p) / len(values))
        for n, p in shares.items()
    )


def even(names: tuple[str, ...]) -> dict[str, float]:
    return {name: 1 / len(names) for name in names}


def test_each_word_is_drawn_as_often_as_it_should_be(drawn: list[Scene]):
    things = [scene.things[0] for scene in drawn]
    moving = [thing for thing in things if thing.direction is not None]
    # Measured: at most 2.5 standard deviations.
    assert off([s.background for s in drawn], even(BACKGROUNDS)) < 4
    assert off([t.kind for t in things], even(SHAPE_KINDS)) < 4
    assert off([t.colour for t in things], even(COLOURS)) < 4
    assert off([t.direction or "" for t in moving], even(DIRECTIONS)) < 4
    assert off([t.speed or "" for t in moving], even(SPEEDS)) < 4
    assert off([t.motion for t in things], motions()) < 4
    two = {"one": 1 - _PAIR_SHARE, "two": _PAIR_SHARE}
    assert off(["two" if len(s.things) == 2 else "one" for s in drawn], two) < 4
    # The negative twin: a share that is wrong by a tenth. Measured: 7.4.
    wrong = motions() | {"move": motions()["move"] * 0.9}
    assert off([t.motion for t in things], wrong) > 6


def test_second_things_are_drawn_like_first_ones(drawn: list[Scene]):
    things = [scene.things[1] for scene in drawn if len(scene.things) == 2]
    speeds = [thing.speed for thing in things if thing.speed is not None]
    assert off(list(speeds), even(SPEEDS)) < 4
    assert off([t.motion for t in things], motions()) < 4


def motions() -> dict[str, float]:
    """An eighth of what moves would be held out; it is drawn anew, and may then do otherwise."""
    weights = {
        m: p * (7 / 8 if m in ("move", "bounce") else 1)
        for m, p in zip(MOTIONS, _MOTION_SHARES, strict=True)
    }
    return {m: w / sum(weights.values()) for m, w in weights.items()}


def test_things_stay_inside_and_two_are_apart_and_of_two_colours(drawn: list[Scene]):
    for scene in drawn:
        for thing in scene.things:
            assert outside(thing) <= 0, thing
            assert MIN_RADIUS <= thing.at(SECONDS)[2] <= MAX_RADIUS
        if len(scene.things) == 2:
            a, b = scene.things
            assert a.colour != b.colour
            assert math.hypot(a.x - b.x, a.y - b.y) > a.radius + b.radius
    assert outside(replace(RIGHT, x=0.7)) > 0.3


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("speed", SPEEDS)
def test_a_thing_moves_at_its_speed_in_its_direction(direction, speed):
    thing = replace(RIGHT, direction=direction, speed=speed)
    moved = np.subtract(thing.at(0.5)[:2], thing.at(0.0)[:2]) / 0.5
    angle = math.radians(45 * DIRECTIONS.index(direction))
    expected = SPEED_PER_SECOND[speed] * np.array([math.cos(angle), math.sin(angle)])
    # Measured: 1e-16.
    assert np.max(np.abs(moved - expected)) < 1e-12
    other = replace(thing, direction=DIRECTIONS[DIRECTIONS.index(direction) - 1])
    assert np.max(np.abs(np.subtract(other.at(0.5)[:2], thing.at(0.5)[:2]))) > 0.02


def test_the_words_of_a_direction_say_where_it_points():
    signs = {"right": (1, 0), "left": (-1, 0), "down": (0, 1), "up": (0, -1)}
    for direction in DIRECTIONS:
        said = np.sum([signs[word] for word in direction.split()], axis=0)
        assert np.array_equal(np.sign(np.round(unit_vector(direction), 9)), said), direction


def test_a_bouncing_thing_turns_at_the_edges():
    thing = replace(RIGHT, motion="bounce", x=0.7)
    # At 0.45 sides a second it meets the right edge, where its centre is at 0.8, after 2/9 s.
    times = np.linspace(0, 5, 501)
    x = np.array([thing.at(t)[0] for t in times])
    assert thing.at(2 / 9)[0] == pytest.approx(0.8)
    assert thing.at(4 / 9)[0] == pytest.approx(0.7)
    assert thing.at(1.0)[0] == pytest.approx(0.8 - 0.45 * (1 - 2 / 9))
    # Back at the left edge 0.6 sides later, and at the start, going right, 1.2 sides later.
    assert thing.at(2 / 9 + 0.6 / 0.45)[0] == pytest.approx(0.2)
    assert thing.at(1.2 / 0.45)[0] == pytest.approx(0.7)
    assert x.min() >= 0.2 and x.max() <= 0.8
    assert np.max(np.abs(np.diff(x))) <= 0.45 * 0.01 + 1e-9
    assert {thing.at(t)[1] for t in times} == {0.5}
    # The negative twin: what does not bounce leaves.
    assert replace(thing, motion="move").at(1.0)[0] > 1


def test_growing_and_shrinking_undo_each_other():
    still = replace(RIGHT, motion="still", direction=None, speed=None)
    grown = replace(still, motion="grow")
    assert still.at(3.0) == (0.5, 0.5, 0.2)
    assert grown.at(1.0) == (0.5, 0.5, pytest.approx(0.27))
    back = replace(still, motion="shrink", radius=grown.at(0.7)[2])
    assert back.at(0.7)[2] == pytest.approx(0.2)
    assert replace(back, motion="grow").at(0.7)[2] > 0.3


@pytest.mark.parametrize(
    "change",
    [
        {"direction": None},
        {"speed": None},
        {"motion": "still"},
        {"motion": "grow", "speed": None},
        {"motion": "bounce", "direction": None, "speed": None},
    ],
)
def test_things_that_contradict_themselves_are_refused(change):
    with pytest.raises(ValueError, match=r"direction"):
        replace(RIGHT, **change)


@pytest.mark.parametrize("seconds", [0.0, -1.0, _MAX_SECONDS * 1.001])
def test_times_for_which_nothing_can_be_planned_are_refused(seconds):
    with pytest.raises(ValueError, match="seconds"):
        draw_scene(np.random.default_rng(0), seconds)


def test_the_longest_scenes_do_not_take_forever():
    def hangs(number, frame):
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.setitimer(signal.ITIMER_REAL, 1)
    try:
        for number in range(50):
            draw_scene(np.random.default_rng(number), _MAX_SECONDS)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
