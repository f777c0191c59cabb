"""The files that a generation makes: checked before it begins, never in place of somebody's.

The video replaces what was there when the user said ``--overwrite``, and what the job itself made.
Files whose names follow from it (settings, latents, pictures) replace only what carries the mark of
this program: the user did not name them.
"""

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from PIL import Image

from skyreels_jax.errors import RequestError
from skyreels_jax.files import LATENTS_SUFFIX, read_json, reason_of, take_name, whole_file
from skyreels_jax.generation.job_folder import FolderStore, exists_already
from skyreels_jax.generation.request.resolved import ResolvedRequest
from skyreels_jax.generation.store import SavedLatents
from skyreels_jax.geometry import LATENT_CHANNELS, pixel_frames
from skyreels_jax.media import RgbImage, check_output, contact_sheet, write_image
from skyreels_jax.outputs import check_names, check_place, check_space, free_name, state_of
from skyreels_jax.shapes import Frames

JOB_SUFFIX: Final = ".job"
# What made it, as settings of a video and pictures name it.
PROGRAM: Final = "skyreels-jax"
# Pictures in a strip, which are all that a preview keeps of a window.
_STRIP: Final = 8
# Bytes of a pixel of a finished video: twice what pictures of a camera take.
_BYTES_A_PIXEL: Final = 0.1
# Of everything else: records, settings, pictures.
_SMALL: Final = 2**20
# Bytes of a latent's value.
_BYTES_A_VALUE: Final = 4

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Products:
    """Where a generation writes.

    Attributes:
        output: the video.
        job: the folder of its job; ``None`` where there is none.
        has_settings: whether they are written beside the video.
        has_latents: whether they are kept beside it.
        has_previews: whether pictures of windows are.
    """

    output: Path
    job: Path | None
    has_settings: bool = False
    has_latents: bool = False
    has_previews: bool = False

    @property
    def settings(self) -> Path:
        """The file of settings."""
        return self.output.with_suffix(".json")

    @property
    def latents(self) -> Path:
        """The file of latents."""
        return self.output.with_suffix(LATENTS_SUFFIX)

    def preview(self, window: int) -> Path:
        """The picture of a window."""
        return self.output.with_name(f"{self.output.stem}.window-{window:03d}.png")

    def check(self, *, overwrite: bool) -> None:
        """Refuse names and places that cannot be written to, and what would be replaced unasked.

        Raises:
            RequestError: says which.
        """
        check_output(self.output)
        self._check_free(overwrite)
        if self.job is not None:
            check_names([self.job])
            if os.path.lexists(self.job):
                raise RequestError(exists_already(self.job))
            check_place(self.job, "job folder")

    def check_request(self, request: ResolvedRequest, *, overwrite: bool) -> None:
        """The same of what only the request decides: how many windows there are, and how large.

        Raises:
            RequestError: says which, or what space is missing.
        """
        if self.has_previews:
            for window in request.windows:
                self._check_derived(self.preview(window.number), overwrite)
        rows, columns = request.latent_shape[1:]
        values = LATENT_CHANNELS * rows * columns * _BYTES_A_VALUE
        windows = [window.frames * values for window in request.windows]
        video = request.output_frames * request.height * request.width * _BYTES_A_PIXEL
        kept = windows[:1] if self.has_latents and len(windows) == 1 else []
        self._check_space(windows, round(video), kept)

    def _check_space(self, windows: Sequence[int], video: int, kept: Sequence[int]) -> None:
        here = self.output.absolute().parent
        job = here if self.job is None else self.job.absolute().parent
        if _disk(job) == _disk(here):
            check_space(here, [*windows, video, *kept, _SMALL], "what this video needs")
        else:
            check_space(job, [*windows, video, _SMALL], "the job of this video")
            check_space(here, [video, *kept, _SMALL], "this video")

    def _check_free(self, overwrite: bool) -> None:
        _refuse_to_replace(self.output, overwrite)
        if self.has_settings:
            self._check_derived(self.settings, overwrite)
        if self.has_latents:
            self._check_derived(self.latents, overwrite)

    def _check_derived(self, path: Path, overwrite: bool) -> None:
        check_names([path])
        _refuse_to_replace(path, overwrite)
        if os.path.lexists(path) and not is_ours(path):
            raise RequestError(
                f"{path} exists and this program did not make it: move it away, or give another "
                "--output"
            )


