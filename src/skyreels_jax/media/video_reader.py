"""Video files as frames of 8-bit RGB, as a player shows them.

Turned as the file says, with square pixels, deinterlaced, HDR mapped to standard range, at the
times that the file gives: resampled by time where another rate is asked for.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Final

import av
import numpy as np
from av.container import InputContainer
from av.filter import Graph
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Colorspace
from av.video.stream import VideoStream

from skyreels_jax.errors import RequestError
from skyreels_jax.files import open_regular
from skyreels_jax.geometry import frame_rate
from skyreels_jax.media.hdr import NAMES, tone_map
from skyreels_jax.media.images import RgbImage
from skyreels_jax.media.kinds import describe_kind, read_head, refuse_as_video, require_file_name
from skyreels_jax.shapes import Frames

# Demuxers that open no other file and start nothing.
_FORMATS: Final = (
    "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,mpeg,mpegvideo,m4v,h264,hevc,av1,ivf,obu,flv,"
    "ogg,asf,mxf,nut,dv,gif,yuv4mpegpipe,mjpeg"
)
# More than this for a frame is no film.
_MAX_PIXELS: Final = 2**26
# Frames apart by more than this share of the usual distance: the rate varies. Beside it, what
# containers that count milliseconds round by.
_UNEVEN: Final = Fraction(1, 4)
_ROUNDING: Final = Fraction(2, 1000)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class VideoInfo:
    """What a video holds, decoded once from end to end.

    Attributes:
        path: of the file.
        frames: how many it has.
        rate: frames a second; the average where it varies.
        seconds: from the first frame's beginning to the last one's end.
        varies: whether frames are unevenly apart.
        sound: name of the codec of its sound, ``None`` where it has none.
        first: the first frame.
        warnings: what a person should know of the file.
    """

    path: Path
    frames: int
    rate: Fraction
    seconds: Fraction
    varies: bool
    sound: str | None
    first: RgbImage
    warnings: tuple[str, ...]

    def frames_at(self, fps: Fraction | int) -> int:
        """How many frames :func:`stream_video` gives at ``fps``."""
        return sum(1 for _ in _ticks(self.seconds, Fraction(fps)))


def read_video(path: str | Path) -> tuple[Frames, Fraction]:
    """All frames of a video, and frames a second.

    Raises:
        RequestError: as for :func:`stream_video`, or the video has no frame.
    """
    with opened_video(path) as container:
        shown = list(_shown(container, path))
        rate = _rate(_moving(container)[0])
    if not shown:
        raise RequestError(f"video {path} has no frames")
    return np.stack([rgb for _, _, rgb in shown]), rate


def stream_video(path: str | Path, fps: Fraction | int | None = None) -> Iterator[RgbImage]:
    """The frames of a video one by one, in memory that does not grow with their number.

    Args:
        path: of the file.
        fps: frames a second to give: for each moment the frame that a player shows then. ``None``
            gives each frame once.

    Raises:
        RequestError: the file is missing or holds no video that can be decoded.
    """
    with opened_video(path) as container:
        if fps is None:
            yield from (rgb for _, _, rgb in _shown(container, path))
        else:
            yield from _resampled(_shown(container, path), Fraction(fps))


def survey_video(path: str | Path) -> VideoInfo:
    """Look through a video.

    Raises:
        RequestError: as for :func:`stream_video`, or the video has no frame.
    """
    times: list[Fraction] = []
    first, end, interlaced = None, Fraction(0), False
    with opened_video(path) as container:
        stream = _moving(container)[0]
        for frame, start, stop in _timed(container, path):
            # Of the others nothing is looked at, and what is not converted costs no time.
            first = _seen(frame, stream) if first is None else first
            interlaced = interlaced or bool(frame.interlaced_frame)
            times.append(start)
            end = stop
        rate, transfer = _rate(stream), int(stream.codec_context.color_trc)
        announced = _announced_seconds(container, stream)
        sound = next((audio.codec_context.name for audio in container.streams.audio), None)
    if first is None:
        raise RequestError(f"video {path} has no frames")
    apart = [b - a for a, b in zip(times, times[1:], strict=False)]
    usual = sorted(apart)[len(apart) // 2] if apart else 1 / rate
    varies = any(abs(gap - usual) > usual * _UNEVEN + _ROUNDING for gap in apart)
    if varies:
        rate = Fraction(len(times)) / end
    name, said = Path(path).name, []
    if transfer in NAMES:
        said.append(f"{name} is HDR in {NAMES[transfer]}: mapped to standard range")
    if interlaced:
        said.append(f"{name} is interlaced: its lines are put together")
    if varies:
        said.append(f"the frame rate of {name} varies, {float(rate):g} a second in the mean")
    if announced is not None and announced - end > max(5 * usual / 2, announced / 100):
        said.append(
            f"{name} announces {float(announced):.2f} seconds and holds {float(end):.2f}: its end "
            f"is missing, and it is taken to end after {len(times)} frames"
        )
    return VideoInfo(Path(path), len(times), rate, end, varies, sound, first, tuple(said))


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings a video of ours carries.

    Raises:
        RequestError: the file is missing, is no video, or carries none.
    """
    with opened_video(path) as container:
        comment = container.metadata.get("comment", "")
    try:
        settings = json.loads(comment)
    except (json.JSONDecodeError, RecursionError):
        settings = None
    if not isinstance(settings, dict):
        raise RequestError(f"video {path} carries no settings in its comment")
    return settings


