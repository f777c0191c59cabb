"""How well a model of moving shapes does what it is told, by an independent judge.

``python -m skyreels_jax.evaluation.quality`` (``make eval``) prints the table of the small models;
``--sweep`` the table of settings against the judge's score (``docs/quality.md``).
"""

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Final

import numpy as np

from skyreels_jax.cache_dirs import enable_compilation_cache
from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.evaluation.scores import (
    FPS,
    FRAMES,
    SIZE,
    Score,
    first_frame,
    from_image,
    from_text,
    held_out_scenes,
    jump_at_joins,
    lasting_scenes,
    score,
)
from skyreels_jax.files import whole_file
from skyreels_jax.media import write_image
from skyreels_jax.models import vae
from skyreels_jax.moving_shapes.judge import look
from skyreels_jax.moving_shapes.render import render
from skyreels_jax.moving_shapes.scene import Scene
from skyreels_jax.parity.metrics import psnr
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.shapes import Frames
from skyreels_jax.weights.parts import stored_vae

# Four times the length of a training clip, in windows of it that share 9 frames.
LONG: Final = 65
OVERLAP: Final = 9
MODES: Final[Mapping[str, Mapping[str, int]]] = {
    "synchronous": {"ar_step": 0},
    "asynchronous": {"ar_step": 4, "causal_block_size": 1},
}


def joins() -> tuple[int, ...]:
    """The first new frame of each window but the first."""
    return tuple(range(FRAMES, LONG, FRAMES - OVERLAP))


def text_to_video(pipeline: Pipeline, count: int, say: Callable[[str], None]) -> Score:
    """Held-out combinations."""
    return score(partial(from_text, pipeline), held_out_scenes(count), say=say)


def image_to_video(pipeline: Pipeline, count: int, say: Callable[[str], None]) -> Score:
    """Held-out combinations; ``first_frame`` is the least PSNR in dB of a first frame to the image,
    ``first_frame_median`` the middle one."""
    scenes, distances = held_out_scenes(count, seed=1), []

    def make(scene: Scene, seed: int) -> Frames:
        frames = from_image(pipeline, scene, seed)
        distances.append(psnr(frames[:1], first_frame(scene)[None]))
        return frames

    found = score(make, scenes, say=say)
    found.figures = {
        "first_frame": min(distances),
        "first_frame_median": float(np.median(distances)),
        "first_frame_28": float(np.mean([d >= 28 for d in distances])),
    }
    return found


def long_video(pipeline: Pipeline, count: int, mode: str, say: Callable[[str], None]) -> Score:
    """Scenes without end at four times the training length; ``jumps`` is the largest of a video's
    steps at joins over its other steps, the middle and the worst of the videos."""
    jumps: list[float] = []
    settings = {
        "num_frames": LONG,
        "base_num_frames": FRAMES,
        "overlap_history": OVERLAP,
        # The level of given frames in training (skyreels_jax.training.sigma_distributions.KNOWN).
        "addnoise_condition": 20,
    }

    def make(scene: Scene, seed: int) -> Frames:
        frames = from_text(pipeline, scene, seed, **settings, **MODES[mode])
        seen = look(frames, FPS)
        jumps.append(jump_at_joins(seen[0], joins()) if seen else math.inf)
        return frames

    found = score(make, lasting_scenes(count), say=say)
    found.figures = {
        "jump_median": float(np.median(jumps)),
        "jump_within_1.5": float(np.mean([jump <= 1.5 for jump in jumps])),
    }
    return found


def through_vae(checkpoint: Checkpoint, count: int) -> Score:
    """Clips encoded and decoded; ``clip`` and ``frame`` are PSNR in dB, of single frames too."""
    model = stored_vae(checkpoint.layout).load(np.float32)
    errors: dict[str, list[float]] = {"clip": [], "frame": []}

    def passed(frames: Frames) -> Frames:
        pixels = np.moveaxis(frames, -1, 0)[None] / np.float32(127.5) - np.float32(1)
        out = vae.decode(model, vae.encode(model, pixels))[0]
        return np.rint((np.moveaxis(out, 0, -1) + 1) * np.float32(127.5)).astype(np.uint8)

    def make(scene: Scene, seed: int) -> Frames:
        del seed
        frames = render(scene, frames=FRAMES, fps=float(FPS), size=SIZE)
        for name, given in (("clip", frames), ("frame", frames[:1])):
            out = passed(given)
            errors[name].append(float(np.mean((out.astype(float) - given.astype(float)) ** 2)))
        return passed(frames)

    found = score(make, held_out_scenes(count, seed=2))
    found.figures = {n: 10 * math.log10(255**2 / float(np.mean(e))) for n, e in errors.items()}
    return found


PARTS: Final = ("vae", "t2v", "i2v", "long")


