"""Run one block many times, with the parameters of all layers stacked."""

from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp

_Carry = TypeVar("_Carry")
_Layer = TypeVar("_Layer")
_Shared = TypeVar("_Shared")
_Out = TypeVar("_Out")


def scan_layers(
    step: Callable[[_Carry, _Layer, _Shared], tuple[_Carry, _Out]],
    carry: _Carry,
    layers: _Layer,
    shared: _Shared = None,
    *,
    depth: int | None = None,
) -> tuple[_Carry, _Out]:
    """``carry, out = step(carry, layer, shared)`` for each layer in order; the outs are stacked.

    ``layers`` is a pytree of arrays stacked along a leading axis, of which the first ``depth`` (or
    all) are run. Arrays that every layer takes go into ``shared``, so that gradients reach them;
    what ``step`` closes over must be constant.

    This is ``jax.lax.scan``, and is differentiated as such. But XLA's CPU compiler cannot slice
    bfloat16: it widens what is sliced to float32, and where that is the same in every turn of the
    loop it does so before the loop, to all layers at once. A bfloat16 model then takes three times
    its memory. Here the stack depends on the turn as far as the compiler can tell, and only the
    slice is widened.
    """
    count = len(jax.tree.leaves(layers)[0]) if depth is None else depth

    def plain(carry: _Carry, layers: _Layer, shared: _Shared) -> tuple[_Carry, _Out]:
        layers = jax.tree.map(lambda leaf: leaf[:count], layers)
        return jax.lax.scan(lambda carry, layer: step(carry, layer, shared), carry, layers)

    @jax.custom_jvp
    def tied(carry: _Carry, layers: _Layer, shared: _Shared) -> tuple[_Carry, _Out]:
        def turn(carry: _Carry, index: jax.Array) -> tuple[_Carry, _Out]:
            stack, index = jax.lax.optimization_barrier((layers, index))
            layer = jax.tree.map(
                lambda leaf: jax.lax.dynamic_index_in_dim(leaf, index, keepdims=False), stack
            )
            return step(carry, layer, shared)

        return jax.lax.scan(turn, carry, jnp.arange(count))

    # A gradient of slices taken inside the loop would have the whole stack's size in every turn.
    tied.defjvp(lambda primals, tangents: jax.jvp(plain, primals, tangents))
    return tied(carry, layers, shared)
