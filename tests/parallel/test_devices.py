"""A run on 8 virtual devices is the run on one."""

import json
import os
import subprocess
import sys

import pytest
from tests.parallel.on_devices import CASES, HEADS

from skyreels_jax.parallel.plan import all_plans

# Of the largest latent, after each of three steps in float32 with guidance 3. Measured at most
TOL = 2e-6
FAST = [("uneven", "ring=2,ulysses=4", "-"), ("df", "data=2,fsdp=2,ulysses=2", "-")]
# Measured 0.0
FAULTS = [("uneven", "fsdp=2,ulysses=4", "without mask")]
# Eight rows: every plan of eight devices is legal.
PLANS = [str(plan) for plan in all_plans(8) if HEADS % plan.ulysses == 0]


def differences(*words: tuple[str, str, str]) -> dict[tuple[str, str, str], float]:
    """What the program finds, by case, mesh and fault."""
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    command = [
        sys.executable,
        "-m",
        "tests.parallel.on_devices",
        *(w for one in words for w in one),
    ]
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rematerialization" not in done.stderr  # nothing is gathered that was not meant to be
    lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("[")]
    return {(case, mesh, fault): found for case, mesh, fault, found in lines}


def test_a_few_meshes_and_a_fault():
    found = differences(*FAST, *FAULTS)
    for key in FAST:
        assert found[key] < TOL
    for key in FAULTS:
        assert found[key] > 100 * TOL


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_every_mesh_of_eight_devices(case: str):
    words = [(case, mesh, "-") for mesh in PLANS]
    found = differences(*words)
    assert len(found) == 20
    assert {key: value for key, value in found.items() if not value < TOL} == {}


@pytest.mark.slow
def test_keys_that_do_not_go_round_are_caught():
    fault = ("uneven", "ring=8", "without turning")
    assert differences(fault)[fault] > 100 * TOL
