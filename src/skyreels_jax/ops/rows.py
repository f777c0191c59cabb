"""Frames of which each device has a slab of rows: what an operation needs of the other slabs.

Outside of :func:`cut_in_rows` frames are whole, and every function here returns what it is given.
"""

from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float

_Rows = Float[Array, "*frames height width C"]


@runtime_checkable
class RowExchange(Protocol):
    """How rows come from other devices. Hashable: it is part of what is traced."""

    def with_neighbours(self, x: _Rows, above: int, below: int) -> _Rows:
        """This slab between the last rows of the one above and the first of the one below.

        Zeros stand outside of the frame.
        """
        ...

    def gathered(self, x: _Rows) -> _Rows:
        """The rows of the whole frame."""
        ...


# Part of the key under which JAX keeps what it traced, as the target is (`ops.target`).
_EXCHANGE = jax.make_user_context(default_value=None)


def cut_in_rows(exchange: RowExchange) -> AbstractContextManager[None]:
    """Trace for frames of which each device has a slab; inside of a ``shard_map``."""
    return _EXCHANGE(exchange)


def with_rows_around(x: _Rows, above: int, below: int) -> tuple[_Rows, tuple[int, int]]:
    """Frames with the rows that a kernel sees around them, and how many of zeros are missing.

    Args:
        x: frames, or this device's slab of them.
        above: rows that the kernel reaches upwards.
        below: and downwards.
    """
    exchange = _EXCHANGE.value
    if exchange is None or not above + below:
        return x, (above, below)
    return exchange.with_neighbours(x, above, below), (0, 0)


def height_around(rows: int, above: int, below: int) -> int:
    """How high :func:`with_rows_around` makes frames of ``rows``."""
    return rows if _EXCHANGE.value is None else rows + above + below


def whole_height(x: _Rows) -> _Rows:
    """All rows of the frames."""
    exchange = _EXCHANGE.value
    return x if exchange is None else exchange.gathered(x)
