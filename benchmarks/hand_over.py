"""Drift of long videos by how windows hand over: latents, or pixels that are encoded anew.

Things that stand still, so that every frame should be as the first window's last one. What is shown
is the distance from it, window by window, and whether the judge still finds the thing.
"""

import argparse
from dataclasses import replace

import numpy as np
from benchmarks.measure import head, middle, row, versions

from skyreels_jax.caches import enable_compilation_cache
from skyreels_jax.moving_shapes.captions import plain_caption
from skyreels_jax.moving_shapes.scene import Scene
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.shapes import Frames
from skyreels_jax.validation.metrics import psnr
from skyreels_jax.validation.scores import FPS, FRAMES, SIZE, Share, held_out_scenes
from skyreels_jax.validation.shapes import agrees, look

OVERLAP = 9
MODES = {"synchronous": 0, "asynchronous": 5}


def still_scenes(count: int) -> list[Scene]:
    """One thing that stands still, of every colour and shape in turn."""
    scenes = held_out_scenes(count, seed=6)
    return [
        Scene((replace(s.things[0], motion="still", direction=None, speed=None),), s.background)
        for s in scenes
    ]


def ends(frames: Frames) -> list[Frames]:
    """The last frame of each window."""
    step = FRAMES - OVERLAP
    return [frames[at : at + 1] for at in range(FRAMES - 1, len(frames), step)]


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
    shown = [n for n in (1, 2, 4, 8, 16) if n < options.windows]
    length = FRAMES + (options.windows - 1) * (FRAMES - OVERLAP)
    head("hand-over", "mode", *(f"dB after {n}" for n in shown), "darker or lighter", "all right")
    for hand_over in ("latents", "pixels"):
        for mode, ar_step in MODES.items():
            distances, lighter, right = [], [], []
            for seed, scene in enumerate(still_scenes(options.count)):
                frames = pipeline(
                    plain_caption(scene),
                    seed=seed,
                    height=SIZE[0],
                    width=SIZE[1],
                    fps=FPS,
                    num_frames=length,
                    base_num_frames=FRAMES,
                    overlap_history=OVERLAP,
                    addnoise_condition=options.addnoise_condition,
                    ar_step=ar_step,
                    hand_over=hand_over,
                ).frames
                last = ends(frames)
                distances.append([psnr(last[n], last[0]) for n in shown])
                lighter.append(float(last[-1].mean()) - float(last[0].mean()))
                right.append(agrees(look(frames, FPS), scene).all)
            middles = [f"{middle(list(column)):.1f}" for column in zip(*distances, strict=True)]
            drift = f"{np.mean(lighter):+.1f} ± {np.std(lighter):.1f}"
            row(hand_over, mode, *middles, drift, Share(sum(right), len(right)))


if __name__ == "__main__":
    main()
