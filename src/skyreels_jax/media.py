"""Reading and writing images and video, as plain NumPy arrays of 8-bit RGB.

Files are written under a temporary name in the same folder and renamed when they are whole, so
that whatever interrupts the writing, no half file has the name that was asked for.
"""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc
from jaxtyping import UInt8
from PIL import Image, ImageOps

from skyreels_jax.errors import RequestError
from skyreels_jax.files import whole_file, write_json
from skyreels_jax.shapes import Frames

RgbImage = UInt8[np.ndarray, "height width 3"]
# What an image may be given as; an array must be an RgbImage, which `read_image` checks.
ImageInput = str | Path | Image.Image | np.ndarray
# x264's constant quality; 17 is generally taken for the point where losses become invisible.
CRF: Final = 17
# x264's fastest routines give another file for the same frames each time (up to 60 different
# files of 60); those chosen for reproducibility give one, in the same time.
ENCODER: Final = {"crf": str(CRF), "x264-params": "cpu-independent=1"}


def read_image(image: ImageInput) -> RgbImage:
    """An image as RGB, turned upright by its EXIF tag.

    Transparent images are laid on white; images of 16 bits a channel lose the lower 8.

    Raises:
        RequestError: the file is missing, is no image, is cut off or is unreasonably large, or the
            array is not 8-bit RGB.
    """
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise RequestError(
                f"image: an array of {image.dtype} {image.shape}; arrays must be uint8 "
                "[height, width, 3]"
            )
        return image
    if isinstance(image, Image.Image):
        return _as_rgb(image)
    path = Path(image)
    if not path.is_file():
        raise RequestError(f"image {path}: there is no such file")
    try:
        with Image.open(path) as opened:
            return _as_rgb(opened)
    except Image.DecompressionBombError as error:
        raise RequestError(f"image {path} is too large to be decoded safely: {error}") from error
    except (OSError, ValueError, SyntaxError) as error:
        raise RequestError(f"image {path} cannot be read ({error}); is it whole?") from error


def _as_rgb(image: Image.Image) -> RgbImage:
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I;16"):
        return np.repeat((np.asarray(image) >> 8).astype(np.uint8)[:, :, None], 3, axis=2)
    if image.has_transparency_data:
        opaque = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(opaque, image.convert("RGBA"))
    return np.asarray(image.convert("RGB"))


def write_image(path: str | Path, image: RgbImage) -> None:
    """Write an image in the format of the path's suffix."""
    with whole_file(Path(path)) as temporary:
        Image.fromarray(image).save(temporary)


def contact_sheet(
    frames: Frames, count: int = 8, columns: int = 4
) -> UInt8[np.ndarray, "sheet_height sheet_width 3"]:
    """``count`` frames evenly spread over the video, in rows of ``columns``, black where none."""
    chosen = np.linspace(0, len(frames) - 1, min(count, len(frames))).round().astype(int)
    rows = -(-len(chosen) // columns)
    _, height, width, _ = frames.shape
    sheet = np.zeros((rows, columns, height, width, 3), np.uint8)
    sheet.reshape(-1, height, width, 3)[: len(chosen)] = frames[chosen]
    return sheet.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, 3)


def check_output(path: str | Path) -> None:
    """Refuse a path that no video can be written to.

    Raises:
        RequestError: its suffix is not ``.mp4``, it is a folder, or its folder does not exist or
            cannot be written to.
    """
    path = Path(path)
    if path.suffix.lower() != ".mp4":
        raise RequestError(f"output {path}: the name must end in .mp4, for example {path.stem}.mp4")
    if path.is_dir():
        raise RequestError(f"output {path} is a folder; name a file in it")
    if not path.parent.is_dir():
        raise RequestError(f"output {path}: the folder {path.parent} does not exist; create it")
    if not os.access(path.parent, os.W_OK):
        raise RequestError(f"output {path}: the folder {path.parent} cannot be written to")


