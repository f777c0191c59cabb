"""Makes the small models of this package: every run in turn, then the folders users load.

``python -m skyreels_jax.mini.make`` (``make mini``) goes on where it was interrupted.
"""

import argparse
import json
import platform
import shutil
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

from skyreels_jax.hub import ASSETS
from skyreels_jax.mini.recipe import read_recipe
from skyreels_jax.presets import PIPELINE_OF_TASK, PRESETS
from skyreels_jax.training.log import LOG_FILE
from skyreels_jax.training.loop import train
from skyreels_jax.weights.components.clip import stored_image_encoder
from skyreels_jax.weights.layout import ComponentName, components_of
from skyreels_jax.weights.pipeline_folder import write_pipeline_files
from skyreels_jax.weights.writer import new_folder, write_config

# The folder that lacks nothing.
_WHOLE: Final = "mini"
# In the order in which they need each other, by the names of their files and output folders.
_RUNS: Final = (
    *("text", "image", "vae-frames", "vae", "df-first", "df", "df-last", "i2v"),
    *("live-causal", "live-guidance", "live"),
)
# Which run each part of the first folder comes from; the others lie beside it and take them there.
_PARTS: Final[Mapping[ComponentName, str]] = {
    "tokenizer": "text",
    "text_encoder": "text",
    "vae": "vae",
}
_IMAGE_PARTS: Final[Mapping[ComponentName, str]] = {
    "image_encoder": "image",
    "image_processor": "image",
}
# The run of each folder's transformer, and of the parts of its own.
_FOLDERS: Final[Mapping[str, tuple[str, Mapping[ComponentName, str]]]] = {
    _WHOLE: ("df-last", _PARTS),
    "mini-i2v": ("i2v", _IMAGE_PARTS),
    "mini-live": ("live", {}),
}
# Runs that begin with another's parameters.
_BEGUN_BY: Final[Mapping[str, str]] = {
    "vae": "vae-frames",
    "df": "df-first",
    "df-last": "df",
    "i2v": "df-last",
    "live-causal": "df-last",
    "live-guidance": "live-causal",
    "live": "live-guidance",
}
# Written by people, from an evaluation.
_CARD_FILES: Final = ("README.md", "wrong.png")


def make(configs: Path, outputs: Path, *, only: str | None = None) -> bool:
    """Train what is not trained yet; whether all of it is finished.

    Args:
        configs: folder of the recipes.
        outputs: folder of the runs; the recipes name those of each other in it.
        only: one of :data:`_RUNS`.
    """
    for name in _RUNS if only is None else (only,):
        output = outputs / name
        if (output / "model").is_dir():
            print(f"{name}: done before", file=sys.stderr)
            continue
        recipe = read_recipe(configs / f"{name}.toml", {"output": str(output)})
        print(f"{name}: {recipe.run.steps} steps", file=sys.stderr)
        named = {"settings": recipe.settings(), "on_log": _print}
        result = train(recipe.task(), recipe.run, recipe.optimizer, output, **named)
        if not result.finished:
            return False
    return True


def assemble(outputs: Path, assets: Path, name: str) -> Path:
    """Put the parts of one small model together in diffusers' layout.

    Args:
        outputs: folder of the runs.
        assets: folder of the models; ``name`` in it is replaced, but for its card.
        name: one of :data:`_FOLDERS`.
    """
    cards = [assets / name / file for file in _CARD_FILES if (assets / name / file).is_file()]
    kept = {card.name: card.read_bytes() for card in cards}
    run, parts = _FOLDERS[name]
    # A student is one of the whole model's; the rest it says itself (streaming.json).
    preset = PRESETS.get(name, PRESETS[_WHOLE])
    with new_folder(assets / name, overwrite=True) as folder:
        shutil.copytree(outputs / run / "model" / "transformer", folder / "transformer")
        for part, source in parts.items():
            shutil.copytree(outputs / source / "model" / part, folder / part)
        pipeline, image = PIPELINE_OF_TASK[preset.task], None
        if "image_encoder" in parts:
            image = stored_image_encoder(components_of(folder)).config
        beside = None if name == _WHOLE else _WHOLE
        together: Mapping[ComponentName, str] = {**_PARTS, **parts}
        write_pipeline_files(folder, pipeline, together, preset.shift, image, beside)
        runs = {run, *together.values()}
        while more := {_BEGUN_BY[later] for later in runs & _BEGUN_BY.keys()} - runs:
            runs |= more
        write_config(folder / "training.json", made_by(outputs, sorted(runs, key=_RUNS.index)))
        for file, content in kept.items():
            (folder / file).write_bytes(content)
    return assets / name


def made_by(outputs: Path, runs: list[str]) -> dict[str, Any]:
    """How the parts were made: steps, hours and last metrics of each run, and versions."""
    found: dict[str, Any] = {}
    for name in runs:
        lines = [json.loads(line) for line in (outputs / name / LOG_FILE).read_text().splitlines()]
        last = {key: value for line in lines for key, value in line.items()}
        found[name] = {**last, "hours": round(last["seconds"] / 3600, 2)}
    packages = ("jax", "flax", "optax", "numpy", "skyreels-jax")
    return {
        "runs": found,
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "date": datetime.now(UTC).date().isoformat(),
    }


def _print(step: int, metrics: Mapping[str, float]) -> None:
    line = "  ".join(f"{name} {value:.4g}" for name, value in metrics.items())
    print(f"  step {step}  {line}", file=sys.stderr, flush=True)


def main() -> int:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(description="Make the small models of this package.")
    parser.add_argument("--configs", type=Path, default=Path("configs/mini"))
    parser.add_argument("--outputs", type=Path, default=Path("out/mini"))
    parser.add_argument("--assets", type=Path, default=ASSETS)
    parser.add_argument("--only", choices=_RUNS)
    parser.add_argument("--assemble", choices=_FOLDERS, help="put one together, train nothing")
    args = parser.parse_args()
    if args.assemble is not None:
        print(assemble(args.outputs, args.assets, args.assemble))
        return 0
    if not make(args.configs, args.outputs, only=args.only):
        print("stopped; run again to go on", file=sys.stderr)
        return 143
    if args.only is None:
        for name in _FOLDERS:
            print(assemble(args.outputs, args.assets, name))
    return 0


if __name__ == "__main__":
    sys.exit(main())
