"""``skyreels-jax plan --training``: which meshes a training step fits on, and how long it takes."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from skyreels_jax.cli.plan import devices_of, job_of
from skyreels_jax.errors import RequestError

if TYPE_CHECKING:
    from skyreels_jax.generation.dry_run.compiled import Compiled
    from skyreels_jax.generation.dry_run.training import TrainingForecast, TrainingJob

_GIB: Final = 2**30
_ROW: Final = "{:<22}{:>8}{:>9}{:>10}{:>9}{:>9}{:>8}{:>9}{:>13}{:>9}{:>10}  {}"
_HEADINGS: Final = (
    *("mesh", "GiB", "weights", "gradients", "optim.", "average", "kept", "at work"),
    *("GB received", "TFLOP", "s a step", ""),
)


def run_training(args: argparse.Namespace) -> int:
    """Print the meshes, those that fit and are fastest first; 0 if one fits, else 2."""
    from skyreels_jax.generation.dry_run import compiled
    from skyreels_jax.generation.dry_run.meshes import ACCELERATORS
    from skyreels_jax.generation.dry_run.training import compile_training, training_forecasts

    job = _job_of(args)
    if args.compile:
        compiled.grid_of(args.device, args.devices)  # What cannot be compiled for is said at once.
    found = training_forecasts(job, args.devices, ACCELERATORS[args.device])
    described: dict[str, object] = {"job": _described(job), "meshes": [_plain(x) for x in found]}
    if not args.json:
        _print(job, args, found)
    if args.compile:
        answer = compile_training(job, found[0].plan, args.device)
        described["compiled"] = _plain_compiled(answer, found[0])
        if not args.json:
            print(
                f"compiled in {answer.seconds[0]:.0f} s, mesh {found[0].plan}: arguments "
                f"{answer.arguments / _GIB:.2f} GiB (here {found[0].arguments / _GIB:.2f}), peak "
                f"{answer.peak / _GIB:.2f} (here {found[0].total / _GIB:.2f})"
            )
    if args.json:
        print(json.dumps(described, indent=2))
    return 0 if found[0].fits else 2


def _job_of(args: argparse.Namespace) -> "TrainingJob":
    """What is to be trained, as a recipe would have it."""
    from skyreels_jax.generation.dry_run.training import TrainingJob
    from skyreels_jax.training.footprint import ClipShape
    from skyreels_jax.training.lora import LoraTraining
    from skyreels_jax.training.optimizer import OptimizerConfig
    from skyreels_jax.training.transformer_recipe import TransformerShape, VideoTraining
    from skyreels_jax.training.videos.recipe import VideoData

    for name in ("steps", "weights", "batched_guidance"):
        if getattr(args, name):
            raise RequestError(f"--{name.replace('_', '-')} is not of training: leave it out")
    if args.base is not None and args.lora is None:
        raise RequestError("--base is of a LoRA: give --lora RANK too")
    batch = args.devices if args.batch is None else args.batch
    if batch < 1:
        raise RequestError(f"`batch` {batch}: nearest is 1")
    made = job_of(args)
    remat = {None: "full", "full": "full", "dots": "dots", "none": False}[args.remat]
    try:
        lora = None
        if args.lora is not None:
            lora = LoraTraining(rank=args.lora, base=args.base or "bfloat16")
        if not 0 <= (args.ema or 0.0) < 1:
            raise ValueError(f"ema = {args.ema} should be at least 0 and below 1, such as 0.99")
    except ValueError as error:
        raise RequestError(str(error)) from error
    # Of the data nothing is read.
    data = VideoData(vae=args.model, text=args.model, image=args.model, encoded="")
    shape = TransformerShape(
        model_type=made.config.model_type, start=args.model, dtype="bfloat16", remat=remat
    )
    return TrainingJob(
        made.config,
        ClipShape(batch, made.frames, made.height, made.width),
        VideoTraining(data, shape, lora=lora),
        OptimizerConfig(name=args.optimizer or "adamw"),
        args.ema or 0.0,
    )


def _print(
    job: "TrainingJob", args: argparse.Namespace, found: Sequence["TrainingForecast"]
) -> None:
    lora, clips = job.training.lora, job.clips
    what = "the transformer" if lora is None else f"a LoRA of rank {lora.rank} over {lora.base}"
    print(
        f"{args.model}: {what}, {clips.batch} clips of {clips.frames} frames of {clips.height} x "
        f"{clips.width} a step, {job.optimizer.name}, remat {job.training.model.remat or 'none'}"
    )
    print(f"{devices_of(args)}; traced, nothing was run")
    print(_ROW.format(*_HEADINGS).rstrip())
    for one in found:
        weights = one.bytes["weights"] + one.bytes["frozen weights"]
        kinds = ("gradients", "optimiser", "average", "kept", "at work")
        sizes = (one.total, weights, *(one.bytes[kind] for kind in kinds))
        print(
            _ROW.format(
                str(one.plan),
                *(f"{size / _GIB:.2f}" for size in sizes),
                f"{sum(traffic.received for traffic in one.traffic) / 1e9:.2f}",
                f"{one.operations / 1e12:.1f}",
                f"{one.seconds:.2f}",
                "fits" if one.fits else "does not fit",
            )
        )
    if found[0].fits:
        print(f"recommended: train --mesh {found[0].plan}")
    else:
        print("none fits: more devices, remat, a LoRA, fewer frames, clips or a smaller size")


def _plain(one: "TrainingForecast") -> Mapping[str, object]:
    return {
        "mesh": str(one.plan),
        "fits": one.fits,
        "seconds_per_step": one.seconds,
        "operations_per_step": one.operations,
        "bytes": dict(one.bytes),
        "arguments": one.arguments,
        "total": one.total,
        "collectives_per_step": [asdict(traffic) for traffic in one.traffic],
    }


def _plain_compiled(found: "Compiled", one: "TrainingForecast") -> Mapping[str, object]:
    return {
        "mesh": str(one.plan),
        "arguments": found.arguments,
        "temporary": found.temporary,
        "peak": found.peak,
        "kernels": dict(found.module.kernels),
        "seconds": found.seconds[0],
    }


def _described(job: "TrainingJob") -> Mapping[str, object]:
    model, lora = job.training.model, job.training.lora
    return {
        **asdict(job.clips),
        "optimizer": job.optimizer.name,
        "ema": job.ema,
        "remat": model.remat or "none",
        "lora": None if lora is None else {"rank": lora.rank, "base": lora.base},
    }
