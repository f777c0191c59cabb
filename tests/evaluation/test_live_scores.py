"""Streams that are drawn, and drawn with a fault: every fault is seen by its own figure."""

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from skyreels_jax.evaluation import live_scores
from skyreels_jax.evaluation.live_scores import (
    blocks_until,
    changed_scenes,
    drawn_wording,
    jump_at_change,
    live_clips,
    live_rows,
    long_runs,
    prompt_changes,
)
from skyreels_jax.evaluation.quality import table, write_cards
from skyreels_jax.evaluation.scores import FPS, MINI_SIZE, held_out_scenes, lasting_scenes
from skyreels_jax.moving_shapes.captions import foreign_caption, plain_caption
from skyreels_jax.moving_shapes.render import render
from skyreels_jax.moving_shapes.scene import Motion, Scene
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.shapes import Frames

BLOCK = 4


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch):
    """Streams that change are drawn whole."""
    monkeypatch.setattr(live_scores, "_ENOUGH", 64)


KNOWN: dict[str, Scene] = {}


def learn(*scenes: Scene) -> None:
    """Remember scenes by all that is said of them."""
    for number, scene in enumerate(scenes):
        for say in (lambda s, _: plain_caption(s), drawn_wording, foreign_caption):
            KNOWN[say(scene, number)] = scene


class Drawn:
    """A stream of what its prompt says, as :class:`.LiveStream` is used."""

    def __init__(self, prompt: str, *, late: int = 1, wrong_from: int = 10**9, **settings: Any):
        self.prompts, self.late, self.wrong_from = [(0, prompt)], late, wrong_from
        self.total = round(settings["seconds"] * FPS)
        self.seen, self.settings, self.make_sampler = 0, settings, None
        self.videos: dict[str, Frames] = {}

    def __enter__(self) -> "Drawn":
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def change(self, prompt: str) -> None:
        # What is under way is finished first.
        self.prompts.append((self.seen + self.late * BLOCK, prompt))

    def __iter__(self) -> Iterator[Frames]:
        while self.seen < self.total:
            count = BLOCK if self.seen else 1
            prompt = [text for at, text in self.prompts if at <= self.seen][-1]
            if prompt not in self.videos:
                self.videos[prompt] = drawn(KNOWN[prompt], self.total + BLOCK)
            frames = self.videos[prompt][self.seen : self.seen + count]
            if self.seen + count > self.wrong_from:
                frames = frames[..., ::-1]  # Red and blue, green and purple.
            self.seen += count
            yield frames


def drawn(scene: Scene, frames: int) -> Frames:
    return render(scene, frames=frames, fps=float(FPS), size=MINI_SIZE)


def test_streams_of_a_clips_length_are_judged():
    scenes = held_out_scenes(4)
    learn(*scenes)
    asked: list[Drawn] = []

    def stream(prompt: str, /, **settings: Any) -> Any:
        asked.append(Drawn(prompt, **settings))
        return asked[-1]

    found = live_clips(stream, 4, steps=2, guidance_scale=1.0)
    assert found.share("all").right == len(found.verdicts) == 4
    assert {(one.settings["steps"], one.total) for one in asked} == {(2, 17)}
    assert "cpu 0" in table({"drawn": found})
    for wording in (drawn_wording, foreign_caption):
        assert live_clips(stream, 4, wording=wording).share("all").right == 4
        assert asked[-1].prompts[0][1] == wording(scenes[3], 3) != plain_caption(scenes[3])
    wrong = live_clips(lambda prompt, /, **s: Drawn(prompt, wrong_from=0, **s), 4)  # pyright: ignore
    assert wrong.share("all").right == 0


@pytest.mark.parametrize(
    ("wrong_from", "right", "at_end", "until"),
    [(10**9, 4, 1.0, 400), (330, 3, 0.0, 300), (0, 0, 0.0, 0)],
    ids=["right", "lost", "wrong"],
)
def test_long_streams_are_judged_at_each_hundredth_frame(
    wrong_from: int, right: int, at_end: float, until: int
):
    learn(*lasting_scenes(1, seed=2, motions=("still",)))

    def stream(prompt: str, /, **settings: Any) -> Any:
        return Drawn(prompt, wrong_from=wrong_from, **settings)

    found = long_runs(stream, 1, 420)
    assert len(found.verdicts) == 4
    assert found.share("all").right == right
    assert found.metrics == {"at_end": at_end, "right_until": until}


