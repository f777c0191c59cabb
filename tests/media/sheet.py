"""A sheet of what is read of difficult media, each beside the plain truth.

``python -m tests.media.sheet docs/images/media.png`` draws it; a person looks at it.
"""

import sys
import tempfile
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from tests.media.films import DATA, colours, write_film

from skyreels_jax import media

CELL = (120, 150)


def pairs(folder: Path) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """What it is, how it should look, and how it is read."""
    film = colours(8, 96, 128)
    plain = media.read_video(write_film(folder / "plain.mp4", film))[0][0]
    for degrees, turns in ((90, -1), (180, 2), (270, 1)):
        path = write_film(folder / f"{degrees}.mp4", film, turned=degrees)
        yield f"turned {degrees}", np.rot90(plain, turns), media.survey_video(path).first
    path = write_film(folder / "sar.mp4", film, aspect=Fraction(16, 11))
    wide = np.asarray(Image.fromarray(plain).resize((186, 96)))
    yield "pixels 16:11", wide, media.survey_video(path).first
    truth = media.read_video(DATA / "plain.mp4")[0][0]
    for name in ("pq", "hlg"):
        yield f"HDR {name.upper()}", truth, media.survey_video(DATA / f"{name}.mp4").first
    srgb = media.read_image(DATA / "srgb.png")
    for name in ("p3", "adobe"):
        yield f"profile {name}", srgb, media.read_image(DATA / f"{name}.png")
    ramp = np.tile(np.linspace(0, 65535, 128, dtype=np.uint16), (96, 1))
    Image.fromarray(ramp).save(folder / "deep.png")
    grey = np.repeat((ramp >> 8).astype(np.uint8)[..., None], 3, axis=2)
    yield "16 bits", grey, media.read_image(folder / "deep.png")
    times = [0, 0.1, 0.2, 0.3, 0.7, 1.1, 1.5, 1.9]
    path = write_film(folder / "vfr.mkv", film, rate=10, times=times)
    # After 0.6 seconds the fourth frame still stands.
    fourth = media.read_video(path)[0][3]
    yield "uneven times", fourth, list(media.stream_video(path, 10))[6]


def cell(image: np.ndarray, text: str) -> Image.Image:
    picture = Image.new("RGB", CELL, "white")
    shown = Image.fromarray(image)
    shown.thumbnail((CELL[0] - 8, CELL[1] - 24))
    picture.paste(shown, (4, 20))
    ImageDraw.Draw(picture).text((4, 4), text, "black")
    return picture


def draw() -> Image.Image:
    with tempfile.TemporaryDirectory() as folder:
        found = list(pairs(Path(folder)))
    sheet = Image.new("RGB", (CELL[0] * len(found), CELL[1] * 2), "white")
    for column, (name, right, read) in enumerate(found):
        for row, (image, text) in enumerate(((right, name), (read, "as read"))):
            sheet.paste(cell(np.ascontiguousarray(image), text), (column * CELL[0], row * CELL[1]))
    return sheet


if __name__ == "__main__":
    draw().save(sys.argv[1], optimize=True)
