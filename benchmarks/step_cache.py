"""Step caches by threshold on the small model: calls computed, time, and what becomes of the video.

PSNR is that of the frames against those of the same seed without a cache; the judge says whether
colour, shape and motion are still what the caption says. Each video is made with every setting in
turn, so that times are compared side by side.
"""

import argparse
from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from benchmarks.measure import head, middle, row, versions

from skyreels_jax.evaluation.scores import FPS, MINI_CLIP, Share, held_out_scenes
from skyreels_jax.hub import enable_compilation_cache
from skyreels_jax.moving_shapes.captions import plain_caption
from skyreels_jax.moving_shapes.judge import detect_things, judge_scene
from skyreels_jax.moving_shapes.scene import Scene
from skyreels_jax.parity.metrics import psnr
from skyreels_jax.pipeline import Pipeline

THRESHOLDS = (0.05, 0.1, 0.2, 0.3)
WAYS: dict[str, dict[str, Any]] = {
    "teacache": {"cache": "teacache"},
    "teacache, ret steps": {"cache": "teacache", "use_ret_steps": True},
    "easycache": {"cache": "easycache"},
}
PLAIN = ("none", 0.0)
# Steps by which each latent frame runs behind the one before.
MODES = {"synchronous": 0, "asynchronous": 5}


@dataclass
class Found:
    """Of one setting, video by video."""

    computed: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    decibels: list[float] = field(default_factory=list)
    right: list[bool] = field(default_factory=list)


def settings() -> dict[tuple[str, float], dict[str, Any]]:
    """What is compared, the run without a cache first."""
    chosen = {
        (name, threshold): {**way, "cache_threshold": threshold}
        for name, way in WAYS.items()
        for threshold in THRESHOLDS
    }
    return {PLAIN: {}, **chosen}


def measure(
    pipeline: Pipeline, scenes: list[Scene], ar_step: int, steps: int
) -> dict[tuple[str, float], Found]:
    """All settings on all scenes."""
    found: dict[tuple[str, float], Found] = defaultdict(Found)
    for seed, scene in enumerate(scenes):
        same = {**MINI_CLIP, "seed": seed, "steps": steps, "ar_step": ar_step}
        videos = {
            name: pipeline(plain_caption(scene), **same, **chosen)
            for name, chosen in settings().items()
        }
        for name, video in videos.items():
            one, timings = found[name], video.timings
            one.computed.append(timings.computed / timings.calls)
            one.seconds.append(sum(timings.steps))
            one.decibels.append(psnr(video.frames, videos[PLAIN].frames))
            one.right.append(judge_scene(detect_things(video.frames, FPS), scene).all)
    return found


def main() -> None:
    """Print a table for docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini", help="a diffusion-forcing model of shapes")
    parser.add_argument("--count", type=int, default=24, help="of videos")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    enable_compilation_cache()
    print(versions())
    pipeline = Pipeline.from_pretrained(options.model, dtype="float32", keep=True)
    scenes = held_out_scenes(options.count, seed=5)
    for mode, ar_step in MODES.items():
        print(f"\n{mode}\n")
        head("cache", "threshold", "calls of all", "time of none", "PSNR, dB", "all right")
        found = measure(pipeline, scenes, ar_step, options.steps)
        whole = found[PLAIN].seconds
        for name, one in found.items():
            ratio = middle([a / b for a, b in zip(one.seconds, whole, strict=True)])
            distance = f"{middle(one.decibels):.1f}" if name[1] else ""
            right = Share(sum(one.right), len(one.right))
            row(*name, f"{np.mean(one.computed):.2f}", f"{ratio:.2f}", distance, right)


if __name__ == "__main__":
    main()
