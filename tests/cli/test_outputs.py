"""What can be known before any weight is read is said then; what is somebody's is left alone."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from tests.cli.commands import Command, linked, rewrite
from tests.fabricate import Checkpoints

from skyreels_jax import media, outputs
from skyreels_jax.cli import products
from skyreels_jax.cli.main import main
from skyreels_jax.files import LATENTS_SUFFIX
from skyreels_jax.generation.store import SavedLatents
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.weights.plan import Format

SMALL = ("--height", "32", "--width", "48", "--num-frames", "5", "--steps", "2", "--seed", "7")
Words = tuple[str | Path, ...]


@pytest.fixture
def words(checkpoints: Checkpoints) -> Words:
    return ("generate", "--model", checkpoints("t2v", "original"), "--prompt", "a fox", *SMALL)


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch):
    """Whoever opens a checkpoint has gone too far."""

    def fail(*_: object, **__: object) -> None:
        raise AssertionError("a checkpoint was opened")

    monkeypatch.setattr("skyreels_jax.cli.generate.open_pipeline", fail)
    monkeypatch.setattr("skyreels_jax.cli.resume.open_pipeline", fail, raising=False)


@pytest.mark.parametrize("stem", [pytest.param("x" * 230, marks=pytest.mark.slow), "影" * 83])
def test_a_long_name_is_written(command: Command, words: Words, out: Path, stem: str):
    outcome = command(*words, "--output", out / f"{stem}.mp4")
    assert outcome.code == 0, outcome.err
    assert [path.name for path in out.iterdir()] == [f"{stem}.mp4"]


@pytest.mark.parametrize(
    ("stem", "flags"),
    [
        ("x" * 252, ()),
        ("影" * 84, ()),
        ("x" * 251, ("--sidecar",)),
        ("x" * 236, ("--keep-latents",)),
        ("影" * 79, ("--keep-latents",)),
    ],
)
def test_a_name_that_is_too_long_is_refused_at_once(
    command: Command, words: Words, out: Path, no_weights, stem: str, flags: tuple[str, ...]
):
    outcome = command(*words, "--output", out / f"{stem}.mp4", *flags)
    assert outcome.code == 2
    assert "bytes" in outcome.errors[0]
    assert list(out.iterdir()) == []


def test_pictures_names_are_known_beforehand(command: Command, words: Words, out: Path):
    outcome = command(*words, "--output", out / f"{'x' * 245}.mp4", "--preview")
    assert outcome.code == 2
    assert "bytes" in outcome.errors[0]
    assert list(out.iterdir()) == []


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        ("--prompt", "caf\udce9 red circle"),
        ("--prompt", "\ud83d"),
        ("--negative-prompt", "b\udcffd"),
    ],
)
def test_text_that_is_no_utf_8_is_refused_by_name(
    command: Command, words: Words, out: Path, no_weights, flag: str, value: str
):
    outcome = command(*words, flag, value, "--output", out / "x.mp4")
    assert outcome.code == 2
    assert "UTF-8" in outcome.errors[0]
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", ["-caf\udce9:%d '\".mp4"])
def test_odd_names_are_written(
    command: Command, words: Words, out: Path, monkeypatch: pytest.MonkeyPatch, name: str
):
    monkeypatch.chdir(out)
    outcome = command(*words, f"--output={name}", "--sidecar", "--keep-latents")
    assert outcome.code == 0, outcome.err
    assert media.read_video(out / name)[0].shape == (5, 32, 48, 3)
    assert len(list(out.iterdir())) == 3


@pytest.mark.parametrize("place", ["/proc/e.mp4", "/sys/e.mp4", "/dev/null/e.mp4"])
def test_special_places_are_refused(command: Command, words: Words, no_weights, place: str):
    outcome = command(*words, "--output", place)
    assert outcome.code == 2
    assert place in outcome.errors[0]


@pytest.mark.parametrize("make", [os.mkfifo, lambda path: path.symlink_to("/dev/null"), os.mkdir])
def test_what_is_no_file_is_not_replaced(
    command: Command, words: Words, out: Path, no_weights, make: Callable[[Path], None]
):
    make(out / "x.mp4")
    outcome = command(*words, "--output", out / "x.mp4", "--overwrite")
    assert outcome.code == 2
    assert [path.name for path in out.iterdir()] == ["x.mp4"]


def test_room_that_is_not_there_is_said_with_numbers(
    command: Command, words: Words, out: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(outputs.shutil, "disk_usage", lambda _: SimpleNamespace(free=2**19))
    outcome = command(*words, "--output", out / "x.mp4")
    assert outcome.code == 2
    assert "1.0 MiB" in outcome.errors[0]
    assert "0.5 MiB free" in outcome.errors[0]
    assert "text:" not in outcome.err
    assert list(out.iterdir()) == []


def test_a_limit_of_files_is_said_with_numbers(
    command: Command, words: Words, out: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(outputs, "_largest_file", lambda: 3000)
    outcome = command(*words, "--output", out / "x.mp4")
    assert outcome.code == 2
    assert "ulimit -f" in outcome.errors[0]
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", ["x.json", "x.latents.safetensors", "x.window-000.png"])
def test_files_beside_the_video_that_are_somebodys_stay(
    command: Command, words: Words, out: Path, name: str
):
    (out / name).write_bytes(b"somebody's")
    flags = ("--sidecar", "--keep-latents", "--preview", "--output", out / "x.mp4")
    for more in ((), ("--overwrite",)):
        outcome = command(*words, *flags, *more)
        assert outcome.code == 2
        assert f"{out / name} exists" in outcome.errors[0]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == {name: b"somebody's"}


def test_what_this_program_made_is_replaced_when_asked(command: Command, words: Words, out: Path):
    flags = ("--sidecar", "--keep-latents", "--preview", "--output", out / "x.mp4")
    assert command(*words, *flags).code == 0
    before = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert len(before) == 4
    assert "exists" in command(*words, *flags).errors[0]
    outcome = command(*words, *flags, "--overwrite")
    assert outcome.code == 0, outcome.err
    after = {path.name: path.stat().st_mtime_ns for path in out.iterdir()}
    assert after.keys() == before.keys()
    assert all(after[name] > before[name] for name in before)


def test_what_comes_while_the_video_is_made_is_left_alone(
    command: Command, words: Words, out: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    """Somebody puts files to the output's names while it is worked on."""
    true = products.place_video

    def meanwhile(*given):
        for name in ("x.mp4", "x-1.json", "x-1.latents.safetensors"):
            (out / name).write_bytes(b"somebody's")
        return true(*given)

    monkeypatch.setattr("skyreels_jax.cli.job.place_video", meanwhile)
    outcome = command(*words, "--sidecar", "--keep-latents", "--output", out / "x.mp4")
    assert outcome.code == 0, outcome.err
    assert f"wrote {out / 'x-1.mp4'}" in outcome.out
    assert f"{out / 'x.mp4'} has come there since and is left alone" in caplog.text
    for name in ("x.mp4", "x-1.json", "x-1.latents.safetensors"):
        assert (out / name).read_bytes() == b"somebody's"
    assert media.read_video(out / "x-1.mp4")[0].shape == (5, 32, 48, 3)
    assert json.loads((out / "x-1-1.json").read_text())["prompt"] == "a fox"
    assert SavedLatents.open(out / "x-1-1.latents.safetensors").latents.shape[0] == 16


