"""A transformer in training on one of many devices, which has its part of every matrix.

A layer's matrices are put together when it runs, forwards and again backwards; the transpose of
that gather sums their gradients over devices and leaves each its part of the sum.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend.core import Primitive
from jaxtyping import Array, Float, PyTree

from skyreels_jax.models.parallelism import (
    REMAT_POLICIES,
    LayerFunction,
    LayerInputs,
    Remat,
    SharedInputs,
    SingleDevice,
)
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_attention import FrameKeyValues
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.models.transformer_layers import FrameTokens
from skyreels_jax.ops.positions import RopeTable
from skyreels_jax.parallel.attention import MeshAttention
from skyreels_jax.parallel.plan import MeshPlan
from skyreels_jax.parallel.rules import Rules
from skyreels_jax.training.task import LossAndMetrics, Params

if TYPE_CHECKING:
    from skyreels_jax.training.mesh import TrainingMesh

_Shared = TypeVar("_Shared")
_Out = TypeVar("_Out")
# Begins the names of parameters that are stacked over layers.
STACKED: Final = "blocks."


@runtime_checkable
class LayeredTask(Protocol):
    """A task whose loss puts the parameters of a layer together when the layer runs."""

    def on_mesh(self, mesh: "TrainingMesh") -> None:
        """Evaluate parameters that are on a mesh from now on."""
        ...

    @property
    def layered(self) -> TransformerConfig | None:
        """The transformer whose blocks are trained; ``None`` if the loss takes whole ones."""
        ...

    def loss_in_parts(
        self, layers: "LayersInParts", params: Params, batch: PyTree, noise: PyTree
    ) -> LossAndMetrics:
        """The loss, the layers run as ``layers`` does, which takes each device's parts."""
        ...


@dataclass(frozen=True, eq=False)
class LayersInParts(SingleDevice):
    """How a transformer runs on one of many devices in a fully manual ``shard_map``.

    Attributes:
        plan: of the mesh.
        rules: what is cut along which of its axes.
        cut_axes: of each parameter that is cut, by dotted path.
        remat: what is computed again for the backward pass; gathers always are.
    """

    plan: MeshPlan
    rules: Rules
    cut_axes: Mapping[str, int]
    remat: Remat | None = None

    def adopt(self, model: WanModel) -> None:
        """Run a model this way; what it computes again it computes again here."""
        model.parallelism, model.remat = replace(self, remat=model.remat), None

    def cut(self, patches: Float[Array, "B F P C"]) -> Float[Array, "B F Q C"]:
        """This device's slab of every frame; zeros fill up the last."""
        slabs = self.rules.parts("patches", self.plan)
        if slabs == 1:
            return patches
        missing = -patches.shape[2] % slabs
        filled = jnp.pad(patches, ((0, 0), (0, 0), (0, missing), (0, 0)))
        size = filled.shape[2] // slabs
        number = jax.lax.axis_index(self.rules.axes("patches", self.plan))
        return jax.lax.dynamic_slice_in_dim(filled, number * size, size, axis=2)

    def join(self, patches: Float[Array, "B F Q C"], count: int) -> Float[Array, "B F P C"]:
        """The patches of all devices that share these rows."""
        if axes := self.rules.axes("patches", self.plan):
            patches = jax.lax.all_gather(patches, axes, axis=2, tiled=True)
        return patches[:, :, :count]

    def run_layers(
        self, layer: LayerFunction, tokens: FrameTokens, layers: LayerInputs, shared: SharedInputs
    ) -> tuple[FrameTokens, FrameKeyValues | None]:
        """One after the other, each put together for its turn."""
        frames, slab = tokens.shape[1:3]
        count = shared.rope.cos.shape[0] // frames
        attend = None
        if self.rules.parts("patches", self.plan) > 1:
            around = MeshPlan(ring=self.plan.ring, ulysses=self.plan.ulysses)
            attend = MeshAttention(around, slab, count)

            def own(table: Float[Array, "L half"]) -> Float[Array, "l half"]:
                by_frame = self.cut(table.reshape(1, frames, count, -1))
                return by_frame.reshape(-1, table.shape[-1])

            shared = shared._replace(rope=RopeTable(*map(own, shared.rope)))

        def turn(
            tokens: FrameTokens, given: LayerInputs
        ) -> tuple[FrameTokens, FrameKeyValues | None]:
            whole = given._replace(parameters=self._whole(given.parameters, STACKED))
            return layer(tokens, whole, shared, attend)

        return jax.lax.scan(self._again(turn), tokens, layers)

    def map_layers(
        self,
        layer: Callable[[nnx.State, _Shared], _Out],
        parameters: nnx.State,
        shared: _Shared,
        path: str,
    ) -> _Out:
        """One after the other, each put together for its turn; the results are stacked."""

        def turn(_: None, parameters: nnx.State) -> tuple[None, _Out]:
            return None, layer(self._whole(parameters, path), shared)

        return jax.lax.scan(self._again(turn), None, parameters)[1]

    def _again(self, turn: Callable[..., _Out]) -> Callable[..., _Out]:
        """Keep of a layer for the backward pass what is to be kept, and never what is gathered."""
        policy = _all_but_weights if self.remat is None else REMAT_POLICIES[self.remat]
        return jax.checkpoint(turn, prevent_cse=False, policy=policy)

    def _whole(self, parameters: nnx.State, path: str) -> nnx.State:
        """One layer's parameters, of all devices' parts."""
        leaves = []
        for own, leaf in nnx.to_flat_state(parameters):
            axis = self.cut_axes.get(path + ".".join(map(str, own)))
            if axis is not None:
                axes = self.rules.axes("weights", self.plan)
                value = jax.lax.all_gather(leaf.get_value(), axes, axis=axis - 1, tiled=True)
                leaf = leaf.replace(value)
            leaves.append((own, leaf))
        return nnx.from_flat_state(leaves)


def _all_but_weights(primitive: Primitive, *operands: object, **_: object) -> bool:
    """The policy that keeps all but what is put together of devices' parts.

    Nor a matrix of it in another type, as that of an 8-bit kernel; what is of rows has more axes.
    """
    if primitive.name == "convert_element_type":
        return all(getattr(value, "ndim", 0) > 2 for value in operands)
    return primitive.name != "all_gather"
