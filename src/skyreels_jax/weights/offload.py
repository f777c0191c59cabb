"""Kernels of the blocks in the host's memory, which stream through the device layer by layer.

The scan over the layers moves each layer to the device when its turn comes
(:func:`skyreels_jax.models.layers.scan_layers`).
"""

from typing import Final

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec, SingleDeviceSharding

from skyreels_jax.errors import UnsupportedError

# Memory of the host that a device reads from by itself.
PINNED_HOST: Final = "pinned_host"


def stays_on_host(path: str) -> bool:
    """Whether the parameter of this dotted path is one: the stacked kernels, by far the most."""
    return path.startswith("blocks.") and path.endswith(".kernel")


def require_host_memory() -> None:
    """Refuse devices that have no memory of their own beside the host's.

    Raises:
        UnsupportedError: says what the device is.
    """
    device = jax.local_devices()[0]
    if device.platform == "cpu":
        raise UnsupportedError(
            "`offload` keeps weights in the host's memory instead of an accelerator's, and JAX "
            "computes on the CPU here: leave it out"
        )
    if PINNED_HOST not in {memory.kind for memory in device.addressable_memories()}:
        raise UnsupportedError(
            f"`offload` takes memory of the kind {PINNED_HOST}, which {device.device_kind} has not"
        )


def on_host(path: str, value: np.ndarray) -> jax.Array:
    """Place the blocks' kernels in the host's memory, and all else on the default device."""
    if not stays_on_host(path):
        return jax.device_put(value)
    return jax.device_put(
        value, SingleDeviceSharding(jax.local_devices()[0], memory_kind=PINNED_HOST)
    )


def abstract_on_host(model: nnx.Module) -> nnx.Module:
    """An abstract model whose arrays say where :func:`on_host` puts them: programs depend on it."""
    graph, state = nnx.split(model)
    mesh = Mesh(np.array(jax.local_devices()[:1]), ("device",))
    placed = NamedSharding(mesh, PartitionSpec(), memory_kind=PINNED_HOST)
    leaves = []
    for path, variable in nnx.to_flat_state(state):
        leaf = variable.get_value()
        if stays_on_host(".".join(map(str, path))):
            leaf = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=placed)
        leaves.append((path, variable.replace(leaf)))
    return nnx.merge(graph, nnx.from_flat_state(leaves))
