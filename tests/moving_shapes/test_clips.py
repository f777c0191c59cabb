"""Numbered clips: each by itself, the same for the same numbers."""

import signal

import numpy as np
import pytest

from skyreels_jax.errors import RequestError
from skyreels_jax.moving_shapes import clips
from skyreels_jax.moving_shapes.clips import (
    _CROSSING_SECONDS,
    CLIP_LENGTHS,
    FRAME_RATES,
    Clip,
    check_clip,
    clip,
    max_frames,
)
from skyreels_jax.moving_shapes.render import render
from skyreels_jax.moving_shapes.scene import HELD_OUT, is_held_out


def same(a: Clip, b: Clip) -> bool:
    return a.scene == b.scene and a.caption == b.caption and np.array_equal(a.frames, b.frames)


def test_seed_and_index_decide_a_clip():
    assert same(clip(3, 5), clip(3, 5))
    for other in (clip(3, 6), clip(4, 5), clip(5, 3), clip(3, 5, held_out=True)):
        assert not same(clip(3, 5), other)


def test_frames_show_the_scene():
    scene, text, frames = clip(0, 2, 21, 24, 96)
    assert frames.shape == (21, 96, 96, 3)
    assert np.array_equal(frames, render(scene, frames=21, fps=24.0, size=(96, 96)))
    assert not np.array_equal(frames, render(scene, frames=21, fps=16.0, size=(96, 96)))
    assert scene.things[0].colour in text


def test_scene_and_caption_do_not_depend_on_the_size():
    for index in range(20):
        small, large = (clip(0, index, size=size) for size in (32, 64))
        assert small[:2] == large[:2]


def test_held_out_clips_take_every_combination_in_turn():
    things = [clip(0, i, 5, size=32, held_out=True).scene.things for i in range(24)]
    assert all(len(pair) == 1 and is_held_out(pair[0]) for pair in things)
    assert len({(t.colour, t.kind, t.direction) for (t,) in things}) == len(HELD_OUT)
    drawn = [clip(0, i, 5, size=32).scene.things for i in range(24)]
    assert not any(is_held_out(thing) for pair in drawn for thing in pair)


@pytest.mark.parametrize("fps", FRAME_RATES)
@pytest.mark.parametrize("held_out", [False, True])
def test_the_longest_clips_do_not_take_forever(fps, held_out):
    """Above this length no fast thing can stay inside, and the draw would never end."""

    def hangs(number, frame):
        raise AssertionError("hangs")

    before = signal.signal(signal.SIGALRM, hangs)
    signal.alarm(10)
    try:
        for index in range(24):
            clip(0, index, max_frames(fps), fps, 32, held_out=held_out)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def test_the_longest_clip_is_shorter_than_the_fastest_path():
    assert {fps: max_frames(fps) for fps in FRAME_RATES} == {16: 21, 24: 33}
    for fps in FRAME_RATES:
        longer = [count for count in CLIP_LENGTHS if count > max_frames(fps)]
        assert max_frames(fps) / fps < _CROSSING_SECONDS
        assert all(count / fps >= _CROSSING_SECONDS for count in longer)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ((18, 16, 64), "frames 18.*nearest: 17 or 21"),
        ((1, 16, 64), "frames 1:.*nearest: 5$"),
        ((37, 24, 64), "frames 37:.*nearest: 33$"),
        ((25, 16, 64), "frames 25 at 16 fps.*at most 21 frames at 16 fps, or 25 at 24"),
        ((17, 25, 64), "fps 25.*16 or 24"),
        ((17, 16, 70), "size 70.*nearest: 64 or 80"),
        ((17, 16, 0), "size 0.*nearest: 32$"),
        ((17, 16, 4096), "size 4096.*nearest: 512$"),
    ],
)
def test_what_no_clip_can_have_is_refused(values, says, monkeypatch):
    monkeypatch.setattr(clips, "render", lambda *a, **k: pytest.fail("drawn before it was checked"))
    for refuse in (check_clip, lambda *v: clip(0, 0, *v)):
        with pytest.raises(RequestError, match=says):
            refuse(*values)
    check_clip(17, 16, 64)