class VideoWriter:
    """Writes an MP4 (H.264, 4:2:0, plays in browsers while it loads) piece by piece.

    Use as a context manager: the file appears under its name when the block ends without an
    exception, and leaves nothing behind otherwise.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        fps: int | Fraction,
        size: tuple[int, int],
        settings: Mapping[str, Any] | None = None,
    ):
        """Prepare a file; nothing is written before the block is entered.

        Args:
            path: ends in ``.mp4``.
            fps: frames a second.
            size: height and width in pixels, both even.
            settings: JSON values for the file's ``comment`` tag.

        Raises:
            RequestError: the path or the size cannot be written.
        """
        check_output(path)
        if size[0] % 2 or size[1] % 2:
            raise RequestError(f"a video of {size[0]} x {size[1]} pixels: both must be even")
        self.path = Path(path)
        self.fps = Fraction(fps)
        self.size = size
        self.settings = settings
        self.written = 0

    def __enter__(self) -> "VideoWriter":
        self._file = whole_file(self.path)
        self._container = av.open(
            str(self._file.__enter__()), "w", format="mp4", options={"movflags": "+faststart"}
        )
        if self.settings is not None:
            self._container.metadata["comment"] = json.dumps(self.settings, ensure_ascii=False)
        stream = self._container.add_stream("libx264", rate=self.fps, options=ENCODER)
        stream.height, stream.width = self.size
        stream.pix_fmt = "yuv420p"
        # Untagged video is decoded as 601 or 709 by its size, player by player.
        context = stream.codec_context
        context.colorspace = Colorspace.ITU709
        context.color_range = ColorRange.MPEG
        context.color_primaries = ColorPrimaries.BT709
        context.color_trc = ColorTrc.BT709
        self._stream = stream
        return self

    def append(self, frames: Frames) -> None:
        """Encode frames after those before.

        Raises:
            ValueError: their size is not the one announced.
        """
        if frames.shape[1:3] != self.size:
            raise ValueError(f"frames of {frames.shape[1:3]} in a video of {self.size}")
        for frame in frames:
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.ITU709,
                dst_color_range=ColorRange.MPEG,
            )
            picture.pts = self.written
            picture.time_base = 1 / self.fps
            self._container.mux(self._stream.encode(picture))
            self.written += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if error is None:
                self._container.mux(self._stream.encode())
        finally:
            self._container.close()
            self._file.__exit__(kind, error, trace)


def write_video(
    path: str | Path,
    frames: Frames,
    *,
    fps: int | Fraction,
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Write a whole video at once; see :class:`VideoWriter`."""
    height, width = frames.shape[1:3]
    with VideoWriter(path, fps=fps, size=(height, width), settings=settings) as writer:
        writer.append(frames)


def write_settings(path: str | Path, settings: Mapping[str, Any]) -> None:
    """Write settings as a JSON file."""
    write_json(Path(path), settings)


def read_video(path: str | Path) -> tuple[Frames, Fraction]:
    """All frames of a video, and frames a second.

    Raises:
        RequestError: the file is missing or holds no video that can be decoded.
    """
    with _opened(Path(path)) as container:
        stream = container.streams.video[0]
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        rate = stream.average_rate
    if not frames or rate is None:
        raise RequestError(f"video {path} has no frames")
    return np.stack(frames), rate


def stream_video(path: str | Path) -> Iterator[RgbImage]:
    """The frames of a video one by one, in memory that does not grow with their number.

    Raises:
        RequestError: the file is missing or holds no video that can be decoded.
    """
    with _opened(Path(path)) as container:
        for frame in container.decode(container.streams.video[0]):
            yield frame.to_ndarray(format="rgb24")


def survey_video(path: str | Path) -> tuple[int, Fraction, RgbImage]:
    """How many frames a video really has, how many a second, and the first of them.

    Raises:
        RequestError: as for :func:`stream_video`, or the video has no frame.
    """
    with _opened(Path(path)) as container:
        stream = container.streams.video[0]
        rate, count, first = stream.average_rate, 0, None
        for frame in container.decode(stream):
            first = frame.to_ndarray(format="rgb24") if first is None else first
            count += 1
    if first is None or rate is None:
        raise RequestError(f"video {path} has no frames")
    return count, rate, first


def read_settings(path: str | Path) -> dict[str, Any]:
    """The settings a video of ours carries.

    Raises:
        RequestError: the file is missing, is no video, or carries none.
    """
    with _opened(Path(path)) as container:
        comment = container.metadata.get("comment", "")
    try:
        settings = json.loads(comment)
    except json.JSONDecodeError:
        settings = None
    if not isinstance(settings, dict):
        raise RequestError(f"video {path} carries no settings in its comment")
    return settings


@contextmanager
def _opened(path: Path) -> Iterator[InputContainer]:
    if not path.is_file():
        raise RequestError(f"video {path}: there is no such file")
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise RequestError(f"video {path} has no picture")
            yield container
    except av.FFmpegError as error:
        raise RequestError(f"video {path} cannot be read ({error}); is it whole?") from error
