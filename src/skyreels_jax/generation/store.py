"""Where finished windows of a video are kept: nowhere, in memory, or in a folder on disk.

A folder is a job: what was asked for, and each window once it is finished. ::

    job.json                  the resolved request, and how to go on (model, backend, output)
    image.png, last_image.png what was given, without loss
    window-0000.safetensors   latents of a finished window
    partial.mp4               after a stop: the frames that were finished

Every file is written under a temporary name and renamed, so that whatever ends the process leaves
whole files only; temporary names of ours are removed when the job is opened again. Noise depends
on seed and window alone, so a window made after an interruption is bit for bit what it would have
been.
"""

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from skyreels_jax import geometry
from skyreels_jax.diffusion.cache_settings import CacheSettings
from skyreels_jax.errors import RequestError
from skyreels_jax.files import remove_temporary, whole_file, write_json
from skyreels_jax.generation.request.resolved import Forcing, GivenVideo, ResolvedRequest, Window
from skyreels_jax.generation.request.settings import current_names
from skyreels_jax.media import read_image, write_image
from skyreels_jax.shapes import HostLatents

_FORMAT: Final = 1
_RECORD: Final = "job.json"
_TENSOR: Final = "latents"
_SETTINGS: Final = "settings"
_IMAGES: Final = ("image", "last_image")
# The fields of a request that jobs of earlier versions have under an old name.
_OLD_NAMES: Final = {"notices": "warnings"}
# Everything a job may hold, beside temporary files; nothing else is ever removed.
_OWN: Final = ("job.json", "*image.png", "window-*.safetensors", "partial.mp4")


@runtime_checkable
class WindowStore(Protocol):
    """Where finished windows are kept, so that an interruption costs none of them."""

    def load(self, window: Window) -> HostLatents | None:
        """The latents that were saved of a window, if they were."""
        ...

    def save(self, window: Window, latents: HostLatents) -> None:
        """Keep a finished window, all its frames but an end frame."""
        ...


class NoStore:
    """Keeps nothing: every window is made."""

    def load(self, window: Window) -> None:
        """Find nothing."""

    def save(self, window: Window, latents: HostLatents) -> None:
        """Keep nothing."""


@dataclass(eq=False)
class MemoryStore:
    """Keeps windows for this process."""

    windows: dict[Window, HostLatents] = field(default_factory=dict)

    def load(self, window: Window) -> HostLatents | None:
        """The latents of a window that was made."""
        return self.windows.get(window)

    def save(self, window: Window, latents: HostLatents) -> None:
        """Keep a finished window."""
        self.windows[window] = latents

    @property
    def latents(self) -> HostLatents:
        """All of the first window, of later ones what is new: ``[16, F, H, W]``."""
        pieces = (
            latents[:, window.prefix if window.number else 0 :]
            for window, latents in self.windows.items()
        )
        return np.concatenate(list(pieces), axis=1)


