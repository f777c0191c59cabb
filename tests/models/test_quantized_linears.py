import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from skyreels_jax.errors import UnsupportedError
from skyreels_jax.models.layers import Linear, scan_layers
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import I2V_1_3B, Numerics
from skyreels_jax.models.umt5 import UMT5_XXL, Umt5Encoder
from skyreels_jax.weights.engine import parameters
from skyreels_jax.weights.quantize import quantize

KINDS = pytest.mark.parametrize("kind", [jnp.int8, jnp.float8_e4m3fn])
BLOCK_KERNELS = {f"{a}.{n}" for a in ("self_attn", "cross_attn") for n in "qkvo"} | {
    *("cross_attn.k_img", "cross_attn.v_img", "ffn.fc1", "ffn.fc2")
}


def filled(kind, compute) -> tuple[Linear, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    values, scale = quantize(rng.normal(size=(48, 32)).astype(np.float32), kind)
    layer = Linear(48, 32, numerics=Numerics(compute, compute, kind), rngs=nnx.Rngs(0))
    layer.kernel[...], layer.kernel_scale[...] = jnp.asarray(values), jnp.asarray(scale)
    layer.bias[...] = jnp.asarray(rng.normal(size=32), compute)
    return layer, values, scale


@KINDS
@pytest.mark.parametrize("compute", [jnp.bfloat16, jnp.float32])
def test_a_quantised_linear_is_its_formula_rounded_once(kind, compute):
    layer, values, scale = filled(kind, compute)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(5, 48)), compute)

    def formula(scale: np.ndarray) -> np.ndarray:
        operands = (np.asarray(a, np.float64) for a in (x, values.astype(np.float32)))
        return np.matmul(*operands) * scale + np.asarray(layer.bias[...], np.float64)

    def distance(exact: np.ndarray) -> float:
        found = np.asarray(layer(x), np.float64)
        return float(np.abs(found - exact).max() / np.abs(exact).max())

    assert layer(x).dtype == compute
    # Measured 3.2e-3 (half a step of bfloat16 is up to 2**-8) and 2.3e-7.
    assert distance(formula(scale)) < (2**-8 if compute == jnp.bfloat16 else 1e-6)
    assert distance(formula(np.ones_like(scale))) > 0.5
    assert distance(formula(scale[::-1])) > 0.01


@KINDS
def test_only_linears_of_blocks_are_quantised(kind):
    build = {
        "transformer": lambda: WanModel(I2V_1_3B, rngs=nnx.Rngs(0), kernel_dtype=kind),
        "text encoder": lambda: Umt5Encoder(UMT5_XXL, rngs=nnx.Rngs(0), kernel_dtype=kind),
    }
    found = {name: parameters(nnx.eval_shape(one)) for name, one in build.items()}
    small = {
        name: {path for path, leaf in leaves.items() if leaf.dtype == kind}
        for name, leaves in found.items()
    }
    assert small["transformer"] == {f"blocks.{name}.kernel" for name in BLOCK_KERNELS}
    names = (*(f"attn.{name}" for name in "qkvo"), "ffn.gate", "ffn.fc1", "ffn.fc2")
    assert small["text encoder"] == {f"blocks.{name}.kernel" for name in names}
    for name, leaves in found.items():
        scales = {path: leaf for path, leaf in leaves.items() if path.endswith("kernel_scale")}
        assert scales.keys() == {f"{path}_scale" for path in small[name]}
        for path, scale in scales.items():
            kernel = leaves[path.removesuffix("_scale")]
            assert (scale.shape, scale.dtype) == ((kernel.shape[0], kernel.shape[2]), jnp.float32)


def test_other_dtypes_of_kernels_are_refused():
    with pytest.raises(UnsupportedError, match="quantised to int8 or float8_e4m3fn"):
        Numerics(kernels=jnp.int4)
    assert Numerics(kernels=jnp.int8).in_float32().kernels is None


@KINDS
def test_a_stack_is_not_widened_as_a_whole(kind):
    """What a call needs beside its arguments is less than a stack; widened, it is twice."""
    depth, width = 12, 64
    stack = jax.ShapeDtypeStruct((depth, width, width), kind)
    x = jax.ShapeDtypeStruct((8, width), jnp.bfloat16)

    def run(x, stack):
        def step(x, kernel, _):
            return (x @ kernel.astype(jnp.bfloat16)).astype(jnp.bfloat16), None

        return scan_layers(step, x, stack)[0]

    def widened(x, stack):
        return run(x, stack.astype(jnp.bfloat16))

    def extra(call) -> int:
        return jax.jit(call).lower(x, stack).compile().memory_analysis().temp_size_in_bytes

    assert extra(run) < depth * width * width  # measured 0.42, and 2.42
    assert extra(widened) > 1.5 * depth * width * width


@KINDS
def test_layers_stream_from_the_memory_of_the_host(kind):
    device = jax.devices()[0]
    if "pinned_host" not in {memory.kind for memory in device.addressable_memories()}:
        pytest.fail("JAX's CPU device has had this kind of memory since 0.6")
    rng = np.random.default_rng(0)
    stack = jnp.asarray(rng.integers(-3, 4, (4, 16, 16)), kind)
    x = jnp.asarray(rng.normal(size=(3, 16)), jnp.float32)
    host = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")

    def step(x, kernel, _):
        assert jax.typeof(kernel).memory_space == jax.memory.Space.Device
        return jnp.tanh(x @ kernel.astype(jnp.float32)), None

    run = jax.jit(lambda x, stack: scan_layers(step, x, stack)[0])
    streamed = run(x, jax.device_put(stack, host))
    np.testing.assert_array_equal(streamed, run(x, stack))
    assert np.abs(streamed - run(x, stack[::-1])).max() > 0.1
