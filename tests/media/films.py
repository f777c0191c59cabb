"""Films with what VideoWriter never writes."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np

DATA = Path(__file__).parent / "data"


def colours(frames: int = 8, height: int = 48, width: int = 64) -> np.ndarray:
    """Red top left, blue top right, green bottom left, white bottom right; a line that moves."""
    film = np.full((frames, height, width, 3), 255, np.uint8)
    film[:, : height // 2, : width // 2] = (220, 30, 30)
    film[:, : height // 2, width // 2 :] = (30, 30, 220)
    film[:, height // 2 :, : width // 2] = (30, 200, 30)
    for number, frame in enumerate(film):
        frame[:, 4 * number % width] = 0
    return film


def write_film(
    path: Path,
    frames: np.ndarray,
    *,
    rate: int | Fraction = 16,
    times: list[float] | None = None,
    turned: int = 0,
    aspect: Fraction | None = None,
    sound: str | None = None,
) -> Path:
    """A film with what VideoWriter never writes."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"crf": "8"})
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000 * int(rate))
        if aspect:
            stream.sample_aspect_ratio = aspect
        if sound:
            audio = container.add_stream(sound, rate=16000)
            audio.layout = "mono"
            silence = av.AudioFrame.from_ndarray(
                np.zeros((1, 16000), np.float32 if sound == "aac" else np.int16),
                format="fltp" if sound == "aac" else "s16",
                layout="mono",
            )
            silence.sample_rate = 16000
        for number, frame in enumerate(frames):
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            seconds = number / Fraction(rate) if times is None else Fraction(times[number])
            picture.pts = round(seconds * 1000 * int(rate))
            picture.time_base = Fraction(1, 1000 * int(rate))
            container.mux(stream.encode(picture))
        container.mux(stream.encode())
        if sound:
            container.mux(audio.encode(silence))
            container.mux(audio.encode())
    if turned:
        turn(path, turned)
    return path


def turn(path: Path, degrees: int) -> None:
    """Put a display matrix of the track into the header, as phones do."""
    matrices = {
        90: (0, 1, -1, 0),
        180: (-1, 0, 0, -1),
        270: (0, -1, 1, 0),
    }
    data = bytearray(path.read_bytes())
    where = data.index(b"tkhd") + 4 + 40
    a, b, c, d = (value * 65536 for value in matrices[degrees])
    for index, value in enumerate((a, b, 0, c, d, 0, 0, 0, 2**30)):
        data[where + 4 * index : where + 4 * index + 4] = value.to_bytes(4, "big", signed=True)
    path.write_bytes(data)
