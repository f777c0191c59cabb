"""A training step against PyTorch: the loss and every gradient, through diffusers' transformer."""

import copy
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tests.models.transformer_oracle import Shape, diffusers_model, inputs, jax_model

from skyreels_jax.training.objective import Batch, velocity_loss
from skyreels_jax.weights.components.transformer import transformer_rules
from skyreels_jax.weights.engine import export

SHAPE = Shape(frames=3)
# Kind of model, and whether each frame has its own level.
CASES = {"flow matching": ("t2v", False), "diffusion forcing": ("df", True), "i2v": ("i2v", False)}
LOSS_TOL = 1e-5  # relative; measured 9.8e-7
# Largest difference in a tensor over the largest gradient in it, from PyTorch in float64. Measured
# 6e-6, for i2v 9e-5; but 2.9e-4 for one bias there: its gradient is what 507 equal tokens of text
# padding leave of each other, and PyTorch's own float32 is 6.1e-4 away.
GRAD_TOL = 1e-4
# On one processor the keys of text are up to 3.7 times as far away as PyTorch's own float32 is
# (that bias, 2.4e-3 and 6.5e-4): sums in another order. All else is at most as far as it.
KEYS_OF_TEXT, OF_OWN = re.compile(r"attn2\.(to|norm)_k\."), 6


def case(kind: str, per_frame: bool):
    config = SHAPE.config(kind, inject_sample_info=kind == "df")
    oracle = diffusers_model(config, seed=2)
    given = inputs(config, SHAPE, seed=3, per_frame=per_frame)
    rng = np.random.default_rng(4)
    noise = rng.standard_normal(given["x"].shape).astype(np.float32)
    sigma = rng.uniform(0.05, 0.95, (1, SHAPE.frames if per_frame else 1)).astype(np.float32)
    # PyTorch's side looks levels up as whole numbers.
    return config, oracle, given, noise, np.float32(np.round(sigma * 1000) / 1000)


def in_float64(oracle, given, noise, sigma):
    """The same case for PyTorch in float64."""
    wide = {k: v.astype(np.float64) if v.dtype == np.float32 else v for k, v in given.items()}
    return copy.deepcopy(oracle).double(), wide, noise.astype(float), sigma.astype(float)


def by_torch(oracle, given, noise, sigma) -> tuple[float, dict[str, np.ndarray]]:
    x, noise, level = (torch.from_numpy(a) for a in (given["x"], noise, sigma))
    share = level[:, None, :, None, None]
    noisy = (1 - share) * x + share * noise
    hidden = torch.cat([noisy, torch.from_numpy(given["y"])], 1) if "y" in given else noisy
    told = torch.round(level * 1000).long()
    prediction = oracle(
        hidden_states=hidden,
        timestep=told if told.shape[1] > 1 else told[:, 0],
        encoder_hidden_states=torch.from_numpy(given["context"]),
        encoder_hidden_states_image=torch.from_numpy(given["clip_fea"])
        if "clip_fea" in given
        else None,
        enable_diffusion_forcing=told.shape[1] > 1,
        fps=given.get("fps"),
        return_dict=False,
    )[0]
    loss = torch.mean((prediction - (noise - x)) ** 2)
    oracle.zero_grad()
    loss.backward()
    named = {n: p.grad.numpy() for n, p in oracle.named_parameters() if p.grad is not None}
    return loss.item(), named


def by_jax(config, oracle, given, noise, sigma, **options) -> tuple[float, dict[str, np.ndarray]]:
    model = jax_model(config, oracle, remat=options.pop("remat", False))
    told = {k: jnp.asarray(v) for k, v in given.items() if k not in ("x", "t")}
    batch = Batch(jnp.asarray(given["x"]), **told)
    graph, parameters = nnx.split(model)

    def loss_of(parameters, noise, sigma):
        return velocity_loss(nnx.merge(graph, parameters), batch, noise, sigma, **options)

    both = jax.jit(jax.value_and_grad(loss_of))
    loss, gradients = both(parameters, jnp.asarray(noise), jnp.asarray(sigma))
    return float(loss), dict(export(gradients, transformer_rules(config), "diffusers"))


def furthest(ours: dict[str, np.ndarray], theirs: dict[str, np.ndarray]) -> dict[str, float]:
    unused = {name for name in theirs if "norm_added_q" in name}
    assert set(ours) == set(theirs) - unused
    return {
        name: float(np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max())
        for name in ours
    }


# Checkpointing changes what is kept and not what is computed: one kind in every run, the others in
# `make test-all`.
@pytest.mark.parametrize(
    ("name", "remat"),
    [
        *((name, False) for name in CASES if name != "flow matching"),
        pytest.param("flow matching", False, marks=pytest.mark.slow),
        ("diffusion forcing", True),
        *(
            pytest.param(name, True, marks=pytest.mark.slow)
            for name in CASES
            if name != "diffusion forcing"
        ),
    ],
)
def test_the_loss_and_every_gradient_are_pytorchs(name: str, remat: bool):
    given = case(*CASES[name])
    loss, gradients = by_jax(*given, remat=remat)
    right, expected = by_torch(*in_float64(*given[1:]))
    assert abs(loss - right) / right < LOSS_TOL
    gaps = furthest(gradients, expected)
    single = by_torch(*given[1:])[1]
    own = furthest({name: single[name] for name in gaps}, expected)
    times = {name: OF_OWN if KEYS_OF_TEXT.search(name) else 1 for name in gaps}
    bad = {n: gap for n, gap in gaps.items() if gap > max(GRAD_TOL, times[n] * own[n])}
    assert not bad


def wrong_sign(sigma: Any, noise: Any) -> tuple[Any, Any]:
    return sigma, -noise


def wrong_time(sigma: Any, noise: Any) -> tuple[Any, Any]:
    return 1 - sigma, noise


# Measured 1.4 and 0.7 of the loss, and more than 0.5 of a gradient.
@pytest.mark.parametrize("fault", [wrong_sign, wrong_time])
def test_a_wrong_convention_is_caught(fault):
    config, oracle, given, noise, sigma = case("df", True)
    right, expected = by_torch(oracle, given, noise, sigma)
    sigma, noise = fault(sigma, noise)
    loss, gradients = by_jax(config, oracle, given, noise, sigma)
    assert abs(loss - right) / right > 100 * LOSS_TOL
    assert max(furthest(gradients, expected).values()) > 100 * GRAD_TOL


@pytest.mark.slow
def test_weights_of_levels_multiply_their_errors():
    given = case("df", True)
    plain, _ = by_jax(*given)
    double, _ = by_jax(*given, weight=lambda sigma: 2 * jnp.ones_like(sigma))
    assert double == pytest.approx(2 * plain, rel=1e-6)
    first, _ = by_jax(*given, weight=lambda sigma: jnp.asarray([[1.0, 0.0, 0.0]]))
    assert 0 < first < plain
