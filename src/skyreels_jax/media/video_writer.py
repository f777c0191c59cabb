"""Writing MP4 files: whole or not at all, with the settings that made them."""

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import av
import numpy as np
from av.container import OutputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from av.video.stream import VideoStream
from jaxtyping import UInt8

from skyreels_jax.errors import RequestError
from skyreels_jax.files import json_text, whole_file, write_json
from skyreels_jax.geometry import frame_rate
from skyreels_jax.media.video_reader import opened_video
from skyreels_jax.outputs import check_names, check_place
from skyreels_jax.shapes import Frames

# x264's constant quality; 17 is generally taken for the point where losses become invisible.
CRF: Final = 17
# x264's fastest routines give another file for the same frames each time (up to 60 different
# files of 60); those chosen for reproducibility give one, in the same time.
# Of sound; others would have to be encoded anew.
_SOUND_CODECS: Final = ("aac", "mp3", "mp3float", "ac3", "eac3", "alac", "opus", "libopus")
ENCODER: Final = {"crf": str(CRF), "x264-params": "cpu-independent=1"}


def check_output(path: str | Path) -> None:
    """Refuse a path that no video can be written to.

    Raises:
        RequestError: its suffix is not ``.mp4``, or no file can be made there.
    """
    path = Path(path)
    check_names([path])
    if path.suffix.lower() != ".mp4":
        raise RequestError(f"output {path}: the name must end in .mp4, for example {path.stem}.mp4")
    check_place(path)


@dataclass(frozen=True)
class Sound:
    """The sound of a video file, from its beginning on.

    Attributes:
        path: of the file.
        seconds: how much of it.
    """

    path: Path
    seconds: float

    @staticmethod
    def fits(codec: str) -> bool:
        """Whether MP4 can hold sound of this codec as it is."""
        return codec in _SOUND_CODECS


def check_size(size: tuple[int, int]) -> None:
    """Refuse a height and a width that 4:2:0 cannot hold; raises RequestError."""
    if size[0] % 2 or size[1] % 2:
        raise RequestError(f"a video of {size[0]} x {size[1]} pixels: both must be even")


def add_pictures(
    container: OutputContainer,
    fps: Fraction,
    size: tuple[int, int],
    options: Mapping[str, str] = ENCODER,
) -> VideoStream:
    """A stream of pictures (H.264, 4:2:0, BT.709) in a file that is written."""
    stream = container.add_stream("libx264", rate=fps, options=dict(options))
    stream.height, stream.width = size
    stream.pix_fmt = "yuv420p"
    # Untagged video is decoded as 601 or 709 by its size, player by player.
    context = stream.codec_context
    context.colorspace = Colorspace.ITU709
    context.color_range = ColorRange.MPEG
    context.color_primaries = ColorPrimaries.BT709
    context.color_trc = ColorTrc.BT709
    return stream


def as_picture(
    frame: UInt8[np.ndarray, "height width 3"], number: int, fps: Fraction
) -> av.VideoFrame:
    """Frame ``number`` of a video as its encoder takes it."""
    picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
        format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
    )
    picture.pts = number
    picture.time_base = 1 / fps
    return picture


class VideoWriter:
    """Writes an MP4 (H.264, 4:2:0, plays in browsers while it loads) piece by piece.

    Use as a context manager: the file appears under its name when the block ends without an
    exception, and leaves nothing behind otherwise.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fps: int | float | Fraction,
        size: tuple[int, int],
        settings: Mapping[str, Any] | None = None,
        sound: Sound | None = None,
        replace: bool = True,
    ):
        """Prepare a file; nothing is written before the block is entered.

        Args:
            path: ends in ``.mp4``.
            fps: frames a second.
            size: height and width in pixels, both even.
            settings: JSON values for the file's ``comment`` tag.
            sound: to copy from another file.
            replace: what is there at the end; else that is a FileExistsError.

        Raises:
            RequestError: the path or the size cannot be written.
        """
        check_output(path)
        check_size(size)
        self.path = Path(path)
        self.fps = Fraction(frame_rate(fps))
        self.size = size
        self.settings = settings
        self.sound = sound
        self.replace = replace
        self.written = 0

    def __enter__(self) -> "VideoWriter":
        with ExitStack() as opened:
            temporary = opened.enter_context(whole_file(self.path, replace=self.replace))
            self._begin(temporary)
            self._file = opened.pop_all()
        return self

    def _begin(self, temporary: Path) -> None:
        # Absolute: FFmpeg takes what stands before a colon in a relative path for a protocol.
        name = str(temporary.absolute())
        self._container = av.open(name, "w", format="mp4", options={"movflags": "+faststart"})
        if self.settings is not None:
            self._container.metadata["comment"] = json_text(self.settings)
        self._stream = add_pictures(self._container, self.fps, self.size)
        if self.sound is not None:
            self._copy_sound(self.sound)

    def _copy_sound(self, sound: Sound) -> None:
        """Packets as they are; FFmpeg keeps them until the pictures of their time have come."""
        with opened_video(sound.path) as source:
            audio = source.streams.audio[0]
            copied = self._container.add_stream_from_template(audio)
            for packet in source.demux(audio):
                if packet.dts is None or packet.pts is None or audio.time_base is None:
                    continue
                if packet.pts * audio.time_base < sound.seconds:
                    packet.stream = copied
                    self._container.mux(packet)

    def append(self, frames: Frames) -> None:
        """Encode frames after those before.

        Raises:
            ValueError: their size is not the one announced.
        """
        if frames.shape[1:3] != self.size:
            raise ValueError(f"frames of {frames.shape[1:3]} in a video of {self.size}")
        for frame in frames:
            picture = as_picture(frame, self.written, self.fps)
            self._container.mux(self._stream.encode(picture))
            self.written += 1

    def _flush(self) -> None:
        """Write the frames that the encoder holds."""
        self._container.mux(self._stream.encode())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        failure = error
        try:
            if failure is None:
                self._flush()
        except BaseException as flushing:
            failure = flushing
        try:
            self._container.close()
        except BaseException as closing:
            failure = failure or closing
        if failure is None:
            self._file.__exit__(None, None, None)
            return
        # The file does not get its name, and what failed first is raised.
        self._file.__exit__(type(failure), failure, failure.__traceback__)
        if failure is not error:
            raise failure


def write_video(
    path: str | Path,
    frames: Frames,
    *,
    fps: int | float | Fraction,
    settings: Mapping[str, Any] | None = None,
    sound: Sound | None = None,
) -> None:
    """Write a whole video at once; see :class:`VideoWriter`."""
    height, width = frames.shape[1:3]
    with VideoWriter(path, fps=fps, size=(height, width), settings=settings, sound=sound) as writer:
        writer.append(frames)


def write_settings(path: str | Path, settings: Mapping[str, Any]) -> None:
    """Write settings as a JSON file."""
    write_json(Path(path), settings)
