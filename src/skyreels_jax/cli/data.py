"""``skyreels-jax data``: videos with captions to train on; one's own looked through and encoded."""

import argparse
import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Final

from skyreels_jax.errors import RequestError

if TYPE_CHECKING:
    from skyreels_jax.training.transformer_recipe import VideoTraining
    from skyreels_jax.training.videos.recipe import FolderData

METADATA: Final = "metadata.jsonl"
# Names have five digits, so that they sort as they count.
MOST: Final = 100_000
# Of `check`, where something is wrong with the data.
PROBLEMS: Final = 1


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``data`` verb."""
    summary = "write videos with captions to train on; look through and encode one's own"
    parser = subparsers.add_parser("data", help=summary, description=f"{summary}.")
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True)

    def action(name: str, help: str) -> argparse.ArgumentParser:
        added = actions.add_parser(name, help=help, description=f"{help}.")
        added.add_argument("--verbose", action="store_true", default=argparse.SUPPRESS)
        return added

    _add_shapes(action("shapes", "write clips of moving shapes"))
    check = action(
        "check",
        'say what becomes of the data of a recipe with [data] source = "folder", and what is wrong '
        "with it (exit code 1); nothing is loaded",
    )
    check.add_argument("config", metavar="RECIPE.toml", type=Path, help="see docs/training.md")
    check.add_argument("--json", action="store_true", help="print JSON instead of lines")
    check.add_argument(
        "--sheet",
        type=Path,
        metavar="FILE.png",
        help="draw first frames as the model gets them, by bucket",
    )
    encode = action(
        "encode",
        "encode the data of such a recipe ahead of training; run again, it goes on with what is "
        "missing or damaged",
    )
    encode.add_argument("config", metavar="RECIPE.toml", type=Path, help="see docs/training.md")
    encode.add_argument(
        "--shard",
        metavar="i/n",
        help="share i of n, from 0, for n processes (default: the index of a job array of Slurm "
        "or Kubernetes, else all)",
    )


def _add_shapes(parser: argparse.ArgumentParser) -> None:
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
    """Write, look through or encode."""
    return {"shapes": _run_shapes, "check": _run_check, "encode": _run_encode}[args.action](args)


def _run_shapes(args: argparse.Namespace) -> int:
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
    with (
        new_folder(args.output) as folder,
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


def _folder_recipe(file: Path) -> "tuple[VideoTraining, FolderData]":
    from skyreels_jax.mini.recipe import read_recipe
    from skyreels_jax.training.transformer_recipe import FolderTraining

    tables = read_recipe(file).tables
    if not isinstance(tables, FolderTraining):
        raise RequestError(f'{file} has no [data] with source = "folder"')
    return tables, tables.data


def _run_check(args: argparse.Namespace) -> int:
    from skyreels_jax.media import write_image
    from skyreels_jax.outputs import check_place
    from skyreels_jax.training.sources import layout_of
    from skyreels_jax.training.videos.plan import plan_clips
    from skyreels_jax.training.videos.report import draw_sheet, report_lines, report_of
    from skyreels_jax.weights.tokenizer_file import open_tokenizer

    if args.sheet is not None:
        if args.sheet.suffix.lower() != ".png":
            raise RequestError(f"sheet {args.sheet}: the name must end in .png")
        check_place(args.sheet)
    _, data = _folder_recipe(args.config)
    tokenizer = layout_of("data.text", data.text).component("tokenizer")
    plan = plan_clips(data, open_tokenizer(tokenizer))
    if args.json:
        print(json.dumps(report_of(plan), indent=2))
    else:
        for line in report_lines(plan):
            print(line)
    if args.sheet is not None and plan.clips:
        write_image(args.sheet, draw_sheet(plan))
    return PROBLEMS if plan.problems else 0


def _run_encode(args: argparse.Namespace) -> int:
    from skyreels_jax.cli.train import encoding_progress
    from skyreels_jax.generation.batch_rows import choose_shard
    from skyreels_jax.hub import enable_compilation_cache
    from skyreels_jax.training.sources import find_sources
    from skyreels_jax.training.videos.encode import EncodedFiles, encode_videos
    from skyreels_jax.training.videos.plan import plan_clips, require_sound
    from skyreels_jax.weights.tokenizer_file import open_tokenizer

    shard = choose_shard(args.shard, os.environ)
    training, data = _folder_recipe(args.config)
    sources = find_sources(training)
    plan = plan_clips(data, open_tokenizer(sources.text.component("tokenizer")))
    require_sound(plan, data.skip_broken)
    files = EncodedFiles.of(data, sources)
    share = (shard.index, shard.count)
    enable_compilation_cache()
    with encoding_progress() as on_encoded:
        clips, texts = encode_videos(plan, files, share, verify=True, on_encoded=on_encoded)
    print(f"encoded {clips} clips and {texts} captions; the others were there", file=sys.stderr)
    return 0
