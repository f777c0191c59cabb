"""What `python -m benchmarks.compile` reads in compiled programs, and that it compiles for TPUs."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from benchmarks import compile as benchmark

from skyreels_jax.generation.dry_run.compiled import read_module

# An instruction of a kernel is broken by its metadata; other kernels are traced in other scopes.
TEXT = """
  %splash = bf16[2,8]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", frontend={m={
  }}, metadata={op_name="jit(f)/attention_splash/vmap(s)/pallas_call" id=1}
  %other = bf16[2,8]{1,0} custom-call(%a), custom_call_target="tpu_custom_call", metadata={
  op_name="jit(f)/other/pallas_call"}
  %last = bf16[2,8]{1,0} custom-call(%a), custom_call_target="X", metadata={op_name="x"}
  %named = f32[4]{0} fusion(%a), metadata={op_name="jit(f)/attention_splash/mul"}
  %fmha = (f16[4]{0}, u8[0]{0}) custom-call(%a), custom_call_target="__cudnn$fmhaSoftmax"
  %sum = (f32[2,4]{1,0}, bf16[3]{0}) all-reduce(%a, %b), to_apply=%add
  %begun = (bf16[8]{0}, bf16[64]{0}) all-gather-start(%a), dimensions={0}
  %done = bf16[64]{0} all-gather-done(%begun)
  %again = bf16[64]{0} all-gather(%a), dimensions={0}
"""


def test_kernels_and_collectives_are_counted_by_kind():
    module = read_module(TEXT)
    assert module.kernels == {"splash": 1, "cudnn": 1}
    assert module.collectives == {"all-reduce": (1, 38), "all-gather": (2, 256)}
    assert read_module(TEXT.replace("attention_splash/vmap", "other")).kernels == {"cudnn": 1}


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("v5e:1x1", r"^v5e:1x1 is compiled for with libtpu: .*skyreels-jax\[compile\]"),
        ("h100", "CUDA plugin"),
        ("v5litepod-4", "say h100, or one of v4, v5e"),
    ],
)
def test_what_is_missing_is_one_line(target: str, said: str, monkeypatch):
    monkeypatch.setattr(benchmark, "find_spec", lambda name: None)
    with pytest.raises(SystemExit, match=said) as left:
        benchmark.devices_of(target)
    assert "\n" not in str(left.value)


def test_each_program_stands_once_whoever_shares_it():
    names = ["SkyReels-V2-I2V-14B-540P", "SkyReels-V2-I2V-14B-720P", "SkyReels-V2-T2V-14B-540P"]
    stages = list(benchmark.stages_of([*names, names[0]], benchmark.STAGES, "float32"))
    assert [stage.name for stage in stages] == [
        *3 * ["step"],
        *2 * ["decode"],
        *2 * ["encode"],
        "text",
        "image",
    ]
    stages = benchmark.stages_of(names[2:], benchmark.STAGES, "float32")
    assert "image" not in [stage.name for stage in stages]


@pytest.mark.slow
@pytest.mark.parametrize(
    # Of both predictions of guidance, self- and cross-attention.
    ("stage", "kernels"),
    [("decode", "none"), ("step", "4 splash")],
    ids=["decode", "step"],
)
def test_programs_of_the_released_size_are_compiled_for_a_tpu(stage: str, kernels: str):
    root = Path(__file__).parent.parent
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.compile", "--target", "v5e:1x1", "--stages", stage]
        + ["--models", "SkyReels-V2-DF-1.3B-540P", "--vae-dtype", "bfloat16"],
        cwd=root,
        env=os.environ | {"PYTHONPATH": f"{root / 'src'}:{root}"},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    cells = [cell.strip() for cell in told.stdout.strip().splitlines()[-1].strip("|").split("|")]
    assert cells[0] == stage
    # Of a v5e's 16 GiB, less than a third.
    assert 3 < float(cells[4]) < 5.3  # measured 4.6 both
    assert cells[5:7] == [kernels, "none"]


@pytest.mark.slow
def test_a_step_on_a_mesh_takes_what_plan_says():
    """1.3B on the 8 chips of a v5e: the compiler's bytes against the formula's."""
    root = Path(__file__).parent.parent
    words = ["plan", "--model", "SkyReels-V2-DF-1.3B-540P", "--device", "v5e", "--devices", "8"]
    told = subprocess.run(
        [sys.executable, "-m", "skyreels_jax", *words, "--compile", "--json"],
        env=os.environ | {"PYTHONPATH": str(root / "src")},
        capture_output=True,
        text=True,
    )
    assert told.returncode == 0, told.stderr
    answer = json.loads(told.stdout)
    compiled, best = answer["compiled"], answer["meshes"][0]
    assert compiled["mesh"] == best["mesh"]
    parts = best["bytes"]["transformer"]
    arguments = parts["weights"] + parts["contexts"] + parts["latents"]
    assert compiled["arguments"] == pytest.approx(arguments, rel=0.05)  # measured here 0.45 %
    peak = sum(parts.values())
    assert compiled["peak"] == pytest.approx(peak, rel=0.1)  # measured here 0.52 %
    assert compiled["kernels"] == {"splash": 4}
    # No gather of a whole stack, which has 2.6 GB: all gathers together are less than half of that.
    assert compiled["collectives"]["all-gather"]["bytes"] < 1.3e9  # measured 0.91e9
