"""Finished windows of a video in a folder on disk, so that an interruption costs none of them.

A folder is a job: what was asked for, and each window once it is finished. ::

    job.json                  the resolved request, and how to go on (model, backend, output)
    image.png, last_image.png what was given, without loss
    window-0000.safetensors   latents of a finished window, with a checksum
    partial.mp4               after a stop: the frames that were finished

Every file is written under a temporary name and renamed, so that whatever ends the process leaves
whole files only; temporary names of ours are removed when the job is opened again. Noise depends
on seed and window alone, so a window made after an interruption is bit for bit what it would have
been.
"""

import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import numpy as np

from skyreels_jax import geometry
from skyreels_jax.errors import RequestError
from skyreels_jax.files import (
    load_tensors,
    read_json,
    reason_of,
    remove_temporary,
    save_tensors,
    write_json,
)
from skyreels_jax.generation.job_record import IMAGES, from_json, to_json
from skyreels_jax.generation.request.resolved import ResolvedRequest, Window
from skyreels_jax.generation.store import TENSOR
from skyreels_jax.interrupt import deferred
from skyreels_jax.media import read_image, write_image
from skyreels_jax.outputs import fallback_folders, locked
from skyreels_jax.shapes import HostLatents

# Windows of format 1 have no checksum.
_FORMAT: Final = 2
_UNCHECKED: Final = 1
RECORD: Final = "job.json"
_PARTIAL: Final = "partial.mp4"
# What does not decide a window, or may be at another place when a job goes on.
_NOT_DECIDING: Final = ("sources", "warnings", "notices", "video")

logger = logging.getLogger(__name__)


@dataclass(eq=False)
class FolderStore:
    """Keeps windows in a job folder, and where that refuses, in another place.

    Attributes:
        folder: where it is; another one once windows had to go elsewhere.
        request: resolved, as it was when the job began.
        how: what else is needed to go on, as JSON values.
        replaceable: states of files that may be replaced by the video: what the user confirmed, and
            what this job made.
        others: job folders of the same video with windows, such as one on a disk that became full.
        record: the request as JSON.
    """

    folder: Path
    request: ResolvedRequest
    how: dict[str, Any]
    record: Mapping[str, Any]
    replaceable: list[list[int]] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)
    format: int = _FORMAT
    _memory: dict[Window, HostLatents] = field(default_factory=dict)
    _damaged: set[Path] = field(default_factory=set)
    _locks: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def create(
        cls,
        folder: Path,
        request: ResolvedRequest,
        how: Mapping[str, Any],
        replaceable: list[list[int]] | None = None,
    ) -> "FolderStore":
        """A new folder for a request.

        Raises:
            RequestError: the folder is there already, or cannot be made; nothing is left of it.
        """
        job = cls(folder, request, dict(how), to_json(request), replaceable or [])
        try:
            folder.mkdir()
        except FileExistsError as error:
            raise RequestError(exists_already(folder)) from error
        except OSError as error:
            raise RequestError(f"job folder {folder} cannot be made: {error}") from error
        try:
            job._write(folder)
        except BaseException as error:
            job.remove()
            if isinstance(error, OSError | ValueError | TypeError):
                raise RequestError(f"job folder {folder} cannot be written: {error}") from error
            raise
        return job

    @classmethod
    def open(cls, folder: Path) -> "FolderStore":
        """A job that was created before; what an interruption left half written is removed.

        Raises:
            RequestError: it is no job folder, or one of another version.
        """
        require_job(folder)
        path = folder / RECORD
        record = read_json(path)
        try:
            version = record["format"]
            if version not in (_UNCHECKED, _FORMAT):
                raise RequestError(
                    f"{path} has format {version!r:.40}; this version reads {_UNCHECKED} and "
                    f"{_FORMAT}"
                )
            raw = dict(record["request"])
            images = {
                name: read_image(folder / f"{name}.png") for name in IMAGES if raw[name] is not None
            }
            request = from_json(raw, images)
            how = {str(name): value for name, value in dict(record["how"]).items()}
            states = [_state(state) for state in record.get("replaceable", [])]
            others = [Path(str(other)) for other in record.get("others", [])]
        except RequestError as error:
            raise RequestError(f"{path}: {error}" if str(path) not in str(error) else error) from (
                error
            )
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            reason = f"{type(error).__name__}: {error}"
            raise RequestError(f"{path} cannot be understood ({reason}); start anew") from error
        remove_temporary(folder)
        job = cls(folder, request, how, raw, states, [], version)
        job.others = [other for other in others if job._is_same(other)]
        return job

    @property
    def partial(self) -> Path:
        """Where finished frames are, after a stop."""
        return self.folder / _PARTIAL

    @property
    def finished(self) -> int:
        """How many windows are finished, and whole."""
        return sum(self._read(window) is not None for window in self.request.windows)

    @property
    def has_windows(self) -> bool:
        """Whether there is any window that may be whole."""
        return any(self._path(f, w).is_file() for w in self.request.windows for f in self._folders)

    def load(self, window: Window) -> HostLatents | None:
        """A finished window; one that is damaged is said, and is ``None``."""
        return self._memory[window] if window in self._memory else self._read(window)

    def save(self, window: Window, latents: HostLatents) -> None:
        """Keep a finished window, elsewhere where the folder refuses; a signal waits for it."""
        with deferred():
            try:
                self._save(self.folder, window, latents)
                return
            except OSError as error:
                refusal = reason_of(error)
            for folder in self._elsewhere():
                try:
                    self._write(folder)
                    self._save(folder, window, latents)
                except OSError:
                    with suppress(OSError):
                        self._remove_from(folder)
                    continue
                logger.warning(
                    "window %d cannot be written to %s (%s): it is kept in %s",
                    *(window.number, self.folder, refusal, folder),
                )
                with suppress(RequestError):
                    self._locks.enter_context(locked(folder, "job"))
                self.others.append(self.folder)
                self.folder = folder
                return
            logger.warning(
                "window %d cannot be written to %s (%s) nor anywhere else: it is kept in memory",
                *(window.number, self.folder, refusal),
            )
            self._memory[window] = latents

    def allow(self, state: list[int] | None) -> None:
        """Note the state of a file that the video may replace from now on."""
        if state is None or state in self.replaceable:
            return
        self.replaceable.append(state)
        # The video matters more than this note, which only a later `resume` needs.
        with suppress(OSError):
            self._write_record(self.folder)

    def remove(self) -> None:
        """Remove the job's files, and its folders if nothing else is in them."""
        for folder in self._folders:
            with suppress(OSError):
                self._remove_from(folder)
        self._locks.close()

    @property
    def _folders(self) -> list[Path]:
        return [self.folder, *self.others]

    def _elsewhere(self) -> Iterator[Path]:
        """New folders in other places, until one is taken."""
        for place in fallback_folders():
            with suppress(OSError):
                stem = self.folder.stem[:40]
                yield Path(tempfile.mkdtemp(".job", f"skyreels-jax-{stem}-", place))

    def _save(self, folder: Path, window: Window, latents: HostLatents) -> None:
        texts = {"window": str(window.number), "request": self._digest}
        tensors = {TENSOR: np.ascontiguousarray(latents)}
        save_tensors(self._path(folder, window), tensors, texts)

    def _read(self, window: Window) -> HostLatents | None:
        expected = (geometry.LATENT_CHANNELS, window.frames, *self.request.latent_shape[1:])
        unchecked = self.format == _UNCHECKED
        for folder in self._folders:
            path = self._path(folder, window)
            if not path.exists():
                continue
            try:
                tensors, texts = load_tensors(path, "window", unchecked=unchecked)
                latents = tensors[TENSOR]
                if texts or not unchecked:
                    named = (texts.get("window"), texts.get("request"))
                    if named != (str(window.number), self._digest):
                        raise RequestError(f"window {path} is of another request")
                if latents.shape != expected or latents.dtype != np.float32:
                    raise RequestError(
                        f"window {path} holds {latents.shape} of {latents.dtype}, not {expected} "
                        "of float32"
                    )
                return latents
            except (RequestError, KeyError) as error:
                if path not in self._damaged:
                    self._damaged.add(path)
                    logger.warning("%s; the window is made anew", error)
        return None

    @property
    def _digest(self) -> str:
        """A hash of all in the record that decides a window."""
        deciding = {k: v for k, v in self.record.items() if k not in _NOT_DECIDING}
        return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()

    def _write(self, folder: Path) -> None:
        for name in IMAGES:
            if (image := getattr(self.request, name)) is not None:
                write_image(folder / f"{name}.png", image)
        # The record last: a folder that has it is complete.
        self._write_record(folder)

    def _write_record(self, folder: Path) -> None:
        others = [str(other.resolve()) for other in self._folders if other != folder]
        write_json(
            folder / RECORD,
            {
                "format": self.format,
                "request": self.record,
                "how": self.how,
                "replaceable": self.replaceable,
                "others": others,
            },
        )

    def _is_same(self, folder: Path) -> bool:
        """Whether another folder is a job of the same request: nothing else is read or removed."""
        try:
            raw = read_json(folder / RECORD)["request"]
            return FolderStore(folder, self.request, {}, dict(raw))._digest == self._digest
        except (RequestError, KeyError, TypeError, ValueError):
            return False

    def _remove_from(self, folder: Path) -> None:
        windows = (self._path(folder, window) for window in self.request.windows)
        _remove_files(folder, windows)

    @staticmethod
    def _path(folder: Path, window: Window) -> Path:
        return folder / f"window-{window.number:04d}.safetensors"


