"""``skyreels-jax resume``: go on with a long video that was interrupted."""

import argparse
from pathlib import Path

from skyreels_jax.cli import long


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``resume`` verb."""
    parser = subparsers.add_parser(
        "resume",
        help="go on with a long video that was interrupted",
        description="Go on with a long video that was interrupted. Finished windows are taken as "
        "they are; the video is the same, byte for byte of every frame, as without interruption.",
    )
    parser.add_argument("job", type=Path, help="the job folder, by default the output's name.job")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Resume; 0 when the video is written."""
    return long.resume(args.job)
