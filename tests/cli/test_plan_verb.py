"""``skyreels-jax plan``: a table, JSON, and what is refused."""

import json

import pytest
from tests.cli.commands import Command

from skyreels_jax.cli.plan import ACCELERATOR_NAMES
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
