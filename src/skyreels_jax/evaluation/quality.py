"""How well a model of moving shapes follows its captions, by an independent judge.

``python -m skyreels_jax.evaluation.quality`` (``make eval``) prints the table of the small models;
``--sweep`` the table of settings against the judge's score (``docs/quality.md``).
"""

import argparse
import json
import math
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Final

import numpy as np

from skyreels_jax.built_in import LIVE_MODEL
from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.errors import RequestError
from skyreels_jax.evaluation.live_scores import live_rows
from skyreels_jax.evaluation.scores import (
    FPS,
    FRAMES,
    MINI_SIZE,
    Score,
    first_frame,
    from_image,
    from_text,
    held_out_scenes,
    jump_at_joins,
    lasting_scenes,
    score,
    score_seconds,
)
from skyreels_jax.files import write_text
from skyreels_jax.hub import enable_compilation_cache, locate
from skyreels_jax.media import write_image
from skyreels_jax.models import vae
from skyreels_jax.moving_shapes.judge import detect_things
from skyreels_jax.moving_shapes.render import render
from skyreels_jax.moving_shapes.scene import Motion, Scene
from skyreels_jax.parity.metrics import psnr
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.shapes import Frames
from skyreels_jax.weights.components.vae import stored_vae

# Four times the length of a training clip, in windows of it that share 9 frames.
LONG: Final = 65
LONG_OVERLAP: Final = 9
_MODES: Final[Mapping[str, Mapping[str, int]]] = {
    "synchronous": {"ar_step": 0},
    "asynchronous": {"ar_step": 4, "causal_block_size": 1},
}


# Seconds of the longest videos that are judged, and what things do in them.
HALF_MINUTE: Final = 30
_HALF_MINUTES: Final[Mapping[str, Motion]] = {"standing": "still", "moving": "bounce"}


def joins() -> tuple[int, ...]:
    """Return the first new frame of each window but the first."""
    return tuple(range(FRAMES, LONG, FRAMES - LONG_OVERLAP))


def _text_to_video(pipeline: Pipeline, count: int, log: Callable[[str], None]) -> Score:
    """Score videos of held-out combinations."""
    return score(partial(from_text, pipeline), held_out_scenes(count), log=log)


def _image_to_video(pipeline: Pipeline, count: int, log: Callable[[str], None]) -> Score:
    """Score videos of held-out combinations, with their first frames given.

    ``first_frame`` is the least PSNR in dB of a first frame to the image, ``first_frame_median``
    the median, and ``first_frame_28`` the share with at least 28 dB.
    """
    scenes, distances = held_out_scenes(count, seed=1), []

    def make(scene: Scene, seed: int) -> Frames:
        frames = from_image(pipeline, scene, seed)
        distances.append(psnr(frames[:1], first_frame(scene)[None]))
        return frames

    found = score(make, scenes, log=log)
    found.metrics = {
        "first_frame": min(distances),
        "first_frame_median": float(np.median(distances)),
        "first_frame_28": float(np.mean([d >= 28 for d in distances])),
    }
    return found


def _long_video(pipeline: Pipeline, count: int, mode: str, log: Callable[[str], None]) -> Score:
    """Score videos of four times the training length.

    A jump is the largest of a video's steps at joins over its largest other step:
    ``jump_median`` is their median, ``jump_within_1.5`` the share of at most 1.5.
    """
    jumps: list[float] = []
    settings = {
        "num_frames": LONG,
        "base_num_frames": FRAMES,
        "overlap_history": LONG_OVERLAP,
        # That of given frames in training: sigma_distributions.KNOWN_FRAME_SIGMA.
        "addnoise_condition": 20,
        # That of short videos: these rows show what windows cost, beside the rows of one window.
        "guidance_scale": pipeline.checkpoint.defaults.guidance_scale,
    }

    def make(scene: Scene, seed: int) -> Frames:
        frames = from_text(pipeline, scene, seed, **settings, **_MODES[mode])
        things = detect_things(frames, FPS)
        jumps.append(jump_at_joins(things[0], joins()) if things else math.inf)
        return frames

    found = score(make, lasting_scenes(count), log=log)
    found.metrics = {
        "jump_median": float(np.median(jumps)),
        "jump_within_1.5": float(np.mean([jump <= 1.5 for jump in jumps])),
    }
    return found


def _half_minute(
    pipeline: Pipeline, count: int, motion: Motion, log: Callable[[str], None]
) -> Score:
    """Score every second of videos of half a minute, made with the model's own defaults."""

    def make(scene: Scene, seed: int) -> Frames:
        return from_text(pipeline, scene, seed, num_frames=HALF_MINUTE * FPS + 1)

    scenes = lasting_scenes(count, seed=1, motions=(motion,))
    return score_seconds(make, scenes, HALF_MINUTE, log=log)


