"""Rows of a batch: ids and seeds that stay, defaults, shards, and everything that is refused."""

import json
from pathlib import Path
from typing import Any

import pytest

from skyreels_jax.errors import RequestError
from skyreels_jax.generation.batch_rows import Shard, choose_shard, differing, read_rows
from skyreels_jax.generation.request.settings import Request

ROWS = [
    {"id": "fox", "prompt": "a fox", "seed": 7},
    {"prompt": "a crow", "steps": 3, "image": "crow.png"},
    {"prompt": "a crow", "steps": 3, "image": "crow.png"},
    {"prompt": ["a fox", "a crow"], "hand_over": "pixels", "seed": -1},
]


def read(folder: Path, rows: list[Any], **defaults: Any):
    file = folder / "rows.jsonl"
    texts = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("\n".join(texts))
    return read_rows(file, defaults, {"dtype": "float32"})


def test_a_row_is_the_request_of_its_settings(tmp_path: Path):
    rows, problems = read(tmp_path, ROWS, steps=20, seed=5)
    assert problems == {}
    assert rows[0].request == Request(prompt="a fox", seed=7, steps=20, dtype="float32")
    assert rows[1].request.image == str(tmp_path / "crow.png")
    assert (rows[1].request.steps, rows[1].request.seed) == (3, 5)
    assert rows[3].request.prompt == ("a fox", "a crow")
    assert rows[3].request.continuation == "pixels"


def test_ids_and_seeds_follow_from_a_row_alone(tmp_path: Path):
    """Other rows, their number, defaults and the order of keys change neither."""
    rows, _ = read(tmp_path, ROWS)
    turned = [dict(reversed(row.items())) for row in ROWS]
    again, _ = read(tmp_path, [*turned, {"prompt": "a hen"}], steps=9)
    assert [(row.id, row.request.seed) for row in again[:4]] == [
        (row.id, row.request.seed) for row in rows
    ]
    assert [row.line for row in rows] == [1, 2, 3, 4]
    assert rows[0].request.seed == 7
    # Equal rows are two videos, in names and in pictures.
    assert rows[1].id[:6] == "000002" and rows[2].id[:6] == "000003"
    assert rows[1].id[6:] == rows[2].id[6:]
    assert rows[1].request.seed != rows[2].request.seed
    # As they were when this test was written: files of earlier runs keep their names.
    assert (rows[1].id, rows[1].request.seed) == ("000002-a97e796c", 955903302)


def test_an_edited_row_is_another_video(tmp_path: Path):
    """Negative twin: what the row says changes both; with an id the seed alone."""
    (plain, named), _ = read(tmp_path, [{"prompt": "a"}, {"id": "x", "prompt": "a"}])
    (other, renamed), _ = read(tmp_path, [{"prompt": "b"}, {"id": "x", "prompt": "b"}])
    assert plain.id != other.id and plain.request.seed != other.request.seed
    assert named.id == renamed.id and named.request.seed != renamed.request.seed


@pytest.mark.parametrize(
    ("row", "left"),
    [
        ({"num_frames": 9}, {"num_frames": 9, "resolution": "540P"}),
        ({"height": 32, "width": 48}, {"height": 32, "width": 48, "seconds": 2.0}),
        ({"steps": 3}, {"steps": 3, "resolution": "540P", "seconds": 2.0}),
        ({"resolution": None}, {"seconds": 2.0}),
    ],
)
def test_a_setting_of_a_row_stands_instead_of_defaults(tmp_path: Path, row: Any, left: Any):
    (made,), _ = read(tmp_path, [{"prompt": "x", "seed": 1} | row], resolution="540P", seconds=2.0)
    assert made.request == Request(prompt="x", seed=1, dtype="float32", **left)


