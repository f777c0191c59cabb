"""``skyreels-jax batch``: many videos, one model load.

Everything is checked before a weight is read. What is there already is left alone, so that the same
command goes on where it was interrupted, and several processes share the rows by ``--shard``.
"""

import argparse
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from skyreels_jax.cli.flags import add_video_flags
from skyreels_jax.errors import RequestError, SkyReelsError
from skyreels_jax.generation.request.declaration import one_line

if TYPE_CHECKING:
    from skyreels_jax.cli.batch_work import RowOutcome, RowWorker
    from skyreels_jax.generation.batch_rows import BatchRow

# What the command returns where rows failed.
_SOME_FAILED: Final = 1
_EXAMPLES: Final = """\
A row is a JSON object on a line of its own, with `prompt` and any setting of docs/settings.md under
its keyword; `id` names its files:
  {"id": "fox", "prompt": "a fox in the snow", "seed": 7}
  {"prompt": "a crow", "num_frames": 49, "image": "crow.png"}

examples:
  skyreels-jax batch prompts.jsonl videos --steps 30
  skyreels-jax batch prompts.jsonl videos --shard 0/4
More: docs/batch.md.
"""


def add_parser(subparsers: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Add the ``batch`` verb."""
    parser = subparsers.add_parser(
        "batch",
        help="make a video of each row of a file of JSON lines, with one model load",
        description="Make a video of each row of a file of JSON lines, with one model load.\n"
        "Flags are defaults of rows that do not say otherwise. What is finished stays: the same\n"
        "command goes on where it was interrupted, and tries anew what failed.",
        usage="%(prog)s ROWS.jsonl DIR [--model DIR_OR_ID] [--shard I/N] [flags below]",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("rows", type=Path, metavar="ROWS.jsonl", help="a row for each video")
    parser.add_argument("folder", type=Path, metavar="DIR", help="the folder to write to")
    sharing = parser.add_argument_group("rows and processes")
    sharing.add_argument(
        "--shard",
        metavar="I/N",
        help="make every N-th row from the I-th on, counted from 0 (default: what a job array of "
        "Slurm or an indexed job of Kubernetes says, else all)",
    )
    sharing.add_argument(
        "--retries",
        type=_count,
        default=0,
        metavar="N",
        help="try rows that failed so many times more, after all others (default: 0)",
    )
    sharing.add_argument(
        "--engine",
        choices=("local", "ray"),
        default="local",
        help="who makes rows: this process, or the workers of a Ray cluster, which takes the extra "
        "`ray` (default: local)",
    )
    sharing.add_argument(
        "--workers",
        type=_count,
        metavar="N",
        help="processes of the engine ray (default: one for each GPU of the cluster, else one)",
    )
    groups = add_video_flags(parser, prompted=False)
    groups["output"].add_argument(
        "--no-metadata", action="store_true", help="leave the settings out of the video files"
    )


def _count(text: str) -> int:
    if not (text.isascii() and text.isdecimal() and int(text) < 1000):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 0 to 999")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """Make the videos; 0 where all are there, 1 where rows failed.

    Raises:
        SkyReelsError: before anything is made: rows cannot be made, and each is said why.
    """
    from skyreels_jax.cli.batch_work import RowWorker
    from skyreels_jax.generation.batch_rows import choose_shard, read_rows

    shard = choose_shard(args.shard, os.environ)
    rows, problems = read_rows(args.rows, *RowWorker.settings(args))
    mine = shard.of(rows)
    engine = _engine(args)
    worker = RowWorker(args, elsewhere=args.engine == "ray")
    todo, others = _not_done(worker, mine)
    _refuse_bad(args.rows, problems | others, len(rows) + len(problems))
    print(f"{args.rows}: {len(rows)} rows; {shard} has {len(mine)}", flush=True)
    waiting = {row.id for row in todo}
    done = [row for row in mine if row.id not in waiting]
    if args.dry_run:
        print(f"{len(done)} are done, {len(todo)} would be made:")
        for row in todo:
            print(f"  {row}: {worker.output_of(row)}")
        return 0
    worker.prepare()
    for row in done:
        worker.tidy(row)
    failed: list[RowOutcome] = []
    made = 0
    try:
        for attempt in range(1 + args.retries):
            if attempt and todo:
                print(f"{len(todo)} rows failed: attempt {attempt + 1} of {1 + args.retries}")
            failed = []
            for outcome in engine(worker, todo):
                print(outcome, file=sys.stderr if outcome.failure else sys.stdout, flush=True)
                made += outcome.failure is None
                failed += [outcome] if outcome.failure else []
            todo = [outcome.row for outcome in failed]
    finally:
        print(f"{made} made, {len(done)} were done before, {len(failed)} failed", flush=True)
    if failed:
        for outcome in failed:
            print(outcome, file=sys.stderr)
        print(
            f"skyreels-jax: error: {len(failed)} of {len(mine)} rows failed; the same command "
            "tries them anew",
            file=sys.stderr,
        )
    return _SOME_FAILED if failed else 0


def _engine(
    args: argparse.Namespace,
) -> "Callable[[RowWorker, Sequence[BatchRow]], Iterator[RowOutcome]]":
    """Who makes rows."""
    if args.engine == "ray":
        from skyreels_jax.cli.batch_ray import cluster_of

        return cluster_of(args)
    from skyreels_jax.cli.batch_work import make_alone

    if args.workers is not None:
        raise RequestError("`workers` are those of `engine` ray; here --shard divides the rows")
    return make_alone


def _not_done(
    worker: "RowWorker", rows: "Sequence[BatchRow]"
) -> "tuple[list[BatchRow], dict[int, str]]":
    """The rows that are to be made, and what is wrong with others, by line."""
    found: list[BatchRow] = []
    problems: dict[int, str] = {}
    for row in rows:
        try:
            found += [] if worker.is_done(row) else [row]
        except SkyReelsError as error:
            problems[row.line] = f"({row.id}) {one_line(str(error))}"
    return found, problems


def _refuse_bad(path: Path, problems: Mapping[int, str], count: int) -> None:
    """Say of every row what is wrong with it, if anything is; raises a RequestError then."""
    if not problems:
        return
    for line in sorted(problems):
        print(f"{path}, line {line}: {problems[line]}", file=sys.stderr)
    raise RequestError(f"{len(problems)} of {count} rows cannot be made; nothing was begun")
