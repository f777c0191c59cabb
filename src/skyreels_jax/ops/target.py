"""What a program is traced for: which device, and whole frames or a slab of their rows.

The device is this process's own, or one that the program is compiled for from afar. Frames are
whole, unless a program runs on several devices of which each has a slab of their rows
(:func:`cut_in_rows`); an operation then gets what it needs of the other slabs here.
"""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax
from jaxtyping import Array, Float

_Rows = Float[Array, "*frames height width C"]


@dataclass(frozen=True)
class Device:
    """Where a program will run: ``cpu``, ``cuda``, ``rocm``, ``tpu``; on CUDA, its capability."""

    platform: str
    capability: float = 0.0


@runtime_checkable
class _OnPlatform(Protocol):
    """What :class:`jax.Device` says, whether it is at hand or described by a topology."""

    @property
    def platform(self) -> str: ...


# Part of the key under which JAX keeps what it traced: a function is traced anew for each target.
_TARGET = jax.make_user_context(default_value=None)


def compiled_for(device: Device) -> AbstractContextManager[None]:
    """Trace for ``device`` instead of the default device of this process.

    What depends on the platform is decided while a function is traced, so calls, ``trace`` and
    ``lower`` belong inside; ``compile`` need not.
    """
    return _TARGET(device)


def target_device() -> Device:
    """The device that is traced for: as :func:`compiled_for` says, else the process's default."""
    return _TARGET.value or device_of(jax.devices()[0])


def device_of(device: _OnPlatform) -> Device:
    """What the choices need to know of one of JAX's devices."""
    # A described GPU is of platform "cuda", one that is there of "gpu".
    if device.platform not in ("gpu", "cuda"):
        return Device(device.platform)
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; "gfx90a" on ROCm
    if not capability.replace(".", "", 1).isdigit():
        return Device("rocm")
    return Device("cuda", float(capability))


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


# Part of the key as the target is.
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
