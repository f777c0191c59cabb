"""Writing an MP4 that plays while it grows: into a file, or into a pipe.

Every picture is a fragment of its own (``moof`` and ``mdat``) behind a ``moov`` that stands at the
beginning, so that what is there can be played at any moment, whatever ends the writing: at most the
last picture, whose duration only the next one tells, is missing then.
"""

from collections.abc import Mapping
from contextlib import suppress
from fractions import Fraction
from types import TracebackType
from typing import Final, Protocol, runtime_checkable

import av

from skyreels_jax.files import json_text
from skyreels_jax.geometry import frame_rate
from skyreels_jax.media.video_writer import ENCODER, add_pictures, as_picture, check_size
from skyreels_jax.shapes import Frames

# No index at the end: it would be kept in memory, and a player has no use for it.
_FRAGMENTS: Final = "frag_every_frame+empty_moov+default_base_moof+skip_trailer"
# The encoder holds no picture back, and each second can be played from.
_AT_ONCE: Final = {**ENCODER, "tune": "zerolatency"}


@runtime_checkable
class ByteSink(Protocol):
    """What bytes are written to, such as a file, a pipe or a socket's file."""

    def write(self, data: bytes | memoryview, /) -> int | None:
        """Take some of ``data`` and say how much."""
        ...

    def flush(self) -> None:
        """Let go of what is held back."""
        ...


class _Forward:
    """A file as FFmpeg sees it: written from the beginning to the end, never sought in."""

    def __init__(self, file: ByteSink):
        self._file = file

    def write(self, data: bytes) -> int:
        """All of ``data``, through whatever buffers there are."""
        left = memoryview(data)
        while left:  # A pipe may take less at a time.
            left = left[self._file.write(left) or 0 :]
        self._file.flush()
        return len(data)


class GrowingVideo:
    """Writes a fragmented MP4 (H.264, 4:2:0) piece by piece, all of it at once.

    Use as a context manager. However the block ends, what was appended is in the file.

    Attributes:
        written: pictures so far.
    """

    def __init__(
        self,
        file: ByteSink,
        *,
        fps: int | float | Fraction,
        size: tuple[int, int],
        settings: Mapping[str, object] | None = None,
    ):
        """Nothing is written before the block is entered.

        Args:
            file: to write to; it stays open.
            fps: pictures a second.
            size: height and width in pixels, both even.
            settings: JSON values for the file's ``comment`` tag.

        Raises:
            RequestError: the size cannot be written.
        """
        check_size(size)
        self.fps, self.size = Fraction(frame_rate(fps)), size
        self.written = 0
        self._file, self._settings = file, settings

    def __enter__(self) -> "GrowingVideo":
        self._container = av.open(
            _Forward(self._file),
            "w",
            format="mp4",
            options={"movflags": _FRAGMENTS, "flush_packets": "1"},
        )
        if self._settings is not None:
            self._container.metadata["comment"] = json_text(self._settings)
        keyframes = {"g": str(max(1, round(self.fps)))}
        self._stream = add_pictures(self._container, self.fps, self.size, _AT_ONCE | keyframes)
        return self

    def append(self, frames: Frames) -> None:
        """Write frames after those before.

        Raises:
            ValueError: their size is not the one announced.
            OSError: the file takes no more; a BrokenPipeError where nobody reads it.
        """
        if frames.shape[1:3] != self.size:
            raise ValueError(f"frames of {frames.shape[1:3]} in a video of {self.size}")
        for frame in frames:
            self._container.mux(self._stream.encode(as_picture(frame, self.written, self.fps)))
            self.written += 1

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if isinstance(error, OSError):  # Nothing more can be written.
            with suppress(OSError, av.FFmpegError):
                self._container.close()
            return
        try:
            if self.written:
                self._container.mux(self._stream.encode())
        finally:
            self._container.close()
