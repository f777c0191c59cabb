"""The VAE as it is computed for TPUs, where equal blocks are a loop, against all other devices'."""

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from skyreels_jax.models.transformer_config import Numerics
from skyreels_jax.models.vae import WanVae, decode_to_pixels, encode_pixels
from skyreels_jax.models.vae_layers import Residual, ResidualBlock, VaeConfig
from skyreels_jax.models.vae_runs import run_by_frame, run_layers
from skyreels_jax.ops.target import Device, compiled_for

TOL = 5e-6  # measured 2.0e-7 to 2.0e-6
WRONG = 1e-2  # the least that a mistake changes; measured 0.33 and 0.53
CONFIG = VaeConfig(base_dim=8, z_dim=16, dim_mult=(1, 2, 4, 4), num_res_blocks=2)


def error(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.abs(a - b).max() / np.abs(b).max())


def blocks(*places: tuple[int, int]) -> list[ResidualBlock]:
    """With other parameters each, norms and biases too."""
    rngs, rng = nnx.Rngs(0), np.random.default_rng(0)
    made = [
        ResidualBlock(Residual(*place), numerics=Numerics(np.float32, np.float32), rngs=rngs)
        for place in places
    ]
    for leaf in jax.tree.leaves(
        nnx.state(made), is_leaf=lambda leaf: isinstance(leaf, nnx.Variable)
    ):
        noise = rng.normal(size=leaf.shape).astype(np.float32)
        leaf.set_value(leaf[...] + 0.1 * noise)
    return made


def run(layers: Sequence[ResidualBlock], x: np.ndarray, target: str, *, carry: bool = True):
    """A frame, then two, together and one by one."""
    graph, state = nnx.split(list(layers))

    @jax.jit
    def outputs(state: nnx.State, x: jax.Array) -> jax.Array:
        blocks = nnx.merge(graph, state)
        out, cache = run_layers(blocks, x[:, :1], None)
        assert len(cache) == (2 if target == "tpu" else len(blocks))
        ways = run_layers, run_by_frame
        later = [way(blocks, x[:, 1:], cache if carry else None) for way in ways]
        assert {jax.tree.structure(kept) for _, kept in later} == {jax.tree.structure(cache)}
        return jnp.concatenate([out, *(out for out, _ in later)], axis=1)

    with compiled_for(Device(target)):
        return np.asarray(outputs(state, jnp.asarray(x)))


def test_a_loop_over_equal_blocks_is_the_blocks_one_by_one():
    layers = blocks((4, 6), (6, 6), (6, 6))
    x = np.random.default_rng(1).standard_normal((2, 3, 5, 6, 4), np.float32)
    expected = run(layers, x, "cpu")
    assert error(run(layers, x, "tpu"), expected) <= TOL
    assert error(run(layers, x, "tpu", carry=False), expected) > WRONG
    assert error(run([layers[k] for k in (0, 2, 1)], x, "tpu"), expected) > WRONG


def decoded(vae: WanVae) -> np.ndarray:
    latents = np.random.default_rng(0).standard_normal((1, 16, 2, 2, 3), np.float32)
    return decode_to_pixels(vae, latents)


def encoded(vae: WanVae) -> np.ndarray:
    pixels = np.random.default_rng(0).uniform(-1, 1, (1, 3, 5, 16, 24))
    return encode_pixels(vae, pixels.astype(np.float32))


@pytest.mark.slow
@pytest.mark.parametrize("direction", [decoded, encoded])
def test_the_whole_vae_for_tpus_is_that_of_other_devices(direction: Callable[..., np.ndarray]):
    vae = WanVae(CONFIG, rngs=nnx.Rngs(0))
    with compiled_for(Device("tpu")):
        found = direction(vae)
    assert error(found, direction(vae)) <= TOL
