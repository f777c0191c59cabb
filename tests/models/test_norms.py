"""Norms and modulation against float64, and their dtypes."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from skyreels_jax.models.layers import layer_norm, mul_add, mul_add_add, rms_norm

EPS = 1e-6
TOL = 2e-6  # measured 4.3e-7, of values up to 5.3


def arrays(scale: float = 1.0, *, offset: float = 0.0) -> tuple[np.ndarray, ...]:
    rng = np.random.default_rng(0)
    x = (scale * rng.standard_normal((2, 3, 64)) + offset).astype(np.float32)
    return x, *rng.standard_normal((2, 64)).astype(np.float32)


def furthest(ours, exact: np.ndarray) -> float:
    return float(np.abs(np.asarray(ours, np.float64) - exact).max())


def exact_rms(x, scale, eps=EPS):
    x = x.astype(np.float64)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale


def exact_layer(x, scale, bias, eps=EPS):
    x = x.astype(np.float64)
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) * scale + bias


def test_rms_norm():
    x, scale, _ = arrays()
    ours = rms_norm(jnp.asarray(x), jnp.asarray(scale), EPS)
    assert furthest(ours, exact_rms(x, scale)) <= TOL
    assert furthest(ours, exact_layer(x, scale, 0)) > 0.01


def test_layer_norm():
    x, scale, bias = arrays()
    ours = layer_norm(jnp.asarray(x), jnp.asarray(scale), jnp.asarray(bias), eps=EPS)
    assert furthest(ours, exact_layer(x, scale, bias)) <= TOL
    assert furthest(ours, exact_layer(x, scale, 0 * bias)) > 0.01


def test_layer_norm_far_from_zero_is_as_exact_as_torch():
    x, _, _ = arrays(offset=100.0)
    exact = exact_layer(x, 1, 0)
    theirs = furthest(torch.nn.functional.layer_norm(torch.from_numpy(x), (64,), eps=EPS), exact)
    # Measured 1.2e-5 against 1.4e-5: the mean is taken off before squares are summed.
    assert furthest(layer_norm(jnp.asarray(x), eps=EPS), exact) <= 2 * theirs
    mean = x.mean(-1, keepdims=True)
    variance = (x * x).mean(-1, keepdims=True) - mean * mean
    assert furthest((x - mean) / np.sqrt(variance + EPS), exact) > 10 * theirs


@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_epsilon_is_inside_the_root(norm):
    x, scale, bias = arrays(scale=1e-3)
    given = [jnp.asarray(v) for v in (x, scale, bias)]
    if norm == "rms":
        ours, exact = rms_norm(*given[:2], EPS), exact_rms(x, scale)
        outside = exact_rms(x, scale, 0)
    else:
        ours, exact = layer_norm(*given, eps=EPS), exact_layer(x, scale, bias)
        outside = exact_layer(x, scale, bias, 0)
    assert furthest(ours, exact) <= TOL
    assert furthest(outside, exact) > 0.1


def test_results_are_float32_whatever_comes_in():
    x, scale, bias = (jnp.asarray(v, jnp.bfloat16) for v in arrays())
    row = x[:1, :1]
    for out in (
        rms_norm(x, scale, EPS),
        layer_norm(x, scale, bias, eps=EPS),
        mul_add(x, x, row),
        mul_add_add(x, row, row),
    ):
        assert out.dtype == jnp.float32
        assert out.shape == x.shape


def test_mul_add_and_mul_add_add():
    x, y, z = jnp.array([2.0]), jnp.array([3.0]), jnp.array([5.0])
    assert mul_add(x, y, z).tolist() == [2 + 3 * 5]
    assert mul_add_add(x, y, z).tolist() == [2 * (1 + 3) + 5]


def test_mul_add_does_not_round_its_product_to_bfloat16():
    x, y = jnp.zeros(1, jnp.bfloat16), jnp.full(1, 1 + 2**-7, jnp.bfloat16)
    product = (1 + 2**-7) ** 2
    assert mul_add(x, y, y).tolist() == [product]
    assert float(jnp.asarray(product, jnp.bfloat16)) != product
