"""``skyreels-jax data shapes OUT``: videos with captions, to train on."""

import argparse
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Final

from skyreels_jax.errors import RequestError

METADATA: Final = "metadata.jsonl"
# Names have five digits, so that they sort as they count.
MOST: Final = 100_000


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``data`` verb."""
    parser = subparsers.add_parser("data", help="write videos with captions, to train on")
    parser.add_argument("what", choices=("shapes",), help="shapes: moving shapes, drawn")
    parser.add_argument(
        "output",
        metavar="OUT",
        type=Path,
        help=f"folder to make, of 00000.mp4, 00000.txt, … and {METADATA}",
    )
    parser.add_argument("--count", type=int, required=True, metavar="N", help="how many (required)")
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="S",
        help="the same one gives the same clips, however many (default: 0)",
    )
    parser.add_argument("--frames", type=int, default=17, metavar="N", help="4 k + 1 (default: 17)")
    parser.add_argument("--fps", type=int, default=16, metavar="16|24", help="default: 16")
    parser.add_argument(
        "--size",
        type=int,
        default=64,
        metavar="PIXELS",
        help="of a side, a multiple of 16 (default: 64)",
    )
    parser.add_argument(
        "--held-out",
        action="store_true",
        help="only what training never sees: colours, kinds and directions held out together",
    )


def run(args: argparse.Namespace) -> int:
    """Write the folder; it appears whole or not at all."""
    from skyreels_jax.media import VideoWriter
    from skyreels_jax.moving_shapes.clips import check_clip, clip
    from skyreels_jax.weights.writer import new_folder

    if not 1 <= args.count <= MOST:
        nearest = 1 if args.count < 1 else MOST
        raise RequestError(f"count {args.count}: it must be from 1 to {MOST:,}; nearest: {nearest}")
    if args.seed < 0:
        raise RequestError(f"seed {args.seed}: it must not be negative; nearest: 0")
    check_clip(args.frames, args.fps, args.size)
    # Resolved: "." has no name of its own that the unfinished folder's could be made from.
    with (
        new_folder(args.output.resolve()) as folder,
        (folder / METADATA).open("w", encoding="utf-8") as metadata,
    ):
        for index in range(args.count):
            scene, caption, frames = clip(
                args.seed, index, args.frames, args.fps, args.size, held_out=args.held_out
            )
            file = folder / f"{index:05d}.mp4"
            with VideoWriter(file, fps=args.fps, size=(args.size, args.size)) as video:
                video.append(frames)
            file.with_suffix(".txt").write_text(caption + "\n", encoding="utf-8")
            row = {
                "file": file.name,
                "caption": caption,
                "fps": args.fps,
                "frames": args.frames,
                "scene": asdict(scene),
            }
            metadata.write(json.dumps(row) + "\n")
    print(f"{args.count} clips of {args.frames} frames in {args.output}", file=sys.stderr)
    return 0