@contextmanager
def opened_video(path: str | Path) -> Iterator[InputContainer]:
    """Open a regular file of a format that opens no other; errors of FFmpeg become ours.

    Raises:
        RequestError: as for :func:`stream_video`.
    """
    require_file_name(path, "video")
    with open_regular(path, "video") as file:
        refuse_as_video(path, describe_kind(read_head(file)))
        # As a stream: a name with a colon is no address, and no playlist opens what it names.
        options = {"format_whitelist": _FORMATS, "protocol_whitelist": "none"}
        try:
            with av.open(file, "r", options=options, metadata_errors="replace") as container:
                if not _moving(container):
                    raise RequestError(f"video {path} has no picture")
                yield container
        except (av.FFmpegError, ValueError, EOFError) as error:
            if isinstance(error, RequestError):
                raise
            raise RequestError(f"video {path} cannot be read ({error}); is it whole?") from error


def _moving(container: InputContainer) -> list[VideoStream]:
    """Video streams without the cover pictures that music and podcasts carry."""
    covers = Disposition.attached_pic
    return [s for s in container.streams.video if not s.disposition & covers]


def _rate(stream: VideoStream) -> Fraction:
    found = stream.average_rate or stream.guessed_rate
    return Fraction(frame_rate(found)) if found else Fraction(25)


def _announced_seconds(container: InputContainer, stream: VideoStream) -> Fraction | None:
    """How long the container says the picture lasts, where it does."""
    if stream.duration is not None and stream.time_base is not None:
        return stream.duration * stream.time_base
    # The container's may be that of longer sound.
    if container.duration is None or container.streams.audio:
        return None
    return Fraction(container.duration, av.time_base)


def _shown(
    container: InputContainer, path: str | Path
) -> Iterator[tuple[Fraction, Fraction, RgbImage]]:
    """When each frame begins and ends, and what is seen of it."""
    stream = _moving(container)[0]
    for frame, start, stop in _timed(container, path):
        yield start, stop, _seen(frame, stream)


def _timed(
    container: InputContainer, path: str | Path
) -> Iterator[tuple[VideoFrame, Fraction, Fraction]]:
    """Decoded frames; with each when it begins and ends, the first at 0."""
    stream = _moving(container)[0]
    rate = _rate(stream)
    size, origin, before, end = None, None, Fraction(0), Fraction(0)
    for frame in _deinterlaced(container.decode(stream)):
        size = size or (frame.width, frame.height)
        if frame.width * frame.height > _MAX_PIXELS:
            raise RequestError(f"video {path} is {frame.width} x {frame.height}: too large")
        if (frame.width, frame.height) != size:
            raise RequestError(
                f"video {path} changes its size from {size[0]} x {size[1]} to {frame.width} x "
                f"{frame.height} in the middle; write it again in one size"
            )
        if frame.pts is None or frame.time_base is None:
            start = end
        else:
            start = frame.pts * frame.time_base
            origin = start if origin is None else origin
            start -= origin
        last = frame.duration * frame.time_base if frame.duration and frame.time_base else 1 / rate
        # Containers of unevenly timed frames give the last one any length.
        end = start + max(last, start - before)
        before = start
        yield frame, start, end


def _deinterlaced(frames: Iterator[VideoFrame]) -> Iterator[VideoFrame]:
    """Frames whose two fields were taken at different times are put together by FFmpeg's yadif."""
    graph: Graph | None = None
    for frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield frame
            continue
        if graph is None:
            graph = Graph()
            source = graph.add_buffer(
                width=frame.width,
                height=frame.height,
                format=frame.format,
                time_base=frame.time_base or Fraction(1, 25),
            )
            filtered = graph.add("yadif", "deint=interlaced")
            source.link_to(filtered)
            filtered.link_to(graph.add("buffersink"))
            graph.configure()
        graph.vpush(frame)
        yield from _pulled(graph)
    if graph is not None:
        graph.vpush(None)
        yield from _pulled(graph)


def _pulled(graph: Graph) -> Iterator[VideoFrame]:
    while True:
        try:
            yield graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return


def _seen(frame: VideoFrame, stream: VideoStream) -> RgbImage:
    """A frame as a player shows it."""
    aspect = stream.sample_aspect_ratio
    width = frame.width
    if aspect and Fraction(1, 16) <= aspect <= 16:
        width = max(1, round(frame.width * aspect))
    transfer = int(stream.codec_context.color_trc)
    if transfer in NAMES:
        wide = frame.reformat(
            width, frame.height, format="rgb48le", src_colorspace=Colorspace.BT2020
        )
        rgb = tone_map(wide.to_ndarray(), transfer)
    else:
        wide = frame if width == frame.width else frame.reformat(width, frame.height)
        rgb = wide.to_ndarray(format="rgb24")
    turns = round((frame.rotation or 0) / 90) % 4
    return np.ascontiguousarray(np.rot90(rgb, turns)) if turns else rgb


def _ticks(seconds: Fraction, fps: Fraction) -> Iterator[Fraction]:
    """Moments a frame apart that begin before the end; one that is all but at the end is none."""
    tick, quarter = Fraction(0), 1 / (4 * fps)
    while tick < seconds - quarter or tick == 0:
        yield tick
        tick += 1 / fps


def _resampled(
    shown: Iterator[tuple[Fraction, Fraction, RgbImage]], fps: Fraction
) -> Iterator[RgbImage]:
    """For each moment the frame that is shown then; containers round times by a little."""
    tick, before = Fraction(0), None
    for start, stop, rgb in shown:
        if before is not None:
            while tick < start - 1 / (4 * fps):
                yield before[2]
                tick += 1 / fps
        before = (start, stop, rgb)
    if before is not None:
        for moment in _ticks(before[1], fps):
            if moment >= tick:
                yield before[2]