@pytest.fixture(scope="module")
def unfinished(checkpoints: Checkpoints, tmp_path_factory, cache_folder: Path) -> Path:
    """A job with its one window, and without a video."""
    out = tmp_path_factory.mktemp("unfinished")
    asked = ["generate", "--model", str(checkpoints("t2v", "original")), "--prompt", "a fox"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SKYREELS_JAX_CACHE", str(cache_folder))
        patch.setattr("skyreels_jax.cli.job.place_video", full)
        assert main([*asked, *SMALL, "--sidecar", "--output", str(out / "x.mp4")]) == 2
    assert [path.name for path in out.iterdir()] == ["x.job"]
    return out / "x.job"


@pytest.fixture
def broken_off(unfinished: Path, out: Path) -> Path:
    """The same, in the place of this test."""
    job = Path(shutil.copytree(unfinished, out / "x.job"))
    record = json.loads((job / "job.json").read_text())
    record["how"]["output"] = str(out / "x.mp4")
    (job / "job.json").write_text(json.dumps(record))
    return job


def full(*_: object, **__: object) -> None:
    raise OSError(28, "No space left on device")


def test_resume_replaces_no_file_of_somebody(command: Command, broken_off: Path, out: Path):
    (out / "x.mp4").write_bytes(b"somebody's")
    outcome = command("resume", broken_off)
    assert outcome.code == 2
    assert "did not make it" in outcome.errors[0]
    assert (out / "x.mp4").read_bytes() == b"somebody's"
    other = command("resume", broken_off, "--output", out / "y.mp4")
    assert other.code == 0, other.err
    assert sorted(path.name for path in out.iterdir()) == ["x.mp4", "y.json", "y.mp4"]
    assert (out / "x.mp4").read_bytes() == b"somebody's"


def test_resume_replaces_what_is_confirmed(command: Command, broken_off: Path, out: Path):
    (out / "x.mp4").write_bytes(b"somebody's")
    assert command("resume", broken_off, "--overwrite").code == 0
    assert media.read_video(out / "x.mp4")[0].shape == (5, 32, 48, 3)


def test_resume_replaces_what_the_job_made(command: Command, words: Words, out: Path):
    assert command(*words, "--keep-job", "--output", out / "x.mp4").code == 0
    outcome = command("resume", out / "x.job")
    assert outcome.code == 0, outcome.err
    # The same size, and another time: somebody's now.
    os.utime(out / "x.mp4")
    assert "did not make it" in command("resume", out / "x.job").errors[0]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"output": "{out}/victim.txt"}, ".mp4"),
        ({"output": "{out}/victim.mp4"}, "did not make it"),
        ({"output": "/proc/e.mp4"}, "not beside the job"),
        ({"output": "{out}/deep/new.mp4"}, "not beside the job"),
        ({"output": "relative.mp4"}, "not beside the job"),
        ({"output": 5}, "output is 5"),
        ({"model": None}, "model is None"),
        ({"no_prompt_cache": "yes"}, "no_prompt_cache is 'yes'"),
        ({"sidecar": 1}, "sidecar is 1"),
        ({"weights": ["a"]}, "weights is"),
    ],
)
def test_a_record_that_names_other_things_is_refused(
    command: Command, broken_off: Path, out: Path, no_weights, change: dict[str, object], says: str
):
    for name in ("victim.txt", "victim.mp4"):
        (out / name).write_bytes(b"somebody's")
    (out / "deep").mkdir()
    record = json.loads((broken_off / "job.json").read_text())
    for name, value in change.items():
        record["how"][name] = value.format(out=out) if isinstance(value, str) else value
    (broken_off / "job.json").write_text(json.dumps(record))
    outcome = command("resume", broken_off)
    assert outcome.code == 2, outcome.err
    assert says in outcome.errors[0]
    for name in ("victim.txt", "victim.mp4"):
        assert (out / name).read_bytes() == b"somebody's"
    assert list((out / "deep").iterdir()) == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("steps", value) for value in (0, -1, "many", None, 1.5, 2**70, True)),
        *(("height", value) for value in (33, 0, -32)),
        *(("num_frames", value) for value in (6, 10**9 + 1, [5])),
        *(("seed", value) for value in (-2, 2**32, 0.5)),
        *(("fps", value) for value in (0, "1/0", 10**6)),
        *(("prompts", value) for value in ([], ["a", "b"], [" "], "a fox", [5], [])),
        *(("task", value) for value in ("df", "i2v", "x", None)),
        *(("dtype", value) for value in ("float64", None)),
        *(("cache", value) for value in (None, {}, {"name": "teacache"})),
        *(("sources", value) for value in ([], {"steps": 5})),
        *(("video", value) for value in ({}, {"path": "x.mp4", "frames": 5, "fps": 24.0})),
        ("extra", 1),
    ],
)
def test_a_record_is_checked_as_a_request_is(
    command: Command, broken_off: Path, no_weights, name: str, value: object
):
    record = json.loads((broken_off / "job.json").read_text())
    record["request"][name] = value
    (broken_off / "job.json").write_text(json.dumps(record))
    outcome = command("resume", broken_off)
    assert outcome.code == 2, outcome.err
    assert "job.json" in outcome.errors[0]


