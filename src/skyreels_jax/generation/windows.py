"""How a video longer than the model can see at once is cut: overlapping windows of latent frames.

Source: the long-video loop of SkyReels-V2's ``diffusion_forcing_pipeline.py``. A window is the
last ``overlap`` frames of what is there, given and clean, and new frames after them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from skyreels_jax.errors import RequestError
from skyreels_jax.geometry import pixel_frames


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
                f"{len(prompts)} prompts for {len(windows)} windows: give at most one for each, or "
                "shorter windows (`base_num_frames`)"
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
