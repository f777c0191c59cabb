"""TeaCache: the blocks are left out while the time embedding has changed little.

The change of the time embedding from step to step, through a fitted polynomial, estimates the
change of the blocks' output. While the sum of estimates stays below a threshold, the last residual
``blocks(tokens) - tokens`` is added in place of running the blocks; the head always runs.

Source: Liu et al., "Timestep Embedding Tells" (arXiv 2411.19108), as in SkyReels-V2's transformer.
The original counts model calls against a number of steps, so that its counter wraps in the middle
of a run: the first steps are kept in full twice, the last ones never. :class:`TeaCache` counts
steps, :class:`OriginalTeaCache` does as the original.
"""

from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from skyreels_jax.diffusion.cache_settings import CacheSettings, CallCounter
from skyreels_jax.diffusion.step_cache import Number, Position, StagedForward, Velocity


class _TeaState(NamedTuple):
    """What one model call of a step remembers: sum of estimates, embedding, residual."""

    estimate: Float[Array, ""]
    embedding: Array
    residual: Float[Array, "rows F P D"]


_Result = tuple[Velocity, _TeaState, Bool[Array, ""]]


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("threshold", "coefficients", "first", "last"),
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
        projected: whether the projected embedding is looked at (the original's
            ``use_ret_steps``) or the one of the head.
    """

    threshold: Number
    coefficients: Number
    first: Number
    last: Number
    projected: bool

    @classmethod
    def of(
        cls, settings: CacheSettings, steps: int, counter: CallCounter | None
    ) -> "TeaCache | OriginalTeaCache":
        """The cache of a run; the original's, if its ``counter`` is given."""
        del steps
        # Arrays go to the device, so that other numbers compile nothing anew.
        threshold = np.array(settings.threshold, np.float32)
        coefficients = np.array(settings.coefficients or (), np.float32)
        first = settings.first_steps
        if counter is None:
            last = 0 if settings.use_ret_steps else 1
            kept = np.array(first, np.int32), np.array(last, np.int32)
            return cls(threshold, coefficients, *kept, settings.use_ret_steps)
        return OriginalTeaCache(
            threshold,
            coefficients,
            kept=np.array(2 * first, np.int32),
            start=np.array(counter.start, np.int32),
            wrap=np.array(counter.wrap, np.int32),
            per_step=np.array(counter.per_step, np.int32),
            projected=settings.use_ret_steps,
            alternating=counter.per_step == 1,
        )

    def init(self, staged: StagedForward) -> _TeaState:
        """Shapes of embedding and residual; the latter is as large as the tokens."""
        return _no_state(staged, self.projected)

    def call(self, state: _TeaState, position: Position, staged: StagedForward) -> _Result:
        """The prediction, from blocks that ran or from the last residual."""
        embedding, estimate = _estimated(state, staged, self.projected, self.coefficients)
        step, steps = jnp.asarray(position.step), jnp.asarray(position.steps)
        always = (step < self.first) | (step >= steps - self.last)
        runs = always | (estimate >= self.threshold) | (self.threshold <= 0)
        return _carried_out(state, staged, embedding, estimate, runs)


@partial(
    jax.tree_util.register_dataclass,
    data_fields=("threshold", "coefficients", "kept", "start", "wrap", "per_step"),
    meta_fields=("projected", "alternating"),
)
@dataclass(frozen=True, eq=False)
class OriginalTeaCache:
    """TeaCache with the decisions of the original's, whose counter goes on from window to window.

    The original has one state for even counts and one for odd ones. Where calls are left out, the
    last call of the same parity was two calls ago, whatever the counter's wrapping: with two calls
    a step that is the same prompt's of the step before, with one it is that of two steps before.

    Attributes:
        threshold: of the sum of estimates; at 0 a negative sum still leaves calls out.
        coefficients: as of :class:`TeaCache`.
        kept: calls from a count of 0 on that always run.
        start: count of the run's first call.
        wrap: number of calls after which the count starts again.
        per_step: calls that the original makes in a step; with 1 they must be ``alternating``.
        projected: as of :class:`TeaCache`.
        alternating: whether calls take two states in turn.
    """

    threshold: Number
    coefficients: Number
    kept: Number
    start: Number
    wrap: Number
    per_step: Number
    projected: bool
    alternating: bool

    def init(self, staged: StagedForward) -> tuple[_TeaState, ...]:
        """The states of the last calls, the older first."""
        return (_no_state(staged, self.projected),) * (2 if self.alternating else 1)

    def call(
        self, state: tuple[_TeaState, ...], position: Position, staged: StagedForward
    ) -> tuple[Velocity, tuple[_TeaState, ...], Bool[Array, ""]]:
        """The prediction, from blocks that ran or from a residual."""
        older, *newer = state
        embedding, estimate = _estimated(older, staged, self.projected, self.coefficients)
        runs = (self._count(position) < self.kept) | ~(estimate < self.threshold)
        velocity, after, runs = _carried_out(older, staged, embedding, estimate, runs)
        return velocity, (*newer, after), runs

    def _count(self, position: Position) -> Array:
        """As :meth:`~skyreels_jax.diffusion.cache_settings.CallCounter.at`."""
        call = jnp.asarray(position.step) * self.per_step + position.call
        later = (jnp.minimum(self.start, self.wrap - 1) + call) % self.wrap
        return jnp.where(call == 0, self.start, later)


def _no_state(staged: StagedForward, projected: bool) -> _TeaState:
    embedding = jnp.zeros_like(_embedding(staged, projected))
    return _TeaState(jnp.zeros(()), embedding, jnp.zeros_like(staged.tokens))


def _embedding(staged: StagedForward, projected: bool) -> Array:
    return staged.e0 if projected else staged.e


def _estimated(
    state: _TeaState, staged: StagedForward, projected: bool, coefficients: Number
) -> tuple[Array, Float[Array, ""]]:
    """The embedding that is looked at, and the sum of estimates with this call's."""
    embedding = _embedding(staged, projected)
    change = jnp.mean(jnp.abs(embedding - state.embedding))
    relative = change / jnp.mean(jnp.abs(state.embedding))
    return embedding, state.estimate + jnp.polyval(jnp.asarray(coefficients), relative)


def _carried_out(
    state: _TeaState,
    staged: StagedForward,
    embedding: Array,
    estimate: Float[Array, ""],
    runs: Bool[Array, ""],
) -> _Result:
    """The prediction of a call that has been decided on, and the state after it."""

    def run() -> tuple[Array, Array]:
        tokens = staged.blocks(staged.tokens)
        return tokens, tokens - staged.tokens

    def reuse() -> tuple[Array, Array]:
        return staged.tokens + state.residual, state.residual

    tokens, residual = jax.lax.cond(runs, run, reuse)
    velocity = staged.head(tokens)
    after = _TeaState(jnp.where(runs, jnp.zeros(()), estimate), embedding, residual)
    return velocity, after, runs
