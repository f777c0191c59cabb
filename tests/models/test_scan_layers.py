import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skyreels_jax.models.layers import scan_layers

DEPTH, WIDTH = 8, 64
TOL = 1e-6  # measured 1.3e-7, of the largest value


def step(x, layer, shared):
    x = jnp.tanh(x @ layer["kernel"] + (layer["bias"] * shared)[None])
    return x, x.sum()


def arrays(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(4, WIDTH)), dtype)
    layers = {
        "kernel": jnp.asarray(0.1 * rng.normal(size=(DEPTH, WIDTH, WIDTH)), dtype),
        "bias": jnp.asarray(rng.normal(size=(DEPTH, WIDTH)), dtype),
    }
    return x, layers, jnp.asarray(rng.normal(size=WIDTH), dtype)


def one_by_one(x, layers, shared):
    outs = []
    for index in range(DEPTH):
        x, out = step(x, jax.tree.map(lambda leaf, i=index: leaf[i], layers), shared)
        outs.append(out)
    return x, jnp.stack(outs)


def furthest(found, expected) -> float:
    gaps = jax.tree.map(lambda a, b: jnp.abs(a - b).max(), found, expected)
    return float(max(jax.tree.leaves(gaps)))


def size(expected) -> float:
    return furthest(expected, jax.tree.map(jnp.zeros_like, expected))


def backwards(step):
    """The layers in the wrong order."""

    def run(x, layers, shared):
        return scan_layers(step, x, jax.tree.map(lambda leaf: leaf[::-1], layers), shared)

    return run


def test_layers_run_in_order():
    found = jax.jit(lambda *args: scan_layers(step, *args))(*arrays())
    expected = one_by_one(*arrays())
    scale = size(expected)
    assert furthest(found, expected) < TOL * scale
    assert furthest(backwards(step)(*arrays()), expected) > 0.01 * scale


def test_only_the_first_layers_run_where_a_depth_is_given():
    def first(x, layers, shared):
        return scan_layers(step, x, layers, shared, depth=3)

    x, layers, shared = arrays()
    whole = one_by_one(x, layers, shared)[1]
    found, outs = first(x, layers, shared)
    assert outs.shape == (3,)
    assert furthest(outs, whole[:3]) < TOL * size(whole)
    gradient = jax.grad(lambda layers: first(x, layers, shared)[0].sum())(layers)["kernel"]
    assert jnp.abs(gradient).max(axis=(1, 2)).astype(bool).tolist() == [True] * 3 + [False] * 5


@pytest.mark.parametrize("remat", [False, True])
def test_gradients_reach_input_layers_and_what_is_shared(remat: bool):
    def loss(run, *args):
        x, outs = run(*args)
        return jnp.sum(x) + jnp.sum(outs**2)

    body = jax.checkpoint(step) if remat else step
    gradient = jax.grad(loss, argnums=(1, 2, 3))
    found = gradient(lambda *args: scan_layers(body, *args), *arrays())
    expected = gradient(one_by_one, *arrays())
    scale = size(expected)
    assert furthest(found, expected) < TOL * scale
    assert furthest(gradient(backwards(body), *arrays()), expected) > 0.01 * scale


def extra_bytes(run) -> int:
    """What a compiled call needs besides its arguments and results."""
    compiled = jax.jit(run).lower(*arrays(jnp.bfloat16)).compile()
    analysis = compiled.memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_bfloat16_layers_are_not_all_widened_at_once():
    def widened(x, layers, shared):
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), layers)

        def narrow(x, layer, shared):
            return step(x, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), layer), shared)

        return jax.lax.scan(lambda x, layer: narrow(x, layer, shared), x, wide)

    all_layers = 2 * DEPTH * WIDTH * WIDTH  # bytes, in bfloat16
    assert extra_bytes(lambda *args: scan_layers(step, *args)) < all_layers
    assert extra_bytes(widened) > 2 * all_layers
