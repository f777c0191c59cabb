"""``skyreels-jax plan``: what each mesh of devices would take, before anybody rents them."""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Final

from skyreels_jax.errors import RequestError
from skyreels_jax.geometry import FRAMES_PER_LATENT, SIZE_MULTIPLE, nearest_multiples

if TYPE_CHECKING:
    from skyreels_jax.generation.dry_run.compiled import Compiled
    from skyreels_jax.generation.dry_run.meshes import Job, MeshForecast

# Names of `generation.dry_run.meshes.ACCELERATORS`, which a test holds equal.
ACCELERATOR_NAMES: Final = ("h100", "h200", "a100", "l40s", "4090", "v5e", "v5p", "v6e")
# Names of the recipe's choices, which a test holds equal.
_OPTIMIZERS: Final = ("adamw", "muon", "adafactor", "sgd")
_REMAT: Final = ("full", "dots", "none")
_BASES: Final = ("bfloat16", "float32", "int8")
_OF_TRAINING: Final = ("batch", "optimizer", "ema", "remat", "lora", "base")
_MOST_DEVICES: Final = 4096
_GIB: Final = 2**30
_ROW: Final = "{:<28}{:>10}{:>14}{:>14}{:>12}{:>12}  {}"
_HEADINGS: Final = ("mesh", "GiB", "of weights", "GB received", "TFLOP", "s a step", "")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``plan`` verb."""
    parser = subparsers.add_parser(
        "plan",
        help="which meshes of devices a model fits on, and how long a step takes there",
        description="Which meshes of devices a model fits on, and how long a step would take "
        "there: by formula from shapes and makers' rates, without weights and without devices; "
        "or by the TPU's compiler.",
    )
    parser.add_argument(
        "--model",
        required=True,
        metavar="PRESET|DIR|ID",
        help="name of a released checkpoint, of which nothing is needed; or a checkpoint",
    )
    parser.add_argument("--device", required=True, choices=ACCELERATOR_NAMES, help="its kind")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="how many (default: 1)")
    parser.add_argument("--frames", type=int, metavar="N", help="default: the checkpoint's")
    parser.add_argument("--height", type=int, metavar="PIXELS", help="default: the checkpoint's")
    parser.add_argument("--width", type=int, metavar="PIXELS", help="default: the checkpoint's")
    parser.add_argument("--steps", type=int, metavar="N", help="default: the checkpoint's")
    parser.add_argument("--weights", choices=("bf16", "int8", "fp8"), help="of the blocks' kernels")
    parser.add_argument(
        "--batched-guidance", action="store_true", help="both prompts in one call: for data=2"
    )
    parser.add_argument(
        "--compile",
        action="store_true",
        help="ask the compiler about the recommended mesh (TPUs; extra `compile`; minutes)",
    )
    training = parser.add_argument_group("training", "what a training step would take instead")
    training.add_argument("--training", action="store_true", help="of the transformer, or a LoRA")
    training.add_argument("--batch", type=int, metavar="N", help="clips a step (default: devices)")
    training.add_argument("--optimizer", choices=_OPTIMIZERS, help=f"default: {_OPTIMIZERS[0]}")
    training.add_argument("--ema", type=float, metavar="SHARE", help="keep an average (default: 0)")
    training.add_argument(
        "--remat",
        choices=_REMAT,
        help="what of a layer is computed again (default: full, which keeps its inputs alone)",
    )
    training.add_argument(
        "--lora", type=int, metavar="RANK", help="train a LoRA; the transformer stays as it is"
    )
    training.add_argument(
        "--base", choices=_BASES, help="what a LoRA's transformer is kept in (default: bfloat16)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of lines")


def run(args: argparse.Namespace) -> int:
    """Print the meshes, those that fit and are fastest first; 0 if one fits, else 2."""
    from skyreels_jax.generation.dry_run import compiled
    from skyreels_jax.generation.dry_run.meshes import ACCELERATORS, forecasts

    if not 1 <= args.devices <= _MOST_DEVICES:
        raise RequestError(
            f"`devices` {args.devices}: expected 1 to {_MOST_DEVICES}; nearest is "
            f"{min(max(args.devices, 1), _MOST_DEVICES)}"
        )
    if args.training:
        from skyreels_jax.cli.plan_training import run_training

        return run_training(args)
    if given := [name for name in _OF_TRAINING if getattr(args, name) is not None]:
        raise RequestError(f"--{given[0]} is of training: give --training too")
    job = job_of(args)
    if args.compile:
        compiled.grid_of(args.device, args.devices)  # What cannot be compiled for is said at once.
    found = forecasts(job, args.devices, ACCELERATORS[args.device])
    if not args.json:
        _print(job, args, found)
    described: dict[str, object] = {
        "job": _described(job),
        "meshes": [_plain(one) for one in found],
    }
    if args.compile and found:
        answer = compiled.compile_step(job, found[0].plan, args.device)
        described["compiled"] = _plain_compiled(answer, found[0])
        if not args.json:
            _print_compiled(answer, found[0])
    if args.json:
        print(json.dumps(described, indent=2))
    return 0 if found and found[0].fits else 2


def job_of(args: argparse.Namespace) -> "Job":
    """What is to be made, with the checkpoint's own values for what is not said."""
    from skyreels_jax.checkpoints import Checkpoint
    from skyreels_jax.generation.dry_run.meshes import Job
    from skyreels_jax.presets import PRESETS

    preset = PRESETS.get(args.model)
    if preset is not None:
        config, (height, width) = preset.config, preset.resolution
        frames, steps, scale = preset.num_frames, preset.steps, preset.guidance_scale
    else:
        checkpoint = Checkpoint.open(args.model)
        config, defaults = checkpoint.config, checkpoint.defaults
        height, width = defaults.resolution.value
        frames, steps = defaults.num_frames.value, defaults.steps.value
        scale = defaults.guidance_scale.value
    job = Job(
        config,
        frames=frames if args.frames is None else args.frames,
        height=height if args.height is None else args.height,
        width=width if args.width is None else args.width,
        steps=steps if args.steps is None else args.steps,
        guided=scale != 1.0,
        batched=args.batched_guidance,
        weights=None if args.weights == "bf16" else args.weights,
    )
    for name, value, step, offset in (
        ("frames", job.frames, FRAMES_PER_LATENT, 1),
        ("height", job.height, SIZE_MULTIPLE, 0),
        ("width", job.width, SIZE_MULTIPLE, 0),
        ("steps", job.steps, 1, 0),
    ):
        if value < 1 or (value - offset) % step:
            near = " and ".join(map(str, nearest_multiples(value, step, offset)))
            raise RequestError(f"`{name}` {value}: nearest legal are {near}")
    return job


