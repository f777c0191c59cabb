"""What `make test` leaves to `make test-all`."""

from collections.abc import Iterable
from typing import Any

import pytest


def mostly_slow(names: Iterable[str], one_in: int = 4) -> list[Any]:
    """Parameters of which one in so many is in `make test`, and all are in `make test-all`."""
    return [
        name if number % one_in == 0 else pytest.param(name, marks=pytest.mark.slow)
        for number, name in enumerate(names)
    ]
