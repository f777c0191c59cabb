"""Drift of long videos by how windows hand over: latents, or pixels that are encoded anew.

Things that stand still, so that every frame should be as the first window's last one. What is shown
is the distance from it, window by window, and whether the judge still finds the thing.
"""

import argparse
from dataclasses import dataclass, field, replace
from itertools import product
from typing import Any

import numpy as np
from benchmarks.measure import head, middle, row, versions
from benchmarks.step_cache import MODES

from skyreels_jax.evaluation.quality import LONG_OVERLAP
from skyreels_jax.evaluation.scores import FPS, FRAMES, Share, from_text, held_out_scenes
from skyreels_jax.hub import enable_compilation_cache
from skyreels_jax.moving_shapes.judge import detect_things, judge_scene
from skyreels_jax.moving_shapes.scene import Scene
from skyreels_jax.parity.metrics import psnr
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.shapes import Frames


def still_scenes(count: int) -> list[Scene]:
    """One thing that stands still, of every colour and shape in turn."""
    scenes = held_out_scenes(count, seed=6)
    return [
        Scene((replace(s.things[0], motion="still", direction=None, speed=None),), s.background)
        for s in scenes
    ]


def ends(frames: Frames) -> list[Frames]:
    """The last frame of each window."""
    step = FRAMES - LONG_OVERLAP
    return [frames[at : at + 1] for at in range(FRAMES - 1, len(frames), step)]


@dataclass
class Drift:
    """Of one way to hand over, video by video."""

    distances: list[list[float]] = field(default_factory=list)
    lighter: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)


def measure(pipeline: Pipeline, scenes: list[Scene], shown: list[int], **settings: Any) -> Drift:
    """Of all scenes, after each of the windows ``shown``."""
    found = Drift()
    for seed, scene in enumerate(scenes):
        frames = from_text(pipeline, scene, seed, **settings)
        last = ends(frames)
        found.distances.append([psnr(last[n], last[0]) for n in shown])
        found.lighter.append(float(last[-1].mean()) - float(last[0].mean()))
        found.right.append(judge_scene(detect_things(frames, FPS), scene).all)
    return found


def main() -> None:
    """Print a table for docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini", help="a diffusion-forcing model of shapes")
    parser.add_argument("--count", type=int, default=16, help="of videos")
    parser.add_argument("--windows", type=int, default=17)
    parser.add_argument("--addnoise-condition", type=int, default=0)
    options = parser.parse_args()
    enable_compilation_cache()
    print(versions())
    pipeline = Pipeline.from_pretrained(options.model, dtype="float32", keep=True)
    scenes = still_scenes(options.count)
    shown = [n for n in (1, 2, 4, 8, 16) if n < options.windows]
    windows = {
        "num_frames": FRAMES + (options.windows - 1) * (FRAMES - LONG_OVERLAP),
        "base_num_frames": FRAMES,
        "overlap_history": LONG_OVERLAP,
        "addnoise_condition": options.addnoise_condition,
    }
    head("hand-over", "mode", *(f"dB after {n}" for n in shown), "darker or lighter", "all right")
    for hand_over, (mode, ar_step) in product(("latents", "pixels"), MODES.items()):
        found = measure(pipeline, scenes, shown, continuation=hand_over, ar_step=ar_step, **windows)
        middles = [f"{middle(list(column)):.1f}" for column in zip(*found.distances, strict=True)]
        drift = f"{np.mean(found.lighter):+.1f} ± {np.std(found.lighter):.1f}"
        row(hand_over, mode, *middles, drift, Share(sum(found.right), len(found.right)))


if __name__ == "__main__":
    main()
