"""Parameters read by several processes: each reads a part of every tensor, once.

Columns of our matrices lie in a file one after the other, and devices have rows of them. So a
process reads some columns in one run, and the devices exchange them for rows, a layer at a time: no
byte is read twice, and no host has more than its devices' parts and a layer's.
"""

from dataclasses import dataclass, field
from functools import lru_cache

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import DTypeLike

from skyreels_jax.parallel.transformer import MeshTransformer

_Index = tuple[slice, ...]


@dataclass
class ParameterParts:
    """A parameter that is put together of parts, a layer at a time.

    Attributes:
        read: places of what is read of a layer, or of the whole where there are no layers.
        final: places of the parameter.
        shape: of what is read at a time.
    """

    read: NamedSharding
    final: NamedSharding
    shape: tuple[int, ...]
    value: jax.Array | None
    _devices: list[jax.Device] = field(default_factory=list)  # pyright: ignore[reportInvalidTypeForm]

    def indices(self) -> list[_Index]:
        """What this process reads, one for each of its devices."""
        places = self.read.addressable_devices_indices_map(self.shape)
        self._devices = list(places)
        return [index for index in places.values() if index is not None]

    def put(self, layer: int | None, parts: list[np.ndarray]) -> None:
        """What was read of a layer, in the order of :meth:`indices`; all processes call it."""
        arrays = [jax.device_put(p, d) for p, d in zip(parts, self._devices, strict=True)]
        read = jax.make_array_from_single_device_arrays(self.shape, self.read, arrays)
        if self.value is None or layer is None:
            self.value = read
        else:
            self.value = _with_layer(self.final)(self.value, read, layer)
        # Waiting bounds memory to one layer beside the parameter.
        jax.block_until_ready(self.value)


@dataclass(frozen=True)
class PlacementInParts:
    """Places parameters as a mesh of several processes has them; see the module.

    Attributes:
        devices: of the transformer.
    """

    devices: MeshTransformer

    def __call__(self, path: str, value: np.ndarray) -> jax.Array:
        """Put a parameter of which every process has all."""
        return self.devices.placement(path, value)

    def begin(self, path: str, shape: tuple[int, ...], dtype: DTypeLike) -> ParameterParts | None:
        """A parameter to be read in parts; ``None`` for what every process reads whole."""
        final = self.devices.weight_sharding(path, shape)
        parts, stacked = self.devices.plan.devices, path.startswith("blocks.")
        if final.is_fully_replicated or shape[-1] % parts:
            return None
        last = next(axes for axes in final.spec if axes is not None)
        shape = shape[1:] if stacked else shape
        read = NamedSharding(final.mesh, PartitionSpec(*[None] * (len(shape) - 1), last))
        if not stacked:
            return ParameterParts(read, final, shape, None) if read == final else None
        layers = self.devices.config.num_layers
        return ParameterParts(read, final, shape, _zeros((layers, *shape), dtype, final))


def _zeros(shape: tuple[int, ...], dtype: DTypeLike, sharding: NamedSharding) -> jax.Array:
    return jnp.zeros(shape, dtype, device=sharding)


@lru_cache(maxsize=64)
def _with_layer(sharding: NamedSharding) -> "jax.stages.Wrapped":
    """Puts a layer into a stacked parameter, whose buffer is used again."""
    of_layer = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[1:]))

    def put(stack: jax.Array, layer: jax.Array, number: int) -> jax.Array:
        layer = jax.lax.with_sharding_constraint(layer, of_layer)
        return jax.lax.dynamic_update_index_in_dim(stack, layer, number, 0)

    return jax.jit(put, donate_argnums=0, out_shardings=sharding)