def devices_of(args: argparse.Namespace) -> str:
    """The devices that were named, and the rates that are taken for theirs."""
    from skyreels_jax.generation.dry_run.meshes import ACCELERATORS, ASSUMED_SHARE

    kind = ACCELERATORS[args.device]
    return (
        f"{args.devices} x {args.device}: {kind.memory / _GIB:.0f} GiB, "
        f"{kind.operations / 1e12:.0f} TFLOP/s of which {ASSUMED_SHARE:.0%} are assumed, "
        f"{kind.link / 1e9:.0f} GB/s each way"
    )


def _print(job: "Job", args: argparse.Namespace, found: Sequence["MeshForecast"]) -> None:
    tokens = job.latent_frames * job.patches
    print(
        f"{args.model}: {job.frames} frames of {job.height} x {job.width}, {tokens} tokens, "
        f"{job.calls} calls of {job.rows} rows a step, {job.steps} steps"
    )
    print(f"{devices_of(args)}; a formula, nothing was run")
    print(_ROW.format(*_HEADINGS).rstrip())
    for one in found:
        stage, largest = one.largest
        received = job.calls * sum(traffic.received for traffic in one.traffic)
        verdict = "fits" if one.fits else "does not fit"
        print(
            _ROW.format(
                str(one.plan),
                f"{largest / _GIB:.2f}",
                f"{one.stages['transformer']['weights'] / _GIB:.2f}",
                f"{received / 1e9:.2f}",
                f"{one.operations / 1e12:.1f}",
                f"{one.seconds:.2f}",
                f"{verdict}: {stage}",
            )
        )
    best = found[0]
    if best.fits:
        seconds = best.seconds * job.steps
        print(f"recommended: --mesh {best.plan}, {seconds:.0f} s for {job.steps} steps")
    else:
        print("none fits: more devices, --weights int8, fewer frames or a smaller size")


def _print_compiled(found: "Compiled", one: "MeshForecast") -> None:
    """What the compiler says of a step, beside the formula."""
    kernels = ", ".join(f"{n} {name}" for name, n in found.module.kernels.items()) or "none"
    print(f"compiled in {found.seconds[0]:.0f} s, mesh {one.plan}, a step on each device:")
    peak = sum(one.stages["transformer"].values())
    for name, size, formula in (
        ("arguments", found.arguments, one.arguments),
        ("peak", found.peak, peak),
    ):
        print(f"  {name} {size / _GIB:.2f} GiB, by formula {formula / _GIB:.2f}")
    print(f"  fused attention: {kernels}; what is in the loop over layers counts once here:")
    for kind, (count, size) in found.module.collectives.items():
        print(f"  {count} {kind}, {size / 1e9:.3f} GB")


def _plain_compiled(found: "Compiled", one: "MeshForecast") -> Mapping[str, object]:
    return {
        "mesh": str(one.plan),
        "arguments": found.arguments,
        "temporary": found.temporary,
        "peak": found.peak,
        "kernels": dict(found.module.kernels),
        "collectives": {
            kind: {"count": count, "bytes": size}
            for kind, (count, size) in found.module.collectives.items()
        },
        "seconds": found.seconds[0],
    }


def _plain(one: "MeshForecast") -> Mapping[str, object]:
    return {
        "mesh": str(one.plan),
        "fits": one.fits,
        "seconds_per_step": one.seconds,
        "operations_per_step": one.operations,
        "bytes": {stage: dict(parts) for stage, parts in one.stages.items()},
        "collectives_per_call": [asdict(traffic) for traffic in one.traffic],
    }


def _described(job: "Job") -> Mapping[str, object]:
    values = asdict(job)
    del values["config"]
    return values | {"tokens": job.latent_frames * job.patches, "calls": job.calls}
