"""One step of training: a pure function of (state, batch, key)."""

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, PyTree

from skyreels_jax.errors import UnsupportedError
from skyreels_jax.training.optimizer import MATRICES
from skyreels_jax.training.task import AVERAGE, LossAndMetrics, Params
from skyreels_jax.weights.offload import PINNED_HOST

if TYPE_CHECKING:
    import optax

    from skyreels_jax.training.mesh import TrainingMesh

# Parameters, a batch and what :data:`Draw` gave to the loss and other metrics by name.
Loss = Callable[[Params, PyTree, PyTree], LossAndMetrics]
# A batch and a key to all that is random in a step: arrays with the batch's leading axis.
Draw = Callable[[PyTree, Array], PyTree]


class TrainState(NamedTuple):
    """All that training carries from step to step; one pytree.

    Attributes:
        step: how many have been made.
        params: float32 master copies, by dotted path, whatever dtype the loss is given.
        optimizer: the state of optax.
        average: exponential moving average of the parameters; empty without one.
    """

    step: Int[Array, ""]
    params: dict[str, Array]
    optimizer: PyTree
    average: dict[str, Array]


class TrainStepReport(NamedTuple):
    """What a step says: metrics by name, ``loss`` and ``grad_norm`` among them.

    ``is_finite`` is False where loss or gradient are not; the state has then stayed as it was but
    for its count.
    """

    metrics: dict[str, Float[Array, ""]]
    is_finite: Bool[Array, ""]


TrainStep = Callable[[TrainState, PyTree, Array], tuple[TrainState, TrainStepReport]]


def init_state(
    params: Params,
    optimizer: "optax.GradientTransformation",
    ema: float,
    mesh: "TrainingMesh | None" = None,
    *,
    offload: bool = False,
) -> TrainState:
    """The state before the first step, on a mesh if one is given.

    Where it is to ``offload``, the optimiser's arrays and the average are in the host's memory.

    Raises:
        UnsupportedError: the device has no memory there that it reads from by itself.
    """

    def begun(params: dict[str, Array]) -> TrainState:
        average = {name: jnp.array(value) for name, value in params.items()} if ema else {}
        return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)

    if mesh is None:
        state = begun(dict(params))
    else:
        shardings = mesh.state_shardings(jax.eval_shape(begun, dict(params)))
        placed = mesh.place(dict(params), shardings.params)
        state = jax.jit(begun, out_shardings=shardings)(placed)
    if not offload:
        return state
    optimizer_state, average = jax.tree.map(_to_host, (state.optimizer, state.average))
    return state._replace(optimizer=optimizer_state, average=average)


def _to_host(leaf: Array) -> Array:
    if not leaf.ndim:
        return leaf
    devices = leaf.sharding.addressable_devices
    kinds = {memory.kind for device in devices for memory in device.addressable_memories()}
    if PINNED_HOST not in kinds:
        raise UnsupportedError(
            f"run.offload takes memory of the kind {PINNED_HOST}, which this device has not"
        )
    return jax.device_put(leaf, leaf.sharding.with_memory_kind(PINNED_HOST))


def default_memory_kind(leaf: Array) -> str:
    """The memory that the devices of an array compute in."""
    return next(iter(leaf.devices())).default_memory().kind


def best_params(state: TrainState) -> Params:
    """The average, or the parameters if there is none, in memory that the device computes in."""

    def moved(leaf: Array) -> Array:
        kind = default_memory_kind(leaf)
        if leaf.sharding.memory_kind == kind:
            return leaf
        return jax.device_put(leaf, leaf.sharding.with_memory_kind(kind))

    return {name: moved(value) for name, value in (state.average or state.params).items()}


def no_draw(batch: PyTree, key: Array) -> tuple[()]:
    """The :data:`Draw` of a loss in which nothing is random."""
    del batch, key
    return ()


