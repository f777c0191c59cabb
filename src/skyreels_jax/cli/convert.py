"""``skyreels-jax convert SRC DST``: between the published formats, and between dtypes."""

import argparse
from pathlib import Path
from typing import Any

from skyreels_jax.cli.flags import add_opening_flags
from skyreels_jax.weights.plan import FORMATS

_PRECISIONS = ("int8", "fp8", "comfy-fp8")
_DTYPES = ("keep", "float32", "bfloat16", "float16")


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``convert`` verb."""
    parser = subparsers.add_parser(
        "convert", help="translate a checkpoint into the other format or another dtype"
    )
    parser.add_argument("source", metavar="SRC", help="checkpoint folder, file or Hugging Face id")
    parser.add_argument("target", metavar="DST", type=Path, help="folder to make")
    parser.add_argument(
        "--format",
        "--layout",
        choices=FORMATS,
        required=True,
        dest="format",
        help="format to write (required)",
    )
    parser.add_argument(
        "--dtype",
        choices=_DTYPES,
        default="keep",
        help="of the transformer's tensors (default: keep each as it is)",
    )
    parser.add_argument(
        "--weights",
        choices=("keep", *_PRECISIONS),
        default="keep",
        help="store the matrices of blocks in 8 bits: int8 or fp8 with a scale per output channel, "
        "comfy-fp8 in one file as ComfyUI opens it (default: keep)",
    )
    add_opening_flags(parser)
    parser.add_argument(
        "--overwrite",
        action="store_true",
        help="replace DST if it is there and holds only what an earlier convert wrote",
    )


def run(args: argparse.Namespace) -> int:
    """Convert, and print what was written, copied and left out."""
    # Its help should not wait for JAX.
    from skyreels_jax.checkpoints import OPENING, Checkpoint
    from skyreels_jax.weights.components.transformer import stored_transformer
    from skyreels_jax.weights.convert_folder import convert_folder

    opening: dict[str, Any] = {name: getattr(args, name) for name in OPENING}
    checkpoint = Checkpoint.open(args.source, **opening)
    result = convert_folder(
        checkpoint.layout,
        stored_transformer(checkpoint.layout),
        args.target,
        format=args.format,
        about=checkpoint.about,
        dtype=None if args.dtype == "keep" else args.dtype,
        weights=None if args.weights == "keep" else args.weights,
        overwrite=args.overwrite,
    )
    print(f"{args.source} ({checkpoint.layout.format}) -> {args.target} ({args.format})")
    for path in result.written:
        print(f"  written   {path} ({(args.target / path).stat().st_size / 1e6:.1f} MB)")
    for path in result.copied:
        print(f"  copied    {path}")
    for name, reason in result.left_out.items():
        print(f"  left out  {name}: {reason}")
    return 0
