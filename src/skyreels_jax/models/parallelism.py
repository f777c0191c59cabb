"""How a transformer's tokens and layers are spread over devices: the hooks, and one device.

Models call the hooks and know of no device; :mod:`skyreels_jax.parallel` has those of many.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int, PyTree

from skyreels_jax.models.layers import scan_layers
from skyreels_jax.models.transformer_attention import (
    AttentionFunction,
    CrossContext,
    FrameKeyValues,
)
from skyreels_jax.models.transformer_layers import FrameTokens
from skyreels_jax.ops.positions import RopeTable

_Tree = TypeVar("_Tree")
_Shared = TypeVar("_Shared")
_Out = TypeVar("_Out")


# What of a block is computed again for the backward pass instead of kept: ``full`` keeps a block's
# inputs alone, ``dots`` the results of its linear layers too.
Remat = Literal["full", "dots"]
REMAT_POLICIES: Final[Mapping[Remat, Callable[..., bool]]] = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


class SharedInputs(NamedTuple):
    """What every block takes: projected time embedding, positions, how many frames are past.

    ``past_rope`` has the positions of past frames whose keys are un-rotated.
    """

    e0: Float[Array, "B steps 6 D"]
    rope: RopeTable
    past_frames: Int[Array, ""] | None
    past_rope: RopeTable | None = None


class LayerInputs(NamedTuple):
    """What one block takes; stacked over the layers."""

    parameters: nnx.State
    context: CrossContext
    past: FrameKeyValues | None


@runtime_checkable
class LayerFunction(Protocol):
    """One block."""

    def __call__(
        self,
        tokens: FrameTokens,
        given: LayerInputs,
        shared: SharedInputs,
        attend: AttentionFunction | None = None,
        /,
    ) -> tuple[FrameTokens, FrameKeyValues | None]:
        """Tokens and, perhaps, their keys and values; ``attend`` for other than one device's."""
        ...


def rematerialized(layer: LayerFunction, remat: Remat | None) -> LayerFunction:
    """The block; with ``remat``, the backward pass computes again what that does not keep."""
    if remat is None:
        return layer
    policy = REMAT_POLICIES[remat]
    again = jax.checkpoint(layer, prevent_cse=False, static_argnums=3, policy=policy)
    # What is static must be given.
    return lambda tokens, given, shared, attend=None: again(tokens, given, shared, attend)


@runtime_checkable
class Parallelism(Protocol):
    """Where tokens, layers and arrays are. Hashable: it is part of a compiled program."""

    @property
    def name(self) -> str | None:
        """What brings it about again; ``None`` is one device."""
        ...

    @property
    def devices(self) -> int:
        """How many there are."""
        ...

    def cut(self, patches: Float[Array, "B F P C"]) -> Float[Array, "B F Q C"]:
        """Spread the patches of each frame, filled up with zeros where they do not divide."""
        ...

    def join(self, patches: Float[Array, "B F Q C"], count: int) -> Float[Array, "B F P C"]:
        """Undo :meth:`cut`; ``count`` is how many patches a frame has."""
        ...

    def share(self, tree: _Tree) -> _Tree:
        """Small arrays that every device has a whole copy of."""
        ...

    def run_layers(
        self,
        layer: LayerFunction,
        tokens: FrameTokens,
        layers: LayerInputs,
        shared: SharedInputs,
        /,
    ) -> tuple[FrameTokens, FrameKeyValues | None]:
        """Run ``layer`` for each of ``layers`` in order; the second results are stacked."""
        ...

    def map_layers(
        self,
        layer: Callable[[nnx.State, _Shared], _Out],
        parameters: nnx.State,
        shared: _Shared,
        path: str,
    ) -> _Out:
        """Call ``layer`` with each layer's parameters, which are those at a path of the model."""
        ...

    def check_rows(self, rows: int) -> None:
        """Refuse a batch of so many rows by a RequestError, if it cannot be spread."""
        ...

    def free(self, of_one: int | None) -> int | None:
        """Bytes that are free in all, where so many are on one device; ``None`` is unknown."""
        ...

    def placement(self, path: str, value: np.ndarray) -> Array:
        """Put a loaded parameter, given its dotted path, where it belongs."""
        ...

    def place(self, tree: _Tree) -> _Tree:
        """Arrays (or their shapes) where a program takes them."""
        ...

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """Zeros, where an array of this shape belongs."""
        ...

    def jit(
        self, function: Callable[..., Any], arguments: tuple[PyTree, ...], donated: tuple[int, ...]
    ) -> Any:
        """``jax.jit`` of a function that is called with ``arguments``."""
        ...


@dataclass(frozen=True)
class SingleDevice:
    """The null object: everything is on the default device."""

    @property
    def name(self) -> None:
        """None."""

    @property
    def devices(self) -> int:
        """One."""
        return 1

    def cut(self, patches: Float[Array, "B F P C"]) -> Float[Array, "B F P C"]:
        """As they are."""
        return patches

    def join(self, patches: Float[Array, "B F P C"], count: int) -> Float[Array, "B F P C"]:
        """As they are."""
        del count
        return patches

    def share(self, tree: _Tree) -> _Tree:
        """As they are."""
        return tree

    # One after the other.
    run_layers = staticmethod(scan_layers)

    def map_layers(
        self,
        layer: Callable[[nnx.State, _Shared], _Out],
        parameters: nnx.State,
        shared: _Shared,
        path: str,
    ) -> _Out:
        """One after the other; the results are stacked."""
        del path

        def step(_: None, parameters: nnx.State, shared: _Shared) -> tuple[None, _Out]:
            return None, layer(parameters, shared)

        return scan_layers(step, None, parameters, shared)[1]

    def check_rows(self, rows: int) -> None:
        """Any number will do."""

    def free(self, of_one: int | None) -> int | None:
        """The same."""
        return of_one

    def placement(self, path: str, value: np.ndarray) -> Array:
        """On the default device."""
        del path
        return jax.device_put(value)

    def place(self, tree: _Tree) -> _Tree:
        """As it is."""
        return tree

    def zeros(self, shape: tuple[int, ...], dtype: DTypeLike) -> Array:
        """On the default device."""
        return jnp.zeros(shape, dtype)

    def jit(
        self, function: Callable[..., Any], arguments: tuple[PyTree, ...], donated: tuple[int, ...]
    ) -> Any:
        """The plain one."""
        del arguments
        return jax.jit(function, donate_argnums=donated)


SINGLE_DEVICE: Final = SingleDevice()
