import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from skyreels_jax.models import layers
from skyreels_jax.models.layers import Mlp, gelu_tanh, in_row_tiles
from skyreels_jax.models.transformer_config import Numerics


def feed_forward(dtype, dim=16, hidden=64):
    return Mlp((dim, hidden, dim), gelu_tanh, numerics=Numerics(dtype, dtype), rngs=nnx.Rngs(0))


def inputs(rows, dim=16):
    return jnp.asarray(np.random.default_rng(1).standard_normal((2, rows, dim)), jnp.float32)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("rows", [5, 50, 51, 101])
def test_tiles_give_what_all_rows_at_once_give(monkeypatch, dtype, rows):
    monkeypatch.setattr(layers, "TILE_ROWS", 20)
    layer, x = feed_forward(dtype), inputs(rows)
    np.testing.assert_array_equal(jax.jit(in_row_tiles)(layer, x), jax.jit(layer)(x))


def test_a_row_is_not_taken_for_another(monkeypatch):
    monkeypatch.setattr(layers, "TILE_ROWS", 20)
    layer, x = feed_forward(jnp.float32), inputs(51)
    assert not np.array_equal(in_row_tiles(layer, x), layer(x[:, ::-1]))


def test_the_gradient_is_that_of_all_rows_at_once(monkeypatch):
    monkeypatch.setattr(layers, "TILE_ROWS", 20)
    layer, x = feed_forward(jnp.float32), inputs(51)

    def loss(run):
        return jax.jit(nnx.grad(lambda layer, x: jnp.sum(jnp.square(run(layer, x)))))(layer, x)

    tiled, whole = (loss(run) for run in (in_row_tiles, lambda layer, x: layer(x)))
    for a, b in zip(jax.tree.leaves(tiled), jax.tree.leaves(whole), strict=True):
        np.testing.assert_array_equal(a, b)


def test_memory_between_the_products_does_not_grow_with_the_rows():
    layer = feed_forward(jnp.bfloat16, dim=8, hidden=512)

    def temporary(run, rows):
        compiled = jax.jit(run).lower(layer, inputs(rows, dim=8)).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    # A row between the products is 2 KiB in float32.
    few, many = (temporary(in_row_tiles, rows) for rows in (1700, 17_000))
    assert many - few < 10_000 * 2 * 512
    assert temporary(lambda layer, x: layer(x), 17_000) > 34_000 * 2048