def evaluate(
    parts: Sequence[str], counts: Mapping[str, int], output: Path, models: Mapping[str, str]
) -> dict[str, Score]:
    """Score the parts, and write a table, JSON and sheets of videos.

    Args:
        parts: of :data:`PARTS`.
        counts: of scenes by part.
        output: folder to write to.
        models: the ``df`` and the ``i2v`` checkpoint.
    """
    output.mkdir(parents=True, exist_ok=True)
    say = partial(print, file=sys.stderr, flush=True)
    found: dict[str, Score] = {}
    opened = {
        name: Pipeline.from_pretrained(model, dtype="float32", keep=True)
        for name, model in models.items()
    }
    for part in parts:
        say(part)
        if part == "vae":
            found["VAE"] = through_vae(opened["df"].checkpoint, counts[part])
        elif part == "t2v":
            found["text to video"] = text_to_video(opened["df"], counts[part], say)
        elif part == "i2v":
            found["image to video"] = image_to_video(opened["i2v"], counts[part], say)
        else:
            for mode in MODES:
                found[f"long, {mode}"] = long_video(opened["df"], counts[part], mode, say)
    _write(output, found)
    return found


def table(found: Mapping[str, Score]) -> str:
    """Markdown."""
    lines = [
        "| | videos | colour | shape | motion | all three | seconds a video | |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found.items():
        shares = " | ".join(str(one.share(n)) for n in ("colour", "kind", "motion", "all"))
        figures = ", ".join(f"{key} {value:.3g}" for key, value in one.figures.items())
        lines.append(f"| {name} | {len(one.verdicts)} | {shares} | {one.seconds:.2f} | {figures} |")
    return "\n".join(lines) + "\n"


def _write(output: Path, found: Mapping[str, Score]) -> None:
    for name, one in found.items():
        stem = name.replace(", ", "-").replace(" ", "-").lower()
        right = [sheet for sheet, v in zip(one.sheets, one.verdicts, strict=True) if v.all]
        wrong = [sheet for sheet, v in zip(one.sheets, one.verdicts, strict=True) if not v.all]
        for kind, sheets in (("right", right[:8]), ("wrong", wrong[:8])):
            if sheets:
                write_image(output / f"{stem}-{kind}.png", np.concatenate(sheets))
    values = {
        name: {
            "verdicts": [asdict(verdict) for verdict in one.verdicts],
            "seconds": one.seconds,
            **one.figures,
        }
        for name, one in found.items()
    }
    for file, text in (("eval.json", json.dumps(values, indent=1)), ("eval.md", table(found))):
        with whole_file(output / file) as temporary:
            temporary.write_text(text)


# Each row changes one setting of the defaults.
SWEEP: Final[Sequence[Mapping[str, Any]]] = (
    {},
    *({"guidance_scale": scale} for scale in (1.0, 2.0, 3.0, 6.0, 9.0)),
    *({"steps": steps} for steps in (5, 10, 40)),
    *({"shift": shift} for shift in (1.0, 2.0, 8.0)),
    *({"ar_step": step} for step in (0, 2, 10, 20)),
    *({"cache": "teacache", "cache_threshold": level} for level in (0.1, 0.2, 0.3)),
    *({"cache": "easycache", "cache_threshold": level} for level in (0.05, 0.1, 0.2)),
    {"dtype": "bfloat16"},
)


def sweep(model: str, count: int, output: Path) -> str:
    """The table of settings against the judge's score, written to ``output / "sweep.md"``."""
    lines = [
        "| setting | colour | shape | motion | all three | seconds a video |",
        "|---|---|---|---|---|---|",
    ]
    pipelines: dict[str, Pipeline] = {}
    for change in SWEEP:
        settings = dict(change)
        dtype = settings.pop("dtype", "float32")
        if dtype not in pipelines:
            pipelines[dtype] = Pipeline.from_pretrained(model, dtype=dtype, keep=True)
        make = partial(from_text, pipelines[dtype], **settings)
        found = score(make, held_out_scenes(count, seed=3))
        shares = " | ".join(str(found.share(n)) for n in ("colour", "kind", "motion", "all"))
        name = ", ".join(f"{key} {value}" for key, value in change.items()) or "defaults"
        lines.append(f"| {name} | {shares} | {found.seconds:.2f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines) + "\n"
    output.mkdir(parents=True, exist_ok=True)
    with whole_file(output / "sweep.md") as temporary:
        temporary.write_text(text)
    return text


def main() -> None:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(description="Score the small models on held-out prompts.")
    parser.add_argument("--model", default="mini", help="a diffusion-forcing checkpoint")
    parser.add_argument("--i2v-model", default="mini-i2v")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--count", type=int, help="scenes of each part; 200, 100 and 50 otherwise")
    parser.add_argument("--sweep", action="store_true", help="settings against the score instead")
    parser.add_argument("--output", type=Path, default=Path("out/eval"))
    args = parser.parse_args()
    enable_compilation_cache()
    if args.sweep:
        print(sweep(args.model, args.count or 48, args.output))
        return
    usual = {"vae": 100, "t2v": 200, "i2v": 100, "long": 50}
    counts = {part: args.count or usual[part] for part in PARTS}
    models = {"df": args.model}
    if "i2v" in args.parts:
        models["i2v"] = args.i2v_model
    print(table(evaluate(args.parts, counts, args.output, models)))


if __name__ == "__main__":
    main()
