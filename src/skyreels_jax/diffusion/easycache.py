"""EasyCache: calls are left out while the model's answer can be told from its last ones.

Nothing is calibrated. At a step with input ``x`` the answer is expected to change, relative to its
size, by ``rate * mean|x - x'| / mean|v'|``, with ``x'`` and ``v'`` of the step before and ``rate``
the change of the answer to that of the input, ``mean|v - v'| / mean|x - x'|``, at the last call
that ran. While the sum of expected changes stays below a threshold, the answer is ``x + shift``,
where ``shift = v - x`` of the last call that ran.

Source: Zhou et al., "Less is Enough: Training-Free Video Diffusion Acceleration via
Runtime-Adaptive Caching" (arXiv 2507.02860). There all frames move in every step; in diffusion
forcing those that rest would thin the means out, so only frames whose input changed are looked at.
"""

from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from skyreels_jax.diffusion.cache_settings import CacheSettings, CallCounter
from skyreels_jax.diffusion.step_cache import Number, Position, StagedForward, Velocity

# A tenth of the steps always runs at the start, two at least, and the last one.
_FIRST: Final = 0.1


class _EasyState(NamedTuple):
    """What one model call of a step remembers: three arrays of the size of the latents."""

    expected: Float[Array, ""]
    rate: Float[Array, ""]
    x: Velocity
    velocity: Velocity
    shift: Velocity


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("threshold", "first", "last"),
    meta_fields=(),
)
@dataclass(frozen=True, eq=False)
class EasyCache:
    """A :class:`~skyreels_jax.diffusion.step_cache.StepCache`; its numbers compile nothing anew.

    Attributes:
        threshold: of the sum of expected changes; at 0 every call runs.
        first: steps at the start that always run; at least 2, which the first rate needs.
        last: steps at the end that always run.
    """

    threshold: Number
    first: Number
    last: Number

    @classmethod
    def of(cls, settings: CacheSettings, steps: int, counter: CallCounter | None) -> "EasyCache":
        """The cache of a run in which each frame takes ``steps`` steps."""
        del counter
        first = max(2, round(_FIRST * steps))
        numbers = np.array(settings.threshold, np.float32), np.array(first, np.int32)
        return cls(*numbers, np.array(1, np.int32))

    def init(self, staged: StagedForward) -> _EasyState:
        """Shapes of the latents."""
        zeros = jnp.zeros_like(staged.latents)
        return _EasyState(jnp.zeros(()), jnp.zeros(()), zeros, zeros, zeros)

    def call(
        self, state: _EasyState, position: Position, staged: StagedForward
    ) -> tuple[Velocity, _EasyState, Bool[Array, ""]]:
        """The prediction, of a call that ran or from the last one's."""
        x = staged.latents
        moved = jnp.any(x != state.x, axis=(1, 3, 4), keepdims=True)

        def mean(values: Velocity) -> Float[Array, ""]:
            """Mean magnitude over frames that moved; their number cancels in every ratio."""
            return jnp.sum(jnp.where(moved, jnp.abs(values), 0.0))

        step = jnp.asarray(position.step)
        always = (step < self.first) | (step >= jnp.asarray(position.steps) - self.last)
        change = mean(x - state.x)
        expected = state.expected + state.rate * change / mean(state.velocity)
        runs = always | ~(expected < self.threshold)
        velocity = jax.lax.cond(
            runs,
            lambda: staged.head(staged.blocks(staged.tokens)),
            lambda: x + state.shift,
        )
        rate = mean(velocity - state.velocity) / change
        after = _EasyState(
            expected=jnp.where(runs, jnp.zeros(()), expected),
            # A step in which nothing moved has no rate of its own.
            rate=jnp.where(runs & (change > 0), rate, state.rate),
            x=x,
            velocity=velocity,
            shift=jnp.where(runs, velocity - x, state.shift),
        )
        return velocity, after, runs
