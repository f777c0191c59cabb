"""A request with every setting decided; :func:`skyreels_jax.generation.request.resolve.resolve`."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from skyreels_jax import geometry
from skyreels_jax.diffusion.cache_settings import CacheSettings
from skyreels_jax.generation.request.settings import PlainSettings
from skyreels_jax.generation.windows import Window, plan_windows
from skyreels_jax.geometry import latent_frames
from skyreels_jax.media import RgbImage, Sound
from skyreels_jax.presets import Task


@dataclass(frozen=True, kw_only=True)
class Forcing:
    """How diffusion forcing goes about a video; all numbers legal, in the units of the request."""

    base_num_frames: int
    overlap_history: int
    ar_step: int
    causal_block_size: int
    addnoise_condition: int
    addnoise_once: bool
    continuation: str
    causal_attention: int | None


@dataclass(frozen=True)
class GivenVideo:
    """A video to continue: where it is, how many frames it has at the rate of the request.

    ``fps`` is its own rate; ``sound`` the format of its sound, if it has any.
    """

    path: Path
    frames: int
    fps: float
    sound: str | None = None


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest(PlainSettings):
    """A request in which every setting is decided and legal.

    ``model`` names the checkpoint and ``task`` what it was made for; ``prompts`` has one for each
    window; ``forcing`` is ``None`` where the task is another; ``sources`` says of each setting
    where it came from; ``warnings`` are for the user. The rest is as in
    :class:`~skyreels_jax.generation.request.settings.Request`.
    """

    model: str
    task: Task
    prompts: tuple[str, ...]
    negative_prompt: str
    image: RgbImage | None = field(compare=False)
    last_image: RgbImage | None = field(compare=False)
    video: GivenVideo | None
    forcing: Forcing | None
    height: int
    width: int
    num_frames: int
    steps: int
    guidance_scale: float
    shift: float
    fps: int | Fraction
    seed: int
    noise: str
    cache: CacheSettings
    sources: Mapping[str, str]
    warnings: tuple[str, ...]

    def value_of(self, name: str) -> Any:
        """The resolved value of a setting."""
        return getattr(self if hasattr(self, name) else self.forcing, name)

    @property
    def latent_dtype(self) -> str:
        """The dtype of latents between steps: float32, unless rounded as the original rounds."""
        return self.dtype if self.reference_exact and self.forcing is not None else "float32"

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of the whole video."""
        return geometry.latent_shape(self.num_frames, self.height, self.width)

    @property
    def window_shape(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns of the most that the transformer sees at once."""
        frames = max(window.columns for window in self.windows)
        return (frames, *self.latent_shape[1:])

    @cached_property
    def windows(self) -> tuple[Window, ...]:
        """The runs of the transformer; one, unless diffusion forcing cuts a long video."""
        total = self.latent_shape[0]
        if self.forcing is None:
            return plan_windows(total, total, 0)
        overlap = latent_frames(self.forcing.overlap_history)
        return plan_windows(
            total,
            min(total, latent_frames(self.forcing.base_num_frames)),
            overlap,
            prefix=overlap if self.video else int(self.image is not None),
            end=self.last_image is not None,
        )

    @property
    def is_long(self) -> bool:
        """Whether the video is made window by window, or continues another."""
        return len(self.windows) > 1 or self.video is not None

    @property
    def output_frames(self) -> int:
        """Frames of the finished video, those of a video that is continued included."""
        if self.video is None or self.forcing is None:
            return self.num_frames
        return self.video.frames + self.num_frames - self.forcing.overlap_history

    @property
    def sound(self) -> Sound | None:
        """The sound of the part that is given, where the output can hold it."""
        if self.video is None or self.video.sound is None or not Sound.fits(self.video.sound):
            return None
        return Sound(self.video.path, float(self.video.frames / self.fps))

    @property
    def prompt(self) -> str:
        """The first window's."""
        return self.prompts[0]

    def settings(self) -> dict[str, Any]:
        """Everything that decides the video, as JSON values; images by their size."""
        skipped = {"prompts", "sources", "warnings"}
        values = {
            entry.name: getattr(self, entry.name)
            for entry in dataclasses.fields(self)
            if entry.name not in skipped
        }
        values["prompt"] = self.prompt if len(set(self.prompts)) == 1 else list(self.prompts)
        values["cache"] = dataclasses.asdict(self.cache)
        values["forcing"] = None if self.forcing is None else dataclasses.asdict(self.forcing)
        values["video"] = None if self.video is None else self.video.path.name
        values["fps"] = self.fps if isinstance(self.fps, int) else str(self.fps)
        for name in ("image", "last_image"):
            if (image := values[name]) is not None:
                values[name] = f"{image.shape[1]} x {image.shape[0]}"
        return values