HOLD = """
import sys, time
from pathlib import Path
from skyreels_jax.outputs import locked
with locked(Path(sys.argv[1]), "output"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("verb", ["generate", "resume"])
def test_what_another_process_works_on_is_refused_until_that_is_gone(
    command: Command, words: Words, broken_off: Path, out: Path, verb: str, monkeypatch
):
    """Another process works on the output, or on the job; then it is killed."""
    held = out / ("y.mp4" if verb == "generate" else "x.job")
    asked = (*words, "--output", out / "y.mp4") if verb == "generate" else ("resume", broken_off)
    monkeypatch.chdir(out)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, str(held)], stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == "held\n"
        for path in (str(held), f"../out/./{held.name}", held.name):
            again = [path if str(word) == str(held) else word for word in asked]
            outcome = command(*again)
            assert outcome.code == 2
            assert "another process" in outcome.errors[0]
            assert "text:" not in outcome.err
        other.kill()
    outcome = command(*asked)
    assert outcome.code == 0, outcome.err
    assert not list(out.glob(".*"))


@pytest.mark.parametrize(("where", "layout"), [("x.job", "original"), ("vae/x.job", "diffusers")])
def test_what_is_written_into_the_models_folder_is_none_of_its_files(
    command: Command, checkpoints: Checkpoints, tmp_path: Path, where: str, layout: Format
):
    model = linked(checkpoints("t2v", layout), tmp_path / "model")
    before = Pipeline.from_pretrained(model).fingerprint()
    job = model / where
    job.mkdir()
    SavedLatents(np.zeros((16, 2, 4, 6), np.float32), {"fps": 24}).save(
        job.with_suffix(LATENTS_SUFFIX)
    )
    for name in ("job.json", "window-0000.safetensors", "../x.json", "../x.mp4", "../.x.json"):
        (job / name).write_bytes(b"{}")
    pipeline = Pipeline.from_pretrained(model)
    pipeline.verify()
    assert pipeline.fingerprint() == before
    config = model / ("config.json" if layout == "original" else "vae/config.json")
    rewrite(config, config.read_bytes() + b"\n")
    assert Pipeline.from_pretrained(model).fingerprint() != before


def test_latents_that_are_refused_where_asked_are_elsewhere(
    command: Command, words: Words, out: Path, tmp_path: Path, monkeypatch, caplog
):
    true = SavedLatents.save

    def refused(self: SavedLatents, path: Path, **more) -> None:
        if path.parent == out:
            raise OSError(28, "No space left on device")
        true(self, path, **more)

    monkeypatch.setattr(SavedLatents, "save", refused)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    outcome = command(*words, "--keep-latents", "--output", out / "x.mp4")
    assert outcome.code == 0, outcome.err
    assert [path.name for path in out.iterdir()] == ["x.mp4"]
    (kept,) = tmp_path.glob("*.safetensors")
    assert f"they are in {kept}" in caplog.text
    assert SavedLatents.open(kept).latents.shape == (16, 2, 4, 6)


def test_a_picture_carries_the_mark_and_others_do_not(tmp_path: Path):
    media.write_image(tmp_path / "a.png", np.zeros((4, 4, 3), np.uint8), made_by="skyreels-jax")
    Image.new("RGB", (4, 4)).save(tmp_path / "b.png")
    shutil.copy(tmp_path / "b.png", tmp_path / "c.json")
    assert products.is_ours(tmp_path / "a.png")
    assert not products.is_ours(tmp_path / "b.png")
    assert not products.is_ours(tmp_path / "c.json")
