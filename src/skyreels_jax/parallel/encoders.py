"""Text and image encoders whose parameters are cut over the devices of a mesh.

Every device encodes the same prompt or image. Of each matrix of a layer it has one part, and the
layer is put together when its turn comes: no device holds more than a part of the model, a layer,
and what is not in the layers.
"""

from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array

from skyreels_jax.models.clip_vision import ClipVision
from skyreels_jax.models.umt5 import Umt5Encoder
from skyreels_jax.ops.target import compiled_for, device_of
from skyreels_jax.parallel.placing import send_parts
from skyreels_jax.parallel.rules import encoder_axis

_Tree = TypeVar("_Tree")
_Model = TypeVar("_Model", Umt5Encoder, ClipVision)
# The only axis of a mesh of all devices in a row.
LINE = "line"


def in_a_line(mesh: Mesh) -> Mesh:
    """The devices of a mesh along one axis, in the same order."""
    return Mesh(mesh.devices.reshape(-1), (LINE,))


@dataclass(frozen=True)
class _Gather:
    """How parts become whole inside of the ``shard_map``.

    Attributes:
        axes: of each array of a layer, in the order of the tree; ``None`` is whole already.
        cut_table: whether devices have columns of the table of tokens.
    """

    axes: tuple[int | None, ...]
    cut_table: bool

    def layer(self, parameters: _Tree) -> _Tree:
        """All parts of each array of a layer."""
        leaves, structure = jax.tree.flatten(parameters)
        whole = [
            leaf if axis is None else jax.lax.all_gather(leaf, LINE, axis=axis, tiled=True)
            for leaf, axis in zip(leaves, self.axes, strict=True)
        ]
        return jax.tree.unflatten(structure, whole)

    def features(self, x: Array) -> Array:
        """All columns."""
        if not self.cut_table:
            return x
        return jax.lax.all_gather(x, LINE, axis=x.ndim - 1, tiled=True)


@dataclass(frozen=True)
class MeshEncoder:
    """The devices that encoders are cut over.

    Attributes:
        mesh: along one axis; :func:`in_a_line`.
    """

    mesh: Mesh

    def spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """The cut of the parameter of a dotted path."""
        axis = encoder_axis(path, shape, self.mesh.size)
        return PartitionSpec() if axis is None else PartitionSpec(*[None] * axis, LINE)

    def placement(self, path: str, value: np.ndarray) -> Array:
        """Put a loaded parameter where it belongs: each device is sent its part alone."""
        return send_parts(value, NamedSharding(self.mesh, self.spec(path, value.shape)))

    def apply(self, graph: nnx.GraphDef[_Model], state: nnx.State, *inputs: Array) -> Array:
        """What the model makes of inputs; it is the same on every device."""
        whole = NamedSharding(self.mesh, PartitionSpec())
        return _encoded(self, graph, state, *(send_parts(value, whole) for value in inputs))

    def abstract(self, state: nnx.State) -> nnx.State:
        """Shapes of a model's parameters with the places where :meth:`placement` puts them."""
        leaves = []
        for path, variable in nnx.to_flat_state(state):
            leaf = variable.get_value()
            sharding = NamedSharding(self.mesh, self.spec(_dotted(path), leaf.shape))
            leaf = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            leaves.append((path, variable.replace(leaf)))
        return nnx.from_flat_state(leaves)


@partial(jax.jit, static_argnums=(0, 1))
def _encoded(
    devices: MeshEncoder, graph: nnx.GraphDef[_Model], state: nnx.State, *inputs: Array
) -> Array:
    found = {_dotted(path): leaf.get_value().shape for path, leaf in nnx.to_flat_state(state)}
    parts = devices.mesh.size
    axes = [encoder_axis(path, shape, parts) for path, shape in found.items()]
    layers = [n for n, path in enumerate(found) if path.startswith("blocks.")]
    of_layer = tuple(None if (axis := axes[n]) is None else axis - 1 for n in layers)
    # Beside the layers, only the table of tokens is cut.
    table = any(axis is not None for n, axis in enumerate(axes) if n not in layers)
    gather = _Gather(of_layer, table)

    def on_device(leaves: list[Array], *inputs: Array) -> Array:
        model = nnx.merge(graph, jax.tree.unflatten(structure, leaves))
        model.parts = gather
        return model(*inputs)

    leaves, structure = jax.tree.flatten(state)
    specs = [devices.spec(path, shape) for path, shape in found.items()]
    whole = PartitionSpec()
    mapped = jax.shard_map(
        on_device,
        mesh=devices.mesh,
        in_specs=(specs, *[whole] * len(inputs)),
        out_specs=whole,
        check_vma=False,
    )
    with compiled_for(device_of(devices.mesh.devices.flat[0])):
        return mapped(leaves, *inputs)


def _dotted(path: tuple[object, ...]) -> str:
    return ".".join(map(str, path))
