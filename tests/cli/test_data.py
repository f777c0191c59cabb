"""``skyreels-jax data``: a folder that appears whole, the same for the same seed."""

import json
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from tests.cli.commands import Command

from skyreels_jax.media import VideoWriter, read_video
from skyreels_jax.moving_shapes.clips import clip
from skyreels_jax.moving_shapes.scene import Scene, Thing, is_held_out

SMALL = ("--frames", "5", "--size", "32")


def files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def rows(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def scene_of(row: dict) -> Scene:
    return Scene(tuple(Thing(**t) for t in row["scene"]["things"]), row["scene"]["background"])


def test_a_folder_of_clips(command: Command, out: Path):
    outcome = command("data", "shapes", out / "new", "--count", "3", "--seed", "4", "--fps", "24")
    assert outcome.code == 0, outcome.err
    names = [f"{i:05d}{suffix}" for i in range(3) for suffix in (".mp4", ".txt")]
    assert sorted(files(out / "new")) == [*names, "metadata.jsonl"]
    assert [p.name for p in out.iterdir()] == ["new"]
    for index, row in enumerate(rows(out / "new")):
        expected = clip(4, index, 17, 24, 64)
        assert (row["file"], row["fps"], row["frames"]) == (f"{index:05d}.mp4", 24, 17)
        assert row["caption"] == expected.caption
        assert (out / "new" / f"{index:05d}.txt").read_text() == expected.caption + "\n"
        assert scene_of(row) == expected.scene
        frames, fps = read_video(out / "new" / row["file"])
        assert (frames.shape, fps) == ((17, 64, 64, 3), Fraction(24))
        error = np.abs(frames.astype(int) - expected.frames).mean()
        other = np.abs(frames.astype(int) - clip(4, index + 1, 17, 24, 64).frames).mean()
        # Measured: 1.0 to 2.7 levels, for 4:2:0 colour; 27 to 101 from the next clip.
        assert error < 4
        assert other > 10


def test_a_seed_gives_the_same_clips_however_many(command: Command, out: Path):
    for name, count, seed in (("few", 2, 0), ("more", 4, 0), ("other", 2, 1)):
        arguments = ("--count", str(count), "--seed", str(seed), *SMALL)
        assert command("data", "shapes", out / name, *arguments).code == 0
    few, more, other = (files(out / name) for name in ("few", "more", "other"))
    table = {
        name: found.pop("metadata.jsonl")
        for name, found in zip("fmo", (few, more, other), strict=True)
    }
    assert few.items() < more.items()
    assert table["m"].startswith(table["f"])
    assert not few.items() & other.items()


def test_held_out_clips_are_those_that_training_never_sees(command: Command, out: Path):
    for name, flags in (("held", ("--held-out",)), ("drawn", ())):
        assert command("data", "shapes", out / name, "--count", "8", *SMALL, *flags).code == 0
    held, drawn = (
        [thing for row in rows(out / name) for thing in scene_of(row).things]
        for name in ("held", "drawn")
    )
    assert len(held) == 8
    assert all(map(is_held_out, held))
    assert not any(map(is_held_out, drawn))


def test_an_empty_folder_is_filled(command: Command, out: Path):
    assert command("data", "shapes", out, "--count", "1", *SMALL).code == 0
    assert len(files(out)) == 3


def test_the_folder_one_stands_in(command: Command, out: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(out)
    assert command("data", "shapes", ".", "--count", "1", *SMALL).code == 0
    assert len(files(out)) == 3


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--count", "0"), "count 0: it must be from 1 to 100,000; nearest: 1"),
        (("--count", "100001"), "nearest: 100000"),
        (("--count", "1", "--seed", "-1"), "seed -1"),
        (("--count", "1", "--frames", "18"), "nearest: 17 or 21"),
        (("--count", "1", "--frames", "33"), "at most 21 frames at 16 fps, or 33 at 24"),
        (("--count", "1", "--fps", "25"), "fps 25: it must be 16 or 24"),
        (("--count", "1", "--size", "70"), "nearest: 64 or 80"),
        (("--count", "many"), "--count"),
        (("--count", "1", "--sise", "64"), "did you mean --size?"),
        ((), "--count"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(
    command: Command, out: Path, flags: tuple[str, ...], says: str
):
    outcome = command("data", "shapes", out / "new", *flags)
    assert outcome.code == 2
    assert outcome.out == ""
    (line,) = outcome.err.splitlines()
    assert says in line
    assert list(out.iterdir()) == []


def test_other_data_than_shapes_is_refused(command: Command, out: Path):
    outcome = command("data", "shape", out / "new", "--count", "1")
    assert outcome.code == 2
    assert "'shapes'" in outcome.err


def test_a_folder_that_holds_files_is_left_alone(command: Command, out: Path):
    (out / "mine.txt").write_text("precious")
    outcome = command("data", "shapes", out, "--count", "1", *SMALL)
    assert outcome.code == 2
    assert "there already" in outcome.errors[0]
    assert files(out) == {"mine.txt": b"precious"}


def test_an_interrupted_run_leaves_nothing(
    command: Command, out: Path, monkeypatch: pytest.MonkeyPatch
):
    append = VideoWriter.append

    def stop(self, frames):
        append(self, frames)
        if self.path.name == "00002.mp4":
            raise KeyboardInterrupt

    monkeypatch.setattr(VideoWriter, "append", stop)
    outcome = command("data", "shapes", out / "new", "--count", "4", *SMALL)
    assert outcome.code == 130
    assert list(out.iterdir()) == []
    # The negative twin: with fewer clips nothing stops it.
    assert command("data", "shapes", out / "new", "--count", "2", *SMALL).code == 0
