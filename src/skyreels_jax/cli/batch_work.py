"""One row of a batch made into its files, by the way ``generate`` makes a video."""

import argparse
import hashlib
import json
import os
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Final

from skyreels_jax.cli.generate import UNLIMITED, check_attention
from skyreels_jax.cli.job import begin, check_how, finish, open_pipeline
from skyreels_jax.cli.products import JOB_SUFFIX, Products, is_ours
from skyreels_jax.components.lazy import fingerprint
from skyreels_jax.errors import RequestError, SkyReelsError, Stopped, WeightsError
from skyreels_jax.files import TEMPORARY_PREFIX, json_text, read_json
from skyreels_jax.generation.batch_rows import BatchRow, differing
from skyreels_jax.generation.job_folder import RECORD, FolderStore, remove_unrecorded
from skyreels_jax.generation.job_record import IMAGES, to_json
from skyreels_jax.generation.request.declaration import in_flags, one_line
from skyreels_jax.generation.request.kinds import File, Picture
from skyreels_jax.generation.request.resolved import ResolvedRequest
from skyreels_jax.generation.request.settings import keywords
from skyreels_jax.generation.video import settings_of
from skyreels_jax.outputs import (
    LOCK_SECONDS,
    check_names,
    check_place,
    locked,
    make_folder,
    path_of,
    state_of,
)

# What decides a video beside its settings and weights, of the flags.
_FLAGS: Final = ("backend", "vae_tiling", "vae_dtype")
# What a record has that decides nothing.
_NOT_DECIDING: Final = (
    "generator",
    "sources",
    "warnings",
    "offload",
    "made_from",
    "video",
    "drift",
)
# Seconds after which a temporary file beside the videos is nobody's any more.
_ABANDONED: Final = 3600.0


@dataclass(frozen=True)
class RowOutcome:
    """What became of a row: its video, or why there is none."""

    row: BatchRow
    output: Path
    seconds: float = 0.0
    failure: str | None = None

    def __str__(self) -> str:
        if self.failure is not None:
            return f"failed: {self.row}: {self.failure}"
        return f"made: {self.row}: {self.output} in {self.seconds:.1f} s"