@dataclass(frozen=True)
class FolderStore:
    """Keeps windows in a job folder.

    Attributes:
        folder: where it is.
        request: resolved, as it was when the job began.
        how: what else is needed to go on, as JSON values.
    """

    folder: Path
    request: ResolvedRequest
    how: Mapping[str, Any]

    @classmethod
    def create(
        cls, folder: Path, request: ResolvedRequest, how: Mapping[str, Any]
    ) -> "FolderStore":
        """A new folder for a request.

        Raises:
            RequestError: the folder is there already, or cannot be made.
        """
        try:
            folder.mkdir()
        except FileExistsError as error:
            raise RequestError(
                f"{folder} exists: go on with it by `skyreels-jax resume {folder}`, remove it, or "
                "name another with --job"
            ) from error
        except OSError as error:
            raise RequestError(f"job folder {folder} cannot be made: {error}") from error
        for name in _IMAGES:
            if (image := getattr(request, name)) is not None:
                write_image(folder / f"{name}.png", image)
        # The record last: a folder that has it is complete.
        record = {"format": _FORMAT, "request": _to_json(request), "how": dict(how)}
        write_json(folder / _RECORD, record)
        return cls(folder, request, how)

    @classmethod
    def open(cls, folder: Path) -> "FolderStore":
        """A job that was created before; what an interruption left half written is removed.

        Raises:
            RequestError: it is no job folder, or one of another version.
        """
        path = folder / _RECORD
        if not path.is_file():
            raise RequestError(f"{folder} is no job folder: it has no {_RECORD}")
        try:
            record = json.loads(path.read_text("utf-8"))
            if record["format"] != _FORMAT:
                raise RequestError(
                    f"{path} has format {record['format']}; this version reads {_FORMAT}"
                )
            images = {
                name: read_image(folder / f"{name}.png")
                for name in _IMAGES
                if record["request"].pop(name) is not None
            }
            request = _from_json(record["request"], images)
            how = dict(record["how"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise RequestError(f"{path} cannot be understood ({error}); start anew") from error
        remove_temporary(folder)
        return cls(folder, request, how)

    @property
    def partial(self) -> Path:
        """Where finished frames are, after a stop."""
        return self.folder / "partial.mp4"

    @property
    def finished(self) -> int:
        """How many windows are finished."""
        return sum(self._path(window).is_file() for window in self.request.windows)

    def load(self, window: Window) -> HostLatents | None:
        """A finished window.

        Raises:
            RequestError: its file is damaged.
        """
        path = self._path(window)
        if not path.is_file():
            return None
        expected = (geometry.LATENT_CHANNELS, window.frames, *self.request.latent_shape[1:])
        try:
            with safe_open(path, framework="np") as file:
                latents = file.get_tensor(_TENSOR)
        except (SafetensorError, OSError) as error:
            raise RequestError(f"{path} is damaged ({error}); remove it to make it anew") from error
        if latents.shape != expected or latents.dtype != np.float32:
            raise RequestError(
                f"{path} holds {latents.shape} of {latents.dtype}, not {expected} of float32; "
                "remove it to make it anew"
            )
        return latents

    def save(self, window: Window, latents: HostLatents) -> None:
        """Keep a finished window."""
        with whole_file(self._path(window)) as temporary:
            save_file({_TENSOR: np.ascontiguousarray(latents)}, temporary)

    def remove(self) -> None:
        """Remove the job's files, and the folder if nothing else is in it."""
        remove_temporary(self.folder)
        for pattern in _OWN:
            for file in self.folder.glob(pattern):
                file.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, window: Window) -> Path:
        return self.folder / f"window-{window.number:04d}.safetensors"


def _to_json(request: ResolvedRequest) -> dict[str, Any]:
    """All fields of a request as JSON values; of images only that they are there."""
    values = {
        entry.name: getattr(request, entry.name)
        for entry in dataclasses.fields(request)
        if entry.name not in _IMAGES
    }
    for name in _IMAGES:
        values[name] = None if getattr(request, name) is None else f"{name}.png"
    values["fps"] = request.fps if isinstance(request.fps, int) else str(request.fps)
    values["cache"] = dataclasses.asdict(request.cache)
    values["forcing"] = None if request.forcing is None else dataclasses.asdict(request.forcing)
    if (video := request.video) is not None:
        values["video"] = {**dataclasses.asdict(video), "path": str(video.path.resolve())}
    values["sources"] = dict(request.sources)
    return values


def _from_json(values: Mapping[str, Any], images: Mapping[str, Any]) -> ResolvedRequest:
    """The request that :func:`_to_json` wrote.

    Raises:
        TypeError: fields are missing or unknown.
    """
    values = {_OLD_NAMES.get(name, name): value for name, value in values.items()}
    forcing, video, cache = values["forcing"], values["video"], values["cache"]
    coefficients = None if cache["coefficients"] is None else tuple(cache["coefficients"])
    return ResolvedRequest(
        **{
            **values,
            "prompts": tuple(values["prompts"]),
            "fps": geometry.frame_rate(values["fps"]),
            "warnings": tuple(values["warnings"]),
            "cache": CacheSettings(**{**cache, "coefficients": coefficients}),
            "forcing": None if forcing is None else Forcing(**current_names(forcing)),
            "video": None
            if video is None
            else GivenVideo(**{**video, "path": Path(video["path"])}),
        },
        image=images.get("image"),
        last_image=images.get("last_image"),
    )


@dataclass(frozen=True, eq=False)
class SavedLatents:
    """The latents of a finished video of one window, and the settings that decided them.

    Attributes:
        latents: ``[16, F, H, W]``.
        settings: JSON values; ``fps`` is one of them.
    """

    latents: HostLatents
    settings: Mapping[str, Any]

    @property
    def fps(self) -> int | Fraction:
        """Frames a second."""
        return geometry.frame_rate(self.settings["fps"])

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, once decoded."""
        _, _, rows, columns = self.latents.shape
        return rows * geometry.PIXELS_PER_LATENT, columns * geometry.PIXELS_PER_LATENT

    def save(self, path: Path) -> None:
        """Write a safetensors file."""
        metadata = {_SETTINGS: json.dumps(dict(self.settings), ensure_ascii=False)}
        with whole_file(path) as temporary:
            save_file({_TENSOR: np.ascontiguousarray(self.latents)}, temporary, metadata)

    @classmethod
    def open(cls, path: Path) -> "SavedLatents":
        """Read what :meth:`save` wrote.

        Raises:
            RequestError: the file is missing, or is not such a file.
        """
        if not path.is_file():
            raise RequestError(f"--resume-latents {path}: there is no such file")
        try:
            with safe_open(path, framework="np") as file:
                settings = json.loads((file.metadata() or {})[_SETTINGS])
                saved = cls(file.get_tensor(_TENSOR), settings)
                _ = saved.fps  # Checked here, for all that follows.
        except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
            raise RequestError(
                f"--resume-latents {path}: not a latents file of this program ({error})"
            ) from error
        shape, dtype = saved.latents.shape, saved.latents.dtype
        if len(shape) != 4 or shape[0] != geometry.LATENT_CHANNELS or dtype != np.float32:
            raise RequestError(
                f"--resume-latents {path}: latents are {shape} of {dtype}; expected "
                f"({geometry.LATENT_CHANNELS}, frames, height, width) of float32"
            )
        return saved
