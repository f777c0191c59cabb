"""Videos of any length: windows in turn, and their frames as soon as they are finished.

Memory holds one window and the VAE's state, whatever the length. A window is given the end of the
one before in one of two ways: its latents as they are, with one decoding that goes on through the
whole video (diffusers' way), or its decoded pixels encoded anew, with a decoding for each window
(the original's way). docs/adr/0004-hand-over.md has the reasons for the default.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Final

import numpy as np
from PIL import Image

from skyreels_jax.components.conditioning import prepare_image, to_frames
from skyreels_jax.errors import NumericsError
from skyreels_jax.generation.request import ResolvedRequest
from skyreels_jax.generation.rollout import Rollout
from skyreels_jax.generation.windows import pixel_frames
from skyreels_jax.media import stream_video
from skyreels_jax.sampling.progress import Clock
from skyreels_jax.shapes import Frames, HostLatents, Pixels


def frames_in_turn(rollout: Rollout) -> Iterator[Frames]:
    """All frames of a request's video in order: those of a video to continue, then new ones.

    Raises:
        NumericsError: something was not finite; says what and where.
        Stopped: somebody asked the clock to, between two steps; all finished windows were given.
    """
    request, clock = rollout.request, rollout.clock
    if request.video is not None:
        yield from given_frames(request)
    pixels = HAND_OVERS[request.forcing.hand_over if request.forcing else "latents"](rollout)
    yield from counted(pixels, new_frames(request), clock)


def new_frames(request: ResolvedRequest) -> int:
    """How many frames are made, those taken over from a video to continue not counted."""
    overlap = request.forcing.overlap_history if request.forcing and request.video else 0
    return request.num_frames - overlap


def given_frames(request: ResolvedRequest) -> Iterator[Frames]:
    """The frames of the video to continue, cropped and resized to the request's size."""
    assert request.video is not None
    size = request.height, request.width
    for frame in stream_video(request.video.path, request.fps):
        fitted = prepare_image(frame, *size, Image.Resampling.BICUBIC)
        yield to_frames(fitted.pixels[:, None])


def from_latents(rollout: Rollout) -> Iterator[Pixels]:
    """One decoding of all windows; each is given the last latents of the one before."""
    request = rollout.request

    def pieces() -> Iterator[HostLatents]:
        prefix = rollout.prefix()
        if request.video is not None and prefix is not None:
            yield prefix
        for window in request.windows:
            latents = rollout.latents(window, prefix)
            shown = window.prefix if window.number or request.video else 0
            if window != request.windows[-1]:
                prefix = latents[:, -request.windows[window.number + 1].prefix :]
            yield latents[:, shown:]

    skipped = pixel_frames(request.windows[0].prefix) if request.video else 0
    return without_first(rollout.components.codec.decode_pieces(pieces()), skipped)


def from_pixels(rollout: Rollout) -> Iterator[Pixels]:
    """A decoding for each window; each is given the last frames of the one before, encoded anew."""
    request, codec = rollout.request, rollout.components.codec
    prefix = rollout.prefix()
    for window in request.windows:
        latents = rollout.latents(window, prefix)
        shown = pixel_frames(window.prefix) if window.number or request.video else 0
        last = window == request.windows[-1]
        tail = Tail(0 if last else pixel_frames(request.windows[window.number + 1].prefix))
        yield from without_first(tail.watch(codec.decode_pieces([latents])), shown)
        prefix = None if last else codec.encode(tail.frames())


@dataclass
class Tail:
    """Keeps the last ``length`` frames of what passes."""

    length: int
    kept: list[Pixels] = field(default_factory=list)

    def watch(self, pixels: Iterable[Pixels]) -> Iterator[Pixels]:
        """The same pixels."""
        for chunk in pixels:
            self.kept.append(chunk)
            while self.kept and sum(kept.shape[1] for kept in self.kept[1:]) >= self.length:
                del self.kept[0]
            yield chunk

    def frames(self) -> Pixels:
        """``length`` frames."""
        return np.concatenate(self.kept, axis=1)[:, -self.length :]


def without_first(pixels: Iterable[Pixels], count: int) -> Iterator[Pixels]:
    """All frames but the first ``count``."""
    for chunk in pixels:
        skipped = min(count, chunk.shape[1])
        count -= skipped
        if skipped < chunk.shape[1]:
            yield chunk[:, skipped:]


def counted(pixels: Iterable[Pixels], total: int, clock: Clock) -> Iterator[Frames]:
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


HAND_OVERS: Final[dict[str, Callable[[Rollout], Iterator[Pixels]]]] = {
    "latents": from_latents,
    "pixels": from_pixels,
}
