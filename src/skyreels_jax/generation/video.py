"""A request becomes a video: windows are made in turn, and decoded as soon as they are finished.

Memory holds one window and the VAE's state, whatever the length. A window continues the one before
in one of two ways: from its latents as they are, with one decoding that goes on through the whole
video (diffusers' way), or from its decoded pixels encoded anew, with a decoding for each window
(the original's way). ADR 0004 has the reasons for the default.
"""

import base64
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np

from skyreels_jax import media
from skyreels_jax.components.encoders import fitted_frames, to_frames
from skyreels_jax.components.lazy import loaded_vae
from skyreels_jax.components.protocols import Autoencoder, Components
from skyreels_jax.diffusion.unipc import FlowSchedule
from skyreels_jax.errors import NumericsError, Stopped
from skyreels_jax.generation.request.resolved import ResolvedRequest, Window
from skyreels_jax.generation.store import MemoryStore
from skyreels_jax.generation.window_generator import SMALLER_WINDOWS, WindowGenerator
from skyreels_jax.geometry import pixel_frames
from skyreels_jax.memory import refused_in_words
from skyreels_jax.sampling.denoiser import Denoiser
from skyreels_jax.sampling.progress import Clock, NoProgress, Progress, Timings
from skyreels_jax.shapes import Frames, HostLatents, Latents, Pixels

_SMALLER_DECODE: Final = "decode with `vae_tiling` on, or make a smaller size"
# Of an MP4 that a notebook holds in itself.
_MAX_SHOWN_BYTES: Final = 16 * 2**20


@dataclass(frozen=True, eq=False, repr=False)
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

    def __repr__(self) -> str:
        count, height, width, _ = self.frames.shape
        prompt = str(self.settings.get("prompt", ""))
        shown = prompt if len(prompt) <= 40 else f"{prompt[:39]}…"
        size = f"{count} frames of {width}x{height}"
        seconds = float(count / self.fps)
        return f"<Video: {size} at {float(self.fps):g} fps, {seconds:.1f} s, {shown!r}>"

    def _repr_html_(self) -> str:
        """A player, for notebooks; the first frame alone where the file would be too large."""
        with tempfile.TemporaryDirectory() as folder:
            file = self.save(Path(folder) / "video.mp4", metadata=False)
            if file.stat().st_size <= _MAX_SHOWN_BYTES:
                content = base64.b64encode(file.read_bytes()).decode()
                source = f"data:video/mp4;base64,{content}"
                return f'<video controls loop muted autoplay src="{source}"></video>'
            picture = Path(folder) / "frame.jpg"
            media.write_image(picture, self.frames[0])
            content = base64.b64encode(picture.read_bytes()).decode()
        return f'<img src="data:image/jpeg;base64,{content}"><p>first frame; save() writes all</p>'


def generate(
    components: Components,
    load: Callable[[], Denoiser],
    request: ResolvedRequest,
    *,
    noise: Callable[[Window], Latents] | None = None,
    schedule: FlowSchedule | None = None,
    progress: Progress | None = None,
) -> Video:
    """Make the video of a request, in memory.

    Args:
        components: encoders and VAE.
        load: gives the transformer; keep it between calls to compile once.
        request: from :func:`skyreels_jax.generation.request.resolve.resolve`.
        noise: of a window, ``[1, 16, frames, H, W]`` with its known frames, in place of the seed's.
        schedule: sigmas in place of those of ``request.steps`` and ``request.shift``.
        progress: told of every stage.

    Raises:
        NumericsError: something was not finite; says what and where.
        ValueError: ``noise`` has another shape than a window's latents.
    """
    store, clock = MemoryStore(), Clock(progress or NoProgress())
    generator = WindowGenerator(
        components, load, request, clock=clock, store=store, noise=noise, schedule=schedule
    )
    frames = np.concatenate(list(stream_frames(generator)))
    settings = settings_of(request)
    return Video(frames, request.fps, settings, store.latents, clock.timings, request.sound)


def settings_of(request: ResolvedRequest) -> dict[str, Any]:
    """All that decides a video, where each setting came from, and what made it."""
    return request.settings() | {
        "generator": f"skyreels-jax {version('skyreels-jax')}",
        "sources": dict(request.sources),
    }


def stream_frames(generator: WindowGenerator, first: HostLatents | None = None) -> Iterator[Frames]:
    """All frames of a request's video in order: those of a video to continue, then new ones.

    The first window is made before the VAE is loaded. If it is the only one, the transformer has
    left memory by then; else both stay until the last window is made.

    Args:
        generator: of the windows.
        first: the latents of the first, where they are made already.

    Raises:
        NumericsError: something was not finite; says what and where.
        Stopped: somebody asked the clock to, between two steps; all finished windows were given.
        UnsupportedError: the memory is not enough.
    """
    request, windows = generator.request, generator.request.windows
    overlap = 0
    if request.video is not None:
        assert request.forcing is not None
        overlap = request.forcing.overlap_history
        yield from _frames_of_file(request)
    alone = len(windows) == 1
    if first is None:
        first = generator.make(windows[0])
    with refused_in_words(_SMALLER_DECODE if alone else SMALLER_WINDOWS):
        vae = loaded_vae(generator.components.vae)
        continue_from = request.forcing.continuation if request.forcing else "latents"
        pixels = _CONTINUATIONS[continue_from](generator, vae, first)
        yield from _checked_frames(pixels, request.num_frames - overlap, generator.clock)