WRONG = {
    "no JSON": ("{'prompt': 1}", "no JSON that can be read"),
    "no object": ("[1]", 'is no JSON object such as {"prompt": "a fox"}'),
    "a key twice": ('{"prompt": "a", "prompt": "b"}', "stands there twice"),
    "no finite number": ('{"prompt": "a", "shift": NaN}', "NaN is no finite number"),
    "no prompt": ({"steps": 3}, "`prompt` is missing"),
    "a slip": ({"prompt": "a", "stepz": 3}, "`stepz` does not exist; did you mean `steps`?"),
    "another tool's name": ({"prompt": "a", "cfg": 3}, "did you mean `guidance_scale`?"),
    "of all rows": ({"prompt": "a", "dtype": "float32"}, "`dtype` is the same for all rows"),
    "a kind": ({"prompt": "a", "steps": "many"}, "`steps` 'many' must be a whole number"),
    "an id with a slash": ({"id": "a/b", "prompt": "a"}, "holds '/', which no file's name may"),
    "a hidden id": ({"id": ".a", "prompt": "a"}, "must neither begin with a dot"),
    "an empty id": ({"id": "", "prompt": "a"}, "`id` '' must be text that names a file"),
    "an id that is no text": ({"id": [1], "prompt": "a"}, "must be text that names a file"),
    "a long id": ({"id": "é" * 130, "prompt": "a"}, "has 260 bytes; at most 240"),
}


def test_every_row_that_is_wrong_is_named_at_once(tmp_path: Path):
    good = [{"id": "x", "prompt": "a"}, {"id": 5, "prompt": "a"}, " "]
    rows, problems = read(tmp_path, [*good, *(row for row, _ in WRONG.values())])
    assert [row.id for row in rows] == ["x", "5"]
    assert list(problems) == [4 + index for index in range(len(WRONG))]
    for problem, (_, reason) in zip(problems.values(), WRONG.values(), strict=True):
        assert reason in problem


def test_ids_that_are_one_file_somewhere_are_refused(tmp_path: Path):
    names = ["Fox", "fox", "caf\u00e9", "cafe\u0301", "cafe"]
    _, problems = read(tmp_path, [{"id": name, "prompt": "a"} for name in names])
    assert list(problems) == [2, 4]
    assert "is that of line 1 already" in problems[2]


def test_shards_have_every_row_once(tmp_path: Path):
    rows, _ = read(tmp_path, [{"prompt": str(number)} for number in range(11)])
    for count in (1, 2, 3, 11, 20):
        shards = [Shard(index, count).of(rows) for index in range(count)]
        assert sorted(row.line for shard in shards for row in shard) == list(range(1, 12))
        assert max(map(len, shards)) - min(map(len, shards)) <= 1


SLURM = {"SLURM_ARRAY_TASK_ID": "14", "SLURM_ARRAY_TASK_MIN": "10", "SLURM_ARRAY_TASK_STEP": "2"}
SLURM |= {"SLURM_ARRAY_TASK_COUNT": "4"}
POD = {"JOB_COMPLETION_INDEX": "3", "JOB_COMPLETIONS": "8"}


@pytest.mark.parametrize(
    ("given", "environment", "index", "count"),
    [
        (None, {}, 0, 1),
        ("1/4", {}, 1, 4),
        ("1/4", SLURM, 1, 4),
        (None, SLURM, 2, 4),
        (None, {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "5"}, 3, 5),
        (None, POD, 3, 8),
    ],
)
def test_a_shard_is_given_or_the_schedulers(given: str | None, environment, index: int, count: int):
    shard = choose_shard(given, environment)
    assert (shard.index, shard.count) == (index, count)


@pytest.mark.parametrize(
    ("given", "environment", "advice"),
    [
        ("4/4", {}, "such as 0/4"),
        ("1", {}, "--shard 1/? is no shard"),
        ("-1/4", {}, "such as 0/4"),
        ("a/b", {}, "such as 0/4"),
        (None, SLURM | {"SLURM_ARRAY_TASK_ID": "13"}, "give --shard"),
        (None, SLURM | {"SLURM_ARRAY_TASK_ID": "90"}, "give --shard"),
        (None, {"JOB_COMPLETION_INDEX": "3"}, "set JOB_COMPLETIONS"),
        (None, POD | {"JOB_COMPLETION_INDEX": "8"}, "set JOB_COMPLETIONS"),
    ],
)
def test_no_shard_is_refused_with_advice(given: str | None, environment, advice: str):
    with pytest.raises(RequestError, match=advice.replace("?", r"\?")):
        choose_shard(given, environment)


def test_what_differs_is_named():
    before, now = {"steps": 2, "seed": 1, "gone": 3}, {"steps": 3, "seed": 1, "gone": 3}
    assert list(differing(before, now)) == ["steps 2, now 3"]
    assert list(differing(before, before)) == []
    assert list(differing({}, {"loras": [1]})) == ["loras null, now [1]"]
