"""What is asked for, and the same with every setting decided.

:func:`skyreels_jax.generation.resolve.resolve` makes the second of the first.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from skyreels_jax.generation import sizes
from skyreels_jax.media import ImageInput, RgbImage
from skyreels_jax.presets import Task


@dataclass(frozen=True, kw_only=True)
class Request:
    """A video somebody wants; ``None`` leaves a setting to the checkpoint.

    Attributes:
        prompt: what to show.
        negative_prompt: what to keep away from; ``""`` for nothing in particular.
        image: the first frame, for checkpoints that take one.
        last_image: the last frame, for first-last-frame checkpoints.
        resolution: ``540P`` or ``720P``, in place of height and width.
        aspect: width to height such as ``9:16``, with or without ``resolution``.
        height: in pixels, a multiple of 16; together with ``width``.
        width: in pixels, a multiple of 16; together with ``height``.
        num_frames: ``4 k + 1``.
        seconds: in place of ``num_frames``; the nearest legal number is taken.
        steps: of the solver.
        guidance_scale: of classifier-free guidance; at exactly 1 it is off.
        shift: of the noise levels, towards noise.
        fps: frames a second.
        seed: of the noise; drawn if not given.
        dtype: to compute in, ``bfloat16`` or ``float32``.
        attention: name of an attention path; chosen by device and shape if not given.
        batched_guidance: both prompts in one call of the transformer, for twice the memory.
        output: the file to write, if one is to be written.
    """

    prompt: str
    negative_prompt: str | None = None
    image: ImageInput | None = field(default=None, compare=False)
    last_image: ImageInput | None = field(default=None, compare=False)
    resolution: str | None = None
    aspect: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    seconds: float | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    fps: int | None = None
    seed: int | None = None
    dtype: str = "bfloat16"
    attention: str | None = None
    batched_guidance: bool = False
    output: str | Path | None = None


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """A request in which every setting is decided and legal.

    ``model`` names the checkpoint and ``task`` what it was made for; ``sources`` says of each
    setting where it came from; ``notices`` are remarks for the user. The rest is as in
    :class:`Request`.
    """

    model: str
    task: Task
    prompt: str
    negative_prompt: str
    image: RgbImage | None = field(compare=False)
    last_image: RgbImage | None = field(compare=False)
    height: int
    width: int
    num_frames: int
    steps: int
    guidance_scale: float
    shift: float
    fps: int
    seed: int
    dtype: str
    attention: str | None
    batched_guidance: bool
    sources: Mapping[str, str]
    notices: tuple[str, ...]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """Latent frames, rows and columns."""
        return sizes.latent_shape(self.num_frames, self.height, self.width)

    def settings(self) -> dict[str, Any]:
        """Everything that decides the video, as JSON values; images by their size."""
        skipped = {"sources", "notices"}
        values = {
            entry.name: getattr(self, entry.name)
            for entry in dataclasses.fields(self)
            if entry.name not in skipped
        }
        for name in ("image", "last_image"):
            if (image := values[name]) is not None:
                values[name] = f"{image.shape[1]} x {image.shape[0]}"
        return values
