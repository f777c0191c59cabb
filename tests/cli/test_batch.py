"""``skyreels-jax batch``: rows become the files that ``generate`` makes, once each."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.cli.commands import Command, Outcome
from tests.fabricate import Checkpoints

from skyreels_jax import media
from skyreels_jax.cli import batch_work
from skyreels_jax.generation.request.resolved import ResolvedRequest
from skyreels_jax.pipeline import Pipeline

SMALL = ("--height", "32", "--width", "48", "--num-frames", "5", "--steps", "2")
ROWS = [
    {"id": "fox", "prompt": "a fox", "seed": 7},
    {"prompt": "a crow", "guidance_scale": 3},
    {"id": "hen", "prompt": "a hen"},
]


class Batch:
    """``batch`` of rows in a file, on a random checkpoint."""

    def __init__(self, command: Command, model: Path | str, out: Path):
        self.command, self.model, self.out = command, model, out
        self.rows = out.parent / "rows.jsonl"
        self.write(ROWS)

    def write(self, rows: list[dict[str, object]]) -> None:
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def __call__(self, *flags: str) -> Outcome:
        words = (self.rows, self.out, "--model", self.model, *SMALL, *flags)
        return self.command("batch", *words)

    @property
    def files(self) -> list[str]:
        return sorted(path.name for path in self.out.iterdir())

    @property
    def states(self) -> dict[str, int]:
        return {path.name: path.stat().st_mtime_ns for path in self.out.iterdir()}


@pytest.fixture
def no_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frames that follow from the seed alone, in no time; all around them is as it is."""

    def frames(self: Pipeline, request: ResolvedRequest, *, store, clock):
        shape = (16, request.windows[0].frames, *request.latent_shape[1:])
        store.save(request.windows[0], np.zeros(shape, np.float32))
        size = (request.num_frames, request.height, request.width, 3)
        yield np.random.default_rng(request.seed).integers(0, 256, size, np.uint8)

    monkeypatch.setattr(Pipeline, "frames", frames)
    monkeypatch.setattr("skyreels_jax.pipeline.verify_checkpoint", lambda *_: None)


@pytest.fixture
def batch(command: Command, out: Path) -> Batch:
    return Batch(command, "mini", out)


