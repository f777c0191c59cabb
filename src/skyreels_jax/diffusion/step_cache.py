"""Leaving model calls out where an earlier one's result still serves: protocol and null object.

A cache decides inside the compiled step, from values on the device; the host neither waits for the
decision nor compiles anything for it.
"""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

Velocity = Float[Array, "rows C F H W"]


@runtime_checkable
class Passage(Protocol):
    """One evaluation of the model in parts: the prediction is ``head(blocks(tokens))``."""

    @property
    def latents(self) -> Velocity:
        """What the model is given."""
        ...

    @property
    def e(self) -> Float[Array, "rows steps D"]:
        """Time embedding, of each frame or of all."""
        ...

    @property
    def e0(self) -> Float[Array, "rows steps 6 D"]:
        """Its projection, as the blocks take it."""
        ...

    @property
    def tokens(self) -> Float[Array, "rows F P D"]:
        """What enters the first block."""
        ...

    @property
    def blocks(self) -> Callable[[Array], Array]:
        """The expensive part, from tokens to tokens."""
        ...

    @property
    def head(self) -> Callable[[Array], Velocity]:
        """From tokens to the prediction."""
        ...


class Position(NamedTuple):
    """Where in a run a call is: in ``step`` of ``steps``, the ``call``-th; all from 0."""

    step: Int[Array | np.ndarray, ""]
    steps: Int[Array | np.ndarray, ""]
    call: Int[Array | np.ndarray, ""]


@runtime_checkable
class StepCache(Protocol):
    """Decides, call by call, whether the model runs. A pytree: its numbers compile nothing anew."""

    def init(self, passage: Passage) -> Any:
        """The state of one model call of a step before the first: zeros of its shapes."""
        ...

    def call(
        self, state: Any, position: Position, passage: Passage
    ) -> tuple[Velocity, Any, Bool[Array, ""]]:
        """The prediction, the state after it, and whether the blocks have run for it."""
        ...


class NoCache(NamedTuple):
    """Every call runs."""

    def init(self, passage: Passage) -> tuple[()]:
        """Nothing to remember."""
        del passage
        return ()

    def call(
        self, state: tuple[()], position: Position, passage: Passage
    ) -> tuple[Velocity, tuple[()], Bool[Array, ""]]:
        """The plain prediction."""
        del position
        return passage.head(passage.blocks(passage.tokens)), state, jnp.bool_(True)
