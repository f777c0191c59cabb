"""Distillation against formulas written out in PyTorch: losses, and every gradient, to 1e-4.

Twice: of velocities of two numbers, whose formulas stand here in full, and of transformers, where
PyTorch's side is diffusers' with the same weights, a block at a time.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from skyreels_jax.training.distillation import (
    TANGENT_FLOOR,
    VelocityFunction,
    consistency_loss,
    consistency_sigmas,
    continuous_consistency_loss,
    denoised,
    distribution_matching_loss,
    guided,
    regression_loss,
)

# Relative, of loss and gradients. Measured at most 4e-7.
TOL = 1e-4
SCALE = 3.0
WARMTH = 0.7
RNG = np.random.default_rng(0)
SHAPE = (2, 3, 4, 2, 2)
X, NOISE = (RNG.standard_normal(SHAPE).astype(np.float32) for _ in range(2))
SIGMA = RNG.uniform(0.2, 0.9, (2, 4)).astype(np.float32)
BELOW = SIGMA - np.float32(0.1)
# The two numbers of each velocity.
STUDENT = np.array([0.7, -0.4], np.float32)
OTHERS = {"teacher": (0.5, 0.3), "away": (-0.2, 0.6), "average": (0.65, -0.3), "fake": (0.1, 0.9)}


def toy(p: Any, tanh: Callable) -> Callable:
    """A velocity that is neither linear in the latents nor in sigma; of either library."""

    def velocity(x, sigma):
        s = sigma[:, None, :, None, None]
        return p[0] * tanh(x) * (1 + s * s) + p[1] * x * s

    return velocity


def ours(name: str) -> VelocityFunction:
    return toy(OTHERS[name], jnp.tanh)


# The formulas, by stage: of the student's two numbers to the loss.


def by_guidance(p: torch.Tensor, x, sigma, below, noise) -> torch.Tensor:
    teacher, away = (toy(OTHERS[n], torch.tanh)(x, sigma) for n in ("teacher", "away"))
    return ((toy(p, torch.tanh)(x, sigma) - (away + SCALE * (teacher - away))) ** 2).mean()


def by_consistency(p: torch.Tensor, x, sigma, below, noise) -> torch.Tensor:
    teacher, away = (toy(OTHERS[n], torch.tanh)(x, sigma) for n in ("teacher", "away"))
    s, t = (a[:, None, :, None, None] for a in (sigma, below))
    nearer = x + (t - s) * (away + SCALE * (teacher - away))
    target = nearer - t * toy(OTHERS["average"], torch.tanh)(nearer, below)
    return ((x - s * toy(p, torch.tanh)(x, sigma) - target) ** 2).mean()


def by_continuous(p: torch.Tensor, x, sigma, below, noise) -> torch.Tensor:
    """``d(p0 tanh(x) (1 + s^2) + p1 x s)`` along ``dx = v ds``, by hand."""
    teacher, away = (toy(OTHERS[n], torch.tanh)(x, sigma) for n in ("teacher", "away"))
    v, s = away + SCALE * (teacher - away), sigma[:, None, :, None, None]
    said = toy(p, torch.tanh)(x, sigma)
    by_x = p[0] * (1 - torch.tanh(x) ** 2) * (1 + s * s) + p[1] * s
    by_sigma = p[0] * torch.tanh(x) * 2 * s + p[1] * x
    g = (said - v + WARMTH * s * (by_x * v + by_sigma)).detach()
    g = g / ((g**2).mean((1, 3, 4), keepdim=True).sqrt() + TANGENT_FLOOR)
    return ((said - said.detach() + g) ** 2).mean()


def by_dmd(p: torch.Tensor, x, sigma, below, noise) -> torch.Tensor:
    s = sigma[:, None, :, None, None]
    video = x - s * toy(p, torch.tanh)(x, sigma)
    asked = (1 - s) * video + s * noise
    teacher, away, fake = (
        toy(OTHERS[n], torch.tanh)(asked, sigma) for n in ("teacher", "away", "fake")
    )
    real = asked - s * (away + SCALE * (teacher - away))
    scale = (video - real).abs().mean((1, 2, 3, 4), keepdim=True)
    g = ((asked - s * fake - real) / scale).detach()
    return 0.5 * ((video - (video - g).detach()) ** 2).mean()


def our_losses() -> dict[str, Callable[[jax.Array], jax.Array]]:
    x, noise, sigma, below = map(jnp.asarray, (X, NOISE, SIGMA, BELOW))
    teacher = guided(ours("teacher"), ours("away"), SCALE)

    def student(p: jax.Array) -> VelocityFunction:
        return toy(p, jnp.tanh)

    return {
        "guidance": lambda p: regression_loss(student(p), teacher, x, sigma),
        "consistency": lambda p: consistency_loss(
            student(p), ours("average"), teacher, x, sigma, below
        ),
        "continuous": lambda p: continuous_consistency_loss(
            student(p), teacher, x, sigma, jnp.float32(WARMTH)
        ),
        "dmd": lambda p: distribution_matching_loss(
            denoised(student(p), x, sigma), ours("fake"), teacher, noise, sigma
        ),
    }


FORMULAS = {
    "guidance": by_guidance,
    "consistency": by_consistency,
    "continuous": by_continuous,
    "dmd": by_dmd,
}


def by_torch(formula: Callable, **changed: np.ndarray) -> tuple[float, np.ndarray]:
    p = torch.tensor(STUDENT, requires_grad=True)
    given = {"x": X, "sigma": SIGMA, "below": BELOW, "noise": NOISE, **changed}
    loss = formula(p, **{name: torch.from_numpy(value) for name, value in given.items()})
    loss.backward()
    assert p.grad is not None
    return loss.item(), p.grad.numpy()


def gap(stage: str, right: tuple[float, np.ndarray]) -> tuple[float, float]:
    loss, gradient = jax.jit(jax.value_and_grad(our_losses()[stage]))(jnp.asarray(STUDENT))
    return (
        abs(float(loss) - right[0]) / right[0],
        float(np.abs(np.asarray(gradient) - right[1]).max() / np.abs(right[1]).max()),
    )


@pytest.mark.parametrize("stage", FORMULAS)
def test_a_stages_loss_and_gradient_are_the_formulas(stage: str):
    assert max(gap(stage, by_torch(FORMULAS[stage]))) < TOL


def without_guidance(p, x, sigma, below, noise):
    return (
        (toy(p, torch.tanh)(x, sigma) - toy(OTHERS["teacher"], torch.tanh)(x, sigma)) ** 2
    ).mean()


def of_the_average_alone(p, x, sigma, below, noise):
    """Consistency with what the average says of the same latents: no step of the teacher."""
    s = sigma[:, None, :, None, None]
    target = x - s * toy(OTHERS["average"], torch.tanh)(x, sigma)
    return ((x - s * toy(p, torch.tanh)(x, sigma) - target) ** 2).mean()


def of_the_teachers_velocity(p, x, sigma, below, noise):
    """Continuous without the derivative: the tangent is ``u - v``."""
    teacher, away = (toy(OTHERS[n], torch.tanh)(x, sigma) for n in ("teacher", "away"))
    said = toy(p, torch.tanh)(x, sigma)
    g = (said - away - SCALE * (teacher - away)).detach()
    g = g / ((g**2).mean((1, 3, 4), keepdim=True).sqrt() + TANGENT_FLOOR)
    return ((said - said.detach() + g) ** 2).mean()


def without_the_scale(p, x, sigma, below, noise):
    """DMD without what divides its gradient."""
    s = sigma[:, None, :, None, None]
    video = x - s * toy(p, torch.tanh)(x, sigma)
    asked = (1 - s) * video + s * noise
    teacher, away, fake = (
        toy(OTHERS[n], torch.tanh)(asked, sigma) for n in ("teacher", "away", "fake")
    )
    g = (s * (away + SCALE * (teacher - away) - fake)).detach()
    return 0.5 * ((video - (video - g).detach()) ** 2).mean()


# Each a formula that a careless reading gives. Measured at least 0.02 of the gradient.
@pytest.mark.parametrize(
    ("stage", "formula"),
    [
        ("guidance", without_guidance),
        ("consistency", of_the_average_alone),
        ("continuous", of_the_teachers_velocity),
        ("dmd", without_the_scale),
    ],
)
def test_another_formula_is_caught(stage: str, formula: Callable):
    assert gap(stage, by_torch(formula))[1] > 100 * TOL


def test_a_target_that_passes_a_gradient_is_caught():
    """Consistency whose target is the student's too, and moves with it."""

    def moving(p, x, sigma, below, noise):
        teacher, away = (toy(OTHERS[n], torch.tanh)(x, sigma) for n in ("teacher", "away"))
        s, t = (a[:, None, :, None, None] for a in (sigma, below))
        nearer = x + (t - s) * (away + SCALE * (teacher - away))
        target = nearer - t * toy(p, torch.tanh)(nearer, below)
        return ((x - s * toy(p, torch.tanh)(x, sigma) - target) ** 2).mean()

    def still(p):
        x, sigma, below = map(jnp.asarray, (X, SIGMA, BELOW))
        student = toy(p, jnp.tanh)
        teacher = guided(ours("teacher"), ours("away"), SCALE)
        return consistency_loss(student, student, teacher, x, sigma, below)

    loss, gradient = jax.value_and_grad(still)(jnp.asarray(STUDENT))
    right, moved = by_torch(moving)
    assert abs(float(loss) - right) / right < TOL
    assert np.abs(np.asarray(gradient) - moved).max() / np.abs(moved).max() > 100 * TOL


def test_at_the_last_step_of_consistency_the_target_is_what_the_step_reached():
    """``f(x, 0) = x``, whatever the average says."""
    x, sigma = jnp.asarray(X), jnp.asarray(SIGMA)
    values = []
    for name in ("average", "fake"):
        student, teacher = toy(STUDENT, jnp.tanh), ours("teacher")
        given = (student, ours(name), teacher, x, sigma, jnp.zeros_like(sigma))
        values.append(float(consistency_loss(*given)))
    assert values[0] == values[1]


def test_the_sigmas_of_consistency_fall_from_one_to_nothing():
    found = np.asarray(consistency_sigmas(48, 5.0))
    assert (len(found), found[0], found[-1]) == (49, 1, 0)
    assert (np.diff(found) < 0).all()
    # Shifted towards noise: the middle one, by its formula.
    assert found[24] == pytest.approx(5 * 0.5 / (1 + 4 * 0.5))


def test_guidance_of_one_asks_once():
    positive = ours("teacher")
    assert guided(positive, ours("away"), 1.0) is positive
