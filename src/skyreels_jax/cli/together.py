"""Verbs of which several processes do one: joining, and what those do that print nothing."""

import argparse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NoReturn

from skyreels_jax.cli.job import open_pipeline
from skyreels_jax.errors import RequestError, SkyReelsError, is_out_of_memory
from skyreels_jax.generation.job_folder import FolderStore
from skyreels_jax.generation.together import share_request
from skyreels_jax.parallel.processes import (
    JoinOptions,
    Processes,
    current_processes,
    initialize,
)
from skyreels_jax.parallel.standstill import STALL_SECONDS


def join(args: argparse.Namespace) -> Processes | None:
    """Join the processes that the flags name; ``None`` if they name none.

    Raises:
        RequestError: flags do not go together.
        UnsupportedError: the others cannot be reached.
    """
    options = _options_of(args)
    if options is None:
        return None
    processes = initialize(
        *(options.coordinator, options.num_processes, options.process_id),
        stall_limit=options.stall_limit,
    )
    return processes if processes.count > 1 else None


def _options_of(args: argparse.Namespace) -> JoinOptions | None:
    """What the flags say, if they say anything; raises a RequestError."""
    options = JoinOptions(
        coordinator=args.coordinator,
        num_processes=args.num_processes,
        process_id=args.process_id,
        stall_limit=STALL_SECONDS if args.stall_limit is None else args.stall_limit,
    )
    if args.distributed and options.coordinator is not None:
        raise RequestError("`distributed` asks the cluster and `coordinator` does not: leave one")
    if args.distributed or options.coordinator is not None:
        return options
    if args.stall_limit is not None:
        raise RequestError("`stall_limit` is of several processes, and this is one")
    return None


def check_together(args: argparse.Namespace, options: Mapping[str, object]) -> None:
    """Refuse what several processes cannot make together; raises a RequestError."""
    if _options_of(args) is None:
        return
    if options["mesh"] is None:
        raise RequestError("several processes make one video on a mesh of all devices: say --mesh")
    if options["backend"] != "jax":
        raise RequestError(
            f"--backend {options['backend']} runs in one process, not in several: leave it out"
        )
    if getattr(args, "resume_latents", None):
        raise RequestError("--resume-latents decodes in one process, not in several")
    if getattr(args, "dry_run", False):
        raise RequestError("--dry-run counts one process: leave the others out")


def lead(job: FolderStore) -> None:
    """Tell the other processes, if there are any, what to make."""
    if (processes := current_processes()) is None:
        return
    kept = {name: getattr(job.request, name) for name in ("weights", "offload")}
    share_request(processes, lambda: (job.request, {**job.how, **kept}))


@contextmanager
def broken_off_in_words(advice: str) -> Iterator[None]:
    """An exchange that breaks off because another process is gone, as one line.

    Raises:
        SkyReelsError: it did in the body; with ``advice`` on how to go on.
    """
    try:
        yield
    except RuntimeError as error:
        if current_processes() is None or is_out_of_memory(error):
            raise
        reason = str(error).partition("\n")[0][:160]
        raise SkyReelsError(f"another process is gone ({reason}); {advice}") from error


def follow(processes: Processes) -> int:
    """Compute what process 0 makes, and neither write nor print; 0 when it is made."""

    def never() -> NoReturn:
        raise AssertionError("process 0 makes the request")

    request, options = share_request(processes, never)
    for _ in open_pipeline(options).frames(request):
        pass
    return 0
