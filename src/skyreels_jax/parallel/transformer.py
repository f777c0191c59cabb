"""The transformer on a mesh: one fully manual ``shard_map`` around the scanned blocks.

Each device holds a slab of the patches of every frame and a part of every matrix. A layer's
matrices are put together when it runs, those of the next one while it does.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.typing import DTypeLike
from jaxtyping import Array, Float, PyTree

from skyreels_jax.errors import RequestError
from skyreels_jax.models.layers import layer_at
from skyreels_jax.models.parallelism import (
    SINGLE_DEVICE,
    LayerFunction,
    LayerInputs,
    SharedInputs,
)
from skyreels_jax.models.transformer_attention import FrameKeyValues
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.models.transformer_layers import FrameTokens
from skyreels_jax.ops.target import Device, compiled_for, device_of
from skyreels_jax.parallel.attention import MeshAttention
from skyreels_jax.parallel.placing import mesh_of, send_parts
from skyreels_jax.parallel.plan import AUTO, MeshPlan, choose_plan
from skyreels_jax.parallel.rules import Rules, weight_axis

_Tree = TypeVar("_Tree")
_Shared = TypeVar("_Shared")
_Out = TypeVar("_Out")


@dataclass(frozen=True)
class MeshTransformer:
    """A :class:`~skyreels_jax.models.parallelism.Parallelism` of many devices.

    Attributes:
        mesh: the devices.
        plan: how many there are along each axis.
        config: of the transformer.
        reason: why it is this plan.
        rules: what is cut along which axis.
    """

    mesh: Mesh
    plan: MeshPlan
    config: TransformerConfig
    reason: str = "as given"
    rules: Rules = Rules()

    @classmethod
    def of(
        cls,
        given: "str | MeshPlan",
        config: TransformerConfig,
        devices: Sequence[jax.Device] | None = None,  # pyright: ignore[reportInvalidTypeForm]
    ) -> "MeshTransformer":
        """The mesh that is asked for, of the first devices there are.

        Args:
            given: a plan, its text, or ``auto``.
            config: of the transformer.
            devices: to take; ``None`` for all of this process and those that it has joined.

        Raises:
            RequestError: the plan is illegal; says why, and what would be legal.
        """
        devices = jax.devices() if devices is None else devices
        reason = "as given"
        if given == AUTO:
            plan, reason = choose_plan(len(devices), config)
        else:
            plan = MeshPlan.parse(given) if isinstance(given, str) else given
        plan.require(config, devices=len(devices))
        if plan.devices < len(devices) and jax.process_count() > 1:
            raise RequestError(
                f"`mesh` {plan} has {plan.devices} devices, and {jax.process_count()} processes "
                f"have {len(devices)}: a mesh of several processes has all of them"
            )
        return cls(mesh_of(plan, devices), plan, config, reason)

    @property
    def device(self) -> Device:
        """What programs are compiled for."""
        return device_of(self.mesh.devices.flat[0])

    @property
    def name(self) -> str:
        """The plan as text."""
        return str(self.plan)

    @property
    def devices(self) -> int:
        """How many the mesh has."""
        return self.plan.devices

    def sharding(self, *logical: str | None) -> NamedSharding:
        """The places of an array whose axes have these logical names."""
        return NamedSharding(self.mesh, self.rules.spec(self.plan, *logical))

    # What the model calls.

    def cut(self, patches: Float[Array, "B F P C"]) -> Float[Array, "B F Q C"]:
        """Each device a slab of every frame; zeros fill up the last.

        Raises:
            RequestError: the rows of the batch do not divide.
        """
        self.check_rows(patches.shape[0])
        missing = -patches.shape[2] % self.plan.sequence
        filled = jnp.pad(patches, ((0, 0), (0, 0), (0, missing), (0, 0)))
        places = self.sharding("rows", None, "patches", None)
        return jax.lax.with_sharding_constraint(filled, places)

    def join(self, patches: Float[Array, "B F Q C"], count: int) -> Float[Array, "B F P C"]:
        """All patches on all devices."""
        return jax.lax.with_sharding_constraint(patches, self.sharding())[:, :, :count]

    def share(self, tree: _Tree) -> _Tree:
        """On all devices."""
        return jax.lax.with_sharding_constraint(tree, self.sharding())

    def run_layers(
        self, layer: LayerFunction, tokens: FrameTokens, layers: LayerInputs, shared: SharedInputs
    ) -> tuple[FrameTokens, FrameKeyValues | None]:
        """All layers in turn, each on all devices."""
        frames, filled = tokens.shape[1:3]
        count = shared.rope.cos.shape[0] // frames
        slab = filled // self.plan.sequence
        attend = MeshAttention(self.plan, slab, count)
        spec = partial(self.rules.spec, self.plan)
        of_tokens, of_past = spec("rows", None, "patches", None), self._spec_of_states()

        # Matrices and contexts are put together layer by layer; past frames stay in slabs.
        stacks, structure = jax.tree.flatten((layers.parameters, layers.context))
        parts = self._parts_of(layers)
        cuts = [self._cut_of(part, leaf.shape) for part, leaf in zip(parts, stacks, strict=True)]

        def on_device(
            tokens: FrameTokens, stacks: list[Array], past: FrameKeyValues | None, given: Any
        ) -> tuple[FrameTokens, FrameKeyValues | None]:
            given = given._replace(rope=in_a_row(given.rope), past_rope=in_a_row(given.past_rope))
            depth = stacks[0].shape[0]

            def put_together(index: Array) -> list[Array]:
                return [
                    leaf if axis is None else _gathered(leaf, axes, axis - 1)
                    for leaf, (axes, axis, _) in zip(layer_at(stacks, index), cuts, strict=True)
                ]

            def turn(
                carry: tuple[FrameTokens, list[Array]], index: Array
            ) -> tuple[tuple[FrameTokens, list[Array]], FrameKeyValues | None]:
                tokens, current = carry
                # Asked for before it is needed: it may arrive while this layer computes.
                following = put_together((index + 1) % depth)
                parameters, context = jax.tree.unflatten(structure, current)
                own_past = None if past is None else layer_at(past, index)
                of_layer = LayerInputs(parameters, context, own_past)
                tokens, states = layer(tokens, of_layer, given, attend)
                return (tokens, following), states

            first = (tokens, put_together(jnp.int32(0)))
            (tokens, _), states = jax.lax.scan(turn, first, jnp.arange(depth))
            return tokens, states

        def by_frame(table: Float[Array, "L half"]) -> Float[Array, "F Q half"]:
            table = table.reshape(-1, count, table.shape[-1])
            return jnp.pad(table, ((0, 0), (0, filled - count), (0, 0)))

        def in_a_row(tables: _Tree) -> _Tree:
            return jax.tree.map(lambda table: table.reshape(-1, table.shape[-1]), tables)

        ropes = jax.tree.map(by_frame, (shared.rope, shared.past_rope))
        given = shared._replace(rope=ropes[0], past_rope=ropes[1])
        of_rope = spec(None, "patches", None)
        of_shared = SharedInputs(spec("rows"), of_rope, spec(), of_rope)  # pyright: ignore
        mapped = jax.shard_map(
            on_device,
            mesh=self.mesh,
            in_specs=(of_tokens, [cut[2] for cut in cuts], of_past, of_shared),
            out_specs=(of_tokens, of_past),
            check_vma=False,
        )
        with compiled_for(self.device):
            return mapped(tokens, stacks, layers.past, given)

    def map_layers(
        self,
        layer: Callable[[nnx.State, _Shared], _Out],
        parameters: nnx.State,
        shared: _Shared,
        path: str,
    ) -> _Out:
        """One after the other; the compiler finds out where."""
        return SINGLE_DEVICE.map_layers(layer, parameters, shared, path)

    def _spec_of_states(self) -> PartitionSpec:
        """The cut of keys and values by frame, stacked over layers."""
        return self.rules.spec(self.plan, None, "rows", None, "patches", None, None)

    def _parts_of(self, layers: LayerInputs) -> list[str]:
        """What each array of the parameters and the context is, in the order of the tree."""
        return ["weights"] * len(jax.tree.leaves(layers.parameters)) + ["states"] * len(
            jax.tree.leaves(layers.context)
        )

    def _cut_of(
        self, part: str, shape: tuple[int, ...]
    ) -> tuple[tuple[str, ...], int | None, PartitionSpec]:
        """Along which axes of the mesh, and which of its own, a stacked array is cut."""
        axes = self.rules.axes(part, self.plan)
        if part == "weights":
            axis = weight_axis("blocks.", shape, self.rules.parts(part, self.plan))
            names: list[str | None] = [None] * len(shape)
        else:
            axis, names = self._context_axis(shape), [None, "rows", None, None, None]
        if axis is not None:
            names[axis] = part
        return axes, axis, self.rules.spec(self.plan, *names)

    def _context_axis(self, shape: tuple[int, ...]) -> int | None:
        """Which axis of a context ``[layers, B, S, N, K]`` is cut beside the rows."""
        parts = self.rules.parts("states", self.plan)
        if parts == 1:
            return None
        return next((axis for axis in (2, 3, 4) if shape[axis] % parts == 0), None)

    # What sampling and loading call.

    def check_rows(self, rows: int) -> None:
        """Refuse a batch that the mesh cannot cut; a RequestError says which meshes can."""
        self.plan.require(self.config, rows=rows)

    def free(self, of_one: int | None) -> int | None:
        """Bytes free on all devices, of those on one; a CPU's devices share them."""
        if of_one is None or self.device.platform == "cpu":
            return of_one
        return of_one * self.plan.devices

    def placement(self, path: str, value: np.ndarray) -> jax.Array:
        """Put a loaded parameter where it belongs: each device is sent its part alone."""
        return send_parts(value, self.weight_sharding(path, value.shape))

    def weight_sharding(self, path: str, shape: tuple[int, ...]) -> NamedSharding:
        """The places of the parameter of a dotted path."""
        names: list[str | None] = [None] * len(shape)
        axis = weight_axis(path, shape, self.rules.parts("weights", self.plan))
        if axis is not None:
            names[axis] = "weights"
        return self.sharding(*names)

    def abstract(self, model: nnx.Module) -> nnx.Module:
        """An abstract model whose arrays say where :meth:`placement` puts them."""
        graph, state = nnx.split(model)
        leaves = []
        for path, variable in nnx.to_flat_state(state):
            leaf = variable.get_value()
            sharding = self.weight_sharding(".".join(map(str, path)), leaf.shape)
            leaf = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            leaves.append((path, variable.replace(leaf)))
        return nnx.merge(graph, nnx.from_flat_state(leaves))

    def place(self, tree: _Tree) -> _Tree:
        """Arrays of a run on the mesh; of shapes, what will be there."""

        def placed(leaf: PyTree) -> PyTree:
            sharding = self._sharding_for(leaf.shape)
            if isinstance(leaf, jax.ShapeDtypeStruct):
                return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
            return send_parts(leaf, sharding)

        return jax.tree.map(placed, tree)

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """Zeros, each device's part made there."""
        return jnp.zeros(shape, dtype, device=self._sharding_for(shape))

    def jit(
        self, function: Callable[..., Any], arguments: tuple[PyTree, ...], donated: tuple[int, ...]
    ) -> Any:
        """``jax.jit`` with results placed as :meth:`place` would."""
        results = jax.eval_shape(function, *arguments)
        places = jax.tree.map(lambda leaf: self._sharding_for(leaf.shape), results)
        return jax.jit(function, donate_argnums=donated, out_shardings=places)

    def _sharding_for(self, shape: tuple[int, ...]) -> NamedSharding:
        """Where an array of a run belongs; decides memory alone, never a result.

        What is as large as the tokens is known by its shape: tokens that a step cache remembers,
        keys and values by frame, and contexts. All else is on every device.
        """
        config, rows, patches = self.config, self.plan.data, self.plan.sequence
        match shape:
            case (b, _, p, dim) if (dim, b % rows, p % patches) == (config.dim, 0, 0):
                return self.sharding("rows", None, "patches", None)
            case (_, b, _, p, _, _) if (b % rows, p % patches) == (0, 0):
                return NamedSharding(self.mesh, self._spec_of_states())
            case (depth, b, _, heads, _) if (depth, heads) == (config.num_layers, config.num_heads):
                if b % rows == 0:
                    return NamedSharding(self.mesh, self._cut_of("states", shape)[2])
        return self.sharding()

    def __str__(self) -> str:
        return f"{self.plan} [{self.reason}]"


def _gathered(leaf: Array, axes: tuple[str, ...], axis: int) -> Array:
    """A layer's array of all devices' parts."""
    return jax.lax.all_gather(leaf, axes, axis=axis, tiled=True)
