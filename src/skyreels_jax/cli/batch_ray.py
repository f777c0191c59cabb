"""Rows of a batch on a Ray cluster: Ray Data hands them to a pool of workers that it restarts.

Each worker is a process with one pipeline, and makes rows by the way the local engine does. A row
whose worker dies is handed to another, which goes on where the job of the row was left. The folder
and the checkpoint must be where every machine sees them.
"""

import argparse
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypedDict

from skyreels_jax.cli.batch_work import RowOutcome, RowWorker
from skyreels_jax.cli.flags import quietly
from skyreels_jax.cli.job import absolute_paths
from skyreels_jax.errors import UnsupportedError, WeightsError
from skyreels_jax.generation.batch_rows import BatchRow
from skyreels_jax.outputs import path_of

# How often a row is handed on when its worker dies, before it counts as failed.
_DEATHS = 25
# Seconds to wait for the process of a worker that is gone to end, with its locks.
_PATIENCE = 30.0


class _Answer(TypedDict):
    """What a worker says of a row; empty texts for nothing."""

    index: int
    seconds: float
    failure: str
    damage: str


class _RowServer:
    """A worker of the pool: rows by number in, answers out."""

    def __init__(self, args: argparse.Namespace, rows: Sequence[BatchRow]):
        self._worker = RowWorker(args, patience=_PATIENCE)
        self._rows = rows

    def __call__(self, item: dict[str, int]) -> _Answer:
        index = int(item["index"])
        try:
            with quietly():
                outcome = self._worker.make(self._rows[index])
        except WeightsError as error:
            return _Answer(index=index, seconds=0.0, failure="", damage=str(error))
        return _Answer(
            index=index, seconds=outcome.seconds, failure=outcome.failure or "", damage=""
        )


def cluster_of(
    args: argparse.Namespace,
) -> Callable[[RowWorker, Sequence[BatchRow]], Iterator[RowOutcome]]:
    """Connect to the cluster that RAY_ADDRESS names, or start one here; gives an engine.

    Raises:
        UnsupportedError: Ray is not installed.
    """
    # Nothing is told to Ray's makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        import ray
        import ray.data
    except ImportError as error:
        raise UnsupportedError(
            "--engine ray takes Ray Data: pip install 'skyreels-jax[ray]'"
        ) from error
    import jax

    # The devices are the workers'.
    jax.config.update("jax_platforms", "cpu")
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    if not ray.is_initialized():
        ray.init(logging_level=logging.ERROR, log_to_driver=False)
    everywhere = argparse.Namespace(
        **{
            **vars(args),
            **absolute_paths(args),
            "folder": path_of(args.folder, "folder").absolute(),
        }
    )
    return partial(_make_on_ray, everywhere)


def _make_on_ray(
    args: argparse.Namespace, worker: RowWorker, rows: Sequence[BatchRow]
) -> Iterator[RowOutcome]:
    """Make rows on the pool, in the order in which they are finished.

    Raises:
        WeightsError: a worker found the checkpoint damaged.
    """
    import ray
    import ray.data

    if not rows:
        return
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    # A row whose workers all died is missing from the answers, and the others go on.
    context.max_errored_blocks = -1
    gpus = int(ray.cluster_resources().get("GPU", 0))
    size = min(args.workers or max(gpus, 1), len(rows))
    items = [{"index": index} for index in range(len(rows))]
    answers = ray.data.from_items(items, override_num_blocks=len(items)).map(
        _RowServer,  # pyright: ignore[reportArgumentType]
        fn_constructor_args=(args, rows),
        compute=ray.data.ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
        num_gpus=1 if gpus else 0,
        max_restarts=-1,
        max_task_retries=_DEATHS,
    )
    missing = dict(enumerate(rows))
    for answer in answers.iter_rows():
        row = missing.pop(answer["index"])
        if answer["damage"]:
            raise WeightsError(answer["damage"])
        yield RowOutcome(row, worker.output_of(row), answer["seconds"], answer["failure"] or None)
    for row in missing.values():
        yield RowOutcome(row, worker.output_of(row), failure="its workers died: see Ray's logs")