def _refuse_to_replace(path: Path, overwrite: bool) -> None:
    if os.path.lexists(path) and not overwrite:
        raise RequestError(f"{path} exists: give another --output, or --overwrite to replace it")


def is_ours(path: Path) -> bool:
    """Whether a file carries the mark of this program: settings, latents or a picture of it."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        if path.name.endswith(LATENTS_SUFFIX):
            return _names_program(SavedLatents.open(path, "latents").settings.get("generator"))
        if path.suffix == ".json":
            return _names_program(read_json(path).get("generator"))
        with Image.open(path, formats=["PNG"]) as picture:
            return _names_program(picture.info.get("Software"))
    except Exception:  # Whatever a reader raises: it is none of ours.
        return False


def _names_program(text: object) -> bool:
    return isinstance(text, str) and text.startswith(PROGRAM)


def write_derived(path: Path, write: Callable[[Path], object]) -> Path:
    """Write a file whose name follows from the video's, under a free one if that is somebody's.

    Args:
        path: of the file.
        write: writes a whole file to a path.

    Returns:
        Where it is.

    Raises:
        OSError: it cannot be written.
    """
    if os.path.lexists(path) and not is_ours(path):
        free = free_name(path)
        logger.warning("%s has come there since and is left alone: %s is written", path, free)
        path = free
    write(path)
    return path


def place_video(job: FolderStore, source: Path, target: Path) -> Path:
    """Give a finished video its name, or a free one where somebody's file has come there.

    Args:
        job: knows what may be replaced.
        source: the video; by a copy where it is on another file system.
        target: its name.

    Returns:
        Where it is.

    Raises:
        OSError: it cannot be written; ``source`` is left.
    """
    # Noted first: whatever ends the process, the job knows the file for its own.
    job.allow(state_of(source))
    for path in _names_for(job, target):
        replace = state_of(path) is not None
        try:
            if _disk(source.parent) == _disk(path.absolute().parent):
                take_name(source, path, replace=replace)
            else:
                with whole_file(path, replace=replace) as temporary:
                    shutil.copyfile(source, temporary)
                    shutil.copystat(source, temporary)
                with suppress(OSError):
                    source.unlink()
        except FileExistsError:
            continue
        if path != target:
            logger.warning("%s has come there since and is left alone", target)
        return path
    raise AssertionError("a free name is found or refused")


def _names_for(job: FolderStore, target: Path) -> Iterator[Path]:
    state = state_of(target)
    if state is None or state in job.replaceable:
        yield target
    while True:
        yield free_name(target)


def _disk(folder: Path) -> int:
    return folder.stat().st_dev


def with_strips(
    frames: Iterable[Frames], request: ResolvedRequest, name: Callable[[int], Path]
) -> Iterator[Frames]:
    """The same frames; a strip of pictures of each window is written when its last has come."""
    begin = 0 if request.video is None else request.output_frames - request.num_frames
    ends = [begin + pixel_frames(window.start + window.frames) for window in request.windows]
    spans = list(zip([0, *ends], ends, strict=False))
    number, shown, pictures = 0, 0, list[Frames]()
    for some in frames:
        for frame in some:
            first, end = spans[number]
            chosen = np.linspace(first, end - 1, min(_STRIP, end - first)).round().astype(int)
            if shown in chosen:
                pictures.append(frame[None])
            shown += 1
            if shown == end:
                strip = contact_sheet(np.concatenate(pictures), count=_STRIP, columns=_STRIP)
                _write_strip(name(number), strip)
                pictures, number = [], min(number + 1, len(spans) - 1)
        yield some


def _write_strip(path: Path, strip: RgbImage) -> None:
    """Write a picture that only shows how far things are: what refuses it is said, no more."""
    if state_of(path) is not None and not is_ours(path):
        logger.warning("%s is somebody's: no picture of the window is written", path)
        return
    try:
        write_image(path, strip, made_by=PROGRAM)
    except OSError as error:
        logger.warning("%s cannot be written: %s", path, reason_of(error))
