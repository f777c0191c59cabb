"""Training on a mesh of virtual devices is training on one."""

import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skyreels_jax.errors import RequestError
from skyreels_jax.parallel.plan import MeshPlan
from skyreels_jax.training.mesh import TrainingMesh, check_rows
from skyreels_jax.training.optimizer import OptimizerConfig, make_optimizer

# Of a gradient's largest value (measured at most 1.2e-6), and of the loss (3e-7).
TOLERANCE = 5e-6


def answers(*words: str) -> dict[str, object]:
    """What ``tests.training.on_meshes`` finds on a CPU of eight devices."""
    flags = {
        # Quick to compile; both sides of every comparison are compiled alike.
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0",
        "JAX_PLATFORMS": "cpu",
    }
    command = [sys.executable, "-m", "tests.training.on_meshes", *words]
    done = subprocess.run(command, env={**os.environ, **flags}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(line) for line in done.stdout.splitlines() if line.startswith("["))


def test_a_batch_that_does_not_divide_is_refused_with_the_nearest():
    with pytest.raises(RequestError, match=r"in 4, and 6 do not divide .* nearest: 4 or 8 rows"):
        check_rows(MeshPlan(data=2, fsdp=2), 6)
    with pytest.raises(RequestError, match=r"nearest: 4 rows, or 'fsdp=3'"):
        check_rows(MeshPlan(fsdp=4), 3)
    # Along ring and ulysses rows are not cut.
    check_rows(MeshPlan(data=2, ring=3), 6)


def test_a_mesh_of_more_devices_than_there_are_is_refused():
    with pytest.raises(RequestError, match=r"has 4 devices, and JAX finds 1 device; .*'fsdp=1'"):
        TrainingMesh.of("fsdp=4", 8)
    assert TrainingMesh.of("auto", 8).plan == MeshPlan()


def assert_faults_alone_differ(whole: list[str], faults: list[str]) -> None:
    """Loss and gradients are those of one device, unless a fault is planted."""
    for found in (answers(*whole, faults[0]), answers(faults[1])):
        for word, (of_loss, of_gradients) in found.items():
            if word in whole:
                assert of_loss < TOLERANCE
                assert of_gradients < TOLERANCE
            else:
                assert of_gradients > 1000 * TOLERANCE


@pytest.mark.slow
def test_gradients_are_those_of_one_device():
    whole = [
        "gradients:data=2,fsdp=2:1:none",
        "gradients:fsdp=4:2:full",
        "gradients:data=4:1:dots",
        "gradients:fsdp=2,ulysses=2:1:none",
        "gradients:ring=2,fsdp=2:1:full",
    ]
    # The last words break what comes after them, in the same process.
    faults = ["gradients:data=4:2:none:unsummed", "gradients:fsdp=4:1:none:other rows"]
    assert_faults_alone_differ(whole, faults)


@pytest.mark.slow
def test_gradients_of_a_lora_are_those_of_one_device():
    """What is not trained is cut; its matrices of 8 bits too."""
    whole = [
        "gradients:data=2,fsdp=2:1:none:-:float32",
        "gradients:fsdp=4:2:full:-:int8",
        "gradients:ring=2,fsdp=2:1:dots:-:float32",
    ]
    faults = [
        "gradients:fsdp=4:1:none:unsummed:float32",
        "gradients:fsdp=4:1:none:other parts:float32",
    ]
    assert_faults_alone_differ(whole, faults)


@pytest.mark.slow
def test_a_checkpoint_goes_on_on_other_meshes():
    meshes = ["fsdp=4", "data=2,fsdp=2"]
    words = [":".join(["restored", name, *meshes]) for name in ("adamw", "muon", "adafactor")]
    found = answers(*words)
    # Three steps, of parameters up to 0.5: issue 14 asks for 1e-5.
    assert max(found[words[0]]) < 1e-5
    assert max(found[words[1]]) < 1e-5
    assert max(found[words[2]]) < 1e-5


@pytest.mark.slow
def test_a_run_goes_on_bit_for_bit_and_logs_what_one_device_logs():
    (found,) = answers("resumed:data=2,fsdp=2:adamw:2").values()
    assert found["equal"]
    assert found["sampled"]
    assert found["keys"] == sorted(
        ["step", "seconds", "loss", "grad_norm", "held", "learning_rate", "steps_per_second"]
    )
    for (step, value), (same, expected) in zip(
        found["figures"], found["of one device"], strict=True
    ):
        assert step == same
        assert value == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_what_diverges_says_where():
    (said,) = answers("diverged:data=2,fsdp=2").values()
    assert "step 3 is not finite" in said
    assert "from batch 2" in said


@pytest.mark.slow
def test_each_device_has_its_part_and_no_stack_is_put_together():
    lora = "places:fsdp=4:adamw:int8"
    found = answers("places:data=2,fsdp=2:adamw", "places:fsdp=4:adamw", lora)
    for mesh, share in (("data=2,fsdp=2", 1 / 2), ("fsdp=4", 1 / 4)):
        one = found[f"places:{mesh}:adamw"]
        assert one["params"] == one["average"] == one["moments"] == [share]
        assert one["whole"] == []
        # Forwards 2 matrices of contexts and 9 of blocks, backwards 2 and the 8 that are needed;
        # each has one scatter.
        assert one["collectives"]["layers"] == {"all-gather": 21, "reduce-scatter": 11}
    # Of a LoRA the base is cut, and has no gradient; its own matrices are whole.
    assert found[lora]["frozen"] == [1 / 4]
    assert found[lora]["params"] == found[lora]["moments"] == [1]
    assert found[lora]["whole"] == []
    assert found[lora]["collectives"]["layers"] == {"all-gather": 19}


def after_three_steps(signal: float, rounding: int) -> dict[str, np.ndarray]:
    """Adafactor on two matrices; the gradient of one is a signal and differing rounding, 1e-10."""
    rng, noise = np.random.default_rng(0), np.random.default_rng(rounding)
    draw = lambda size: rng.standard_normal((2, 160, 160)) * size  # noqa: E731
    params = {n: jnp.asarray(draw(0.05), jnp.float32) for n in ("a.kernel", "b.kernel")}
    optimizer = make_optimizer(OptimizerConfig("adafactor", 1e-2, "constant", 0), 10, params)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        for _ in range(3):
            off = noise.standard_normal((2, 160, 160))
            grads = {
                "a.kernel": jnp.asarray(draw(0.01) * (1 + 1e-7 * off), jnp.float32),
                "b.kernel": jnp.asarray(draw(signal) + 1e-10 * off, jnp.float32),
            }
            updates, state = update(grads, state, params)
            params = jax.tree.map(jnp.add, params, updates)
    return {name: np.asarray(value) for name, value in params.items()}


@pytest.mark.slow
def test_adafactor_makes_rounding_large_where_a_gradient_is_nothing_else():
    """Without any mesh: what differs on one is a gradient that is rounding alone."""

    def apart(signal: float) -> dict[str, float]:
        one, other = (after_three_steps(signal, seed) for seed in (1, 2))
        return {name: float(np.max(np.abs(one[name] - other[name]))) for name in one}

    assert max(apart(1e-3).values()) < 1e-7  # measured 1.5e-8
    silent = apart(0.0)
    assert silent["a.kernel"] < 1e-7
    assert silent["b.kernel"] > 1e-3  # measured 5.7e-3, of steps of 1e-2 times the values' size