def _through_vae(checkpoint: Checkpoint, count: int) -> Score:
    """Score drawn clips after the VAE; ``clip`` and ``frame`` (single frames) are PSNR in dB."""
    model = stored_vae(checkpoint.layout).load(np.float32)
    errors: dict[str, list[float]] = {"clip": [], "frame": []}

    def reconstruct(frames: Frames) -> Frames:
        pixels = np.moveaxis(frames, -1, 0)[None] / np.float32(127.5) - np.float32(1)
        out = vae.decode_to_pixels(model, vae.encode_pixels(model, pixels))[0]
        return np.rint((np.moveaxis(out, 0, -1) + 1) * np.float32(127.5)).astype(np.uint8)

    def make(scene: Scene, seed: int) -> Frames:
        del seed
        frames = render(scene, frames=FRAMES, fps=float(FPS), size=MINI_SIZE)
        for name, given in (("clip", frames), ("frame", frames[:1])):
            out = reconstruct(given)
            errors[name].append(float(np.mean((out.astype(float) - given.astype(float)) ** 2)))
        return reconstruct(frames)

    found = score(make, held_out_scenes(count, seed=2))
    found.metrics = {n: 10 * math.log10(255**2 / float(np.mean(e))) for n, e in errors.items()}
    return found


EVALUATIONS: Final = ("vae", "t2v", "i2v", "long", "half-minute", "live")
# Scenes of each where nothing else is asked for; of live, of a row of short streams.
_COUNTS: Final = {"vae": 100, "t2v": 200, "i2v": 100, "long": 50, "half-minute": 3, "live": 200}
_LIVE: Final = "live, "
_I2V: Final = "image to video"
_HEAD: Final = (
    "| | videos | colour | shape | motion | all three | seconds a video | |\n"
    "|---|---|---|---|---|---|---|---|\n"
)


def evaluate(
    names: Sequence[str],
    counts: Mapping[str, int],
    output: Path,
    models: Mapping[str, str],
    streams: tuple[int, int, int] = (5, 20, 1000),
) -> dict[str, Score]:
    """Score models, and write a table, JSON and sheets of videos.

    Args:
        names: of :data:`EVALUATIONS`.
        counts: of scenes, by name.
        output: folder to write to.
        models: the ``df``, the ``i2v`` and the ``live`` checkpoint.
        streams: how many long streams there are, how many that change, and frames of a long one.
    """
    output.mkdir(parents=True, exist_ok=True)
    log = partial(print, file=sys.stderr, flush=True)
    found: dict[str, Score] = {}
    opened = {
        kind: Pipeline.from_pretrained(model, dtype="float32", keep=True)
        for kind, model in models.items()
    }
    for name in names:
        log(name)
        if name == "vae":
            found["VAE"] = _through_vae(opened["df"].checkpoint, counts[name])
        elif name == "t2v":
            found["text to video"] = _text_to_video(opened["df"], counts[name], log)
        elif name == "i2v":
            found[_I2V] = _image_to_video(opened["i2v"], counts[name], log)
        elif name == "live":
            rows = live_rows(opened["live"].stream, (counts[name], *streams), log)
            found.update((_LIVE + row, one) for row, one in rows)
        elif name == "half-minute":
            for kind, motion in _HALF_MINUTES.items():
                row = f"{HALF_MINUTE} s {kind}, by second"
                found[row] = _half_minute(opened["df"], counts[name], motion, log)
        else:
            for mode in _MODES:
                found[f"long, {mode}"] = _long_video(opened["df"], counts[name], mode, log)
    _write(output, found)
    return found


def table(found: Mapping[str, Score]) -> str:
    """Return the scores as a table in Markdown."""
    rows = []
    for name, one in found.items():
        metrics = ", ".join(f"{key} {value:.3g}" for key, value in one.metrics.items())
        rows.append(
            f"| {name} | {len(one.verdicts)} | {one.shares()} | {one.seconds:.2f} | {metrics} |\n"
        )
    return _HEAD + "".join(rows)


