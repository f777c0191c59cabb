"""One step of training: a pure function of (state, batch, key)."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from skyreels_jax.training.optimizer import global_norm
from skyreels_jax.training.parameters import Params

if TYPE_CHECKING:
    import optax

# Parameters, a batch and a key to the loss and other figures by name.
Loss = Callable[[Params, Any, Array], tuple[Float[Array, ""], dict[str, Array]]]


class TrainState(NamedTuple):
    """All that training carries from step to step; one pytree.

    Attributes:
        step: how many have been made.
        params: float32 master copies, by dotted path.
        optimizer: of optax.
        average: exponential moving average of the parameters; empty without one.
    """

    step: Int[Array, ""]
    params: dict[str, Array]
    optimizer: Any
    average: dict[str, Array]


class StepReport(NamedTuple):
    """What a step says: figures by name, ``loss`` and ``grad_norm`` among them.

    ``is_finite`` is False where loss or gradient are not; the state has then stayed as it was but
    for its count.
    """

    figures: dict[str, Float[Array, ""]]
    is_finite: Bool[Array, ""]


Step = Callable[[TrainState, Any, Array], tuple[TrainState, StepReport]]


def init_state(params: Params, optimizer: "optax.GradientTransformation", ema: float) -> TrainState:
    """Before the first step."""
    params = dict(params)
    average = {name: jnp.array(value) for name, value in params.items()} if ema else {}
    return TrainState(jnp.zeros((), jnp.int32), params, optimizer.init(params), average)


def make_step(
    loss: Loss, optimizer: "optax.GradientTransformation", *, accumulate: int = 1, ema: float = 0.0
) -> Step:
    """A compiled step; the state given is donated.

    Args:
        loss: to descend.
        optimizer: whose state is in the TrainState.
        accumulate: gradients averaged in a step. If above 1, every array of a batch has such a
            leading axis, and one part of it is in memory at a time.
        ema: share of the old average that stays in each step; 0 for none. It is lower in the first
            steps, ``(1 + n) / (10 + n)``, so that the initial values are soon forgotten.
    """

    def gradients(params: Params, batch: Any, key: Array) -> tuple[Any, dict[str, Array]]:
        (value, figures), grads = jax.value_and_grad(loss, has_aux=True)(params, batch, key)
        return grads, {"loss": value, **figures}

    def averaged(params: Params, batch: Any, key: Array) -> tuple[Any, dict[str, Array]]:
        if accumulate == 1:
            return gradients(params, batch, key)
        keys = jax.random.split(key, accumulate)
        first = jax.tree.map(lambda x: x[0], batch)
        shapes = jax.eval_shape(gradients, params, first, keys[0])
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def part(total: Any, inputs: tuple[Any, Array]) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradients(params, *inputs)), None

        total, _ = jax.lax.scan(part, zeros, (batch, keys))
        return jax.tree.map(lambda x: x / accumulate, total)

    def step(state: TrainState, batch: Any, key: Array) -> tuple[TrainState, StepReport]:
        grads, figures = averaged(state.params, batch, key)
        norm = global_norm(grads)
        is_finite = jnp.isfinite(figures["loss"]) & jnp.isfinite(norm)
        # optax mixes dtypes and ranks, which a strict caller forbids.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            updates, optimizer_state = optimizer.update(grads, state.optimizer, state.params)
        params = jax.tree.map(jnp.add, state.params, updates)
        count = state.step.astype(jnp.float32)
        stays = jnp.minimum(ema, (1 + count) / (10 + count))
        average = {
            name: stays * old + (1 - stays) * params[name] for name, old in state.average.items()
        }
        after = TrainState(state.step, params, optimizer_state, average)
        kept = jax.tree.map(lambda new, old: jnp.where(is_finite, new, old), after, state)
        report = StepReport({**figures, "grad_norm": norm}, is_finite)
        return kept._replace(step=state.step + 1), report

    return jax.jit(step, donate_argnums=0)