class RowWorker:
    """Makes rows with one pipeline, whose components stay in memory where they fit.

    Attributes:
        pipeline: opened; its weights are read when the first row is made.
    """

    def __init__(
        self, args: argparse.Namespace, *, patience: float = LOCK_SECONDS, elsewhere: bool = False
    ):
        """Open the checkpoint; nothing of its weights is read.

        Args:
            args: flags of ``batch``.
            patience: seconds to wait for another process that works on a row.
            elsewhere: rows are made on other machines: what this one's device can is not asked.
        """
        self.pipeline = open_pipeline(vars(args), keep="auto")
        self._args, self._patience, self._elsewhere = args, patience, elsewhere
        self._folder = path_of(args.folder, "folder").absolute()
        self._said: set[str] = set()

    @staticmethod
    def settings(args: argparse.Namespace) -> tuple[dict[str, object], dict[str, object]]:
        """Defaults of rows, and settings of the pipeline, that the flags spell."""
        defaults: dict[str, object] = {}
        for name, setting in keywords().items():
            value = None if name == "prompt" else getattr(args, name)
            if value is not None:
                is_file = isinstance(setting.kind, File | Picture)
                defaults[name] = os.path.abspath(value) if is_file else value
        chosen = {"dtype": args.dtype, "weights": args.weights, "offload": bool(args.offload)}
        return defaults, chosen

    def output_of(self, row: BatchRow) -> Path:
        """The file of a row's video."""
        return self._folder / f"{row.id}.mp4"

    def is_done(self, row: BatchRow) -> bool:
        """Whether the video of a row is there as it would be made; nothing is changed.

        Raises:
            RequestError: the row cannot be made, or files are there that it would replace.
            UnsupportedError: the attention path cannot run here.
        """
        request = self._resolved(row)
        return self._is_done(row, request, self._made_from(request))

    def _resolved(self, row: BatchRow) -> ResolvedRequest:
        if self._elsewhere:
            return self.pipeline.resolve_request(row.request, memory=UNLIMITED)
        request = self.pipeline.resolve_request(row.request)
        check_attention(self.pipeline.checkpoint, request)
        return request

    def prepare(self) -> None:
        """Prove the checkpoint complete, make the folder, and remove what nobody finishes.

        Raises:
            WeightsError: a component is missing, unsound or incomplete.
            RequestError: the folder cannot be made or written to.
        """
        self.pipeline.verify()
        make_folder(self._folder, "folder")
        check_place(self._folder / "x.mp4")
        for left in self._folder.glob(f"{TEMPORARY_PREFIX}*"):
            state = state_of(left)
            if state is not None and time.time() - state[1] / 1e9 > _ABANDONED:
                left.unlink(missing_ok=True)

    def tidy(self, row: BatchRow) -> None:
        """Remove what is left of the job of a row that is done, if its process was killed then."""
        job_folder = self.output_of(row).with_suffix(JOB_SUFFIX)
        if job_folder.is_dir():
            with suppress(RequestError), locked(job_folder, "job", self._patience):
                remove_unrecorded(job_folder)

    def make(self, row: BatchRow) -> RowOutcome:
        """Make the video of a row, going on where an earlier run has left it; failures are said.

        Raises:
            WeightsError: the checkpoint is wrong, and with it every other row would fail.
            Stopped, KeyboardInterrupt: somebody asked to stop.
        """
        output, begun = self.output_of(row), time.perf_counter()
        try:
            self._make(row, output)
        except (Stopped, WeightsError):
            raise
        except SkyReelsError as error:
            if isinstance(error.__cause__, WeightsError):
                raise
            return RowOutcome(row, output, failure=one_line(str(error)))
        except Exception as error:  # One row's bug is not to cost the others.
            traceback.print_exc()
            return RowOutcome(row, output, failure=f"{type(error).__name__}: {error}")
        return RowOutcome(row, output, time.perf_counter() - begun)

    def _make(self, row: BatchRow, output: Path) -> None:
        job_folder = output.with_suffix(JOB_SUFFIX)
        with ExitStack() as held:
            held.enter_context(locked(output, "output", self._patience))
            held.enter_context(locked(job_folder, "job", self._patience))
            request = self._resolved(row)
            made_from = self._made_from(request)
            # Again: who held the lock may have finished it.
            if self._is_done(row, request, made_from):
                return
            for warning in request.warnings:
                if warning not in self._said:
                    self._said.add(warning)
                    print(in_flags(f"note: {warning}"), flush=True)
            job = self._job(output, job_folder, request, made_from)
            written, _ = finish(self.pipeline, job, job.finished)
        if written != output:
            raise RequestError(f"somebody's file has come to {output}: the video is {written}")

    def _job(
        self,
        output: Path,
        folder: Path,
        request: ResolvedRequest,
        made_from: Mapping[str, str],
    ) -> FolderStore:
        """The job of a row that is not done, gone on with or new."""
        if (folder / RECORD).is_file():
            job = FolderStore.open(folder)
            check_how(job)
            job.how["output"] = str(output)
            return job
        remove_unrecorded(folder)
        files = {"output": output, "job": None, "sidecar": True, "overwrite": False}
        unused = dict.fromkeys(("preview", "keep_job", "keep_latents"), False)
        args = argparse.Namespace(**{**vars(self._args), **files, **unused})
        products = Products(output, folder, has_settings=True)
        return begin(args, self.pipeline, request, products, made_from)

    def _is_done(
        self, row: BatchRow, request: ResolvedRequest, made_from: Mapping[str, str]
    ) -> bool:
        """Whether a row's video is there; raises a RequestError for another's in its place."""
        output = self.output_of(row)
        sidecar, job = output.with_suffix(".json"), output.with_suffix(JOB_SUFFIX)
        check_names([output, sidecar, job])
        advice = "it is never replaced: give the row another id, or move it away"
        if (record := _record_of(job)) is not None:
            made_then = _mapping(record.get("how")).get("made_from")
            if other := _other(to_json(request), made_from, record.get("request"), made_then):
                raise RequestError(f"{job} is begun with {other}; {advice}")
            there = state_of(output)
            if there is not None and there not in _listed(record.get("replaceable")):
                raise RequestError(f"{output} is there, and {job} did not make it: move it away")
            return False
        if sidecar.exists() and not is_ours(sidecar):
            raise RequestError(f"{sidecar} exists and this program did not make it: move it away")
        if state_of(output) is None:
            return False
        if not sidecar.exists():
            raise RequestError(f"{output} exists and nothing says what made it; {advice}")
        settings = _mapping(read_json(sidecar))
        if other := _other(settings_of(request), made_from, settings, settings.get("made_from")):
            raise RequestError(f"{output} was made with {other}; {advice}")
        return True

    def _made_from(self, request: ResolvedRequest) -> dict[str, str]:
        """What decides a video beside its settings: weights, and the content of what is given."""
        images = {name: getattr(request, name) for name in IMAGES}
        found = {
            name: hashlib.sha256(image.tobytes()).hexdigest()
            for name, image in images.items()
            if image is not None
        }
        if request.video is not None:
            found["video"] = fingerprint([request.video.path], times=False)
        return {**self._weights, **found}

    @cached_property
    def _weights(self) -> dict[str, str]:
        flags = {name: str(getattr(self._args, name)) for name in _FLAGS}
        return {"weights": self.pipeline.fingerprint(times=False), **flags}


def _other(
    now: Mapping[str, object], made_from: Mapping[str, str], before: object, made_before: object
) -> str:
    """What of a record is not what it would be now, in words; empty if nothing is."""
    plain = json.loads(json_text({**now}))
    then, decided = (
        {name: value for name, value in _mapping(some).items() if name not in _NOT_DECIDING}
        for some in (before, plain)
    )
    found = [*differing(then, decided), *differing(_mapping(made_before), made_from)]
    return "; ".join(found)


def _mapping(value: object) -> Mapping[str, object]:
    """A JSON object; an empty one for anything else, which then differs from what is expected."""
    return value if isinstance(value, dict) else {}


def _listed(value: object) -> Sequence[object]:
    return value if isinstance(value, list) else []


def _record_of(job: Path) -> Mapping[str, object] | None:
    """What a job records; ``None`` where there is none, or its process has just removed it."""
    path = job / RECORD
    if not path.is_file():
        return None
    try:
        record = read_json(path)
    except RequestError:
        if path.is_file():
            raise
        return None
    if not isinstance(record, dict):
        raise RequestError(f"{path} cannot be understood: move {job} away")
    return record


def make_alone(worker: RowWorker, rows: Iterable[BatchRow]) -> Iterator[RowOutcome]:
    """Make rows one after the other, in this process."""
    rows = list(rows)
    for number, row in enumerate(rows, 1):
        print(f"[{number}/{len(rows)}] {row}", flush=True)
        yield worker.make(row)
