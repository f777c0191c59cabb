"""The mesh of a plan; values of the host onto devices and back, of several processes too."""

from collections.abc import Sequence
from functools import lru_cache

import jax
import numpy as np
from jax.core import Tracer
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from skyreels_jax.parallel.plan import MESH_AXES, MeshPlan


def mesh_of(
    plan: MeshPlan,
    devices: Sequence[jax.Device],  # pyright: ignore[reportInvalidTypeForm]
) -> Mesh:
    """The mesh of a plan, of the first of so many devices."""
    sizes = tuple(plan.size(axis) for axis in MESH_AXES)
    # Of a slice of 4 x 4 TPUs, an axis of 8 is one row and a half of another direction.
    grid = create_device_mesh(sizes, devices[: plan.devices], allow_split_physical_axes=True)
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(sizes))


def send_parts(value: np.ndarray | jax.Array, sharding: NamedSharding) -> jax.Array:
    """A value that all processes have, or an array of all, each part on its device."""
    # Of what is traced nobody can say where it is.
    of_all = isinstance(value, Tracer) or not getattr(value, "is_fully_addressable", True)
    if of_all or sharding.is_fully_addressable:
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
