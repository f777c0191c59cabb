"""A long video under way, as a folder: what was asked for, and each window once it is finished.

::

    job.json                  the settled request, and how to go on (model, backend, output)
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from skyreels_jax import geometry
from skyreels_jax.diffusion.cache_settings import CacheSettings
from skyreels_jax.errors import RequestError
from skyreels_jax.files import remove_temporary, whole_file, write_json
from skyreels_jax.generation.request import Forcing, GivenVideo, ResolvedRequest
from skyreels_jax.generation.windows import Window
from skyreels_jax.media import read_image, write_image
from skyreels_jax.shapes import HostLatents

FORMAT: Final = 1
RECORD: Final = "job.json"
TENSOR: Final = "latents"
IMAGES: Final = ("image", "last_image")
# Everything a job may hold, beside temporary files; nothing else is ever removed.
OWN: Final = ("job.json", "*image.png", "window-*.safetensors", "partial.mp4")


@dataclass(frozen=True)
class Job:
    """An opened job folder; keeps finished windows (:class:`.rollout.Kept`).

    Attributes:
        folder: where it is.
        request: settled, as it was when the job began.
        how: what else is needed to go on, as JSON values.
    """

    folder: Path
    request: ResolvedRequest
    how: Mapping[str, Any]

    @classmethod
    def create(cls, folder: Path, request: ResolvedRequest, how: Mapping[str, Any]) -> "Job":
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
        for name in IMAGES:
            if (image := getattr(request, name)) is not None:
                write_image(folder / f"{name}.png", image)
        # The record last: a folder that has it is complete.
        record = {"format": FORMAT, "request": to_json(request), "how": dict(how)}
        write_json(folder / RECORD, record)
        return cls(folder, request, how)

    @classmethod
    def open(cls, folder: Path) -> "Job":
        """A job that was created before; what an interruption left half written is removed.

        Raises:
            RequestError: it is no job folder, or one of another version.
        """
        path = folder / RECORD
        if not path.is_file():
            raise RequestError(f"{folder} is no job folder: it has no {RECORD}")
        try:
            record = json.loads(path.read_text("utf-8"))
            if record["format"] != FORMAT:
                raise RequestError(
                    f"{path} has format {record['format']}; this version reads {FORMAT}"
                )
            images = {
                name: read_image(folder / f"{name}.png")
                for name in IMAGES
                if record["request"].pop(name) is not None
            }
            request = from_json(record["request"], images)
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
                latents = file.get_tensor(TENSOR)
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
            save_file({TENSOR: np.ascontiguousarray(latents)}, temporary)

    def remove(self) -> None:
        """Remove the job's files, and the folder if nothing else is in it."""
        remove_temporary(self.folder)
        for pattern in OWN:
            for file in self.folder.glob(pattern):
                file.unlink()
        if not any(self.folder.iterdir()):
            self.folder.rmdir()

    def _path(self, window: Window) -> Path:
        return self.folder / f"window-{window.number:04d}.safetensors"


def to_json(request: ResolvedRequest) -> dict[str, Any]:
    """All fields of a request as JSON values; of images only that they are there."""
    values = {
        entry.name: getattr(request, entry.name)
        for entry in dataclasses.fields(request)
        if entry.name not in IMAGES
    }
    for name in IMAGES:
        values[name] = None if getattr(request, name) is None else f"{name}.png"
    values["fps"] = request.fps if isinstance(request.fps, int) else str(request.fps)
    values["cache"] = dataclasses.asdict(request.cache)
    values["forcing"] = None if request.forcing is None else dataclasses.asdict(request.forcing)
    if (video := request.video) is not None:
        values["video"] = {**dataclasses.asdict(video), "path": str(video.path.resolve())}
    values["sources"] = dict(request.sources)
    return values


def from_json(values: Mapping[str, Any], images: Mapping[str, Any]) -> ResolvedRequest:
    """The request that :func:`to_json` wrote.

    Raises:
        TypeError: fields are missing or unknown.
    """
    forcing, video, cache = values["forcing"], values["video"], values["cache"]
    coefficients = None if cache["coefficients"] is None else tuple(cache["coefficients"])
    return ResolvedRequest(
        **{
            **values,
            "prompts": tuple(values["prompts"]),
            "fps": geometry.frame_rate(values["fps"]),
            "notices": tuple(values["notices"]),
            "cache": CacheSettings(**{**cache, "coefficients": coefficients}),
            "forcing": None if forcing is None else Forcing(**forcing),
            "video": None
            if video is None
            else GivenVideo(**{**video, "path": Path(video["path"])}),
        },
        image=images.get("image"),
        last_image=images.get("last_image"),
    )
