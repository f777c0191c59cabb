"""``skyreels-jax generate`` from a checkpoint folder to a file, and what stops it on the way."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import save_file
from tests.cli.commands import Command, linked, rewrite
from tests.fabricate import Checkpoints

from skyreels_jax import media
from skyreels_jax.pipeline import Pipeline

SMALL = ("--height", "32", "--width", "48", "--num-frames", "5", "--steps", "2", "--seed", "7")
VAE = "Wan2.1_VAE.pth"


def picture(folder: Path) -> Path:
    values = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(values).save(folder / "image.png")
    return folder / "image.png"


def test_from_a_folder_to_a_video_that_carries_its_settings(
    command: Command, checkpoints: Checkpoints, out: Path, tmp_path: Path
):
    folder, file = checkpoints("i2v", "original"), out / "x.mp4"
    words = ("--model", folder, "--prompt", "a fox ❄", "--image", picture(tmp_path), *SMALL)
    outcome = command("generate", *words, "--output", file, "--sidecar", "--dtype", "float32")
    assert outcome.code == 0, outcome.err
    assert sorted(path.name for path in out.iterdir()) == ["x.json", "x.mp4"]
    frames, rate = media.read_video(file)
    assert frames.shape == (5, 32, 48, 3)
    settings = media.read_settings(file)
    assert settings == json.loads((out / "x.json").read_text())
    assert (settings["prompt"], settings["seed"], settings["num_frames"]) == ("a fox ❄", 7, 5)
    assert settings["fps"] == rate
    assert settings["sources"]["steps"] == "given"
    told = outcome.out
    assert f"wrote {file} (5 frames, {rate} frames a second)" in told
    assert "steps            2  [given]" in told
    for setting in ("guidance-scale", "shift", "fps"):
        line = next(line for line in told.splitlines() if line.strip().startswith(setting))
        assert line.endswith(f"[{settings['sources'][setting.replace('-', '_')]}]")
        assert "given" not in line
    for stage in ("text", "image", "condition", "load", "compile", "denoise", "decode"):
        assert f"{stage}: done in" in outcome.err
        assert any(line.split()[:1] == [stage] for line in told.splitlines())
    assert "a step)" in told


def test_the_command_makes_what_python_makes(command: Command, checkpoints: Checkpoints, out: Path):
    folder = checkpoints("t2v", "original")
    words = ("--model", folder, "--prompt", "a fox", *SMALL, "--no-metadata", "--keep-latents")
    assert command("generate", *words, "--output", out / "x.mp4").code == 0
    assert sorted(p.name for p in out.iterdir()) == ["x.latents.safetensors", "x.mp4"]
    pipe = Pipeline.from_pretrained(folder)
    video = pipe("a fox", height=32, width=48, num_frames=5, steps=2, seed=7)
    video.save(out / "y.mp4")
    np.testing.assert_array_equal(
        media.read_video(out / "x.mp4")[0], media.read_video(out / "y.mp4")[0]
    )
    assert "comment" not in (out / "x.mp4").read_bytes().decode("latin-1")
    again = ("--resume-latents", out / "x.latents.safetensors", "--output", out / "z.mp4")
    outcome = command("generate", "--model", folder, "--prompt", "-", *again)
    assert outcome.code == 0
    assert "denoise:" not in outcome.err
    np.testing.assert_array_equal(
        media.read_video(out / "x.mp4")[0], media.read_video(out / "z.mp4")[0]
    )
    assert media.read_settings(out / "z.mp4")["prompt"] == "a fox"
    assert (out / "x.latents.safetensors").exists()


def test_a_latents_file_of_an_earlier_version_is_decoded(
    command: Command, checkpoints: Checkpoints, out: Path
):
    """The format as it was before jobs: latents and, in the metadata, settings as JSON."""
    latents = np.random.default_rng(0).standard_normal((16, 2, 4, 6)).astype(np.float32)
    settings = json.dumps({"prompt": "a hen", "fps": 24, "forcing": {"hand_over": "pixels"}})
    save_file({"latents": latents}, out / "old.safetensors", {"settings": settings})
    words = ("--model", checkpoints("t2v", "original"), "--prompt", "-", "--sidecar")
    given = ("--resume-latents", out / "old.safetensors", "--output", out / "x.mp4")
    outcome = command("generate", *words, *given)
    assert outcome.code == 0, outcome.err
    assert f"wrote {out / 'x.mp4'} (5 frames, 24 frames a second)" in outcome.out
    assert media.read_settings(out / "x.mp4") == json.loads(settings)
    assert (out / "old.safetensors").exists()


def test_what_fails_while_decoding_keeps_the_latents(
    command: Command, checkpoints: Checkpoints, out: Path, tmp_path: Path
):
    folder = linked(checkpoints("t2v", "original"), tmp_path / "model")
    values = torch.load(folder / VAE, weights_only=True)
    values["decoder.conv1.bias"][0] = torch.nan
    (folder / VAE).unlink()
    torch.save(values, folder / VAE)
    words = ("generate", "--model", folder, "--prompt", "a fox", "--output", out / "x.mp4")
    outcome = command(*words, *SMALL)
    assert outcome.code == 2
    (line,) = outcome.errors
    job = out / "x.job"
    assert "decoder.conv1.bias" in line
    assert f"go on with: skyreels-jax resume {job}" in line
    assert [path.name for path in out.iterdir()] == [job.name]
    assert sorted(path.name for path in job.iterdir()) == ["job.json", "window-0000.safetensors"]
    # The next run must not overwrite them unasked.
    assert "exists" in command(*words, *SMALL).errors[0]
    whole = checkpoints("t2v", "original") / VAE
    rewrite(folder / VAE, whole.read_bytes())
    resumed = command("resume", job)
    assert resumed.code == 0, resumed.err
    assert "1 of 1 windows are finished" in resumed.out
    assert "denoise:" not in resumed.err
    assert media.read_video(out / "x.mp4")[0].shape == (5, 32, 48, 3)
    assert [path.name for path in out.iterdir()] == ["x.mp4"]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_while_frames_are_written_leaves_no_half_file(
    command: Command,
    checkpoints: Checkpoints,
    out: Path,
    monkeypatch: pytest.MonkeyPatch,
    number: int,
    code: int,
):
    half: list[str] = []

    def stop(self: media.VideoWriter, frames: np.ndarray) -> None:
        self._container.start_encoding()
        half.extend(path.name for path in out.rglob(".skyreels-*"))
        os.kill(os.getpid(), number)

    monkeypatch.setattr(media.VideoWriter, "append", stop)
    words = ("--model", checkpoints("t2v", "original"), "--prompt", "a fox", *SMALL)
    handler = signal.getsignal(signal.SIGTERM)
    outcome = command("generate", *words, "--output", out / "x.mp4")
    assert outcome.code == code
    assert signal.getsignal(signal.SIGTERM) is handler
    assert len(half) == 1  # there was something to leave
    job = out / "x.job"
    assert [path.name for path in out.iterdir()] == [job.name]
    assert sorted(path.name for path in job.iterdir()) == ["job.json", "window-0000.safetensors"]
    assert f"skyreels-jax resume {job}" in outcome.err


@pytest.mark.parametrize(
    ("number", "code"),
    # Inside this process both signals are sent by the test above.
    [(signal.SIGINT, 130), pytest.param(signal.SIGTERM, 143, marks=pytest.mark.slow)],
)
def test_an_interrupted_process_leaves_nothing(
    checkpoints: Checkpoints, out: Path, number: int, code: int
):
    """A real process, interrupted by a real signal while it compiles or denoises."""
    folder = checkpoints("t2v", "original")
    words = [sys.executable, "-m", "skyreels_jax.cli.main", "generate", "--model", str(folder)]
    words += ["--prompt", "a fox", "--output", str(out / "x.mp4"), *SMALL[:-4], "--steps", "1000"]
    words += ["--height", "256", "--width", "256", "--num-frames", "33"]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    for line in process.stderr:
        # A thousand steps of this size take far longer than the signal.
        if line.startswith("load: done"):
            break
    time.sleep(0.5)
    process.send_signal(number)
    _, err = process.communicate(timeout=120)
    assert process.returncode == code, err
    assert "Traceback" not in err
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_output_that_is_there_is_replaced_only_when_asked(
    command: Command, checkpoints: Checkpoints, out: Path, overwrite: bool
):
    file = out / "x.mp4"
    file.write_bytes(b"somebody's")
    words = ("--model", checkpoints("t2v", "original"), "--prompt", "a fox", *SMALL)
    flags = ("--overwrite",) if overwrite else ()
    outcome = command("generate", *words, "--output", file, *flags)
    assert outcome.code == (0 if overwrite else 2)
    assert (file.read_bytes() == b"somebody's") is not overwrite


def test_verbose_shows_shapes_and_the_place_of_an_error(
    command: Command, checkpoints: Checkpoints, out: Path, caplog: pytest.LogCaptureFixture
):
    words = ("--model", checkpoints("t2v", "original"), "--prompt", " ", "--verbose")
    with caplog.at_level("DEBUG"):
        outcome = command("generate", *words, "--output", out / "x.mp4")
    assert outcome.code == 2
    assert "RequestError" in caplog.text
