"""Training on a mesh: where state and batch are, and gradients by one fully manual ``shard_map``.

Each device has some rows of the batch and its part of every matrix, of the matrix's average and of
what the optimiser knows of it (:mod:`.layers_in_parts` has how a transformer runs so).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Final, TypeVar

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec
from jax.tree_util import DictKey, KeyPath
from jaxtyping import Array, PyTree

from skyreels_jax.errors import RequestError
from skyreels_jax.parallel.placing import mesh_of, send_parts
from skyreels_jax.parallel.plan import AUTO, MESH_AXES, MeshPlan
from skyreels_jax.parallel.rules import Rules, weight_axis
from skyreels_jax.training.layers_in_parts import STACKED, LayeredTask, LayersInParts
from skyreels_jax.training.task import LossAndMetrics, Params, ShapesOfParams

if TYPE_CHECKING:
    from skyreels_jax.training.step import TrainState

_Tree = TypeVar("_Tree")
_Loss = Callable[[Params, PyTree, PyTree], LossAndMetrics]
_Gradients = Callable[[Params, tuple[PyTree, PyTree], Params], tuple[PyTree, dict[str, Array]]]

# Matrices that are small beside those that they stand at, and whole on every device: a collective
# each would take longer than their bytes are worth.
_BESIDE: Final = (".lora_down", ".lora_up")
# Other than for one video: ``fsdp`` cuts rows, which attention need not gather, and along ``data``
# there are whole copies of what is trained.
TRAINING_RULES: Final = Rules(
    rows=("data", "fsdp"),
    patches=("ring", "ulysses"),
    weights=("fsdp", "ring", "ulysses"),
    states=(),
)


@dataclass(frozen=True)
class TrainingMesh:
    """The devices that a model is trained on.

    Attributes:
        mesh: the devices; an abstract one is to be traced for.
        plan: how many there are along each axis.
        reason: why it is this plan.
        layered: what is trained, if its loss puts layers together itself.
        rules: what is cut along which axis.
    """

    mesh: Mesh | AbstractMesh
    plan: MeshPlan
    reason: str = "as given"
    layered: LayeredTask | None = None
    rules: Rules = TRAINING_RULES

    @classmethod
    def of(
        cls,
        given: str,
        rows: int,
        task: object = None,
        devices: "Sequence[jax.Device] | None" = None,  # pyright: ignore[reportInvalidTypeForm]
    ) -> "TrainingMesh":
        """The mesh that is asked for, of the first devices there are.

        Args:
            given: a plan's text, or ``auto``.
            rows: of a batch that are computed at once: all, or those of one accumulated part.
            task: that is to be trained.
            devices: to take; ``None`` for all.

        Raises:
            RequestError: there are too few devices, or rows or heads do not divide, or it is no
                transformer and its patches are to be cut; says what would do.
        """
        devices = jax.devices() if devices is None else devices
        reason = "as given"
        if given == AUTO:
            parts = max(n for n in range(1, len(devices) + 1) if rows % n == 0)
            plan = MeshPlan(fsdp=parts)
            reason = f"auto: {len(devices)} devices, and {rows} rows of a batch divide by {parts}"
        else:
            plan = MeshPlan.parse(given)
        if plan.devices > len(devices):
            found = "1 device" if len(devices) == 1 else f"{len(devices)} devices"
            raise RequestError(
                f"run.mesh = {given!r} has {plan.devices} devices, and JAX finds {found}; nearest: "
                f"'fsdp={len(devices)}'"
            )
        if jax.process_count() > 1 and plan.devices != jax.device_count():
            raise RequestError(
                f"run.mesh = {given!r} has {plan.devices} devices, but all {jax.device_count()} of "
                f"{jax.process_count()} processes take part; nearest: 'fsdp={jax.device_count()}'"
            )
        check_rows(plan, rows)
        layered = task if isinstance(task, LayeredTask) and task.layered is not None else None
        if layered is not None and layered.layered is not None:
            plan.require(layered.layered)
        elif plan.ring * plan.ulysses > 1:
            raise RequestError(
                f"run.mesh = {given!r}: ring and ulysses cut patches of a transformer's frames, "
                "which is not what this run trains; take data and fsdp"
            )
        return cls(mesh_of(plan, devices), plan, reason, layered)

    def sharding(self, *logical: str | None) -> NamedSharding:
        """The places of an array whose axes have these logical names."""
        return NamedSharding(self.mesh, self.rules.spec(self.plan, *logical))

    def _weight_axis(self, name: str, shape: tuple[int, ...]) -> int | None:
        if name.endswith(_BESIDE):
            return None
        return weight_axis(name, shape, self.rules.parts("weights", self.plan))

    def _weight_spec(self, name: str, shape: tuple[int, ...]) -> PartitionSpec:
        axis = self._weight_axis(name, shape)
        if axis is None:
            return PartitionSpec()
        return self.rules.spec(
            self.plan, *("weights" if n == axis else None for n in range(len(shape)))
        )

    def state_shardings(self, state: "TrainState") -> "TrainState":
        """Where each array of a state (or of its shapes) is.

        Parameters are cut by the rules; their average and what an optimiser has of their shape as
        they are. What it has of all but one of their axes is cut where that says how. All else is
        on every device.
        """
        shapes = {name: value.shape for name, value in state.params.items()}

        def place(path: KeyPath, leaf: PyTree) -> NamedSharding:
            keys = (key.key for key in path if isinstance(key, DictKey))
            name = next((key for key in keys if key in shapes), None)
            spec = PartitionSpec()
            if name is not None:
                spec = self._weight_spec(name, shapes[name])
                if leaf.shape != shapes[name]:
                    spec = _without_an_axis(spec, shapes[name], leaf.shape)
            return NamedSharding(self.mesh, spec)

        return jax.tree_util.tree_map_with_path(place, state)

    def weight_shardings(self, params: ShapesOfParams) -> dict[str, NamedSharding]:
        """Where parameters (or their shapes) are that no state has."""
        specs = self._weight_specs(params)
        return {name: NamedSharding(self.mesh, spec) for name, spec in specs.items()}

    def place(self, tree: PyTree, shardings: PyTree) -> PyTree:
        """Arrays where they belong; each of several processes has them whole and puts its own."""
        return jax.tree.map(send_parts, tree, shardings)

    def constrain_state(self, state: "TrainState") -> "TrainState":
        """A state within a compiled function, where it belongs."""
        return jax.lax.with_sharding_constraint(state, self.state_shardings(state))

    def constrain_rows(self, tree: PyTree) -> PyTree:
        """Arrays within a compiled function, each device's rows on it."""
        return jax.lax.with_sharding_constraint(tree, self.sharding("rows"))

    def place_batch(self, batch: PyTree) -> PyTree:
        """Each device its rows.

        Raises:
            RequestError: they do not divide.
        """
        for leaf in jax.tree.leaves(batch)[:1]:
            check_rows(self.plan, leaf.shape[0])
        return jax.tree.map(lambda leaf: send_parts(leaf, self.sharding("rows")), batch)

    def loss_of(self, params: ShapesOfParams, loss: _Loss) -> _Loss:
        """The loss for :meth:`gradients`: that of a :class:`.LayeredTask` takes layers in parts.

        Args:
            params: all that the loss takes, whole ones, or their shapes.
            loss: of whole parameters.
        """
        if self.layered is None:
            return loss
        return partial(self.layered.loss_in_parts, self._layers(params))

    def evaluation_of(self, params: Params, loss: Callable[..., Array]) -> Callable[..., Array]:
        """A compiled function of parameters and other arrays, which every device computes.

        Args:
            params: shapes of the parameters.
            loss: of :class:`.LayersInParts`, parameters and other arrays.
        """
        layers, specs = self._layers(params), self._weight_specs(params)

        def on_device(params: Params, *given: PyTree) -> Array:
            return loss(layers, self._joined(params, layers.cut_axes, True), *given)

        def evaluate(params: Params, *given: PyTree) -> Array:
            whole = PartitionSpec()
            of_given = (whole,) * len(given)
            mapped = jax.shard_map(
                on_device,
                mesh=self.mesh,
                in_specs=(specs, *of_given),
                out_specs=whole,
                check_vma=False,
            )
            return mapped(params, *given)

        return jax.jit(evaluate)

    def _layers(self, params: ShapesOfParams) -> LayersInParts:
        return LayersInParts(self.plan, self.rules, self._cut_axes(params))

    def _cut_axes(self, params: ShapesOfParams) -> dict[str, int]:
        found = {name: self._weight_axis(name, value.shape) for name, value in params.items()}
        return {name: axis for name, axis in found.items() if axis is not None}

    def _weight_specs(self, params: ShapesOfParams) -> dict[str, PartitionSpec]:
        return {name: self._weight_spec(name, value.shape) for name, value in params.items()}

    def gradients(self, local: _Gradients) -> _Gradients:
        """Gradients of a mean over all rows, of a function that gives those over some.

        Args:
            local: from parameters, a device's rows and parameters that are not trained to
                gradients and metrics, which are means. The layers of a :class:`.LayeredTask` are
                in parts, and so are their gradients: the transpose of a gather has summed them
                along the axes that cut them.
        """
        axes = tuple(axis for axis in MESH_AXES if self.plan.size(axis) > 1)
        of_weights, layered = self.rules.axes("weights", self.plan), self.layered is not None

        def spread(
            params: Params, inputs: tuple[PyTree, PyTree], frozen: Params
        ) -> tuple[PyTree, dict[str, Array]]:
            cut_axes, specs = self._cut_axes(params), self._weight_specs(params)
            frozen_axes, of_frozen = self._cut_axes(frozen), self._weight_specs(frozen)

            def summed(name: str, grad: Array) -> Array:
                done = of_weights if name in cut_axes else ()
                if name in cut_axes and not (layered and name.startswith(STACKED)):
                    grad = jax.lax.psum_scatter(
                        grad, of_weights, scatter_dimension=cut_axes[name], tiled=True
                    )
                left = tuple(axis for axis in axes if axis not in done)
                return (jax.lax.psum(grad, left) if left else grad) / self.plan.devices

            def on_device(
                params: Params, inputs: tuple[PyTree, PyTree], frozen: Params
            ) -> tuple[PyTree, dict[str, Array]]:
                whole = self._joined({**frozen, **params}, {**frozen_axes, **cut_axes}, layered)
                found = local(
                    {name: whole[name] for name in params},
                    inputs,
                    {name: whole[name] for name in frozen},
                )
                grads, metrics = self._together(found)
                metrics = jax.lax.pmean(metrics, axes) if axes else metrics
                return {name: summed(name, grad) for name, grad in grads.items()}, metrics

            mapped = jax.shard_map(
                on_device,
                mesh=self.mesh,
                in_specs=(specs, self.rules.spec(self.plan, "rows"), of_frozen),
                out_specs=(specs, PartitionSpec()),
                check_vma=False,
            )
            return mapped(params, inputs, frozen)

        return spread

    def _joined(
        self, params: Params, cut_axes: Mapping[str, int], layered: bool
    ) -> dict[str, Array]:
        """Whole parameters on each device, but those of layers that are put together in turn."""
        found: dict[str, Array] = {}
        for name, axis in cut_axes.items():
            if not (layered and name.startswith(STACKED)):
                axes = self.rules.axes("weights", self.plan)
                found[name] = jax.lax.all_gather(params[name], axes, axis=axis, tiled=True)
        return {**params, **self._together(found)}

    def _together(self, found: _Tree) -> _Tree:
        """All results only when each is there, on a CPU.

        Its runtime goes on to a collective after a loop before the loop is through, where the one
        does not need the other, and then takes collectives of a kind for each other.
        """
        if isinstance(self.mesh, AbstractMesh) or self.mesh.devices.flat[0].platform != "cpu":
            return found
        firsts = [jnp.ravel(leaf)[0].astype(jnp.float32) for leaf in jax.tree.leaves(found)]
        nothing = 0 * jnp.sum(jnp.stack(firsts)) if firsts else jnp.zeros(())
        return jax.tree.map(lambda leaf: leaf + nothing.astype(leaf.dtype), found)

    def __str__(self) -> str:
        return f"{self.plan} [{self.reason}]"


def check_rows(plan: MeshPlan, rows: int) -> None:
    """Refuse a batch that the mesh cannot cut.

    Raises:
        RequestError: with the nearest batches, and meshes, that go.
    """
    parts = TRAINING_RULES.parts("rows", plan)
    if rows % parts:
        near = sorted({max(rows - rows % parts, parts), rows - rows % parts + parts})
        less = max(n for n in range(1, parts) if rows % n == 0)
        raise RequestError(
            f"run.mesh = '{plan}' cuts the rows of a batch in {parts}, and {rows} do not divide by "
            f"it; nearest: {' or '.join(map(str, near))} rows, or 'fsdp={less}'"
        )


def _without_an_axis(
    spec: PartitionSpec, shape: tuple[int, ...], left: tuple[int, ...]
) -> PartitionSpec:
    """The cut of what lacks one axis of a shape; none where that may be one of several."""
    names = (*spec, *(None,) * (len(shape) - len(spec)))
    found = {
        (*names[:axis], *names[axis + 1 :])
        for axis in range(len(shape))
        if (*shape[:axis], *shape[axis + 1 :]) == left
    }
    return PartitionSpec(*found.pop()) if len(found) == 1 else PartitionSpec()
