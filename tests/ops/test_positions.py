"""Rotary positions against their definition as complex rotations, and diffusers' tables."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2RotaryPosEmbed

from skyreels_jax.ops.positions import RopeTable, axis_dims, rope_apply, rope_params, rope_table

GRID = (3, 4, 5)
TOL = 1e-6  # measured 2.6e-7, on values up to 3.9


@pytest.mark.parametrize(
    ("head_dim", "split"),
    [(128, (44, 42, 42)), (12, (4, 4, 4)), (10, (6, 2, 2)), (16, (8, 4, 4)), (6, (2, 2, 2))],
)
def test_the_frames_take_the_pairs_that_three_does_not_divide(head_dim, split):
    assert axis_dims(head_dim) == split
    assert sum(split) == head_dim


@pytest.mark.parametrize("head_dim", [128, 12, 10, 16])
def test_tables_equal_diffusers(head_dim):
    module = SkyReelsV2RotaryPosEmbed(head_dim, (1, 2, 2), 32)
    frames, rows, columns = GRID
    cos, sin = module(torch.zeros(1, 1, frames, 2 * rows, 2 * columns))
    table = rope_table(GRID, head_dim)
    # Both from float64 angles, rounded once: measured 0; one unit in the last place is allowed.
    ulp = 6e-8
    assert np.abs(np.asarray(table.cos) - cos[0, :, 0, 0::2].numpy()).max() <= ulp
    assert np.abs(np.asarray(table.sin) - sin[0, :, 0, 1::2].numpy()).max() <= ulp
    assert np.abs(np.asarray(table.cos[1:]) - cos[0, :-1, 0, 0::2].numpy()).max() > 0.1


def test_angles_are_exact_at_far_positions():
    table = rope_params(1024, 44)
    angle = 1023 * 10_000.0 ** (-2 / 44)
    assert abs(table[1023, 1] - np.exp(1j * angle)) < 1e-12
    rounded = np.float64(np.float32(angle))
    assert abs(table[1023, 1] - np.exp(1j * rounded)) > 1e-6  # float32 angles: 1.5e-5


def rotated(x: np.ndarray, head_dim: int) -> np.ndarray:
    """The definition: pair ``j`` of each axis turns by ``position * theta^(-2j / dim)``."""
    out = np.empty(x.shape, np.float64)
    for token, position in enumerate(np.ndindex(*GRID)):
        angles = np.concatenate(
            [
                p * 10_000.0 ** (-np.arange(0, dim, 2) / dim)
                for p, dim in zip(position, axis_dims(head_dim), strict=True)
            ]
        )
        pairs = (x[:, token, :, 0::2] + 1j * x[:, token, :, 1::2]) * np.exp(1j * angles)
        out[:, token, :, 0::2], out[:, token, :, 1::2] = pairs.real, pairs.imag
    return out


@pytest.mark.parametrize("head_dim", [12, 16])
def test_pairs_turn_by_their_tokens_angles(head_dim):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, int(np.prod(GRID)), 3, head_dim)).astype(np.float32)
    expected = rotated(x, head_dim)
    ours = np.asarray(rope_apply(jnp.asarray(x), rope_table(GRID, head_dim)))
    assert np.abs(ours - expected).max() <= TOL
    frames, rows, columns = GRID
    swapped = rope_table((frames, columns, rows), head_dim)
    assert np.abs(np.asarray(rope_apply(jnp.asarray(x), swapped)) - expected).max() > 0.1
    backwards = RopeTable(swapped.cos, -swapped.sin)
    assert np.abs(np.asarray(rope_apply(jnp.asarray(x), backwards)) - expected).max() > 0.1


def test_halves_are_not_pairs():
    """Pairs are neighbours (2j, 2j + 1), not (j, j + half) as in other models."""
    x = jnp.zeros((1, 2, 1, 6)).at[..., 0].set(1.0)
    out = np.asarray(rope_apply(x, rope_table((2, 1, 1), 6)))[0, 1, 0]
    np.testing.assert_allclose(out, [np.cos(1), np.sin(1), 0, 0, 0, 0], atol=1e-7)


def test_the_result_is_float32():
    x = jnp.ones((1, 60, 1, 12), jnp.bfloat16)
    assert rope_apply(x, rope_table(GRID, 12)).dtype == jnp.float32


def test_cached_tables_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        rope_params(8, 4)[0, 0] = 0
