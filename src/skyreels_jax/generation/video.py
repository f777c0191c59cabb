"""What a generation gives back."""

from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from skyreels_jax import media
from skyreels_jax.sampling.progress import Timings
from skyreels_jax.shapes import Frames, HostLatents


@dataclass(frozen=True, eq=False)
class Video:
    """A finished video.

    Attributes:
        frames: 8-bit RGB, ``[T, height, width, 3]``.
        fps: frames a second.
        settings: all that decided the video, as JSON values.
        latents: what the frames were decoded from, ``[16, F, H, W]``.
        timings: seconds by stage and step.
        sound: of a video that was continued.
    """

    frames: Frames
    fps: int | Fraction
    settings: Mapping[str, Any]
    latents: HostLatents
    timings: Timings
    sound: media.Sound | None = None

    def save(self, path: str | Path, *, sidecar: bool = False, metadata: bool = True) -> Path:
        """Write an MP4 and return its path.

        Args:
            path: ends in ``.mp4``.
            sidecar: also write the settings to a ``.json`` file beside it.
            metadata: whether the MP4 carries the settings in its ``comment`` tag.

        Raises:
            RequestError: the path cannot be written to.
        """
        path = Path(path)
        carried = self.settings if metadata else None
        media.write_video(path, self.frames, fps=self.fps, settings=carried, sound=self.sound)
        if sidecar:
            media.write_settings(path.with_suffix(".json"), self.settings)
        return path