def make_step(
    loss: Loss,
    optimizer: "optax.GradientTransformation",
    *,
    draw: Draw = no_draw,
    accumulate: int = 1,
    ema: float = 0.0,
    frozen: Params | None = None,
    kernels: DTypeLike = jnp.float32,
    mesh: "TrainingMesh | None" = None,
) -> TrainStep:
    """A compiled step; the state given is donated.

    Args:
        loss: to descend; a mean over the examples of a batch. On a mesh, of parameters in parts
            (:meth:`.TrainingMesh.loss_of`).
        optimizer: whose state is in the TrainState.
        draw: what is random, for the whole batch: its parts get theirs of it.
        accumulate: parts of a batch whose gradients are averaged, one in memory at a time. The
            leading axis of every array in a batch must be a multiple.
        ema: share of the old average that stays in each step; 0 for none. It is lower in the first
            steps, ``(1 + n) / (10 + n)``, so that the initial values are soon forgotten.
        frozen: parameters that the loss is given too and that stay as they are. They are given to
            what is compiled: constants of it they would be twice in memory. On a mesh they are
            where :meth:`.TrainingMesh.weight_shardings` says.
        kernels: dtype in which the loss is given what multiplies, and in which its gradients are;
            what is descended are the float32 masters.
        mesh: the devices that state and batch are on; ``None`` for one.
    """

    def step(
        state: TrainState, batch: PyTree, key: Array, frozen: Params
    ) -> tuple[TrainState, TrainStepReport]:
        on_device = _on_device(state)
        # On one device a loss may ask for the average too; on a mesh none does.
        named = on_device.average if mesh is None else {}
        others = {**frozen, **{f"{AVERAGE}{name}": value for name, value in named.items()}}
        made = {"draw": draw, "accumulate": accumulate, "ema": ema, "mesh": mesh}
        made["kernels"] = jnp.dtype(kernels)
        stepped = _uncompiled(loss, optimizer, others, **made)
        after, report = stepped(on_device, batch, key)
        return jax.tree.map(_where, after, state), report

    return partial(jax.jit(step, donate_argnums=0), frozen=dict(frozen or {}))


def _on_device(state: TrainState) -> TrainState:
    """A traced state of which what is in the host's memory is moved when it is needed."""

    def moved(leaf: Array) -> Array:
        on_host = jax.typeof(leaf).memory_space == jax.memory.Space.Host
        return jax.device_put(leaf, jax.memory.Space.Device) if on_host else leaf

    return jax.tree.map(moved, state)


def _where(leaf: Array, before: Array) -> Array:
    """A traced array in the memory in which another is."""
    on_host = jax.typeof(before).memory_space == jax.memory.Space.Host
    return jax.device_put(leaf, jax.memory.Space.Host) if on_host else leaf


def _uncompiled(
    loss: Loss,
    optimizer: "optax.GradientTransformation",
    frozen: Params,
    *,
    draw: Draw,
    accumulate: int,
    ema: float,
    kernels: np.dtype,
    mesh: "TrainingMesh | None",
) -> TrainStep:
    import optax

    def given(params: Params) -> dict[str, Array]:
        return {n: v.astype(kernels) if n.endswith(MATRICES) else v for n, v in params.items()}

    def in_float32(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)

    def gradients(
        params: Params, inputs: tuple[PyTree, PyTree], frozen: Params
    ) -> tuple[PyTree, dict[str, Array]]:
        def whole_loss(params: Params) -> LossAndMetrics:
            return loss({**frozen, **params}, *inputs)

        (value, metrics), grads = jax.value_and_grad(whole_loss, has_aux=True)(params)
        return grads, {"loss": value, **metrics}

    def averaged(
        params: Params, inputs: tuple[PyTree, PyTree], frozen: Params
    ) -> tuple[PyTree, dict[str, Array]]:
        if accumulate == 1:
            return gradients(params, inputs, frozen)
        parts = jax.tree.map(lambda x: x.reshape(accumulate, -1, *x.shape[1:]), inputs)
        first = jax.tree.map(lambda x: x[0], parts)
        shapes = jax.eval_shape(gradients, params, first, frozen)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, jnp.float32), shapes)

        def add(total: PyTree, part: tuple[PyTree, PyTree]) -> tuple[PyTree, None]:
            return jax.tree.map(jnp.add, total, in_float32(gradients(params, part, frozen))), None

        total, _ = jax.lax.scan(add, zeros, parts)
        return jax.tree.map(lambda x: x / accumulate, total)

    def step(state: TrainState, batch: PyTree, key: Array) -> tuple[TrainState, TrainStepReport]:
        inputs = batch, draw(batch, key)
        if mesh is None:
            grads, metrics = averaged(given(state.params), inputs, frozen)
        else:
            spread = mesh.gradients(averaged)
            grads, metrics = spread(given(state.params), mesh.constrain_rows(inputs), frozen)
        grads = in_float32(grads)
        # optax mixes dtypes and ranks, which a strict caller forbids.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            norm = optax.tree.norm(grads)
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        is_finite = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm)
        params = jax.tree.map(jnp.add, state.params, updates)
        count = state.step.astype(jnp.float32)
        stays = jnp.minimum(ema, (1 + count) / (10 + count))
        average = {
            name: stays * old + (1 - stays) * params[name] for name, old in state.average.items()
        }
        after = TrainState(state.step, params, optimizer_state, average)
        kept = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), after, state)
        report = TrainStepReport({**metrics, "grad_norm": norm}, is_finite)
        kept = kept._replace(step=state.step + 1)
        return (kept if mesh is None else mesh.constrain_state(kept)), report

    return step
