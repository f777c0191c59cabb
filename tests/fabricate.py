"""Checkpoint folders that tests read: made once a test session, one for each kind and layout.

A pytest plugin, loaded by ``conftest.py``.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from skyreels_jax.testing.random_checkpoint import Kind, make_checkpoint
from skyreels_jax.weights.plan import Format

Checkpoints = Callable[[Kind, Format], Path]


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """``checkpoints(kind, layout)``: the path of a small random checkpoint; never write into it."""
    root = tmp_path_factory.mktemp("checkpoints")

    @cache
    def make(kind: Kind, layout: Format) -> Path:
        return make_checkpoint(root / f"{kind}-{layout}", kind, layout)

    return make
