"""A request with every setting decided, and the windows that its video is made in.

:func:`skyreels_jax.generation.request.resolve.resolve` makes it. A video longer than the model can
see at once is cut into overlapping windows of latent frames.

Source of the windows: the long-video loop of SkyReels-V2's ``diffusion_forcing_pipeline.py``. A
window is the last ``overlap`` frames of what is there, given and clean, and new frames after them.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cached_property
from pathlib import Path
from typing import Any

from skyreels_jax import geometry
from skyreels_jax.diffusion.cache_settings import CacheSettings
from skyreels_jax.errors import RequestError
from skyreels_jax.generation.request.settings import PlainSettings
from skyreels_jax.geometry import latent_frames, pixel_frames
from skyreels_jax.media import RgbImage, Sound
from skyreels_jax.presets import Task


@dataclass(frozen=True)
class Window:
    """One run of the transformer; all numbers are latent frames, ``start`` those of the video.

    Attributes:
        number: from 0.
        start: where its first frame, given ones included, is in the video.
        frames: how many it has, given ones included and an end frame not.
        prefix: how many of them are given.
        end: whether an end frame follows, which the video does not show.
    """

    number: int
    start: int
    frames: int
    prefix: int
    end: bool = False

    @property
    def first_new(self) -> int:
        """The video's latent frame that is the first this window makes."""
        return self.start + self.prefix

    @property
    def columns(self) -> int:
        """Frames that the transformer sees."""
        return self.frames + int(self.end)


def plan_windows(
    total: int, size: int, overlap: int, *, prefix: int = 0, end: bool = False
) -> tuple[Window, ...]:
    """Windows of at most ``size`` frames that cover ``total``; only the last may be shorter.

    Args:
        total: latent frames of the video, ``prefix`` included.
        size: of a window.
        overlap: frames a window takes over from the one before.
        prefix: frames given to the first window: an image, or the end of another video.
        end: an end frame stands after the last window's.

    Raises:
        ValueError: numbers that leave a window without new frames.
    """
    if not (0 <= prefix < min(total, size) and (total <= size or 1 <= overlap < size)):
        raise ValueError(f"{total=} {size=} {overlap=} {prefix=}: a window has no new frames")
    stride = size - overlap
    count = 1 if total <= size else 1 + -(-(total - size) // stride)
    return tuple(
        Window(
            number=i,
            start=i * stride,
            frames=min(size, total - i * stride),
            prefix=overlap if i else prefix,
            end=end and i == count - 1,
        )
        for i in range(count)
    )


def prompts_by_window(
    prompts: Sequence[str] | Mapping[int, str], windows: Sequence[Window]
) -> tuple[str, ...]:
    """The prompt of each window.

    Args:
        prompts: one for each window in order, the last one for all that follow; or by the pixel
            frame from which on they hold. A window has the prompt in force at its first new frame.
        windows: of the video.

    Raises:
        RequestError: a prompt that no window would have.
    """
    if not isinstance(prompts, Mapping):
        if len(prompts) > len(windows):
            raise RequestError(
                f"{len(prompts)} prompts for {len(windows)} windows: several prompts are for the "
                "windows of one video, in turn; give at most one for each, or shorter windows "
                "(`base_num_frames`), or call once for each prompt for a video of each"
            )
        return tuple(prompts[min(i, len(prompts) - 1)] for i in range(len(windows)))
    starts = sorted(prompts)
    if not starts or starts[0] != 0:
        raise RequestError(f"prompts start at frames {starts}: the first must start at frame 0")
    begins = [pixel_frames(window.first_new) if window.number else 0 for window in windows]
    chosen = [max(start for start in starts if start <= begin) for begin in begins]
    if unused := [start for start in starts if start not in chosen]:
        raise RequestError(
            f"the prompts from frames {', '.join(map(str, unused))} would never be used: new "
            f"windows begin at frames {', '.join(map(str, begins))}, and each takes the prompt in "
            "force there"
        )
    return tuple(prompts[start] for start in chosen)


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
    where it came from; ``warnings`` are for the user, and ``length_warnings`` those of them that
    speak of the number of frames, which a stream has not; ``loras`` names what was added to the
    transformer, and how much of it. The rest is as in
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
    length_warnings: tuple[str, ...] = ()
    loras: tuple[tuple[str, float], ...] = ()

    def value_of(self, name: str) -> Any:
        """The resolved value of a setting."""
        return getattr(self if hasattr(self, name) else self.forcing, name)

    @property
    def exact_forcing(self) -> bool:
        """Whether the original's diffusion-forcing pipeline is followed to the letter."""
        return self.reference_exact and self.forcing is not None

    @property
    def reading_rate(self) -> int | Fraction | None:
        """Frames a second of a video that is continued; ``None`` takes each once, as is."""
        return None if self.reference_exact else self.fps

    @property
    def latent_dtype(self) -> str:
        """The dtype of latents between steps: float32, unless rounded as the original rounds."""
        return self.dtype if self.exact_forcing else "float32"

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
    def rows(self) -> int:
        """Rows of a batch of the transformer: two with both prompts in it."""
        return 2 if self.batched_guidance and self.is_guided else 1

    @property
    def is_guided(self) -> bool:
        """Whether the negative prompt counts."""
        return self.guidance_scale != 1

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
        skipped = {"prompts", "sources", "warnings", "length_warnings"}
        skipped |= {*(() if self.loras else ("loras",))}
        values = {
            entry.name: getattr(self, entry.name)
            for entry in dataclasses.fields(self)
            if entry.name not in skipped
        }
        if self.loras:
            values["loras"] = [{"file": name, "scale": scale} for name, scale in self.loras]
        values["prompt"] = self.prompt if len(set(self.prompts)) == 1 else list(self.prompts)
        values["cache"] = dataclasses.asdict(self.cache)
        values["forcing"] = None if self.forcing is None else dataclasses.asdict(self.forcing)
        values["video"] = None if self.video is None else self.video.path.name
        values["fps"] = self.fps if isinstance(self.fps, int) else str(self.fps)
        for name in ("image", "last_image"):
            if (image := values[name]) is not None:
                values[name] = f"{image.shape[1]} x {image.shape[0]}"
        return values
