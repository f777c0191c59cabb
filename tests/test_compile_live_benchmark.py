"""What `python -m benchmarks.compile --live` counts of a stream's block, by two other counts."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from benchmarks.compile_live import RATES, BlockWork, Stream

from skyreels_jax.causal_presets import CAUSAL_PRESETS
from skyreels_jax.generation.dry_run.meshes import ACCELERATORS
from skyreels_jax.generation.dry_run.operations import operations

PRESET = CAUSAL_PRESETS["self-forcing"]
T2V_1_3B = PRESET.model.config


def stream(size: tuple[int, int], layers: int) -> Stream:
    """A block of the released width, with attention that is no kernel and no loop."""
    config = dataclasses.replace(T2V_1_3B, num_layers=layers)
    return Stream(config, PRESET.schedule(), PRESET.attention_window(), size, "xla")


def test_operations_are_those_of_the_traced_program():
    small = stream((32, 48), layers=2)
    assert small.work == BlockWork(small.config, patches=6, block=3, past=18, steps=4)
    traced, _ = small.trace(jax.devices()[0])
    assert small.work.operations == operations(traced.jaxpr.jaxpr)
    without = dataclasses.replace(small.work, past=0)
    assert without.operations != operations(traced.jaxpr.jaxpr)


def test_a_standing_block_of_the_released_size():
    work = Stream(T2V_1_3B, PRESET.schedule(), PRESET.attention_window(), (480, 832)).work
    assert (work.patches, work.block, work.past) == (1560, 3, 18)
    # By hand, of one layer: 12 · 4680 · 1536² + 4 · 4680 · 1536 · 8960 and 4 · 4680 · 33272 · 1536.
    assert work.linears == 390_133_186_560
    assert work.kernels == 956_700_426_240
    # Five calls, each reading the window's keys and values: 30 layers · 28080 · 1536 · 2 · 2 bytes.
    assert work.bytes(0) == 5 * 30 * 1536 * 4 * (28080 + 512) + 30 * 1536 * 4 * 4680


def test_rates_are_those_that_plans_are_made_with():
    for kind, rates in RATES.items():
        assert rates.operations == ACCELERATORS[kind].operations


PROGRAM = """
import json, sys
from benchmarks.compile import devices_of
(device,) = devices_of("v5e:1x1")
from benchmarks.compile_live import compile_block
from tests.test_compile_live_benchmark import stream
# Of two layers: one would be no loop, and its unused half not there.
small = stream((128, 256), layers=2)
found, attention, _ = compile_block(small, device)
forgotten = small.work.__class__(small.config, small.work.patches, 3, 0, 4)
formulas = [work.standing(kernels=True) for work in (small.work, forgotten)]
print(json.dumps([found.counted, *formulas, attention]))
"""


@pytest.mark.slow
def test_operations_are_nearly_those_that_the_compiler_for_a_tpu_counts():
    root = Path(__file__).parent.parent
    told = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=root,
        env=os.environ | {"PYTHONPATH": f"{root / 'src'}:{root}"},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    counted, formula, without_past, attention = json.loads(told.stdout.splitlines()[-1])
    assert attention == "xla"
    # The compiler counts norms, softmax and gates too: measured 0.63 % above the formula.
    assert formula == pytest.approx(counted, rel=0.02)
    assert without_past != pytest.approx(counted, rel=0.02)  # measured 14 % below
