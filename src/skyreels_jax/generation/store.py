"""Where finished windows of a video are kept while it is made, and latents once it is finished.

A folder on disk is :class:`skyreels_jax.generation.job_folder.FolderStore`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import numpy as np

from skyreels_jax import geometry
from skyreels_jax.errors import RequestError
from skyreels_jax.files import json_text, load_tensors, parse_json, save_tensors
from skyreels_jax.generation.request.resolved import Window
from skyreels_jax.shapes import HostLatents

TENSOR: Final = "latents"
_SETTINGS: Final = "settings"


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

    def save(self, path: Path, *, replace: bool = True) -> None:
        """Write a safetensors file; raises OSError."""
        tensors = {TENSOR: np.ascontiguousarray(self.latents)}
        save_tensors(path, tensors, {_SETTINGS: json_text(self.settings)}, replace=replace)

    @classmethod
    def open(cls, path: Path, what: str = "--resume-latents") -> "SavedLatents":
        """Read what :meth:`save` wrote; files of earlier versions have no checksum.

        Raises:
            RequestError: the file is missing, damaged, or is not such a file.
        """
        tensors, texts = load_tensors(path, what, unchecked=True)
        try:
            settings = parse_json(texts[_SETTINGS], f"{what} {path}: its settings")
            saved = cls(tensors[TENSOR], dict(settings))
            _ = saved.fps  # Checked here, for all that follows.
        except (KeyError, ValueError, TypeError) as error:
            raise RequestError(f"{what} {path}: not a latents file of this program: {error}") from (
                error
            )
        shape, dtype = saved.latents.shape, saved.latents.dtype
        legal = len(shape) == 4 and shape[0] == geometry.LATENT_CHANNELS and min(shape) > 0
        if not legal or dtype != np.float32:
            raise RequestError(
                f"{what} {path}: latents are {shape} of {dtype}; expected "
                f"({geometry.LATENT_CHANNELS}, frames, height, width) of float32"
            )
        return saved
