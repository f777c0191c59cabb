"""Videos that a model makes of scenes, scored by the judge."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np

from skyreels_jax.media import contact_sheet
from skyreels_jax.moving_shapes.captions import plain_caption
from skyreels_jax.moving_shapes.judge import DetectedThing, Verdict, detect_things, judge_scene
from skyreels_jax.moving_shapes.render import render
from skyreels_jax.moving_shapes.scene import (
    BACKGROUNDS,
    HELD_OUT,
    Motion,
    Scene,
    Thing,
    draw_held_out,
    draw_scene,
)
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.shapes import Frames

MINI_SIZE: Final = (64, 64)
FRAMES: Final = 17
FPS: Final = 16
# Settings of the videos that the small models make: those they were trained on.
MINI_CLIP: Final[Mapping[str, int]] = {
    "height": MINI_SIZE[0],
    "width": MINI_SIZE[1],
    "num_frames": FRAMES,
    "fps": FPS,
}
# A jump of the centre below this, in sides of the frame, is none that could be seen.
_UNSEEN: Final = 0.02
# Makes the video of a scene (by its caption, and perhaps the first frame) and a seed.
_MakeVideo = Callable[[Scene, int], Frames]


@dataclass(frozen=True)
class Share:
    """How many videos of how many are right."""

    right: int
    of: int

    @property
    def interval(self) -> tuple[float, float]:
        """Confidence interval, 95 %: Wilson, "Probable inference", JASA 22 (1927)."""
        z, n, p = 1.96, self.of, self.right / self.of
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / (1 + z * z / n)
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.right / self.of:.1%} ({low:.1%} to {high:.1%})"


@dataclass
class Score:
    """What a judge found in the videos of some scenes; ``seconds`` is the mean of a video."""

    verdicts: list[Verdict] = field(default_factory=list)
    seconds: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    sheets: list[np.ndarray] = field(default_factory=list)

    def share(self, name: str) -> Share:
        """Return the share of videos whose ``colour``, ``kind``, ``motion`` or ``all`` is right."""
        return Share(sum(getattr(v, name) for v in self.verdicts), len(self.verdicts))

    def shares(self) -> str:
        """Return all shares as cells of a row of a table in Markdown."""
        return " | ".join(str(self.share(name)) for name in ("colour", "kind", "motion", "all"))


def held_out_scenes(count: int, seed: int = 0) -> list[Scene]:
    """Draw scenes of one thing each, of every held-out combination in turn."""
    rng = np.random.default_rng([seed, 77])
    combinations = sorted(HELD_OUT, key=str)
    return [
        draw_held_out(rng, combinations[i % len(combinations)], FRAMES / FPS) for i in range(count)
    ]


def lasting_scenes(
    count: int, seed: int = 0, *, motions: Sequence[Motion] = ("bounce", "still")
) -> list[Scene]:
    """Draw scenes of one thing each that never leaves the frame: it bounces or stands still."""
    rng = np.random.default_rng([seed, 78])
    scenes: list[Scene] = []
    while len(scenes) < count:
        thing: Thing = draw_scene(rng, FRAMES / FPS).things[0]
        if thing.motion in motions:
            background = BACKGROUNDS[int(rng.integers(len(BACKGROUNDS)))]
            scenes.append(Scene((thing,), background))
    return scenes


def score(
    make_video: _MakeVideo,
    scenes: Sequence[Scene],
    *,
    fps: float | int = FPS,
    log: Callable[[str], None] = lambda line: None,
) -> Score:
    """Make a video of each scene and judge it; the first warms up what is compiled."""
    found, clock = Score(), 0.0
    for number, scene in enumerate(scenes):
        started = time.perf_counter()
        frames = make_video(scene, number)
        clock += time.perf_counter() - started if number else 0.0
        verdict = judge_scene(detect_things(frames, fps), scene)
        found.verdicts.append(verdict)
        found.sheets.append(contact_sheet(frames, count=6, columns=6))
        if (number + 1) % 20 == 0:
            log(f"{number + 1} of {len(scenes)}: all right {found.share('all')}")
    found.seconds = clock / max(len(scenes) - 1, 1)
    return found


def score_seconds(
    make_video: _MakeVideo,
    scenes: Sequence[Scene],
    seconds: int,
    *,
    fps: int = FPS,
    log: Callable[[str], None] = lambda line: None,
) -> Score:
    """Make a video of each scene and judge each of its seconds by itself.

    ``metrics`` has ``at_end``, the share of videos whose last second is right, and ``right_until``,
    after how many seconds the first is wrong, in the middle video.

    Args:
        make_video: gives at least ``seconds * fps + 1`` frames.
        scenes: of things that never leave the frame.
        seconds: of each video.
        fps: frames a second.
        log: told of each video.
    """
    found, at_end, until, clock = Score(), [], [], 0.0
    for number, scene in enumerate(scenes):
        started = time.perf_counter()
        frames = make_video(scene, number)
        clock += time.perf_counter() - started
        verdicts = []
        for first in range(0, seconds * fps, fps):
            second = frames[first : first + fps + 1]
            verdicts.append(judge_scene(detect_things(second, fps), scene))
            found.sheets.append(contact_sheet(second, count=6, columns=6))
        found.verdicts += verdicts
        right = [verdict.all for verdict in verdicts]
        at_end.append(right[-1])
        until.append(right.index(False) if False in right else seconds)
        log(f"{plain_caption(scene)}: {sum(right)} of {seconds} seconds right, last: {right[-1]}")
    found.seconds = clock / len(scenes)
    found.metrics = {"at_end": float(np.mean(at_end)), "right_until": float(np.median(until))}
    return found


def from_text(pipeline: Pipeline, scene: Scene, seed: int, **settings: Any) -> Frames:
    """Make a video by the plain caption alone."""
    chosen: dict[str, Any] = {**MINI_CLIP, **settings}
    return pipeline(plain_caption(scene), seed=seed, **chosen).frames


def from_image(pipeline: Pipeline, scene: Scene, seed: int, **settings: Any) -> Frames:
    """Make a video by the plain caption and the first frame."""
    return from_text(pipeline, scene, seed, image=first_frame(scene), **settings)


def first_frame(scene: Scene) -> np.ndarray:
    """Draw the first frame of a scene, uint8 ``[64, 64, 3]``."""
    return render(scene, frames=1, fps=float(FPS), size=MINI_SIZE)[0]


def jump_at_joins(detected: DetectedThing, joins: Sequence[int]) -> float:
    """Return the centre's largest step at a join, over the largest other one (at least 0.02)."""
    steps = np.hypot(*np.diff(detected.track[:, :2], axis=0).T)
    at = [join - 1 for join in joins]
    others = np.delete(steps, at)
    return float(np.nanmax(steps[at]) / max(float(np.nanmax(others)), _UNSEEN))