def test_a_batch_makes_what_generate_makes_and_makes_it_once(
    command: Command,
    checkpoints: Checkpoints,
    out: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    batch = Batch(command, checkpoints("t2v", "original"), out)
    loads: list[Pipeline] = []
    load = Pipeline.load_denoiser
    monkeypatch.setattr(Pipeline, "load_denoiser", lambda self: loads.append(self) or load(self))
    outcome = batch("--shard", "0/1")
    assert outcome.code == 0, outcome.err
    assert len(loads) == 1
    (crow,) = (path.stem for path in batch.out.glob("000002-*.mp4"))
    names = sorted(f"{name}.{kind}" for name in ("fox", "hen", crow) for kind in ("json", "mp4"))
    assert batch.files == names
    assert "3 made, 0 were done before, 0 failed" in outcome.out
    # The same bytes as a single run with the seed that stands beside the video.
    settings = json.loads((batch.out / f"{crow}.json").read_text())
    words = ("--model", batch.model, *SMALL, "--guidance-scale", "3", "--prompt", "a crow")
    words += ("--seed", str(settings["seed"]), "--sidecar", "--output", tmp_path / "crow.mp4")
    assert command("generate", *words).code == 0
    assert (tmp_path / "crow.mp4").read_bytes() == (batch.out / f"{crow}.mp4").read_bytes()
    assert sorted(settings.pop("made_from")) == ["backend", "vae_dtype", "vae_tiling", "weights"]
    assert settings == json.loads((tmp_path / "crow.json").read_text())
    # Negative twin: another seed is another video.
    assert (batch.out / "fox.mp4").read_bytes() != (batch.out / "hen.mp4").read_bytes()
    before, loaded = batch.states, len(loads)
    again = batch()
    assert again.code == 0
    assert "0 made, 3 were done before, 0 failed" in again.out
    assert batch.states == before
    assert len(loads) == loaded  # no weight is read for what is there


@pytest.mark.usefixtures("no_model")
def test_what_is_there_with_other_settings_is_never_replaced(batch: Batch):
    batch.write(ROWS[:1])
    assert batch().code == 0
    before = batch.states
    (batch.out / "hen.mp4").write_bytes(b"somebody's")
    batch.write([{**ROWS[0], "seed": 8}, *ROWS[1:]])
    outcome = batch()
    assert outcome.code == 2
    assert f"line 1: (fox) {batch.out / 'fox.mp4'} was made with seed 7, now 8" in outcome.err
    assert f"line 3: (hen) {batch.out / 'hen.mp4'} exists and nothing says" in outcome.err
    assert "2 of 3 rows cannot be made; nothing was begun" in outcome.errors[0]
    assert {name: state for name, state in batch.states.items() if name != "hen.mp4"} == before
    # Another way of computing, and other weights of the same name.
    batch.write(ROWS[:1])
    assert 'made with vae_dtype "float32", now "bfloat16"' in batch("--vae-dtype", "bfloat16").err
    sidecar = batch.out / "fox.json"
    sidecar.write_text(sidecar.read_text().replace('"weights": "', '"weights": "0'))
    assert "was made with weights" in batch().err


def test_bad_rows_are_all_named_before_anything_begins(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(Pipeline, "frames", None)
    rows = [{"prompt": "a", "steps": 0}, {"prompt": "a", "image": "x.png"}, {"prompt": "a", "x": 1}]
    batch.write([*ROWS, *rows])
    batch.out.rmdir()
    outcome = batch()
    assert outcome.code == 2
    told = [line for line in outcome.err.splitlines() if "rows.jsonl, line" in line]
    assert [line.split("line ")[1][0] for line in told] == ["4", "5", "6"]
    assert "`steps` 0 must be between 1 and 1000" in told[0]
    assert "x.png" in told[1]
    assert "3 of 6 rows cannot be made; nothing was begun" in outcome.errors[0]
    assert not batch.out.exists()


def failing(monkeypatch: pytest.MonkeyPatch, name: str, times: int) -> None:
    """The first so many attempts to make a row fail."""
    finish, left = batch_work.finish, [times]

    def fail(pipeline, job, finished=0):
        if job.folder.stem == name and left[0]:
            left[0] -= 1
            raise RuntimeError("the moon is full")
        return finish(pipeline, job, finished)

    monkeypatch.setattr(batch_work, "finish", fail)


@pytest.mark.usefixtures("no_model")
def test_a_row_that_fails_stops_no_other_and_is_tried_anew(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
):
    failing(monkeypatch, "fox", 2)
    outcome = batch()
    assert outcome.code == 1
    assert "2 made, 0 were done before, 1 failed" in outcome.out
    assert "failed: line 1 (fox): RuntimeError: the moon is full" in outcome.err
    assert "1 of 3 rows failed" in outcome.errors[0]
    assert "fox.mp4" not in batch.files and "hen.mp4" in batch.files
    again = batch("--retries", "1")
    assert again.code == 0, again.err
    assert "1 made, 2 were done before, 0 failed" in again.out
    assert "fox.mp4" in batch.files and not list(batch.out.glob("*.job"))


def test_a_shard_makes_its_rows_alone(batch: Batch, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("JOB_COMPLETION_INDEX", "1")
    monkeypatch.setenv("JOB_COMPLETIONS", "2")
    outcome = batch("--dry-run")
    assert outcome.code == 0
    assert "3 rows; shard 1/2 (JOB_COMPLETION_INDEX/JOB_COMPLETIONS) has 1" in outcome.out
    assert "0 are done, 1 would be made:" in outcome.out
    assert batch.files == []


@pytest.mark.usefixtures("no_model")
def test_what_a_row_is_given_decides_it_by_its_content(batch: Batch, out: Path, tmp_path: Path):
    """An image of the same name and size with other content is another video's."""

    def draw(seed: int) -> None:
        values = np.random.default_rng(seed).integers(0, 256, (32, 48, 3), np.uint8)
        Image.fromarray(values).save(tmp_path / "image.png")

    draw(0)
    batch.write([{"id": "x", "prompt": "a fox", "image": "image.png"}])
    assert batch().code == 0
    assert media.read_settings(out / "x.mp4")["image"] == "48 x 32"
    assert "1 were done before" in batch().out
    draw(1)
    outcome = batch()
    assert outcome.code == 2
    assert "was made with image" in outcome.err


@pytest.mark.usefixtures("no_model")
def test_jobs_that_a_killed_process_left_are_gone_on_with_or_removed(
    batch: Batch, monkeypatch: pytest.MonkeyPatch
):
    batch.write(ROWS[:1])
    job = batch.out / "fox.job"

    def killed(pipeline, job, finished=0):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(batch_work, "finish", killed)
        assert batch().code == 130
    assert (job / "job.json").is_file()
    # It is of this row as it is: another is refused, the same is gone on with.
    batch.write([{**ROWS[0], "seed": 8}])
    outcome = batch()
    assert outcome.code == 2
    assert f"{job} is begun with seed 7, now 8" in outcome.err
    batch.write(ROWS[:1])
    begin = batch_work.begin
    monkeypatch.setattr(batch_work, "begin", None)
    assert batch().code == 0
    assert batch.files == ["fox.json", "fox.mp4"]
    monkeypatch.setattr(batch_work, "begin", begin)
    # Killed while it was removed.
    job.mkdir()
    (job / "window-0000.safetensors").write_bytes(b"half")
    assert "0 made, 1 were done before" in batch().out
    assert batch.files == ["fox.json", "fox.mp4"]
    # Killed before its video was: somebody's file beside is not removed.
    job.mkdir()
    for name in ("window-0000.safetensors", "notes.txt"):
        (job / name).write_bytes(b"x")
    (batch.out / "fox.mp4").unlink()
    outcome = batch()
    assert outcome.code == 1
    assert "there are files in it" in outcome.err
    assert [path.name for path in job.iterdir()] == ["notes.txt"]


def test_what_ray_takes_is_said(batch: Batch, monkeypatch: pytest.MonkeyPatch):
    assert "--workers are those of --engine ray" in batch("--workers", "2").errors[0]
    monkeypatch.setitem(sys.modules, "ray", None)
    assert "pip install 'skyreels-jax[ray]'" in batch("--engine", "ray").errors[0]
    assert batch.files == []
