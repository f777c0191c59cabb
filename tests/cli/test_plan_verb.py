"""``skyreels-jax plan``: a table, JSON, and what is refused."""

import json
from collections import Counter
from typing import get_args, get_type_hints

import pytest
from tests.cli.commands import Command

from skyreels_jax.cli import plan
from skyreels_jax.cli.plan import ACCELERATOR_NAMES
from skyreels_jax.generation.dry_run import compiled
from skyreels_jax.generation.dry_run.compiled import Compiled, Module, grid_of
from skyreels_jax.generation.dry_run.meshes import ACCELERATORS
from skyreels_jax.training.lora import LoraTraining
from skyreels_jax.training.optimizer import OptimizerConfig

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

    def answer(job, mesh, kind) -> Compiled:
        asked.append((str(mesh), kind))
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


ON = ("--training", "--device", "h100", "--devices")


def test_a_training_step_has_its_own_table(command: Command):
    small = ("--frames", "17", "--height", "64", "--width", "64")
    outcome = command("plan", "--model", "mini", *small, *ON, "2", "--lora", "32")
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0].endswith(
        "a LoRA of rank 32 over bfloat16, 2 clips of 17 frames of 64 x 64 a step, adamw, remat full"
    )
    assert lines[-1] == f"recommended: train --mesh {lines[3].split()[0]}"


@pytest.mark.slow
def test_json_of_a_training_step_has_every_kind_of_bytes(command: Command):
    found = json.loads(
        command(*MODEL, *ON, "8", "--ema", "0.9", "--optimizer", "muon", "--json").out
    )
    assert found["job"]["optimizer"] == "muon"
    assert {mesh["mesh"] for mesh in found["meshes"]} >= {"data=8", "fsdp=8"}
    kinds = {"weights", "gradients", "optimiser", "average", "kept", "at work"}
    for mesh in found["meshes"]:
        assert kinds < set(mesh["bytes"])
        assert mesh["total"] == sum(mesh["bytes"].values())


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--ema", "0.9"), "--ema is of training: give --training too"),
        (("--training", "--weights", "int8"), "--weights is not of training"),
        (("--training", "--base", "int8"), "give --lora RANK too"),
        (("--training", "--batch", "0"), "nearest is 1"),
        (("--training", "--lora", "0"), "rank = 0 should be at least 1"),
        (("--training", "--ema", "1"), "ema = 1.0 should be at least 0 and below 1"),
    ],
)
def test_what_does_not_go_with_training_is_refused(command: Command, words, says: str):
    outcome = command(*MODEL, "--device", "h100", *words)
    assert outcome.code == 2
    assert says in outcome.errors[0]


def test_choices_of_training_are_those_of_a_recipe():
    of_recipe = get_type_hints(OptimizerConfig)["name"]
    assert get_args(of_recipe) == plan._OPTIMIZERS
    assert set(get_args(get_type_hints(LoraTraining)["base"])) == set(plan._BASES)
