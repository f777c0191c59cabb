"""Long videos that are interrupted: nothing finished is lost, and the video is the same."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.cli.commands import Command
from tests.cli.conftest import jax_settings
from tests.fabricate import Checkpoints

from skyreels_jax import media
from skyreels_jax.cli.main import main

# Seconds from the start of the work within which a kill falls; most of the work is in the first.
SPAN = 2.5
FRAMES = 53
SMALL = ("--num-frames", FRAMES, "--base-num-frames", "17", "--overlap-history", "5")
SMALL += ("--height", "32", "--width", "48", "--steps", "25", "--seed", "7", "--dtype", "float32")
PROMPTS = ("--prompt", "a fox", "--prompt", "a crow")


def words(checkpoints: Checkpoints, out: Path, *more: str) -> list[str]:
    asked = ["generate", "--model", checkpoints("df", "diffusers"), *PROMPTS, *SMALL]
    return [str(word) for word in (*asked, "--output", out / "x.mp4", *more)]


def start(arguments: list[str]) -> subprocess.Popen[str]:
    program = [sys.executable, "-m", "skyreels_jax.cli.main", *arguments]
    return subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until_it_works(process: subprocess.Popen[str]) -> None:
    """Wait for the first stage to end: from then on there is a job."""
    assert process.stderr is not None
    for line in process.stderr:
        if ": done in" in line:
            return
    raise AssertionError(process.communicate())


@pytest.fixture(scope="module")
def undisturbed(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory, cache_folder):
    """Frames of a run that nothing interrupts; it also fills the compilation cache."""
    out = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch, jax_settings():
        patch.setenv("SKYREELS_JAX_CACHE", str(cache_folder))
        assert main(words(checkpoints, out)) == 0
    assert sorted(path.name for path in out.iterdir()) == ["x.mp4"]
    return media.read_video(out / "x.mp4")[0]


@pytest.mark.slow
@pytest.mark.parametrize("times", [20])
def test_kills_at_random_moments_lose_nothing(checkpoints, out: Path, undisturbed, times: int):
    moments = random.Random(5)
    kills = finished = 0
    while kills < times:
        job = out / "x.job"
        go_on = (job / "job.json").is_file()
        process = start(["resume", str(job)] if go_on else words(checkpoints, out, "--overwrite"))
        until_it_works(process)
        time.sleep(moments.uniform(0, SPAN))
        killed = process.poll() is None
        process.send_signal(signal.SIGKILL)
        _, err = process.communicate(timeout=60)
        kills += killed
        if not killed:
            assert process.returncode == 0, err
        if (out / "x.mp4").is_file():
            finished += 1
            np.testing.assert_array_equal(media.read_video(out / "x.mp4")[0], undisturbed)
            (out / "x.mp4").unlink()
    job = out / "x.job"
    if (job / "job.json").is_file():
        process = start(["resume", str(job)])
        _, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        np.testing.assert_array_equal(media.read_video(out / "x.mp4")[0], undisturbed)
        assert [path.name for path in out.iterdir()] == ["x.mp4"]
        finished += 1
    assert finished


@pytest.mark.parametrize(
    "number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_asked_to_stop_it_leaves_a_file_that_plays(checkpoints, out: Path, undisturbed, number):
    # So many steps that the second window is under way when the signal comes.
    process = start(words(checkpoints, out, "--steps", "150"))
    until_it_works(process)
    while not (out / "x.job" / "window-0000.safetensors").is_file():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(number)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 128 + number
    assert "Traceback" not in err
    assert f"skyreels-jax resume {out / 'x.job'}" in err
    partial = out / "x.job" / "partial.mp4"
    frames, _ = media.read_video(partial)
    assert len(frames) in (17, 29, 41)  # whole windows
    assert str(partial) in err
    assert not (out / "x.mp4").exists()
    assert not list(out.rglob(".*"))


def break_off(command: Command, monkeypatch: pytest.MonkeyPatch, words: list[str]):
    """Make a job whose disk is full when frame 20 is to be written."""
    true = media.VideoWriter.append

    def full(self: media.VideoWriter, frames: np.ndarray) -> None:
        if self.written > 20:
            raise OSError(28, "No space left on device")
        true(self, frames)

    with monkeypatch.context() as patch:
        patch.setattr(media.VideoWriter, "append", full)
        return command(*words)


@pytest.fixture
def broken_off(
    command: Command, checkpoints, out: Path, undisturbed, monkeypatch: pytest.MonkeyPatch
):
    outcome = break_off(command, monkeypatch, words(checkpoints, out, "--preview", "--sidecar"))
    assert outcome.code == 2
    assert "No space left" in outcome.err
    assert f"go on with: skyreels-jax resume {out / 'x.job'}" in outcome.err
    return out / "x.job"


@pytest.mark.slow
def test_a_job_goes_on_with_the_components_it_began_with(
    command: Command, checkpoints, out: Path, undisturbed, monkeypatch: pytest.MonkeyPatch
):
    (vae,) = (checkpoints("t2v", "diffusers") / "vae").glob("*.safetensors")
    loud = out.parent / "loud.safetensors"
    tensors = load_file(vae)
    save_file({k: 1.1 * v if k.endswith("gamma") else v for k, v in tensors.items()}, loud)
    asked = words(checkpoints, out, "--vae", str(loud))
    assert command(*asked).code == 0
    expected = media.read_video(out / "x.mp4")[0]
    assert not np.array_equal(expected, undisturbed)
    (out / "x.mp4").unlink()
    assert break_off(command, monkeypatch, asked).code == 2
    assert command("resume", out / "x.job").code == 0
    np.testing.assert_array_equal(media.read_video(out / "x.mp4")[0], expected)


def test_a_full_disk_says_what_is_kept_and_how_to_go_on(
    command: Command, broken_off: Path, out: Path, undisturbed
):
    kept = {path.name for path in broken_off.iterdir()}
    assert kept == {"job.json", "window-0000.safetensors", "window-0001.safetensors"}
    outcome = command("resume", broken_off)
    assert outcome.code == 0, outcome.err
    assert "2 of 4 windows are finished" in outcome.out
    np.testing.assert_array_equal(media.read_video(out / "x.mp4")[0], undisturbed)
    strips = [f"x.window-{number:03d}.png" for number in range(4)]
    assert sorted(path.name for path in out.iterdir()) == ["x.json", "x.mp4", *strips]
    assert media.read_image(out / strips[0]).shape == (32, 8 * 48, 3)
    assert media.read_settings(out / "x.mp4")["prompt"] == ["a fox", *["a crow"] * 3]
    # Of all frames, those of windows that were finished before too.
    assert json.loads((out / "x.json").read_text())["drift"]["frames"] == FRAMES


@pytest.mark.parametrize(
    "damage",
    [
        "bit",
        "of another request",
        pytest.param("cut", marks=pytest.mark.slow),
        pytest.param("another window's", marks=pytest.mark.slow),
    ],
)
def test_a_damaged_window_is_named_and_made_anew(
    command: Command, broken_off: Path, out: Path, undisturbed, caplog, damage: str
):
    window = broken_off / "window-0001.safetensors"
    content = bytearray(window.read_bytes())
    if damage == "cut":
        del content[1000:]
    elif damage == "bit":
        content[-1000] ^= 1
    elif damage == "another window's":
        content[:] = (broken_off / "window-0000.safetensors").read_bytes()
    else:
        record = broken_off / "job.json"
        record.write_text(record.read_text().replace('"seed": 7', '"seed": 8'))
    window.write_bytes(content)
    outcome = command("resume", broken_off)
    assert outcome.code == 0, outcome.err
    assert f"window {window} is " in caplog.text
    assert "the window is made anew" in caplog.text
    same = np.array_equal(media.read_video(out / "x.mp4")[0], undisturbed)
    assert same is (damage != "of another request")


def test_another_checkpoint_is_refused(command: Command, broken_off: Path):
    record = broken_off / "job.json"
    record.write_text(record.read_text().replace('"weights": "', '"weights": "0'))
    outcome = command("resume", broken_off)
    assert outcome.code == 2
    assert "is not what" in outcome.err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is no job folder"),
        ("{", "is no JSON that can be read"),
        ("[]", "cannot be understood"),
        ('{"format": 9}', "has format 9; this version reads 1 and 2"),
        ('{"format": 1, "request": {}, "how": {}}', "cannot be understood"),
    ],
)
def test_what_is_no_job_is_refused(command: Command, out: Path, content, message: str):
    if content is not None:
        (out / "job.json").write_text(content)
    outcome = command("resume", out)
    assert outcome.code == 2
    assert message in outcome.err


def test_a_job_that_is_there_is_not_begun_again(command: Command, broken_off: Path, checkpoints):
    outcome = command(*words(checkpoints, broken_off.parent))
    assert outcome.code == 2
    assert f"skyreels-jax resume {broken_off}" in outcome.err


def test_prompts_are_read_from_regular_files_alone(
    command: Command, checkpoints, out: Path, tmp_path: Path
):
    os.mkfifo(tmp_path / "pipe")
    arguments = [word for word in words(checkpoints, out) if word not in PROMPTS]
    for name, message in (("pipe", "is a pipe"), ("missing", "no such file"), (".", "a folder")):
        outcome = command(*arguments, "--prompt-file", tmp_path / name)
        assert outcome.code == 2
        assert message in outcome.err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a fox", "line 1: 'a fox'; expected `frame: prompt`"),
        ("0: a fox\n\n17:", "line 3"),
        ("0: a\n0: b", "frame 0 has a prompt already"),
        ("5: a", "first must start at frame 0"),
        ("", "--prompt is empty"),
    ],
)
def test_bad_prompt_files_are_refused(command: Command, checkpoints, out: Path, text, message):
    (out / "prompts.txt").write_text(text)
    arguments = [word for word in words(checkpoints, out) if word not in PROMPTS]
    outcome = command(*arguments, "--prompt-file", out / "prompts.txt")
    assert outcome.code == 2
    assert message in outcome.err
