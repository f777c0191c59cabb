"""What a video shows before its scene."""

import numpy as np

from skyreels_jax.moving_shapes.changes import draw_change, faded
from skyreels_jax.moving_shapes.scene import HELD_OUT, draw_held_out, draw_scene, is_held_out

FRAMES = 5


def changes(count: int = 400):
    rng = np.random.default_rng(3)
    for _ in range(count):
        scene = draw_scene(rng, 1.0)
        yield scene, draw_change(rng, scene, 1.0, FRAMES)


def test_nothing_held_out_is_shown_before_and_all_moments_are_drawn():
    found = list(changes())
    assert not any(is_held_out(thing) for _, change in found for thing in change.before.things)
    assert {change.at for _, change in found} == {None, 1, 2, 3, 4}
    for _, change in found:
        assert change.first_learned == (2 if change.at is None else change.at)
    past = np.mean([change.at is None for _, change in found])
    assert abs(past - 0.25) < 0.09  # four deviations of a share of 400


def test_the_same_thing_before_differs_in_colour_or_shape_alone():
    same = 0
    for scene, change in changes():
        thing, before = scene.things[0], change.before.things[0]
        path = (thing.motion, thing.direction, thing.speed, thing.x, thing.y, thing.radius)
        if path == (
            *(before.motion, before.direction, before.speed),
            *(before.x, before.y, before.radius),
        ):
            same += 1
            assert (thing.kind, thing.colour) != (before.kind, before.colour)
            assert change.before.background == scene.background
            assert change.before.things[1:] == scene.things[1:]
            assert len({t.colour for t in change.before.things}) == len(change.before.things)
    assert abs(same / 400 - 0.6) < 0.1


def test_a_held_out_scene_may_have_another_before_it():
    rng = np.random.default_rng(4)
    for combination in sorted(HELD_OUT, key=str):
        scene = draw_held_out(rng, combination, 1.0)
        before = draw_change(rng, scene, 1.0, FRAMES).before
        assert not any(map(is_held_out, before.things))


def test_a_fade_has_even_steps_and_ends_in_the_scene():
    before, after = np.full((9, 4, 4, 3), 40, np.uint8), np.full((9, 4, 4, 3), 240, np.uint8)
    values = faded(before, after, start=3, count=4)[:, 0, 0, 0].tolist()
    assert values == [40, 40, 40, 90, 140, 190, 240, 240, 240]
    # A later start is another fade.
    assert faded(before, after, start=4, count=4)[3, 0, 0, 0] == 40