def decode_latents(vae: Autoencoder, latents: HostLatents, clock: Clock) -> Iterator[Frames]:
    """The frames of a video of one window whose latents are finished.

    Raises:
        NumericsError: the VAE's output is not finite.
        UnsupportedError: the memory is not enough.
    """
    with refused_in_words(_SMALLER_DECODE):
        yield from _checked_frames(
            vae.decode_pieces([latents]), pixel_frames(latents.shape[1]), clock
        )


def write_mp4(
    frames: Iterable[Frames],
    path: Path,
    *,
    fps: int | Fraction,
    size: tuple[int, int],
    settings: Mapping[str, Any] | None,
    sound: media.Sound | None = None,
    replace: bool = True,
) -> int:
    """Write frames into an MP4 as they come, in memory that does not grow with their number.

    Args:
        frames: in order.
        path: ends in ``.mp4``; the file appears when all of it is written, or the run is stopped.
        fps: frames a second.
        size: height and width in pixels.
        settings: for the file's ``comment`` tag.
        sound: of a video that is continued.
        replace: what is there when all is written; else that is a FileExistsError.

    Returns:
        How many frames were written.

    Raises:
        Stopped: somebody asked to; the file is whole, and there unless it has no frame.
        RequestError: the path cannot be written to.
    """
    stopped = None
    with media.VideoWriter(
        path, fps=fps, size=size, settings=settings, sound=sound, replace=replace
    ) as writer:
        try:
            for some in frames:
                writer.append(some)
        except Stopped as error:
            if not writer.written:
                raise
            stopped = error
    if stopped is not None:
        raise stopped
    return writer.written


def _frames_of_file(request: ResolvedRequest) -> Iterator[Frames]:
    """The frames of the video to continue, at the request's size."""
    assert request.video is not None
    size = request.height, request.width
    for frame in fitted_frames(request.video.path, size, request.reading_rate):
        yield to_frames(frame.pixels[:, None])


def _from_latents(
    generator: WindowGenerator, vae: Autoencoder, first: HostLatents
) -> Iterator[Pixels]:
    """One decoding of all windows; each begins with the last latents of the one before."""
    request = generator.request

    def pieces() -> Iterator[HostLatents]:
        latents, prefix = first, generator.known.prefix
        if request.video is not None and prefix is not None:
            yield prefix
        for window in request.windows:
            if window.number:
                latents = generator.make(window, latents[:, -window.prefix :])
            yield latents[:, window.prefix if window.number or request.video else 0 :]

    skipped = pixel_frames(request.windows[0].prefix) if request.video else 0
    return _without_first(vae.decode_pieces(pieces()), skipped)


def _from_pixels(
    generator: WindowGenerator, vae: Autoencoder, first: HostLatents
) -> Iterator[Pixels]:
    """A decoding for each window; each begins with the last frames of the one before, encoded."""
    request, latents = generator.request, first
    tail = _Tail(0)
    for window, after in zip(request.windows, (*request.windows[1:], None), strict=True):
        if window.number:
            latents = generator.make(window, vae.encode(tail.frames()))
        tail = _Tail(0 if after is None else pixel_frames(after.prefix))
        skipped = pixel_frames(window.prefix) if window.number or request.video else 0
        yield from _without_first(tail.passing(vae.decode_pieces([latents])), skipped)


_CONTINUATIONS: Final[
    Mapping[str, Callable[[WindowGenerator, Autoencoder, HostLatents], Iterator[Pixels]]]
] = {"latents": _from_latents, "pixels": _from_pixels}


@dataclass
class _Tail:
    """The last ``length`` frames of what passes."""

    length: int
    chunks: list[Pixels] = field(default_factory=list)

    def passing(self, pixels: Iterable[Pixels]) -> Iterator[Pixels]:
        """The same pixels."""
        for chunk in pixels:
            self.chunks.append(chunk)
            while self.chunks and sum(kept.shape[1] for kept in self.chunks[1:]) >= self.length:
                del self.chunks[0]
            yield chunk

    def frames(self) -> Pixels:
        """``length`` frames."""
        return np.concatenate(self.chunks, axis=1)[:, -self.length :]


def _without_first(pixels: Iterable[Pixels], count: int) -> Iterator[Pixels]:
    """All frames but the first ``count``."""
    for chunk in pixels:
        skipped = min(count, chunk.shape[1])
        count -= skipped
        if skipped < chunk.shape[1]:
            yield chunk[:, skipped:]


def _checked_frames(pixels: Iterable[Pixels], total: int, clock: Clock) -> Iterator[Frames]:
    """8-bit frames as they are decoded, each checked and reported.

    Raises:
        NumericsError: the VAE's output is not finite.
    """
    done = 0
    with clock.stage("decode", total):
        for chunk in pixels:
            if not np.all(np.isfinite(chunk)):
                raise NumericsError(
                    f"decoding gave NaN or infinity after frame {done} of {total}: the VAE's "
                    "weights are damaged or a value overflowed in its dtype"
                )
            frames = to_frames(chunk)
            done += len(frames)
            clock.progress.advance("decode", done)
            yield frames
