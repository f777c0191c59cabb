"""Parameters that are trained in turn: a student and its critic."""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Int, PyTree

from skyreels_jax.training.task import Params

if TYPE_CHECKING:
    import optax


class TurnsState(NamedTuple):
    """How many steps there were, and the state of each optimiser."""

    step: Int[Array, ""]
    first: PyTree
    second: PyTree


def take_turns(
    first: "optax.GradientTransformation",
    second: "optax.GradientTransformation",
    prefix: str,
    seconds: int,
) -> "optax.GradientTransformation":
    """Two optimisers in turn: ``seconds`` steps of the second, then one of the first.

    Out of its turn an optimiser changes neither parameters nor its own state, whatever the
    gradient is.

    Args:
        first: of all parameters but the second's.
        second: of the parameters whose names begin with ``prefix``.
        prefix: of names.
        seconds: steps of the second for each of the first.
    """
    import optax

    def parted(tree: Params) -> tuple[dict[str, Array], dict[str, Array]]:
        def those(is_second: bool) -> dict[str, Array]:
            return {n: v for n, v in tree.items() if n.startswith(prefix) == is_second}

        return those(False), those(True)

    def init(params: PyTree) -> TurnsState:
        own, other = parted(params)
        return TurnsState(jnp.zeros((), jnp.int32), first.init(own), second.init(other))

    def update(updates: PyTree, state: PyTree, params: PyTree = None) -> tuple[PyTree, TurnsState]:
        is_firsts = state.step % (seconds + 1) == seconds
        own, other = (
            _if_due(is_due, chain, *given)
            for is_due, chain, *given in zip(
                (is_firsts, jnp.logical_not(is_firsts)),
                (first, second),
                parted(updates),
                (state.first, state.second),
                parted(params),
                strict=True,
            )
        )
        return {**own[0], **other[0]}, TurnsState(state.step + 1, own[1], other[1])

    return optax.GradientTransformation(init, update)


def _if_due(
    is_due: Bool[Array, ""],
    chain: "optax.GradientTransformation",
    gradients: PyTree,
    state: PyTree,
    params: PyTree,
) -> tuple[PyTree, PyTree]:
    """Updates and the state after them; zeros and the state as it is where it is not due."""
    moves, after = chain.update(gradients, state, params)
    kept = jax.tree.map(lambda move: jnp.where(is_due, move, 0), moves)
    return kept, jax.tree.map(lambda new, old: jnp.where(is_due, new, old), after, state)
