"""``skyreels-jax train``: a training run described by a TOML file."""

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from skyreels_jax.cli.flags import add_process_flags
from skyreels_jax.cli.plan import ACCELERATOR_NAMES
from skyreels_jax.errors import RequestError
from skyreels_jax.outputs import make_folder, path_of

if TYPE_CHECKING:
    from skyreels_jax.generation.request.keywords import VideoSettings
    from skyreels_jax.mini.recipe import Recipe
    from skyreels_jax.models.transformer_config import TransformerConfig
    from skyreels_jax.training.dataset import OnEncoded
    from skyreels_jax.training.log import OnLog


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``train`` verb."""
    parser = subparsers.add_parser(
        "train",
        help="train a model from a TOML file, or go on with it",
        description="Train what a TOML file says, or go on where a run in its output folder was "
        "stopped. Ctrl-C, SIGTERM and SIGHUP save first.",
    )
    parser.add_argument("config", type=Path, help="what to train on what; see docs/training.md")
    parser.add_argument("--output", type=Path, metavar="DIR", help="instead of the file's `output`")
    parser.add_argument(
        "--mesh",
        metavar="MESH",
        help="instead of the file's `run.mesh`: `auto`, or `data=2,fsdp=4`",
    )
    parser.add_argument("--steps", type=int, metavar="N", help="instead of the file's `run.steps`")
    parser.add_argument(
        "--dry-run",
        action="store_true",
        help="say what a step takes of the device's memory, from headers alone, and train nothing",
    )
    parser.add_argument(
        "--device",
        choices=ACCELERATOR_NAMES,
        help="with --dry-run: of this accelerator instead, which nobody needs to have",
    )
    add_process_flags(parser)


def run(args: argparse.Namespace) -> int:
    """Train."""
    overrides: dict[str, str | int] = {}
    if args.output is not None:
        overrides["output"] = str(args.output)
    if args.steps is not None:
        overrides["steps"] = args.steps
    if args.mesh is not None:
        overrides["mesh"] = args.mesh
    from skyreels_jax.training.freed_memory import keep_freed_memory

    keep_freed_memory()
    from skyreels_jax.mini.recipe import read_recipe

    recipe = read_recipe(args.config, overrides)
    shown = _sample_prompts(recipe)
    if args.dry_run:
        return _dry_run(recipe, args.device)
    if args.device is not None:
        raise RequestError("--device goes with --dry-run: training takes the devices there are")

    from skyreels_jax.cli.together import broken_off_in_words, join
    from skyreels_jax.cli.training_samples import (
        made_at_once,
        samples_of,
        streamed,
        write_samples_of,
    )
    from skyreels_jax.hub import enable_compilation_cache
    from skyreels_jax.training.distillation_recipe import learned_settings
    from skyreels_jax.training.distillation_task import DistillTask
    from skyreels_jax.training.loop import train
    from skyreels_jax.training.transformer_task import VideoTask

    join(args)
    enable_compilation_cache()
    make_folder(recipe.output, "output")
    with encoding_progress() as on_encoded:
        task = recipe.task(on_encoded)
    if isinstance(task, VideoTask):
        is_student = isinstance(task, DistillTask) and learned_settings(task.training) is not None
        make = streamed if is_student else made_at_once
        task.sample_writer = write_samples_of(shown or samples_of(task.examples()), make)
    advice = "the same command in every process goes on from the last checkpoint"
    with _progress(recipe.run.steps) as on_log, broken_off_in_words(advice):
        result = train(
            task,
            recipe.run,
            recipe.optimizer,
            recipe.output,
            settings=recipe.settings(),
            on_log=on_log,
            on_mesh=lambda mesh: print(f"mesh: {mesh}", file=sys.stderr, flush=True),
        )
    state = "done" if result.finished else "stopped; the same command goes on"
    if result.started == result.step and result.finished:
        state = "done before; more steps would go on"
    print(f"step {result.step} of {recipe.run.steps}: {state}", file=sys.stderr)
    if result.finished:
        print(recipe.output / "model")
    return 0 if result.finished else result.stop.exit_code


def _sample_prompts(recipe: "Recipe") -> "list[tuple[str, VideoSettings]]":
    """What `run.sample_prompts` asks to see; empty where it does not stand."""
    if recipe.run.sample_prompts is None:
        return []
    if recipe.kind != "video":
        raise RequestError(f"run.sample_prompts is of train = 'video', not of {recipe.kind!r}")
    from skyreels_jax.cli.sample_prompts import read_sample_prompts

    return read_sample_prompts(
        path_of(recipe.run.sample_prompts, "run.sample_prompts"), recipe.tables
    )


def _dry_run(recipe: "Recipe", device: str | None) -> int:
    """Print the memory of a step of a recipe that trains the transformer; 2 if it does not fit."""
    from skyreels_jax.presets import PRESETS
    from skyreels_jax.training.sources import find_sources

    if recipe.kind != "video":
        raise RequestError(f"--dry-run is of train = 'video', not of {recipe.kind!r}")
    shape = recipe.tables.model
    preset = PRESETS.get(shape.start or "")
    # Of a released checkpoint that is named so nothing need be there.
    config = find_sources(recipe.tables).config if preset is None else preset.config
    if config.model_type != shape.model_type:
        raise RequestError(
            f"model.start = {shape.start!r} is {config.model_type}: set model.model_type = "
            f"{config.model_type!r}"
        )
    return _dry_run_here(recipe, config) if device is None else _planned(recipe, config, device)


def _dry_run_here(recipe: "Recipe", config: "TransformerConfig") -> int:
    """By this machine's compiler."""
    import jax

    from skyreels_jax.training.footprint import footprint
    from skyreels_jax.training.optimizer import make_optimizer

    run = recipe.run
    found = footprint(
        recipe.tables,
        config,
        lambda params: make_optimizer(recipe.optimizer, run.steps, params),
        ema=run.ema,
        accumulate=run.accumulate,
        kernels=run.kernels,
    )
    platform = jax.devices()[0].platform
    print(f"a step of {found.clips}, the largest clips that there can be; compiled for {platform}")
    for name, size in found.parts().items():
        print(f"{name:<32} {'unknown' if size is None else f'{size / 1e9:.3f} GB':>12}")
    if run.offload:
        left = found.offloaded().parts()["together"] or 0
        print(f"{'of it not on the host':<32} {f'{left / 1e9:.3f} GB':>12} between steps")
    return 0


