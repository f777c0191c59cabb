"""``skyreels-jax train``: a training run described by a TOML file."""

import argparse
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from skyreels_jax.training.loop import Watch

STOPPED: Final = 143


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``train`` verb."""
    parser = subparsers.add_parser(
        "train",
        help="train a model from a TOML file, or go on with it",
        description="Train what a TOML file says, or go on where a run in its output folder was "
        "stopped. Ctrl-C and SIGTERM save first.",
    )
    parser.add_argument("config", type=Path, help="what to train on what; see docs/training.md")
    parser.add_argument("--output", type=Path, metavar="DIR", help="instead of the file's `output`")
    parser.add_argument("--steps", type=int, metavar="N", help="instead of the file's `run.steps`")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train."""
    from skyreels_jax.cache_dirs import enable_compilation_cache
    from skyreels_jax.cli.training_samples import sampler
    from skyreels_jax.training.loop import train
    from skyreels_jax.training.recipe import read_recipe
    from skyreels_jax.training.transformer_task import VideoTask

    enable_compilation_cache()
    overrides: dict[str, Any] = {}
    if args.output is not None:
        overrides["output"] = str(args.output)
    if args.steps is not None:
        overrides["steps"] = args.steps
    recipe = read_recipe(args.config, overrides)
    task = recipe.task()
    if isinstance(task, VideoTask):
        task.sampler = sampler(task.training.data)
    with progress(recipe.run.steps) as watch:
        result = train(task, recipe.run, recipe.optimizer, recipe.output, watch=watch)
    state = "done" if result.finished else "stopped; the same command goes on"
    print(f"step {result.step} of {recipe.run.steps}: {state}", file=sys.stderr)
    return 0 if result.finished else STOPPED


@contextmanager
def progress(steps: int) -> "Iterator[Watch]":
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
        yield say
        return
    columns = (BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[figures]}"))
    times = (TimeElapsedColumn(), TimeRemainingColumn())
    with Progress(*columns, *times, console=console) as bars:
        bar = bars.add_task("train", total=steps, figures="")

        def watch(step: int, figures: Mapping[str, float]) -> None:
            shown = {name: figures[name] for name in ("loss", "psnr", "held") if name in figures}
            bars.update(bar, completed=step, figures=in_words(shown))

        yield watch


def say(step: int, figures: Mapping[str, float]) -> None:
    """One line."""
    print(f"step {step}  {in_words(figures)}", file=sys.stderr, flush=True)


def in_words(figures: Mapping[str, float]) -> str:
    """Names and values."""
    return "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
