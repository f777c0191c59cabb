"""The device that a program is for: this process's own, or one it is compiled for from afar."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import jax


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
