"""Programs for another device than this process has: what is traced follows the target."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import pytest

from skyreels_jax.ops.attention import attention
from skyreels_jax.ops.linear import causal_conv
from skyreels_jax.ops.target import Device, compiled_for, device_of, target_device

TPU, HOPPER = Device("tpu"), Device("cuda", 9.0)
TOKENS = jax.ShapeDtypeStruct((1, 2048, 1, 128), jnp.bfloat16)


def test_without_a_word_it_is_the_device_of_this_process():
    assert target_device() == device_of(jax.devices()[0])
    with compiled_for(TPU):
        assert target_device() == TPU
        with compiled_for(HOPPER):
            assert target_device() == HOPPER
        assert target_device() == TPU
    assert target_device() == device_of(jax.devices()[0])


@pytest.mark.parametrize(
    ("platform", "capability", "expected"),
    [
        ("cpu", None, Device("cpu")),
        ("tpu", None, TPU),
        ("gpu", "9.0", HOPPER),
        ("cuda", "9.0", HOPPER),
        ("gpu", "gfx90a", Device("rocm")),
    ],
)
def test_a_device_is_described_by_what_choices_need(platform, capability, expected: Device):
    device = SimpleNamespace(platform=platform, compute_capability=capability)
    assert device_of(device) == expected


def test_a_function_that_was_traced_is_traced_anew_for_another_target():
    traced_for = []

    @jax.jit
    def function(x: jax.Array) -> jax.Array:
        traced_for.append(target_device().platform)
        return x + 1

    for device in (Device("cpu"), TPU, TPU, Device("cpu"), HOPPER):
        with compiled_for(device):
            function.trace(jnp.ones(3))
    assert traced_for == ["cpu", "tpu", "cuda"]


@pytest.mark.parametrize(("device", "kernel"), [(Device("cpu"), False), (TPU, True)])
def test_attention_takes_the_kernel_of_its_target(device: Device, kernel: bool):
    with compiled_for(device):
        text = str(jax.jit(attention).trace(TOKENS, TOKENS, TOKENS).jaxpr)
    assert ("pallas_call" in text) is kernel


def test_a_convolution_is_one_for_tpus_and_three_elsewhere():
    x, kernel = jnp.ones((1, 4, 6, 6, 8)), jnp.ones((3, 3, 3, 8, 8))
    history = jnp.ones((1, 2, 6, 6, 8))
    for device, count in ((Device("cpu"), 3), (HOPPER, 3), (TPU, 1)):
        with compiled_for(device):
            traced = jax.make_jaxpr(lambda *a: causal_conv(*a, dtype=jnp.float32))
            text = str(traced(x, kernel, jnp.ones(8), history))
        assert text.count("conv_general_dilated[") == count