@pytest.mark.parametrize("late", [0, 1, 4])
def test_after_how_many_blocks_a_change_is_seen(late: int):
    learn(*(scene for pair in changed_scenes(2) for scene in pair))

    def stream(prompt: str, /, **settings: Any) -> Any:
        return Drawn(prompt, late=late, **settings)

    found = prompt_changes(stream, 2)
    assert found.metrics["blocks_median"] == late + 1
    assert found.metrics["within_2"] == float(late < 2)
    assert found.share("all").right == 2


def test_a_change_that_never_comes_is_seen_in_no_block():
    (scene, other), *_ = changed_scenes(1)
    blocks = [drawn(scene, BLOCK)] * 5
    assert blocks_until(blocks, other) == math.inf
    assert blocks_until(blocks, scene) == 1


@pytest.mark.parametrize("motion", ["still", "bounce"])
def test_changes_are_of_colour_or_shape_alone(motion: Motion):
    for number, (scene, other) in enumerate(changed_scenes(6, motion)):
        (a,), (b,) = scene.things, other.things
        assert a != b
        assert a.motion == b.motion == motion
        assert replace(b, **({"kind": a.kind} if number % 2 else {"colour": a.colour})) == a


# Steps of 8, 12 and 24 of 255 where it changes, and of 8 within blocks; where nothing moves within
# a block the least that is seen, 0.5, stands for it.
@pytest.mark.parametrize(
    ("within", "at", "expected"), [(8, 8, 1.0), (8, 12, 1.5), (8, 24, 3.0), (0, 12, 24.0)]
)
def test_a_jump_at_a_change_is_held_against_the_largest_within_a_block(
    within: int, at: int, expected: float
):
    def block(*brightness: int) -> Frames:
        return np.stack([np.full((4, 4, 3), value, np.uint8) for value in brightness])

    before, after = block(0, within, 0, within), within + at
    blocks = [before, before, block(after, after), block(after, after)]
    assert jump_at_change(blocks, 2) == pytest.approx(expected)
    # What comes later is no change.
    assert jump_at_change([*blocks, block(0, 0)], 2) == pytest.approx(expected)


def test_rows_and_where_they_go(tmp_path, monkeypatch: pytest.MonkeyPatch):
    learn(*held_out_scenes(1), *lasting_scenes(1, seed=2, motions=("still",)))
    for motion in ("still", "bounce"):
        learn(*(scene for pair in changed_scenes(1, motion) for scene in pair))
    rows = dict(live_rows(Drawn, (1, 1, 1, 100), lambda line: None))  # pyright: ignore
    assert list(rows) == [
        *("4 steps", "2 steps", "1 step", "other wordings", "other sentences"),
        *("100 frames", "changes", "changes, moving"),
    ]
    assert all(one.share("all").right == 1 for one in rows.values())
    folders = {kind: tmp_path / kind for kind in ("df", "live")}
    for folder in folders.values():
        folder.mkdir()
        (folder / "README.md").write_text("EVALUATION\n")
    write_cards({f"live, {name}": one for name, one in rows.items()}, folders)
    assert (folders["df"] / "README.md").read_text() == "EVALUATION\n"
    assert "| live, changes | 1 | 100.0%" in (folders["live"] / "README.md").read_text()


def test_denoising_is_timed_without_decoding(monkeypatch: pytest.MonkeyPatch):
    pipeline = Pipeline.from_pretrained("mini", dtype="float32")
    monkeypatch.setattr(live_scores, "FRAMES", 5)
    with pipeline.stream("a red star stands still", seconds=5 / FPS, steps=1, fps=FPS) as stream:
        seconds = live_scores.timed(stream)
        frames = np.concatenate(list(stream))
    assert frames.shape == (5, *MINI_SIZE, 3)
    assert len(seconds) >= 2 and min(seconds) > 0