def write_cards(found: Mapping[str, Score], folders: Mapping[str, Path]) -> None:
    """Put scores into the cards of the models, in place of those there.

    Args:
        found: scores by name; rows of other names stay as they are.
        folders: of the models, each with a ``README.md`` that has a table of scores or the word
            ``EVALUATION`` where it is to be.

    Raises:
        RequestError: a card has no place for scores.
    """
    for kind, folder in folders.items():
        scores = {name: one for name, one in found.items() if _kind_of(name) == kind}
        if not scores:
            continue
        card = folder / "README.md"
        text = card.read_text("utf-8")
        match = re.search(rf"^EVALUATION\n|^{re.escape(_HEAD)}(\|.*\n)*", text, re.MULTILINE)
        if match is None:
            raise RequestError(f"{card} has no table of scores, nor the word EVALUATION")
        rows = {line.split(" | ")[0]: line for line in match[0].removeprefix(_HEAD).splitlines()}
        rows.pop("EVALUATION", None)
        rows |= {line.split(" | ")[0]: line for line in table(scores).splitlines()[2:]}
        new = _HEAD + "".join(f"{row}\n" for row in rows.values())
        write_text(card, text[: match.start()] + new + text[match.end() :])


def _kind_of(row: str) -> str:
    """Which model a row is of."""
    return "i2v" if row == _I2V else "live" if row.startswith(_LIVE) else "df"


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
            **one.metrics,
        }
        for name, one in found.items()
    }
    write_text(output / "eval.json", json.dumps(values, indent=1))
    write_text(output / "eval.md", table(found))


# Each row changes one setting of the defaults.
_SWEEP: Final[Sequence[Mapping[str, int | float | str]]] = (
    {},
    *({"guidance_scale": scale} for scale in (1.0, 2.0, 3.0, 6.0, 9.0)),
    *({"steps": steps} for steps in (5, 10, 40)),
    *({"shift": shift} for shift in (1.0, 2.0, 8.0)),
    *({"ar_step": step} for step in (0, 2, 10, 20)),
    *({"cache": "teacache", "cache_threshold": bound} for bound in (0.1, 0.2, 0.3)),
    *({"cache": "easycache", "cache_threshold": bound} for bound in (0.05, 0.1, 0.2)),
    {"dtype": "bfloat16"},
)


def sweep(model: str, count: int, output: Path) -> str:
    """Write the table of settings against the judge's score to ``output / "sweep.md"``."""
    lines = [
        "| setting | colour | shape | motion | all three | seconds a video |",
        "|---|---|---|---|---|---|",
    ]
    pipelines: dict[str, Pipeline] = {}
    for change in _SWEEP:
        settings = dict(change)
        dtype = str(settings.pop("dtype", "float32"))
        if dtype not in pipelines:
            pipelines[dtype] = Pipeline.from_pretrained(model, dtype=dtype, keep=True)
        make = partial(from_text, pipelines[dtype], **settings)
        found = score(make, held_out_scenes(count, seed=3))
        name = ", ".join(f"{key} {value}" for key, value in change.items()) or "defaults"
        lines.append(f"| {name} | {found.shares()} | {found.seconds:.2f} |")
        print(lines[-1], file=sys.stderr, flush=True)
    text = "\n".join(lines) + "\n"
    output.mkdir(parents=True, exist_ok=True)
    write_text(output / "sweep.md", text)
    return text


def main() -> None:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(description="Score the small models on held-out prompts.")
    parser.add_argument("--model", default="mini", help="a diffusion-forcing checkpoint")
    parser.add_argument("--i2v-model", default="mini-i2v")
    parser.add_argument("--live-model", default=LIVE_MODEL, help="a causal student")
    usual = [name for name in EVALUATIONS if name != "live" or LIVE_MODEL != "mini"]
    parser.add_argument("--parts", nargs="+", choices=EVALUATIONS, default=usual)
    parser.add_argument("--count", type=int, help="scenes of each part; 200 to 3 otherwise")
    parser.add_argument("--runs", type=int, default=5, help="long streams")
    parser.add_argument("--changes", type=int, default=20, help="streams whose prompt changes")
    parser.add_argument("--frames", type=int, default=1000, help="of a long stream, 100 or more")
    parser.add_argument(
        "--write-cards", action="store_true", help="put the scores into the models' README.md"
    )
    parser.add_argument("--sweep", action="store_true", help="settings against the score instead")
    parser.add_argument("--output", type=Path, default=Path("out/eval"))
    args = parser.parse_args()
    enable_compilation_cache()
    if args.sweep:
        print(sweep(args.model, args.count or 48, args.output))
        return
    counts = {name: args.count or _COUNTS[name] for name in EVALUATIONS}
    named = {"i2v": args.i2v_model, "live": args.live_model}
    models = {"df": args.model} | {kind: m for kind, m in named.items() if kind in args.parts}
    streams = args.runs, args.changes, args.frames
    found = evaluate(args.parts, counts, args.output, models, streams)
    print(table(found))
    if args.write_cards:
        write_cards(found, {kind: locate(model).folder for kind, model in models.items()})


if __name__ == "__main__":
    main()
