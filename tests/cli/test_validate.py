"""``skyreels-jax validate``: exit codes, refusals, and one run through real processes."""

import json
import re
import runpy
from pathlib import Path

import numpy as np
import pytest
from tests.cli.commands import Command
from tests.fabricate import Checkpoints

from skyreels_jax import media
from skyreels_jax.parity.recording import writing

ROOT = Path(__file__).parents[2]


def clip(path: Path, seed: int = 0, size: tuple[int, int] = (32, 48)) -> Path:
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (5, size[0] // 8, size[1] // 8, 3), dtype=np.uint8)
    media.write_video(path, frames.repeat(8, axis=1).repeat(8, axis=2), fps=24)
    return path


def test_a_video_equals_itself_and_another_does_not(command: Command, tmp_path: Path):
    a, b = clip(tmp_path / "a.mp4"), clip(tmp_path / "b.mp4", seed=1)
    same = command("validate", "--videos", a, a)
    assert (same.code, same.out.splitlines()[-1]) == (0, "pass")
    assert "PSNR inf dB, SSIM 1.000000" in same.out
    other = command("validate", "--videos", a, b)
    assert other.code == 1
    assert re.search(r"PSNR \d+\.\d\d dB, SSIM -?0\.\d{6}", other.out)
    assert re.search(r"of 255: at most \d+, 99 % within \d+", other.out)
    assert other.out.splitlines()[-1] == "fail: less than 60 dB or 0.9999"


def test_videos_that_cannot_be_compared_are_refused(command: Command, tmp_path: Path):
    a, small = clip(tmp_path / "a.mp4"), clip(tmp_path / "b.mp4", size=(16, 48))
    outcome = command("validate", "--videos", a, small)
    assert outcome.code == 2
    assert "--videos" in outcome.err
    assert len(outcome.errors) == 1
    outcome = command("validate", "--videos", a, tmp_path / "none.mp4")
    assert outcome.code == 2
    assert "none.mp4" in outcome.err
    assert len(outcome.errors) == 1


def trace(path: Path, **values: np.ndarray) -> Path:
    with writing(path) as record:
        for name, array in values.items():
            record(name, array)
    return path


ONE = np.linspace(1, 2, 12, dtype=np.float32).reshape(3, 4)


def test_traces_pass_or_say_where_they_diverge_first(command: Command, tmp_path: Path):
    a = trace(tmp_path / "a.npz", first=ONE, second=ONE, third=ONE)
    assert command("validate", "--trace", a, a).code == 0
    b = trace(tmp_path / "b.npz", first=ONE, second=1.01 * ONE, third=1.5 * ONE)
    outcome = command("validate", "--trace", a, b)
    assert outcome.code == 1
    assert outcome.out.splitlines()[-1] == "fail: first at second"


def test_an_activation_that_only_one_trace_has_is_no_pass(command: Command, tmp_path: Path):
    a = trace(tmp_path / "a.npz", first=ONE, second=ONE)
    b = trace(tmp_path / "b.npz", first=ONE)
    outcome = command("validate", "--trace", a, b)
    assert outcome.code == 1
    assert "only in one of them" in outcome.out


def test_traces_without_a_common_place_are_refused(command: Command, tmp_path: Path):
    a, b = trace(tmp_path / "a.npz", first=ONE), trace(tmp_path / "b.npz", other=ONE)
    outcome = command("validate", "--trace", a, b)
    assert outcome.code == 2
    assert "no activation in common" in outcome.err
    (tmp_path / "c.npz").write_bytes(b"not an archive")
    assert command("validate", "--trace", a, tmp_path / "c.npz").code == 2
    outcome = command("validate", "--trace", a, tmp_path / "none.npz")
    assert outcome.code == 2
    assert "none.npz" in outcome.err


@pytest.mark.parametrize("content", [b"", b"no archive", b"PK\x03\x04 cut"])
def test_what_is_no_trace_is_refused_in_one_line(command: Command, tmp_path: Path, content: bytes):
    a, broken = trace(tmp_path / "a.npz", first=ONE), tmp_path / "b.npz"
    broken.write_bytes(content)
    outcome = command("validate", "--trace", a, broken)
    assert outcome.code == 2
    assert len(outcome.errors) == 1


def test_a_cut_archive_and_words_are_no_trace(command: Command, tmp_path: Path):
    a = trace(tmp_path / "a.npz", first=ONE)
    (tmp_path / "cut.npz").write_bytes(a.read_bytes()[:-40])
    np.savez(tmp_path / "words.npz", first=np.full((3, 4), "one"))
    for name in ("cut.npz", "words.npz"):
        assert command("validate", "--trace", a, tmp_path / name).code == 2


def test_a_bug_is_not_taken_for_a_difference(command: Command, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("skyreels_jax.cli.validate._pipelines", lambda args: 1 / 0)
    outcome = command("validate")
    assert outcome.code == 2
    assert "ZeroDivisionError" in outcome.err


@pytest.mark.parametrize(
    ("flags", "rule"),
    [
        (("--reference", "luck"), "there are diffusers, original-numerics, hybrid"),
        (("--dtype", "float16"), "there are float32, bfloat16"),
        (("--layers", "some"), "there are all, blocks, none"),
        (("--reference", "hybrid", "--dtype", "bfloat16"), "compare it with --dtype float32"),
        (("--num_tests", "0"), "must be at least 1"),
        (("--height", "33", "--width", "48"), "multiple of 16"),
        (("--device", "cuda"), "sees no CUDA device"),
    ],
)
def test_bad_settings_are_refused_with_the_rule(
    command: Command, checkpoints: Checkpoints, tmp_path: Path, flags, rule: str
):
    small = ("--height", "32", "--width", "48", "--num_frames", "9", "--steps", "2")
    words = ("--model", checkpoints("df", "diffusers"), *small, *flags)
    outcome = command("validate", *words, "--output-dir", tmp_path / "x")
    assert outcome.code == 2
    assert rule in outcome.err
    assert len(outcome.errors) == 1


def test_a_refused_device_leaves_what_an_earlier_run_left(
    command: Command, checkpoints: Checkpoints, out: Path
):
    left = out / "raw" / "jax" / "timings.json"
    left.parent.mkdir(parents=True)
    left.write_text("{}")
    words = ("--model", checkpoints("df", "diffusers"), "--height", "32", "--width", "48")
    words += ("--num_frames", "9", "--steps", "2", "--device", "cuda", "--output-dir", out)
    outcome = command("validate", *words)
    assert (outcome.code, len(outcome.errors)) == (2, 1)
    assert "sees no CUDA device" in outcome.err
    assert left.read_text() == "{}"


def test_the_described_script_hands_its_flags_on(monkeypatch: pytest.MonkeyPatch):
    seen = []
    monkeypatch.setattr("skyreels_jax.cli.main.program", seen.append)
    words = ["--model_id", "m", "--num_tests", "3", "--output_dir", "./test_results"]
    monkeypatch.setattr("sys.argv", ["test_jax_port.py", *words])
    runpy.run_path(str(ROOT / "test_jax_port.py"), run_name="__main__")
    assert seen == [["validate", *words]]


def test_a_whole_run_writes_a_report(command: Command, checkpoints: Checkpoints, out: Path):
    words = ("--model_id", checkpoints("df", "original"), "--height", "32", "--width", "48")
    words += ("--num_frames", "9", "--num_inference_steps", "2", "--layers", "blocks")
    left = out / "raw" / "bf16_baseline"
    left.mkdir(parents=True)
    (left / "timings.json").write_text("{}")
    outcome = command("validate", *words, "--output_dir", out)
    assert outcome.code == 0, outcome.err + outcome.out
    assert "verdict: pass" in outcome.out
    report = json.loads((out / "report.json").read_text())
    assert report["schema"] == "skyreels-jax-validation/2"
    assert report["verdict"] == "pass"
    assert report["tests"][0]["frames"]["psnr"] >= 60
    assert {place["name"] for place in report["tests"][0]["layers"]} >= {"blocks.1", "vae", "text"}
    assert report["timings"]["torch"]["peak_mib"] > 100
    assert str(out.parent) not in (out / "report.json").read_text()
    assert media.read_video(out / "test_0.mp4")[0].shape == (9, 32, 3 * 48, 3)
    for name in ("report.html", "layers.png", "steps.png", "frames.png", "times.png", "memory.png"):
        assert (out / name).stat().st_size > 1000
    assert (out / "raw" / "jax" / "trace-0-0.npz").is_file()
    assert not left.exists()  # of an earlier run
