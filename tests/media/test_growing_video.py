"""A file that plays while it grows: at any moment, and whatever ends it."""

import io
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import av
import numpy as np
import pytest

from skyreels_jax import media
from skyreels_jax.errors import RequestError
from skyreels_jax.media import GrowingVideo

SIZE = (32, 48)


def frames(count: int, first: int = 0) -> np.ndarray:
    ramp = np.arange(SIZE[1], dtype=np.uint8)[None, None, :, None] * np.uint8(4)
    turn = np.arange(first, first + count, dtype=np.uint8)[:, None, None, None]
    return np.ascontiguousarray(np.broadcast_to(ramp + 8 * turn, (count, *SIZE, 3)))


def test_it_plays_while_it_grows_and_at_the_end(tmp_path: Path):
    file, copy = tmp_path / "x.mp4", tmp_path / "copy.mp4"
    with file.open("wb") as out, GrowingVideo(out, fps=16, size=SIZE, settings={"a": 1}) as video:
        for block in range(4):
            video.append(frames(12, 12 * block))
            shutil.copy(file, copy)
            made, rate = media.read_video(copy)
            # The last one's duration is told by the next.
            assert 12 * (block + 1) - 1 <= len(made) <= 12 * (block + 1)
            assert rate == 16
            assert media.read_settings(copy) == {"a": 1}
    made, _ = media.read_video(file)
    assert len(made) == video.written == 48
    assert np.abs(made.astype(int) - frames(48)).mean() < 3  # 1.1 measured


def test_nothing_is_sought_in_a_pipe():
    read, write = os.pipe()
    with os.fdopen(write, "wb", buffering=0) as out, GrowingVideo(out, fps=24, size=SIZE) as video:
        video.append(frames(3))
    with os.fdopen(read, "rb") as pipe, av.open(io.BytesIO(pipe.read())) as container:
        assert sum(1 for _ in container.decode(video=0)) == 3


def test_who_closes_the_pipe_is_told_of_as_a_broken_pipe():
    read, write = os.pipe()
    os.close(read)
    with (
        pytest.raises(BrokenPipeError),
        os.fdopen(write, "wb", buffering=0) as out,
        GrowingVideo(out, fps=24, size=SIZE) as video,
    ):
        video.append(frames(30))


def test_an_exception_leaves_what_was_there(tmp_path: Path):
    file = tmp_path / "x.mp4"
    with (
        pytest.raises(KeyboardInterrupt),
        file.open("wb") as out,
        GrowingVideo(out, fps=16, size=SIZE) as video,
    ):
        video.append(frames(10))
        raise KeyboardInterrupt
    assert len(media.read_video(file)[0]) == 10


def test_sizes_are_checked(tmp_path: Path):
    with pytest.raises(RequestError, match="both must be even"):
        GrowingVideo(io.BytesIO(), fps=16, size=(31, 48))
    with GrowingVideo(io.BytesIO(), fps=16, size=(64, 48)) as video, pytest.raises(ValueError):
        video.append(frames(1))


KILLED = """
import sys, time
import numpy as np
from skyreels_jax.media import GrowingVideo
with open(sys.argv[1], "wb") as file, GrowingVideo(file, fps=16, size=(32, 48)) as video:
    video.append(np.zeros((20, 32, 48, 3), np.uint8))
    print("there", flush=True)
    time.sleep(60)
"""


def test_it_plays_after_sigkill(tmp_path: Path):
    file = tmp_path / "x.mp4"
    words = [sys.executable, "-c", KILLED, str(file)]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"there\n"
        process.send_signal(signal.SIGKILL)
    assert len(media.read_video(file)[0]) >= 19


def test_a_plain_file_that_is_cut_off_does_not_play(tmp_path: Path):
    """Negative twin: what `generate` writes has its table at the end until it is whole."""
    with media.VideoWriter(tmp_path / "x.mp4", fps=16, size=SIZE) as writer:
        writer.append(frames(20))
    whole = (tmp_path / "x.mp4").read_bytes()
    (tmp_path / "cut.mp4").write_bytes(whole[: len(whole) // 3])
    with pytest.raises(RequestError):
        media.read_video(tmp_path / "cut.mp4")