def _remove_files(folder: Path, windows: Iterable[Path]) -> None:
    """Remove a job's files, and its folder if nothing else is in it; raises OSError."""
    remove_temporary(folder)
    own = [RECORD, _PARTIAL, *(f"{name}.png" for name in IMAGES)]
    for file in (*(folder / name for name in own), *windows):
        file.unlink(missing_ok=True)
    if not any(folder.iterdir()):
        folder.rmdir()


def remove_unrecorded(folder: Path) -> None:
    """Remove what is left of a job that was killed while it was begun or removed, if anything is.

    A job has its record from when its folder is complete until its video is.

    Raises:
        RequestError: it has a record, or something else is there.
    """
    if not os.path.lexists(folder):
        return
    if folder.is_symlink() or not folder.is_dir() or (folder / RECORD).exists():
        raise RequestError(exists_already(folder))
    try:
        _remove_files(folder, folder.glob("window-[0-9]*.safetensors"))
    except OSError as error:
        raise RequestError(f"{folder} cannot be removed: {reason_of(error)}") from error
    if folder.exists():
        raise RequestError(f"{folder} is no job, and there are files in it: move it away")


def require_job(folder: Path) -> None:
    """Refuse a folder that has no record of a job; raises a RequestError."""
    if not (folder / RECORD).is_file():
        raise RequestError(f"{folder} is no job folder: it has no {RECORD}")


def exists_already(folder: Path) -> str:
    """What is wrong with a job folder that is there."""
    return (
        f"{folder} exists: go on with it by `skyreels-jax resume {folder}`, remove it, or name "
        "another with --job"
    )


def _state(value: Any) -> list[int]:
    size, changed = value
    if type(size) is not int or type(changed) is not int:
        raise TypeError(f"{value!r:.80} is no state of a file")
    return [size, changed]
