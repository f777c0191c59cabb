"""Files appear whole or not at all, and only regular ones are opened."""

import json
import os
import time
from pathlib import Path

import pytest

from skyreels_jax import files, outputs
from skyreels_jax.errors import RequestError, WeightsError


def test_a_file_appears_whole_and_alone(tmp_path: Path):
    files.write_text(tmp_path / "a.txt", "影")
    assert (tmp_path / "a.txt").read_text("utf-8") == "影"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError, OSError, KeyboardInterrupt])
def test_whatever_interrupts_the_writing_leaves_what_was_there(tmp_path: Path, error: type):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(error), files.whole_file(path) as temporary:
        temporary.write_text("half")
        raise error
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("stem", ["x" * 251, "影" * 83])
def test_the_longest_name_that_a_file_can_have_can_be_written(tmp_path: Path, stem: str):
    path = tmp_path / f"{stem}.txt"
    outputs.check_names([path])
    files.write_text(path, "x")
    assert path.read_text() == "x"


@pytest.mark.parametrize("stem", ["x" * 252, "影" * 84])
def test_a_name_that_is_too_long_is_refused_beforehand(tmp_path: Path, stem: str):
    path = tmp_path / f"{stem}.txt"
    with pytest.raises(RequestError, match="255"):
        outputs.check_names([path])
    with pytest.raises(OSError):
        files.write_text(path, "x")
    assert os.listdir(tmp_path) == []


def irregular(tmp_path: Path) -> dict[str, Path]:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "endless").symlink_to("/dev/zero")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    return {name: tmp_path / name for name in ("pipe", "folder", "endless", "round", "missing")}


@pytest.mark.parametrize("kind", ["pipe", "folder", "endless", "round", "missing"])
@pytest.mark.parametrize("error", [RequestError, WeightsError])
def test_only_regular_files_are_opened_and_at_once(tmp_path: Path, kind: str, error: type):
    path = irregular(tmp_path)[kind]
    start = time.monotonic()
    with pytest.raises(error, match=str(path)):
        files.read_json(path, error=error)
    assert time.monotonic() - start < 1


def test_a_link_to_a_regular_file_is_read(tmp_path: Path):
    (tmp_path / "a.json").write_text('{"a": 1.5}')
    (tmp_path / "b.json").symlink_to(tmp_path / "a.json")
    assert files.read_json(tmp_path / "b.json") == {"a": 1.5}


def test_a_byte_order_mark_is_no_part_of_the_text(tmp_path: Path):
    (tmp_path / "a.json").write_bytes(b'\xef\xbb\xbf{"a": "\xe5\xbd\xb1"}')
    assert files.read_json(tmp_path / "a.json") == {"a": "影"}


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[" * 100_000, "deeply"),
        ('{"a": 1, "a": 2}', "twice"),
        ('{"a": {"b": 1, "b": 2}}', "twice"),
        ('{"a": NaN}', "finite"),
        ('{"a": -Infinity}', "finite"),
        ('{"a": 1e999}', "too large"),
        ("9" * 5000, "no JSON"),
        ("", "no JSON"),
        ("<!DOCTYPE html>", "no JSON"),
    ],
)
def test_json_that_is_not_sound_is_refused(tmp_path: Path, text: str, reason: str):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(RequestError, match=reason):
        files.read_json(tmp_path / "a.json")


def test_a_file_that_is_too_large_is_not_read(tmp_path: Path):
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(RequestError, match="at most"):
        files.read_json(tmp_path / "a.json")


def test_many_keys_of_which_one_stands_twice_are_refused_quickly(tmp_path: Path):
    keys = [f'"{n}": 0' for n in range(200_000)]
    (tmp_path / "a.json").write_text("{" + ",".join([*keys, keys[-1]]) + "}")
    start = time.monotonic()
    with pytest.raises(RequestError, match="199999"):
        files.read_json(tmp_path / "a.json")
    assert time.monotonic() - start < 2


def test_what_is_no_json_value_is_not_written(tmp_path: Path):
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"a": float("nan")})
    assert os.listdir(tmp_path) == []
    files.write_json(tmp_path / "a.json", {"a": [1, "影"]})
    assert json.loads((tmp_path / "a.json").read_text("utf-8")) == {"a": [1, "影"]}
