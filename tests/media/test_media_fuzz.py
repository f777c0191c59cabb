"""Damaged images and films: our own error, or a picture; quickly and in bounded memory."""

import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.bounded import MOST, memory_below
from tests.media.films import DATA, colours, write_film

from skyreels_jax import media
from skyreels_jax.errors import RequestError

LONGEST = 2.0  # seconds; measured 0.1 on a busy machine
# Damaged files of each kind; `make test-all` takes the thousand.
ROUNDS = pytest.mark.parametrize("rounds", [40, pytest.param(1000, marks=pytest.mark.slow)])


def damaged(rng: np.random.Generator, data: bytes) -> bytes:
    """Some bytes changed, left out, repeated, or the end cut off."""
    changed = bytearray(data)
    kind = rng.integers(4)
    if kind == 0:
        for _ in range(int(rng.integers(1, 20))):
            changed[int(rng.integers(len(changed)))] = int(rng.integers(256))
    elif kind == 1:
        start = int(rng.integers(len(changed)))
        del changed[start : start + int(rng.integers(1, 200))]
    elif kind == 2:
        start = int(rng.integers(len(changed)))
        changed[start:start] = changed[start : start + int(rng.integers(1, 200))]
    else:
        del changed[int(rng.integers(1, len(changed))) :]
    return bytes(changed)


def holds(read, path: Path) -> bool:
    """Read it: whether it was taken. Whatever else is raised fails the test."""
    start = time.monotonic()
    try:
        read(path)
    except RequestError:
        return False
    finally:
        assert time.monotonic() - start < LONGEST
    return True


def check_damaged(read, data: bytes, path: Path, rounds: int) -> None:
    """Some damage is refused, and none of it takes much memory."""
    rng = np.random.default_rng(0)
    taken = 0
    # Measured: under 10 MiB.
    with memory_below(4 * len(data) + MOST):
        for _ in range(rounds):
            path.write_bytes(damaged(rng, data))
            taken += holds(read, path)
    assert taken < rounds


@ROUNDS
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif", "bmp", "gif", "avif"])
def test_damaged_images(tmp_path: Path, suffix: str, rounds: int):
    Image.fromarray(colours(1, 24, 32)[0]).save(tmp_path / f"whole.{suffix}")
    data = (tmp_path / f"whole.{suffix}").read_bytes()
    check_damaged(media.read_image, data, tmp_path / "damaged.png", rounds)


@ROUNDS
@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_damaged_films(tmp_path: Path, suffix: str, rounds: int):
    data = write_film(tmp_path / f"whole.{suffix}", colours(6, 32, 32)).read_bytes()
    check_damaged(media.survey_video, data, tmp_path / "damaged.mp4", rounds)


@ROUNDS
@pytest.mark.parametrize("name", ["portrait.mp4", "cut.mkv", "latin1-metadata.mp4"])
def test_damaged_films_of_the_field(tmp_path: Path, name: str, rounds: int):
    check_damaged(media.survey_video, (DATA / name).read_bytes(), tmp_path / "damaged.mp4", rounds)
