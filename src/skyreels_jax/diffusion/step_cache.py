"""Leaving model calls out where an earlier one's result still serves: protocol and null object.

A cache decides inside the compiled step, from values on the device; the host neither waits for the
decision nor compiles anything for it.
"""

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, PyTree

from skyreels_jax.diffusion.cache_settings import CACHE_KINDS, CacheSettings, CallCounter

Velocity = Float[Array, "rows C F H W"]
# A number of a cache. While a program is traced, a pytree also holds what stands for numbers.
Number = Any
# What one model call of a step remembers until the next.
CacheState = PyTree[Array]


class StagedForward(NamedTuple):
    """One evaluation of the transformer, cut where a step cache may come between.

    The prediction is ``head(blocks(tokens))``.

    Attributes:
        latents: what the model is given, without an image condition.
        e: time embedding of each frame, or of all (one step).
        e0: its projection, as the blocks take it.
        tokens: what enters the first block.
        blocks: the expensive part, from tokens to tokens.
        head: from tokens to the prediction.
        key_values: the keys and values that the tokens have in all layers,
            ``[layers, B, F, P, N, K]`` each.
    """

    latents: Velocity
    e: Float[Array, "rows steps D"]
    e0: Float[Array, "rows steps 6 D"]
    tokens: Float[Array, "rows F P D"]
    blocks: Callable[[Array], Array]
    head: Callable[[Array], Velocity]
    key_values: Callable[[], tuple[Array, Array]]


class Position(NamedTuple):
    """Where in a run a call is: in ``step`` of ``steps``, the ``call``-th; all from 0."""

    step: Int[Array | np.ndarray, ""]
    steps: Int[Array | np.ndarray, ""]
    call: Int[Array | np.ndarray, ""]


@runtime_checkable
class StepCache(Protocol):
    """Decides, call by call, whether the model runs. A pytree: its numbers compile nothing anew."""

    def init(self, staged: StagedForward) -> CacheState:
        """The state of one model call of a step before the first: zeros of its shapes."""
        ...

    def call(
        self, state: CacheState, position: Position, staged: StagedForward
    ) -> tuple[Velocity, CacheState, Bool[Array, ""]]:
        """The prediction, the state after it, and whether the blocks have run for it."""
        ...


class NoCache(NamedTuple):
    """Every call runs."""

    def init(self, staged: StagedForward) -> tuple[()]:
        """Nothing to remember."""
        del staged
        return ()

    def call(
        self, state: tuple[()], position: Position, staged: StagedForward
    ) -> tuple[Velocity, tuple[()], Bool[Array, ""]]:
        """The plain prediction."""
        del position
        return staged.head(staged.blocks(staged.tokens)), state, jnp.bool_(True)


def step_cache(
    settings: CacheSettings, steps: int, counter: CallCounter | None = None
) -> StepCache:
    """The cache of a run in which each frame takes ``steps`` steps.

    Threshold 0 is no cache at all, and costs no memory. With the original's ``counter`` it is one:
    the original's TeaCache still leaves calls out where its estimate of a change is negative.
    """
    if settings.name == "none" or (settings.threshold == 0 and counter is None):
        return NoCache()
    module = import_module(f"skyreels_jax.diffusion.{settings.name}")
    return getattr(module, CACHE_KINDS[settings.name].cls).of(settings, steps, counter)
