"""One step: accumulation, averages, and what a value that is no number does."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skyreels_jax.errors import UnsupportedError
from skyreels_jax.training import step as train_step
from skyreels_jax.training.optimizer import OptimizerConfig, learning_rate, make_optimizer
from skyreels_jax.training.step import TrainState, init_state, make_step

PARAMS = {"layer.kernel": jnp.ones((3, 2)), "layer.bias": jnp.zeros(2)}


def loss(params, batch, noise):
    x, y = batch
    error = x @ params["layer.kernel"] + params["layer.bias"][None] - y
    return jnp.mean(jnp.square(error)), {"largest": jnp.max(jnp.abs(error))}


def batch_of(seed: int, count: int = 8) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return draw(count, 3), draw(count, 2)


def begun(config: OptimizerConfig | None = None, ema: float = 0.0):
    optimizer = make_optimizer(config or OptimizerConfig(warmup=0), 100, PARAMS)
    copies = {name: jnp.array(value) for name, value in PARAMS.items()}
    return optimizer, init_state(copies, optimizer, ema)


def apart(a: TrainState, b: TrainState) -> float:
    return max(float(jnp.max(jnp.abs(a.params[n] - b.params[n]))) for n in a.params)


def test_parts_of_a_batch_give_the_gradient_of_the_whole():
    optimizer, state = begun()
    x, y = batch_of(0)
    whole, _ = make_step(loss, optimizer)(state, (x, y), jax.random.key(0))
    _, state = begun()
    accumulated, _ = make_step(loss, optimizer, accumulate=4)(state, (x, y), jax.random.key(0))
    _, state = begun()
    less, _ = make_step(loss, optimizer, accumulate=2)(state, (x[:4], y[:4]), jax.random.key(0))
    # Measured: 1.2e-7 of 1. Adam's first step hides the size of a gradient, so compare moments.
    moments = [s.optimizer for s in (whole, accumulated, less)]
    flat = [np.concatenate([np.ravel(x) for x in jax.tree.leaves(m)]) for m in moments]
    assert np.max(np.abs(flat[0] - flat[1])) < 1e-6
    assert np.max(np.abs(flat[0] - flat[2])) > 1e-3


@pytest.mark.parametrize("broken", [np.nan, np.inf])
def test_a_value_that_is_no_number_changes_nothing_and_is_reported(broken: float):
    optimizer, state = begun(ema=0.9)
    step = make_step(loss, optimizer, ema=0.9)
    before = jax.tree.map(np.asarray, state)
    x, y = batch_of(0)
    x[0, 0] = broken
    after, report = step(state, (x, y), jax.random.key(0))
    assert not report.is_finite
    assert int(after.step) == 1
    for old, new in zip(jax.tree.leaves(before[1:]), jax.tree.leaves(after[1:]), strict=True):
        np.testing.assert_array_equal(old, new)
    fine, report = step(after, batch_of(0), jax.random.key(0))
    assert report.is_finite
    assert apart(fine, begun()[1]) > 0


def test_the_average_follows_the_parameters():
    optimizer, state = begun(ema=0.5)
    step = make_step(loss, optimizer, ema=0.5)
    expected = {name: np.asarray(value) for name, value in PARAMS.items()}
    for number in range(4):
        state, _ = step(state, batch_of(number), jax.random.key(number))
        stays = min(0.5, (1 + number) / (10 + number))
        expected = {
            n: stays * expected[n] + (1 - stays) * np.asarray(state.params[n]) for n in expected
        }
    for name, value in expected.items():
        np.testing.assert_allclose(state.average[name], value, rtol=1e-6, atol=1e-7)
    assert apart(state, state._replace(params=state.average)) > 1e-6


def test_the_gradient_is_cut():
    config = OptimizerConfig(
        name="sgd",
        learning_rate=1.0,
        warmup=0,
        clip=0.01,
        beta1=0.0,
        weight_decay=0.0,
        schedule="constant",
    )
    optimizer, state = begun(config)
    after, report = make_step(loss, optimizer)(state, batch_of(1), jax.random.key(0))
    change = np.sqrt(sum(np.sum(np.square(after.params[n] - PARAMS[n])) for n in PARAMS))
    assert float(report.metrics["grad_norm"]) > 0.1
    assert change == pytest.approx(0.01, rel=1e-5)


@pytest.mark.parametrize("name", ["adamw", "muon", "adafactor", "sgd"])
def test_every_optimiser_descends(name):
    config = OptimizerConfig(name=name, learning_rate=3e-2, warmup=5)
    optimizer, state = begun(config)
    step = make_step(loss, optimizer)
    losses = []
    for number in range(60):
        state, report = step(state, batch_of(0), jax.random.key(number))
        losses.append(float(report.metrics["loss"]))
    # Measured: 0.17 (muon) to 0.62 (adafactor) of the first.
    assert losses[-1] < 0.75 * losses[0]


def test_the_rate_rises_and_falls():
    config = OptimizerConfig(learning_rate=2.0, warmup=10, schedule="cosine")
    rate: Callable[[int], float] = learning_rate(config, 110)
    assert float(rate(0)) == 0
    assert float(rate(5)) == pytest.approx(1.0)
    assert float(rate(10)) == pytest.approx(2.0)
    assert float(rate(60)) == pytest.approx(1.0, rel=1e-5)
    assert float(rate(110)) == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [
        {"learning_rate": 0.0},
        {"clip": 0.0},
        {"beta1": 1.0},
        {"beta2": -0.1},
        {"warmup": -1},
        {"weight_decay": -1.0},
    ],
)
def test_illegal_numbers_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        OptimizerConfig(**wrong)


def spaces(tree) -> set[str]:
    return {leaf.sharding.memory_kind for leaf in jax.tree.leaves(tree) if leaf.ndim}


SLOW = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["adamw", pytest.param("muon", marks=SLOW), pytest.param("adafactor", marks=SLOW)]
)
def test_what_is_on_the_host_makes_no_difference(name):
    optimizer, state = begun(OptimizerConfig(name=name, warmup=0), ema=0.9)
    step = make_step(loss, optimizer, ema=0.9)
    copies = {name: jnp.array(value) for name, value in PARAMS.items()}
    moved = init_state(copies, optimizer, 0.9, offload=True)
    assert spaces(state) == {"device"}
    for number in range(3):
        state, _ = step(state, batch_of(number), jax.random.key(number))
        moved, _ = step(moved, batch_of(number), jax.random.key(number))
        assert spaces((moved.optimizer, moved.average)) == {"pinned_host"}
        assert spaces(moved.params) == {"device"}
    for one, other in zip(jax.tree.leaves(state), jax.tree.leaves(moved), strict=True):
        np.testing.assert_array_equal(one, other)
    other, _ = step(moved, batch_of(9), jax.random.key(9))
    assert apart(other, state) > 1e-6


def test_a_device_without_such_memory_is_refused(monkeypatch):
    optimizer, _ = begun()
    monkeypatch.setattr(train_step, "PINNED_HOST", "memory of another machine")
    with pytest.raises(UnsupportedError, match="run.offload takes memory of the kind memory of an"):
        init_state(PARAMS, optimizer, 0.9, offload=True)


def test_masters_stay_float32_where_kernels_are_not():
    seen = []

    def watched(params, batch, noise):
        seen.append({name: value.dtype for name, value in params.items()})
        kernel = params["layer.kernel"].astype(jnp.float32)
        return loss({**params, "layer.kernel": kernel}, batch, noise)

    optimizer, state = begun()
    after, _ = make_step(watched, optimizer, kernels="bfloat16")(
        state, batch_of(0), jax.random.key(0)
    )
    assert seen[0] == {"layer.kernel": jnp.bfloat16, "layer.bias": jnp.float32}
    assert {value.dtype for value in after.params.values()} == {jnp.dtype("float32")}
    # What is descended is the gradient at the rounded kernel, rounded itself; the master is not.
    _, state = begun()
    x, y = batch_of(0)
    grads = dict(jax.grad(lambda p: loss(p, (x, y), ())[0])(PARAMS))
    rounded = grads["layer.kernel"].astype(jnp.bfloat16).astype(jnp.float32)
    with jax.numpy_dtype_promotion("standard"):
        updates, _ = optimizer.update({**grads, "layer.kernel": rounded}, state.optimizer, PARAMS)
    expected = dict(updates)
    for name, value in after.params.items():
        np.testing.assert_allclose(value, PARAMS[name] + expected[name], rtol=1e-6)
    _, state = begun()
    whole, _ = make_step(loss, optimizer)(state, batch_of(0), jax.random.key(0))
    assert apart(whole, after) < 1e-5
