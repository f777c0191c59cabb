"""TeaCache: the blocks are left out while the time embedding has changed little.

The change of the time embedding from step to step, through a fitted polynomial, estimates the
change of the blocks' output. While the sum of estimates stays below a threshold, the last residual
``blocks(tokens) - tokens`` is added in place of running the blocks; the head always runs.

Source: Liu et al., "Timestep Embedding Tells" (arXiv 2411.19108), as in SkyReels-V2's transformer.
The original counts forward calls against a number of steps, so that its counter wraps in the
middle of a run: the first steps are kept in full twice, the last ones never. Here steps are
counted, unless ``wrap`` asks for the original's way.
"""

from dataclasses import dataclass
from functools import partial
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from skyreels_jax.diffusion.cache_settings import CacheSettings
from skyreels_jax.diffusion.step_cache import Number, Position, StagedForward, Velocity

# A step of the original is two calls: of the prompt and of the negative prompt.
_CALLS: Final = 2
# Steps that always run at the start and the end: with the projected embedding or not.
_KEPT: Final = {True: (5, 0), False: (1, 1)}


class _TeaState(NamedTuple):
    """What one model call of a step remembers: sum of estimates, embedding, residual."""

    estimate: Float[Array, ""]
    embedding: Array
    residual: Float[Array, "rows F P D"]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("threshold", "coefficients", "first", "last", "wrap"),
    meta_fields=("projected",),
)
@dataclass(frozen=True, eq=False)
class TeaCache:
    """A :class:`~skyreels_jax.diffusion.step_cache.StepCache`; its numbers compile nothing anew.

    Attributes:
        threshold: of the sum of estimates; at 0 every call runs.
        coefficients: five, of the polynomial, highest power first.
        first: steps at the start that always run.
        last: steps at the end that always run.
        wrap: 0; or the number of calls after which the original's counter starts again.
        projected: whether the projected embedding is looked at (the original's
            ``use_ret_steps``) or the one of the head.
    """

    threshold: Number
    coefficients: Number
    first: Number
    last: Number
    wrap: Number
    projected: bool

    @classmethod
    def of(cls, settings: CacheSettings, steps: int, iterations: int) -> "TeaCache":
        """The cache of a run of ``iterations``."""
        del steps
        first, last = _KEPT[settings.use_ret_steps]
        # Arrays go to the device, so that other numbers compile nothing anew.
        return cls(
            np.array(settings.threshold, np.float32),
            np.array(settings.coefficients or (), np.float32),
            np.array(first, np.int32),
            np.array(last, np.int32),
            np.array(iterations if settings.original_counter else 0, np.int32),
            settings.use_ret_steps,
        )

    def init(self, staged: StagedForward) -> _TeaState:
        """Shapes of embedding and residual; the latter is as large as the tokens."""
        embedding = jnp.zeros_like(self._embedding(staged))
        return _TeaState(jnp.zeros(()), embedding, jnp.zeros_like(staged.tokens))

    def call(
        self, state: _TeaState, position: Position, staged: StagedForward
    ) -> tuple[Velocity, _TeaState, Bool[Array, ""]]:
        """The prediction, from blocks that ran or from the last residual."""
        embedding = self._embedding(staged)
        change = jnp.mean(jnp.abs(embedding - state.embedding))
        relative = change / jnp.mean(jnp.abs(state.embedding))
        estimate = state.estimate + jnp.polyval(jnp.asarray(self.coefficients), relative)
        runs = self._always(position) | (estimate >= self.threshold) | (self.threshold <= 0)

        def run() -> tuple[Array, Array]:
            tokens = staged.blocks(staged.tokens)
            return tokens, tokens - staged.tokens

        def reuse() -> tuple[Array, Array]:
            return staged.tokens + state.residual, state.residual

        tokens, residual = jax.lax.cond(runs, run, reuse)
        velocity = staged.head(tokens)
        after = _TeaState(jnp.where(runs, jnp.zeros(()), estimate), embedding, residual)
        return velocity, after, runs

    def _embedding(self, staged: StagedForward) -> Array:
        return staged.e0 if self.projected else staged.e

    def _always(self, position: Position) -> Bool[Array, ""]:
        """Whether the step is one of those at the ends."""
        step, steps = jnp.asarray(position.step), jnp.asarray(position.steps)
        whole = (step < self.first) | (step >= steps - self.last)
        counter = (_CALLS * step + position.call) % jnp.maximum(self.wrap, 1)
        return jnp.where(jnp.asarray(self.wrap) > 0, counter < _CALLS * self.first, whole)
