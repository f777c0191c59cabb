"""``skyreels-jax train``: a training run described by a TOML file."""

import argparse
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

STOPPED: Final = 143


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``train`` verb."""
    parser = subparsers.add_parser("train", help="train a model from a TOML file, or go on with it")
    parser.add_argument("config", type=Path, help="what to train on what; see docs/training.md")
    parser.add_argument("--output", type=Path, metavar="DIR", help="instead of the file's `output`")
    parser.add_argument("--steps", type=int, metavar="N", help="instead of the file's `run.steps`")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Train."""
    from skyreels_jax.caches import enable_compilation_cache
    from skyreels_jax.training.loop import train
    from skyreels_jax.training.recipe import read_recipe

    enable_compilation_cache()
    overrides: dict[str, Any] = {}
    if args.output is not None:
        overrides["output"] = str(args.output)
    if args.steps is not None:
        overrides["steps"] = args.steps
    recipe = read_recipe(args.config, overrides)
    task = recipe.task()
    result = train(task, recipe.run, recipe.optimizer, recipe.output, watch=say)
    state = "done" if result.finished else "stopped, goes on when run again"
    print(f"step {result.step} of {recipe.run.steps}: {state}", file=sys.stderr)
    return 0 if result.finished else STOPPED


def say(step: int, figures: Mapping[str, float]) -> None:
    """One line."""
    parts = "  ".join(f"{name} {value:.4g}" for name, value in figures.items())
    print(f"step {step}  {parts}", file=sys.stderr, flush=True)
