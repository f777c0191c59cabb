import json
from pathlib import Path

import pytest
from tests.cli.commands import Command

from skyreels_jax.cli import resume
from skyreels_jax.generation.job_folder import FolderStore


@pytest.mark.slow
def test_a_job_remembers_what_weights_were_kept_in(
    command: Command, out: Path, monkeypatch: pytest.MonkeyPatch
):
    film = out / "film.mp4"
    sizes = ["--num-frames", "9", "--steps", "2", "--seed", "1", "--prompt", "a red star"]
    made = command(
        "generate", *sizes, "--output", film, "--weights", "int8", "--sidecar", "--keep-job"
    )
    assert made.code == 0, made.err
    assert json.loads(film.with_suffix(".json").read_text())["weights"] == "int8"
    job, seen = film.with_suffix(".job"), []
    film.unlink()
    monkeypatch.setattr(resume, "go_on", lambda pipeline, *_: seen.append(pipeline.weights) or 0)
    assert command("resume", job).code == 0
    assert seen == ["int8"]
    # A job of an earlier version has neither.
    record = json.loads((job / "job.json").read_text())
    for name in ("weights", "offload"):
        del record["request"][name]
    (job / "job.json").write_text(json.dumps(record))
    request = FolderStore.open(job).request
    assert (request.weights, request.offload) == (None, False)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--weights", "int4"), "--weights 'int4' is unknown; there are bf16, int8, fp8\n"),
        (("--weights", "int8", "--backend", "hybrid"), "leave --weights out"),
        (("--weights", "bf16", "--dtype", "float32"), "leave one out"),
        (("--offload",), "JAX computes on the CPU here"),
    ],
)
def test_what_does_nothing_is_refused(command: Command, out: Path, flags, says: str):
    outcome = command("generate", "--prompt", "a", *flags, "--output", out / "film.mp4")
    assert outcome.code == 2
    assert says in outcome.err
    assert not list(out.iterdir())


@pytest.mark.slow
def test_a_dry_run_counts_them(command: Command, out: Path):
    words = ["generate", "--prompt", "a", "--num-frames", "9", "--steps", "2", "--dry-run"]

    def weights(*flags: str) -> float:
        outcome = command(*words, *flags, "--output", out / "film.mp4")
        assert outcome.code == 0, outcome.err
        rows = [line.split() for line in outcome.out.splitlines()]
        return next(float(row[1]) for row in rows if row and row[0] == "denoise")

    assert weights("--weights", "int8") < 0.65 * weights()
