"""Values of the host onto devices of several processes, and back: each process has its own part."""

from functools import lru_cache

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec


def send_parts(value: np.ndarray | jax.Array, sharding: NamedSharding) -> jax.Array:
    """A value that all processes have, or an array of all, each part on its device."""
    if sharding.is_fully_addressable or not getattr(value, "is_fully_addressable", True):
        return jax.device_put(value, sharding)
    value = np.asarray(value)
    return jax.make_array_from_callback(value.shape, sharding, lambda index: value[index])


def gather_parts(value: jax.Array) -> np.ndarray:
    """All of an array that is cut over devices, in the memory of every process."""
    if value.is_fully_addressable or value.is_fully_replicated:
        return np.asarray(value)
    assert isinstance(value.sharding, NamedSharding)
    whole = NamedSharding(value.sharding.mesh, PartitionSpec())
    return np.asarray(_moved(whole)(value))


@lru_cache(maxsize=64)
def _moved(sharding: NamedSharding) -> "jax.stages.Wrapped":
    return jax.jit(lambda value: value, out_shardings=sharding)
