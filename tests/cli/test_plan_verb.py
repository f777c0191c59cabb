"""``skyreels-jax plan``: a table, JSON, and what is refused."""

import json
from collections import Counter

import pytest
from tests.cli.commands import Command

from skyreels_jax.cli.plan import ACCELERATOR_NAMES
from skyreels_jax.generation.dry_run import compiled
from skyreels_jax.generation.dry_run.compiled import Compiled, Module, grid_of
from skyreels_jax.generation.dry_run.meshes import ACCELERATORS

MODEL = ("plan", "--model", "SkyReels-V2-T2V-14B-720P")


def test_names_of_devices_are_those_that_are_known():
    assert tuple(ACCELERATORS) == ACCELERATOR_NAMES


def test_a_table_and_a_recommendation(command: Command):
    outcome = command(*MODEL, "--device", "h100", "--devices", "8")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0].startswith("SkyReels-V2-T2V-14B-720P: 121 frames of 720 x 1280, 111600 tokens")
    assert "nothing was run" in lines[1]
    assert lines[3].split()[0] in lines[-1]
    assert lines[-1].startswith("recommended: --mesh ")


def test_json_says_the_same(command: Command):
    outcome = command(*MODEL, "--device", "v6e", "--devices", "8", "--json")
    found = json.loads(outcome.out)
    assert found["job"]["tokens"] == 111600
    first = found["meshes"][0]
    assert first["fits"]
    assert set(first["bytes"]) == {"text encoder", "VAE", "transformer"}
    kinds = {one["kind"] for one in first["collectives_per_call"]}
    assert "all-gather of weights" in kinds


def test_the_compiler_is_asked_about_the_recommended_mesh(
    command: Command, monkeypatch: pytest.MonkeyPatch
):
    """It takes a minute; what is said of its answer is tested here."""
    asked = []

    def answer(job, plan, kind) -> Compiled:
        asked.append((str(plan), kind))
        module = Module(Counter(splash=4), {"all-gather": (50, 2_000_000_000)})
        return Compiled(2**30, 2**29, 3 * 2**29, module, (52.0, 55.0))

    monkeypatch.setattr(compiled, "compile_step", answer)
    words = (*MODEL, "--device", "v6e", "--devices", "8", "--compile")
    lines = command(*words).out.splitlines()
    (start,) = [n for n, line in enumerate(lines) if line.startswith("compiled in 52 s, mesh ")]
    assert lines[start + 1].startswith("  arguments 1.00 GiB, by formula 3.5")
    assert lines[start + 2].startswith("  peak 1.50 GiB, by formula 5.69")
    assert "fused attention: 4 splash" in lines[start + 3]
    assert lines[start + 4] == "  50 all-gather, 2.000 GB"
    found = json.loads(command(*words, "--json").out)["compiled"]
    assert found["mesh"] == asked[1][0] == "ulysses=8"
    assert found["collectives"] == {"all-gather": {"count": 50, "bytes": 2_000_000_000}}
    assert asked == [(found["mesh"], "v6e")] * 2


def test_what_cannot_be_compiled_for_is_said_at_once(command: Command):
    for device, count, says in (
        ("h100", "8", "the compiler is asked for TPUs, v5e, v6e, v5p, and not for h100"),
        ("v5e", "3", "there is no slice of 3 v5e; there are 1, 4, 8, 16, 32, 64, 128"),
    ):
        outcome = command(*MODEL, "--device", device, "--devices", count, "--compile")
        assert (outcome.code, outcome.out) == (2, "")
        assert says in outcome.errors[0]
    assert grid_of("v5p", 16) == "v5p:2x2x4"


def test_what_fits_nowhere_is_2(command: Command):
    outcome = command(*MODEL, "--device", "4090")
    assert outcome.code == 2
    assert outcome.out.splitlines()[-1].startswith("none fits")


@pytest.mark.parametrize(
    ("flag", "value", "says"),
    [
        ("--frames", "98", "nearest legal are 97 and 101"),
        ("--height", "721", "nearest legal are 720 and 736"),
        ("--steps", "0", "nearest legal are 1"),
        ("--devices", "0", "nearest is 1"),
        ("--devices", "5000", "nearest is 4096"),
    ],
)
def test_what_is_illegal_is_refused(command: Command, flag: str, value: str, says: str):
    outcome = command(*MODEL, "--device", "h100", flag, value)
    assert outcome.code == 2
    assert says in outcome.errors[0]