def _planned(recipe: "Recipe", config: "TransformerConfig", device: str) -> int:
    """For an accelerator: the step is traced, and what a layer takes at work is a formula."""
    from skyreels_jax.generation.dry_run.meshes import ACCELERATORS
    from skyreels_jax.generation.dry_run.training import TrainingJob, training_forecast
    from skyreels_jax.parallel.plan import AUTO, MeshPlan
    from skyreels_jax.training.footprint import largest_clips

    run, kind, clips = recipe.run, ACCELERATORS[device], largest_clips(recipe.tables)
    plan = MeshPlan() if run.mesh in (None, AUTO) else MeshPlan.parse(run.mesh)
    job = TrainingJob(config, clips, recipe.tables, recipe.optimizer, run.ema)
    found = training_forecast(job.step(), plan, kind)
    print(
        f"a step of {clips}, the largest clips that there can be, on {plan.devices} x {device}; "
        "traced, neither compiled nor run"
    )
    for name, size in found.bytes.items():
        print(f"{name:<32} {size / 1e9:>9.3f} GB")
    verdict = "fits" if found.fits else "does not fit"
    print(f"{'together':<32} {found.total / 1e9:>9.3f} GB of {kind.memory / 1e9:.1f}: {verdict}")
    return 0 if found.fits else 2


@contextmanager
def encoding_progress() -> "Iterator[OnEncoded]":
    """A bar for clips that are encoded on a terminal, else a line now and then."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TaskID,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    bars = Progress(
        *(TextColumn("encoding {task.description}"), BarColumn(), MofNCompleteColumn()),
        *(TimeElapsedColumn(), TimeRemainingColumn()),
        console=console,
        disable=not console.is_terminal,
    )
    shown: dict[tuple[str, int], TaskID] = {}

    def on_encoded(what: str, done: int, total: int) -> None:
        if (what, total) not in shown:
            shown[what, total] = bars.add_task(what, total=total)
        bars.update(shown[what, total], completed=done)
        if bars.disable and (done == total or not done % 512):
            print(f"encoding {what}: {done} of {total}", file=sys.stderr, flush=True)

    with bars:
        yield on_encoded


@contextmanager
def _progress(steps: int) -> "Iterator[OnLog]":
    """A bar with loss and time left on a terminal, else a line for each line of the log."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _print
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[metrics]}"))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console) as bars:
        bar = bars.add_task("train", total=steps, metrics="")

        def on_log(step: int, metrics: Mapping[str, float]) -> None:
            names = ("loss", "psnr", "held", "steps_per_second")
            shown = {name: metrics[name] for name in names if name in metrics}
            bars.update(bar, completed=step, metrics=_in_words(shown))

        yield on_log


def _print(step: int, metrics: Mapping[str, float]) -> None:
    print(f"step {step}  {_in_words(metrics)}", file=sys.stderr, flush=True)


def _in_words(metrics: Mapping[str, float]) -> str:
    return "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
