"""One generation, stage by stage: text, image, condition, denoise, decode."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from skyreels_jax import geometry
from skyreels_jax.components.protocols import Components, VideoCodec
from skyreels_jax.diffusion.sigmas import FlowSchedule
from skyreels_jax.generation.long_video import counted, frames_in_turn
from skyreels_jax.generation.request import ResolvedRequest
from skyreels_jax.generation.rollout import roll_out
from skyreels_jax.generation.video import Video
from skyreels_jax.generation.windows import Window
from skyreels_jax.media import VideoWriter
from skyreels_jax.sampling.denoiser import Denoiser
from skyreels_jax.sampling.progress import Clock, NoProgress, Progress, Timings
from skyreels_jax.shapes import Frames, HostLatents, Latents

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class Sample:
    """A video of one window that is denoised and not decoded yet.

    Attributes:
        latents: finished, ``[16, F, H, W]``.
        settings: all that decided them, as JSON values.
        fps: frames a second, once decoded.
        clock: has timed the stages so far, and goes on with the decoding.
    """

    latents: HostLatents
    settings: Mapping[str, Any]
    fps: int | Fraction
    clock: Clock = field(default_factory=Clock)

    @property
    def timings(self) -> Timings:
        """Seconds by stage, so far."""
        return self.clock.timings

    @property
    def num_frames(self) -> int:
        """Pixel frames, once decoded."""
        return (self.latents.shape[1] - 1) * geometry.FRAMES_PER_LATENT + 1

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels, once decoded."""
        _, _, rows, columns = self.latents.shape
        return rows * geometry.PIXELS_PER_LATENT, columns * geometry.PIXELS_PER_LATENT


def generate(
    components: Components,
    denoiser: Denoiser,
    request: ResolvedRequest,
    *,
    noise: Latents | None = None,
    schedule: FlowSchedule | None = None,
    progress: Progress | None = None,
) -> Video:
    """Make the video of a request.

    Args:
        components: encoders and VAE.
        denoiser: the transformer; keep it between calls to compile once.
        request: from :func:`skyreels_jax.generation.resolve.resolve`.
        noise: latents ``[1, 16, F, H, W]`` in place of the seed's, for a video of one window.
        schedule: noise levels in place of those of ``request.steps`` and ``request.shift``.
        progress: told of every stage.

    Raises:
        NumericsError: something was not finite; says what and where.
        ValueError: ``noise`` has another shape than the request's latents.
    """
    if not request.is_long:
        sampled = sample(
            components, lambda: denoiser, request, noise=noise, schedule=schedule, progress=progress
        )
        return finish(components.codec, sampled)
    return generate_long(
        components,
        lambda: denoiser,
        request,
        noise=None if noise is None else lambda _: noise,
        schedule=schedule,
        progress=progress,
    )


def generate_long(
    components: Components,
    load: Callable[[], Denoiser],
    request: ResolvedRequest,
    *,
    noise: Callable[[Window], Latents] | None = None,
    schedule: FlowSchedule | None = None,
    progress: Progress | None = None,
) -> Video:
    """Make a video of several windows, or continue one, in memory; as :func:`generate`.

    ``noise`` gives that of each window, ``[1, 16, frames, H, W]`` with its given frames.
    """
    clock, windows = Clock(progress or NoProgress()), Gathered()
    rollout = roll_out(
        components, load, request, clock, noise=noise, schedule=schedule, kept=windows
    )
    frames = np.concatenate(list(frames_in_turn(rollout)))
    latents = np.concatenate(windows.pieces, axis=1)
    settings = settings_of(request)
    return Video(frames, request.fps, settings, latents, clock.timings, request.sound)


@dataclass(eq=False)
class Gathered:
    """Keeps what each window added to the video, for this process."""

    pieces: list[HostLatents] = field(default_factory=list)

    def load(self, window: Window) -> None:
        """Nothing: every window is made."""

    def save(self, window: Window, latents: HostLatents) -> None:
        """All of the first window, of later ones what is new."""
        self.pieces.append(latents[:, window.prefix if window.number else 0 :])


def sample(
    components: Components,
    load: Callable[[], Denoiser],
    request: ResolvedRequest,
    *,
    noise: Latents | None = None,
    schedule: FlowSchedule | None = None,
    progress: Progress | None = None,
) -> Sample:
    """Everything up to finished latents of a video of one window; as :func:`generate`.

    ``load`` gives the transformer. It is called once text and image are encoded, and what it gives
    is let go of before this returns: no two large models need to be in memory together.
    """
    (window,) = request.windows
    given = None if noise is None else lambda _: noise
    clock = Clock(progress or NoProgress())
    rollout = roll_out(components, load, request, clock, noise=given, schedule=schedule)
    latents = rollout.latents(window, rollout.prefix())
    return Sample(latents, settings_of(request), request.fps, clock)


def settings_of(request: ResolvedRequest) -> dict[str, Any]:
    """All that decides a video, where each setting came from, and what made it."""
    return request.settings() | {
        "generator": f"skyreels-jax {version('skyreels-jax')}",
        "sources": dict(request.sources),
    }


def finish(codec: VideoCodec, sampled: Sample) -> Video:
    """Decode a sample into a video that is held in memory.

    Raises:
        NumericsError: the VAE's output is not finite.
    """
    frames = np.concatenate(list(decode(codec, sampled)))
    logger.debug("seconds by stage: %s", sampled.clock.seconds)
    return Video(frames, sampled.fps, sampled.settings, sampled.latents, sampled.timings)


def write(codec: VideoCodec, sampled: Sample, path: Path, *, metadata: bool = True) -> None:
    """Decode a sample straight into an MP4: memory does not grow with the video's length.

    Args:
        codec: decodes.
        sampled: what to decode.
        path: ends in ``.mp4``; the file appears when all of it is written.
        metadata: whether the file carries the settings in its ``comment`` tag.

    Raises:
        NumericsError: the VAE's output is not finite.
        RequestError: the path cannot be written to.
    """
    settings = sampled.settings if metadata else None
    with VideoWriter(path, fps=sampled.fps, size=sampled.size, settings=settings) as writer:
        for frames in decode(codec, sampled):
            writer.append(frames)


def decode(codec: VideoCodec, sampled: Sample) -> Iterator[Frames]:
    """Decode piece by piece, so that frames can be written while later ones are still latents.

    Raises:
        NumericsError: the VAE's output is not finite.
    """
    return counted(codec.decode_pieces([sampled.latents]), sampled.num_frames, sampled.clock)
