"""``skyreels-jax info SRC``: what a checkpoint folder is, without reading its weights."""

import argparse
import dataclasses
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from skyreels_jax.causal_settings import CausalSettings
from skyreels_jax.checkpoints import OPENING, Checkpoint
from skyreels_jax.recognition import CausalGuess
from skyreels_jax.weights.components.transformer import stored_transformer
from skyreels_jax.weights.layout import ComponentName

# What generating takes besides the transformer.
_NEEDED: Final[tuple[ComponentName, ...]] = ("vae", "text_encoder", "tokenizer")
# How a causal student is sampled.
_STREAMED: Final = tuple(field.name for field in dataclasses.fields(CausalSettings))


def run(args: argparse.Namespace) -> int:
    """Print the report; a folder that is not sound is an error instead."""
    opening: dict[str, Any] = {name: getattr(args, name) for name in OPENING}
    checkpoint = Checkpoint.open(args.source, **opening)
    stored_transformer(checkpoint.layout).verify()
    report = _describe(checkpoint)
    if args.json:
        print(json.dumps(report, indent=2))
    else:
        for line in lines(report):
            print(line)
    return 0


def _describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """Everything that the headers and the configuration files tell."""
    layout, defaults = checkpoint.layout, checkpoint.defaults
    tensors = layout.tensors().tensors()
    dtypes = Counter(info.dtype.name for info in tensors.values())
    needed = [*_NEEDED, *(["image_encoder"] if checkpoint.config.image_dim is not None else [])]
    return {
        "folder": str(checkpoint.folder),
        "repository": checkpoint.repo,
        "layout": layout.format,
        "notes": list(checkpoint.notes),
        "task": checkpoint.task,
        "family": checkpoint.guess.family,
        "pipeline": layout.model_index.get("_class_name"),
        "preset": checkpoint.guess.preset.name if checkpoint.guess.preset else None,
        "preset_reason": checkpoint.guess.reason,
        "causal": _student(checkpoint.guess.causal),
        "parameters": sum(info.size for info in tensors.values()),
        "tensors": len(tensors),
        "files": len({info.file for info in tensors.values()}),
        "dtypes": dict(dtypes.most_common()),
        "transformer_bytes": sum(info.nbytes for info in tensors.values()),
        "parts": {part: _size_of(path) for part, path in layout.components.items()},
        "missing_parts": [part for part in needed if part not in layout.components],
        "config": dataclasses.asdict(checkpoint.config),
        "defaults": dataclasses.asdict(defaults),
    }


def _student(guess: CausalGuess | None) -> dict[str, object] | None:
    """Which causal student it is, with the settings that it is sampled with."""
    if guess is None:
        return None
    settings = dataclasses.asdict(guess.settings) if guess.settings else {}
    return {
        "preset": guess.preset.name if guess.preset else None,
        "reason": guess.reason,
        "assumed": guess.is_assumed,
        "settings": settings,
    }


def _size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a folder."""
    files = [path] if path.is_file() else path.rglob("*")
    return sum(file.stat().st_size for file in files if file.is_file())


def _by_pipeline(name: str | None) -> str:
    """A pipeline class that is not SkyReels' own is said."""
    foreign = name is not None and not str(name).startswith("SkyReelsV2")
    return f" (model_index.json names {name}, which is not SkyReels')" if foreign else ""


def _missing(part: str) -> str:
    """A component that is missing, with the flag that gives it."""
    flag = "components" if part == "tokenizer" else part.replace("_", "-")
    return f"{part} (--{flag})"


def lines(report: dict[str, Any]) -> Iterator[str]:
    """The report for people."""
    names = {
        "folder": report["folder"],
        "repository": report["repository"] or "none: a local folder",
        "layout": report["layout"],
        "task": report["task"],
        "settings of": report["family"] + _by_pipeline(report["pipeline"]),
        "preset": f"{report['preset'] or 'none'} ({report['preset_reason']})",
        "transformer": (
            f"{report['parameters']:,} parameters in {report['tensors']} tensors, "
            f"{report['files']} files, {report['transformer_bytes'] / 1e9:.2f} GB"
        ),
        "dtypes": ", ".join(f"{name} ({count})" for name, count in report["dtypes"].items()),
        "config": ", ".join(f"{k}={v}" for k, v in report["config"].items() if v is not None),
        **{part: f"{size / 1e9:.2f} GB" for part, size in report["parts"].items()},
        "missing": ", ".join(map(_missing, report["missing_parts"])) or "nothing",
    }
    for name, value in names.items():
        yield f"{name:<15} {value}"
    for note in report["notes"]:
        yield f"{'note':<15} {note}"
    settings = (report["causal"] or {}).get("settings", {})
    for name in _STREAMED:
        if settings.get(name) is not None:
            yield f"streams {name:<15} {settings[name]}"
    for name, default in report["defaults"].items():
        value = default["value"]
        shown = "x".join(map(str, value)) if isinstance(value, tuple) else value
        yield f"default {name:<15} {shown} ({default['source']})"
