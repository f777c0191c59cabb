"""``generate --dry-run``: a table from headers alone, and a verdict."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tests.cli.commands import Command, Outcome, linked, rewrite
from tests.fabricate import Checkpoints

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.cli import dry_run
from skyreels_jax.generation.dry_run.plan import StagePlan, plan
from skyreels_jax.generation.request.resolve import resolve
from skyreels_jax.generation.request.resolved import ResolvedRequest
from skyreels_jax.generation.request.settings import Request

SMALL = ("--height", "32", "--width", "48", "--num-frames", "5", "--steps", "2", "--seed", "7")
# Fast: of these only the transformer is analysed.
HYBRID = ("--backend", "hybrid")


def run(command: Command, folder: Path, out: Path, *words: str | Path) -> Outcome:
    given = ("--model", folder, "--prompt", "a fox", "--output", out / "x.mp4", *SMALL)
    return command("generate", *given, "--dry-run", *words)


def table(outcome: Outcome) -> dict[str, list[str]]:
    """Cells of each stage, without its name."""
    lines = outcome.out.splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("stage "))
    cells = [re.split(r"\s{2,}", line) for line in lines[start + 1 : -1]]
    return {name: rest for name, *rest in cells}


def spoiled(file: Path) -> None:
    """The same header before tensors of other bytes."""
    content = file.read_bytes()
    header = 8 + int.from_bytes(content[:8], "little")
    rewrite(file, content[:header] + b"\xff" * (len(content) - header))


def has(monkeypatch: pytest.MonkeyPatch, free: int | None) -> None:
    monkeypatch.setattr(dry_run, "available_memory", lambda: free)


def test_a_table_is_printed_and_no_weight_read(
    command: Command, checkpoints: Checkpoints, out: Path, tmp_path: Path, monkeypatch
):
    """All bytes of all tensors are NaN: whatever looked at one would refuse it."""
    folder = linked(checkpoints("i2v", "diffusers"), tmp_path / "model")
    weights = list(folder.rglob("*.safetensors"))
    assert len(weights) == 4
    for file in weights:
        spoiled(file)
    photo = tmp_path / "photo.png"
    Image.fromarray(np.zeros((32, 48, 3), np.uint8)).save(photo)
    stages: list[StagePlan] = []

    def planned(checkpoint: Checkpoint, request: ResolvedRequest, **options):
        """What the table is made of: compiled once, and that of the same request from Python."""
        words = {"prompt": "a fox", "image": photo, "height": 32, "width": 48, "num_frames": 5}
        same = resolve(Request(**words, steps=2, seed=7), Checkpoint.open(folder))
        assert replace(request, sources={}, warnings=()) == replace(same, sources={}, warnings=())
        assert options["hybrid"] is False
        stages.extend(plan(checkpoint, request, **options))
        return iter(stages)

    monkeypatch.setattr(dry_run, "plan", planned)
    outcome = run(command, folder, out, "--image", photo)
    assert outcome.code == 0, outcome.err
    rows = table(outcome)
    assert list(rows) == ["text", "image", "condition", "denoise", "decode"]
    assert list(rows) == [stage.stage for stage in stages]
    for stage in stages:
        assert stage.work is not None and stage.work.temporary is not None
        sizes = (stage.weights, stage.work.state, stage.work.temporary, stage.total)
        assert rows[stage.stage][:4] == [f"{size / 2**30:.3f}" for size in sizes]
        assert rows[stage.stage][4] == f"{stage.operations:.3g}"
        assert re.fullmatch(r"\d+\.\d s", rows[stage.stage][5])
    assert outcome.out.splitlines()[-1].startswith("fits: the largest stage, text, takes 0.01 GiB")
    assert list(out.iterdir()) == []
    done = command("generate", "--model", folder, "--prompt", "-", "--output", out / "x.mp4",
                   "--image", photo, *SMALL)  # fmt: skip
    assert "NaN or infinite" in done.errors[0]


@pytest.mark.slow
def test_with_pytorch_around_only_the_transformer_is_analysed(
    command: Command, checkpoints: Checkpoints, out: Path
):
    outcome = run(command, checkpoints("t2v", "original"), out, *HYBRID)
    assert outcome.code == 0
    for stage, cells in table(outcome).items():
        assert (cells.count("?") == 4) is (stage != "denoise"), cells
    assert "takes at least 0.00 GiB" in outcome.out


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_what_does_not_fit_is_refused_with_its_numbers(
    command: Command, checkpoints: Checkpoints, out: Path, monkeypatch, dtype: str
):
    has(monkeypatch, 1000)
    outcome = run(command, checkpoints("df", "original"), out, *HYBRID, "--dtype", dtype)
    assert outcome.code == 2
    (line,) = outcome.errors
    assert "does not fit: the largest stage, " in line
    assert "has 0.00 GiB free; use fewer frames, a smaller size" in line
    # Half the bytes are only to be had where there are four of them.
    assert ("--dtype bfloat16" in line) is (dtype == "float32")
    assert list(table(outcome)) == ["text", "denoise"]  # and the last line read as the verdict's


def test_a_device_that_does_not_tell_gets_no_verdict(
    command: Command, checkpoints: Checkpoints, out: Path, monkeypatch
):
    has(monkeypatch, None)
    outcome = run(command, checkpoints("t2v", "original"), out, *HYBRID)
    assert outcome.code == 0
    assert outcome.out.splitlines()[-1].endswith("does not tell what is free")


@pytest.mark.slow
def test_tiles_show_in_the_table(command: Command, checkpoints: Checkpoints, out: Path):
    wide = ("--width", "448", "--num-frames", "1", "--vae-tiling", "on")
    rows = table(run(command, checkpoints("t2v", "original"), out, *wide))
    assert list(rows) == ["text", "denoise", "decode (2 tiles)"]


@pytest.mark.slow
def test_a_vae_in_bfloat16_keeps_half_as_much_of_frames(
    command: Command, checkpoints: Checkpoints, out: Path
):
    wide = ("--width", "1280", "--height", "720")
    exact, half = (
        table(run(command, checkpoints("t2v", "original"), out, *wide, "--vae-dtype", dtype))
        for dtype in ("float32", "bfloat16")
    )
    assert exact["denoise"][:4] == half["denoise"][:4]
    assert float(half["decode"][1]) == pytest.approx(float(exact["decode"][1]) / 2, rel=0.1)


def test_a_checkpoint_that_lacks_a_part_is_refused(
    command: Command, checkpoints: Checkpoints, out: Path, tmp_path: Path
):
    folder = linked(checkpoints("t2v", "original"), tmp_path / "model")
    (folder / "Wan2.1_VAE.pth").unlink()
    outcome = run(command, folder, out)
    assert outcome.code == 2
    assert "Wan2.1_VAE.pth is missing" in outcome.errors[0]


def test_a_dry_run_of_latents_is_refused(command: Command, checkpoints: Checkpoints, out: Path):
    outcome = run(command, checkpoints("t2v", "original"), out, "--resume-latents", out / "x")
    assert outcome.code == 2
    assert "leave --resume-latents out" in outcome.errors[0]
