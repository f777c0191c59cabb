"""Products of a rank that are nearest to a matrix, above the size that is decomposed exactly."""

import numpy as np
import pytest

from skyreels_jax.weights.lora import extraction
from skyreels_jax.weights.lora.extraction import factors

ROWS, COLUMNS, RANK = 1100, 1060, 12
# Of the error of the best product; measured 1.0000 (slow spectrum) and 1.0000 (steep).
AT_MOST = 1.01


def with_spectrum(values: np.ndarray) -> np.ndarray:
    """A matrix of float32 with these singular values, in random directions."""
    rng = np.random.default_rng(3)
    left = np.linalg.qr(rng.standard_normal((ROWS, len(values))))[0]
    right = np.linalg.qr(rng.standard_normal((COLUMNS, len(values))))[0]
    return ((left * values) @ right.T).astype(np.float32)


def error(matrix: np.ndarray) -> float:
    down, up = factors(matrix, RANK)
    assert down.shape == (RANK, COLUMNS) and up.shape == (ROWS, RANK)
    return float(np.linalg.norm(matrix - up @ down))


SPECTRA = {"slow": 1 / np.arange(1, 201) ** 0.5, "steep": 0.8 ** np.arange(200)}


@pytest.mark.parametrize("kind", SPECTRA)
def test_a_large_matrix_is_nearly_as_near_as_it_can_be(kind: str):
    spectrum = SPECTRA[kind]
    best = float(np.linalg.norm(spectrum[RANK:]))
    assert best <= error(with_spectrum(spectrum)) * 1.0001 <= AT_MOST * best


def test_a_subspace_without_powers_would_be_caught(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(extraction, "_ROUNDS", 0)
    monkeypatch.setattr(extraction, "_MORE_DIRECTIONS", 0)
    spectrum = SPECTRA["slow"]
    best = float(np.linalg.norm(spectrum[RANK:]))
    assert error(with_spectrum(spectrum)) > AT_MOST * best  # measured 1.26


def test_a_large_matrix_of_the_rank_comes_back():
    matrix = with_spectrum(np.linspace(1, 2, RANK))
    assert error(matrix) < 1e-5 * np.linalg.norm(matrix)  # measured 3e-7
