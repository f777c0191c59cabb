"""Embedded timesteps against float64."""

import jax.numpy as jnp
import numpy as np
import pytest

from skyreels_jax.ops.positions import sinusoidal_embedding_1d

DIM = 256


def exact(positions: np.ndarray) -> np.ndarray:
    angles = np.outer(positions, 10_000.0 ** (-np.arange(DIM // 2) / (DIM // 2)))
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)


def embedded(positions: np.ndarray) -> np.ndarray:
    return np.asarray(sinusoidal_embedding_1d(DIM, jnp.asarray(positions)))


def test_whole_timesteps_are_float64_rounded_once():
    positions = np.arange(1001, dtype=np.int32)
    assert (embedded(positions) == exact(positions).astype(np.float32)).all()
    # Sines before cosines, or angles in float32, would be seen.
    naive = positions.astype(np.float32)[:, None] * (
        10_000.0 ** (-np.arange(DIM // 2) / (DIM // 2))
    ).astype(np.float32)
    assert np.abs(np.cos(naive) - exact(positions)[:, : DIM // 2]).max() > 1e-5  # measured 5.6e-5
    assert not (embedded(positions)[:, 0] == exact(positions)[:, DIM // 2]).all()


def test_fractions_are_as_exact():
    positions = np.random.default_rng(0).uniform(0, 1000, 500).astype(np.float32)
    error = np.abs(embedded(positions) - exact(positions.astype(np.float64))).max()
    assert error <= 3e-7  # measured 1.3e-7
    assert np.abs(embedded(np.floor(positions)) - exact(positions)).max() > 0.1


def test_floats_and_integers_agree():
    positions = np.array([0, 1, 500, 999, 1000])
    assert (embedded(positions.astype(np.int32)) == embedded(positions.astype(np.float32))).all()


def test_all_timesteps_differ_in_bfloat16():
    rows = np.asarray(jnp.asarray(embedded(np.arange(1000)), jnp.bfloat16), np.float32)
    assert len(np.unique(rows, axis=0)) == 1000


@pytest.mark.parametrize("position", [-1, -0.5, 1001, 5000])
def test_positions_outside_the_table_are_seen(position):
    assert np.isnan(embedded(np.array([position], np.float32))).all()
