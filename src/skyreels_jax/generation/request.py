"""What is asked for, and the same with every setting decided.

:func:`skyreels_jax.generation.resolve.resolve` makes the second of the first.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any, Final, Literal, get_args

from skyreels_jax import geometry
from skyreels_jax.diffusion.cache_settings import CacheSettings
from skyreels_jax.generation.windows import Window, plan_windows
from skyreels_jax.geometry import latent_frames
from skyreels_jax.media import ImageInput, RgbImage, Sound
from skyreels_jax.presets import Task

# What a window is given of the one before: its last latents, or their decoded pixels encoded anew.
HandOver = Literal["latents", "pixels"]
HAND_OVERS: Final = get_args(HandOver)


@dataclass(frozen=True, kw_only=True)
class Request:
    """A video somebody wants; ``None`` leaves a setting to the checkpoint.

    Attributes:
        prompt: what to show; several are for the windows of a long video in turn, or by the frame
            from which on each holds.
        negative_prompt: what to keep away from; ``""`` for nothing in particular.
        image: the first frame, for checkpoints that take one.
        last_image: the last frame (first-last-frame checkpoints), or what comes right after it
            (diffusion forcing).
        video: a file to continue (diffusion forcing).
        resolution: ``540P`` or ``720P``, in place of height and width.
        aspect: width to height such as ``9:16``, with or without ``resolution``.
        height: in pixels, a multiple of 16; together with ``width``.
        width: in pixels, a multiple of 16; together with ``height``.
        num_frames: ``4 k + 1``. Where a video is continued, with the frames taken over from it.
        seconds: in place of ``num_frames``; the nearest legal number is taken.
        steps: of the solver.
        guidance_scale: of classifier-free guidance; at exactly 1 it is off.
        shift: of the noise levels, towards noise.
        fps: frames a second; 29.97 and ``30000/1001`` are the same.
        seed: of the noise; drawn if not given.
        dtype: to compute in, ``bfloat16`` or ``float32``.
        attention: name of an attention path; chosen by device and shape if not given.
        noise: ``jax``, or ``torch`` for the numbers that PyTorch's CPU generator gives for a seed.
        reference_exact: the original's rounding and order of work, faults that can be seen refused.
        batched_guidance: both prompts in one call of the transformer, for twice the memory.
        output: the file to write, if one is to be written.
        base_num_frames: most frames that are made at once (diffusion forcing, as all below).
        overlap_history: frames that a window takes over from what is there.
        ar_step: steps by which each block of frames runs behind the one before; 0 for none.
        causal_block_size: latent frames in a block.
        addnoise_condition: timestep to which given frames are noised where the model sees them.
        addnoise_once: the same such noise in every step, so that blocks that are finished need not
            be computed anew.
        hand_over: ``latents`` or ``pixels``: what a window is given of the one before.
        causal_attention: latent frames a block of block-causal attention, for models that learned
            with it.
        cache: ``teacache`` or ``easycache``, to leave calls of the transformer out (every task).
        cache_threshold: how much change may go by before the transformer runs again.
        use_ret_steps: TeaCache looks at the time embedding that the blocks take.
    """

    prompt: str | Sequence[str] | Mapping[int, str]
    negative_prompt: str | None = None
    image: ImageInput | None = field(default=None, compare=False)
    last_image: ImageInput | None = field(default=None, compare=False)
    video: str | Path | None = None
    resolution: str | None = None
    aspect: str | None = None
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    seconds: float | None = None
    steps: int | None = None
    guidance_scale: float | None = None
    shift: float | None = None
    fps: int | float | str | Fraction | None = None
    seed: int | None = None
    dtype: str = "bfloat16"
    attention: str | None = None
    noise: str | None = None
    reference_exact: bool = False
    batched_guidance: bool = False
    output: str | Path | None = None
    base_num_frames: int | None = None
    overlap_history: int | None = None
    ar_step: int | None = None
    causal_block_size: int | None = None
    addnoise_condition: int | None = None
    addnoise_once: bool | None = None
    hand_over: str | None = None
    causal_attention: int | None = None
    cache: str | None = None
    cache_threshold: float | None = None
    use_ret_steps: bool = False


@dataclass(frozen=True, kw_only=True)
class Forcing:
    """How diffusion forcing goes about a video; all numbers legal, in the units of the request."""

    base_num_frames: int
    overlap_history: int
    ar_step: int
    causal_block_size: int
    addnoise_condition: int
    addnoise_once: bool
    hand_over: str
    causal_attention: int | None


@dataclass(frozen=True)
class GivenVideo:
    """A video to continue: where it is, how many frames it has at the rate of the request.

    ``fps`` is its own rate; ``sound`` the codec of its sound, if it has any.
    """

    path: Path
    frames: int
    fps: float
    sound: str | None = None


@dataclass(frozen=True, kw_only=True)
class ResolvedRequest:
    """A request in which every setting is decided and legal.

    ``model`` names the checkpoint and ``task`` what it was made for; ``prompts`` has one for each
    window; ``forcing`` is ``None`` where the task is another; ``sources`` says of each setting
    where it came from; ``notices`` are remarks for the user. The rest is as in :class:`Request`.
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
    dtype: str
    attention: str | None
    noise: str
    reference_exact: bool
    batched_guidance: bool
    cache: CacheSettings
    sources: Mapping[str, str]
    notices: tuple[str, ...]

    @property
    def latent_dtype(self) -> str:
        """Of latents between steps: float32; the original's diffusion forcing rounds them."""
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
        skipped = {"prompts", "sources", "notices"}
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
