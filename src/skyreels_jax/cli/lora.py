"""``skyreels-jax lora``: what a LoRA file is, its other forms, and LoRAs into and out of models."""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from skyreels_jax.cli.flags import add_opening_flags, lora_of

if TYPE_CHECKING:
    from skyreels_jax.weights.lora.source import StoredTransformer

# Names of `weights.lora.writing.LORA_FORMS`, which a test holds equal.
LORA_FORM_NAMES: Final = ("peft", "comfyui")
_MODEL_HELP: Final = "checkpoint folder or file, or Hugging Face id"


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``lora`` verb."""
    summary = "inspect, convert, merge and extract LoRA files"
    parser = subparsers.add_parser("lora", help=summary, description=f"{summary}.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, help: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=help, description=f"{help}.")
        added.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS)
        return added

    info = action("info", "what a LoRA file holds, and what of it a model takes")
    info.add_argument("file", metavar="FILE", type=Path)
    info.add_argument("--model", metavar="DIR_OR_ID", help=_MODEL_HELP)
    info.add_argument("--json", action="store_true", help="print JSON instead of lines")

    convert = action("convert", "write a LoRA file in the words of other programs")
    convert.add_argument("file", metavar="FILE", type=Path)
    convert.add_argument("output", metavar="OUT.safetensors", type=Path)
    convert.add_argument(
        "--to",
        choices=LORA_FORM_NAMES,
        required=True,
        help="peft: diffusers' names and PEFT's configuration in the header, products only; "
        "comfyui: the original's names with alphas, every kind (required)",
    )
    convert.add_argument("--model", metavar="DIR_OR_ID", help=f"to hold it against: {_MODEL_HELP}")
    convert.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")

    merge = action("merge", "write a checkpoint with LoRAs added to its transformer")
    merge.add_argument("output", metavar="OUT", type=Path, help="folder to make")
    merge.add_argument("--model", metavar="DIR_OR_ID", required=True, help=_MODEL_HELP)
    merge.add_argument(
        "--lora",
        action="append",
        required=True,
        type=lora_of,
        metavar="FILE[:SCALE]",
        help="repeated, several add up",
    )
    merge.add_argument(
        "--overwrite",
        action="store_true",
        help="replace OUT if it is there and holds only what an earlier merge wrote",
    )
    add_opening_flags(merge)

    extract = action("extract", "the LoRA that turns one model into another, nearly")
    extract.add_argument("output", metavar="OUT.safetensors", type=Path)
    extract.add_argument("--model", metavar="TUNED", required=True, help=_MODEL_HELP)
    extract.add_argument("--base", metavar="BASE", required=True, help="what it was trained from")
    extract.add_argument("--rank", type=int, required=True, help="of its products (required)")
    extract.add_argument("--overwrite", action="store_true", help="replace OUT if it is there")


def run(args: argparse.Namespace) -> int:
    """Run one of the actions."""
    return {"info": _info, "convert": _convert, "merge": _merge, "extract": _extract}[args.action](
        args
    )


def _stored(model: str) -> "StoredTransformer":
    from skyreels_jax.checkpoints import Checkpoint
    from skyreels_jax.weights.components.transformer import stored_transformer

    return stored_transformer(Checkpoint.open(model).layout)


def _bound(file: Path, model: str | None) -> tuple[Any, Any]:
    """A LoRA bound to a model, or to any that has as many blocks as it needs; and the names."""
    from skyreels_jax.weights.lora.binding import bind
    from skyreels_jax.weights.lora.file import open_lora
    from skyreels_jax.weights.lora.names import ModelNames, depth_of

    opened = open_lora(file)
    if model is None:
        names = ModelNames.any(depth_of(opened.tensors()))
    else:
        stored = _stored(model)
        names = ModelNames.of(stored.rules, stored.source.tensors(), stored.format)
    return bind(opened, names), names


def _info(args: argparse.Namespace) -> int:
    from skyreels_jax.weights.lora.report import describe_lora

    bound, _ = _bound(args.file, args.model)
    report = describe_lora(bound) | {"model": args.model}
    if args.json:
        print(json.dumps(report, indent=2))
        return 0
    for name, value in report.items():
        print(f"{name.replace('_', ' '):<15} {_in_words(value)}")
    return 0


def _in_words(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} ({count})" for name, count in value.items()) or "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


def _convert(args: argparse.Namespace) -> int:
    from skyreels_jax.outputs import check_place
    from skyreels_jax.weights.lora.writing import in_form
    from skyreels_jax.weights.writer import write_tensor_file

    check_place(args.output)
    bound, names = _bound(args.file, args.model)
    for note in bound.notes():
        print(f"left out: {note}")
    stream = in_form(bound, names, args.to)
    write_tensor_file(args.output, stream, overwrite=args.overwrite)
    print(f"{args.file} -> {args.output} ({args.to}): {bound.summary()}")
    return 0


def _merge(args: argparse.Namespace) -> int:
    from skyreels_jax.checkpoints import OPENING, Checkpoint
    from skyreels_jax.weights.components.transformer import stored_transformer
    from skyreels_jax.weights.convert_folder import convert_folder
    from skyreels_jax.weights.lora.source import with_loras
    from skyreels_jax.weights.lora.stack import as_loras

    opening = {name: getattr(args, name) for name in OPENING}
    checkpoint: Checkpoint = Checkpoint.open(args.model, **opening)
    loras = as_loras(args.lora)
    stored = with_loras(stored_transformer(checkpoint.layout), loras, is_rounded=True)
    result = convert_folder(
        checkpoint.layout,
        stored,
        args.output,
        format=checkpoint.layout.format,
        about=checkpoint.about,
        overwrite=args.overwrite,
    )
    for lora in loras:
        print(f"added     {lora.path}, scale {lora.scale:g}")
    for path in [*result.written, *result.copied]:
        print(f"written   {args.output / path}")
    for name, reason in result.left_out.items():
        print(f"left out  {name}: {reason}")
    return 0


def _extract(args: argparse.Namespace) -> int:
    from skyreels_jax.outputs import check_place
    from skyreels_jax.weights.lora.extraction import extract, total_error
    from skyreels_jax.weights.writer import write_tensor_file

    check_place(args.output)
    written, report = extract(_stored(args.model), _stored(args.base), args.rank)
    write_tensor_file(args.output, written.stream(), overwrite=args.overwrite)
    worst = max(report, key=lambda one: one.error)
    print(
        f"{args.output}: {len(report)} tensors differ; of their difference "
        f"{100 * total_error(report):.2f}% is lost at rank {args.rank} (the most, "
        f"{100 * worst.error:.2f}%, of {worst.name})"
    )
    return 0
