"""The sigmas of a flow-matching run, and the UniPC solver that goes through them (order 2).

A latent at ``sigma`` is ``(1 - sigma) * data + sigma * noise``; the model is given
``timestep = int(1000 * sigma)``. Sigmas are worked out on the host, in float64.

Every update UniPC makes (predictor and corrector) is a linear combination of five arrays whose
weights depend on the sigmas alone. The weights are therefore tabulated once, on the host, in
float64; a step on the device looks its row up and is a handful of multiply-adds. Each latent frame
may be at a row of its own, which is what diffusion forcing needs.

Source: Zhao et al., "UniPC" (arXiv 2302.04867), variant B2 on data predictions, as in SkyReels-V2's
``FlowUniPCMultistepScheduler`` and diffusers' ``UniPCMultistepScheduler``.
"""

from dataclasses import dataclass
from typing import Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

# The models were trained on 1000 discrete timesteps.
NUM_TRAIN_TIMESTEPS: Final = 1000
# Start of the original's grid: 1 - 1/1000, which its scheduler keeps as a float32.
_SIGMA_MAX: Final = float(np.float32(1 - 1 / NUM_TRAIN_TIMESTEPS))


@dataclass(frozen=True, eq=False)
class FlowSchedule:
    """The sigmas and timesteps of one run of ``N`` steps.

    Attributes:
        sigmas: ``N + 1``, strictly falling from below 1, the last exactly 0. Rounded to float32, as
            both reference schedulers keep them: near 1 the rounding of ``1 - sigma`` is visible.
        timesteps: what the model is given at each step. Truncated, so neighbours may be equal in
            long runs; steps are therefore always found by index, never by timestep.
    """

    sigmas: Float[np.ndarray, " points"]
    timesteps: Int[np.ndarray, " N"]

    def __post_init__(self) -> None:
        steps = len(self.sigmas) - 1
        if steps < 1:
            raise ValueError(f"a schedule of {steps} steps: at least one is needed")
        falling = bool(np.all(np.diff(self.sigmas) < 0))
        if not (falling and self.sigmas[0] < 1 and self.sigmas[-1] == 0):
            raise ValueError(
                f"sigmas must fall strictly from below 1 to 0, got {_shortened(self.sigmas)} "
                f"over {steps} steps; a smaller shift or fewer steps keep them apart in float32"
            )

    @property
    def num_steps(self) -> int:
        """Number of model evaluations per guidance branch."""
        return len(self.timesteps)


def flow_sigmas(num_steps: int, shift: float) -> FlowSchedule:
    """The original's grid: ``linspace(0.999, 0)`` without its end, shifted towards noise.

    Source: ``set_timesteps`` of SkyReels-V2's ``FlowUniPCMultistepScheduler``.
    """
    return schedule_from_sigmas(_shifted(np.linspace(_SIGMA_MAX, 0.0, num_steps + 1)[:-1], shift))


def _shifted(base: Float[np.ndarray, " N"], shift: float) -> Float[np.ndarray, " N"]:
    return shift * base / (1 + (shift - 1) * base)


def schedule_from_sigmas(sigmas: Float[np.ndarray, " N"]) -> FlowSchedule:
    """A schedule through given sigmas (highest first, 0 not among them)."""
    with np.errstate(invalid="ignore"):  # NaN is refused by the schedule itself
        timesteps = (sigmas * NUM_TRAIN_TIMESTEPS).astype(np.int64)
    rounded = np.append(sigmas, 0.0).astype(np.float32).astype(np.float64)
    return FlowSchedule(rounded, timesteps)


def _shortened(values: np.ndarray) -> str:
    return np.array2string(values, precision=6, threshold=6, edgeitems=2, separator=", ")


class Coefficients(NamedTuple):
    """Weights of one step, or of every step (``*at`` is then the step axis).

    With ``v`` the model's velocity and ``x0 = x - sigma * v`` the data it implies::

        corrected = from_sample * x + from_start * start + from_current * x0
                    + from_previous * x0' + from_older * x0''
        next      = keep * corrected + add_current * x0 + add_previous * x0'

    where ``start`` is the sample the last predictor set out from and ``x0'``, ``x0''`` the data
    estimates of one and two steps ago.
    """

    sigma: Float[Array | np.ndarray, "*at"]
    from_sample: Float[Array | np.ndarray, "*at"]
    from_start: Float[Array | np.ndarray, "*at"]
    from_current: Float[Array | np.ndarray, "*at"]
    from_previous: Float[Array | np.ndarray, "*at"]
    from_older: Float[Array | np.ndarray, "*at"]
    keep: Float[Array | np.ndarray, "*at"]
    add_current: Float[Array | np.ndarray, "*at"]
    add_previous: Float[Array | np.ndarray, "*at"]

    def at(self, index: Int[Array | np.ndarray, " P"]) -> "Coefficients":
        """The rows at ``index``; works on the host and, with traced indices, on the device."""
        return Coefficients(*(column[index] for column in self))


class SolverState(NamedTuple):
    """What the solver remembers of every frame between steps."""

    start: Float[Array, "F *frame"]
    previous: Float[Array, "F *frame"]
    older: Float[Array, "F *frame"]


def tabulate(
    schedule: FlowSchedule, *, rounded: bool = False, overwritten: bool = False
) -> Coefficients:
    """The weights of all steps of ``schedule``, worked out in float64 and returned in float32.

    Args:
        schedule: the sigmas.
        rounded: round what the corrector solves for to bfloat16, as the original does when its
            samples are bfloat16.
        overwritten: let the second step's corrector start from the sample after the first step. In
            the original's diffusion forcing the solver remembers a view of the latents as the
            sample that the first step started from, and the loop then overwrites them; later
            steps start from corrected samples, which are arrays of their own.
    """
    with np.errstate(divide="ignore"):
        log_snr = np.log1p(-schedule.sigmas) - np.log(schedule.sigmas)  # infinite at the end
    rows = [
        (
            sigma,
            *_corrector(i, schedule.sigmas, log_snr, rounded=rounded),
            *_predictor(i, schedule.sigmas, log_snr),
        )
        for i, sigma in enumerate(schedule.sigmas[:-1])
    ]
    table = Coefficients(*np.array(rows).astype(np.float32).T)
    if overwritten:
        # The sample after the first step is the one that the second is given.
        table.from_sample[1:2] = table.from_start[1:2]
        table.from_start[1:2] = 0
    return table


def init(x: Float[Array, "F *frame"]) -> SolverState:
    """The state before the first step. The history is never weighted before it is written."""
    # Arrays of their own, so that all of them can be donated.
    previous, older = (jnp.zeros(x.shape, jnp.float32) for _ in range(2))
    return SolverState(start=jnp.zeros_like(x), previous=previous, older=older)


def step(
    coefficients: Coefficients,
    state: SolverState,
    x: Float[Array, "F *frame"],
    velocity: Float[Array, "F *frame"],
    update: Bool[Array | np.ndarray, " P"],
) -> tuple[Float[Array, "F *frame"], SolverState]:
    """Take one step with every frame that is to be updated.

    Args:
        coefficients: rows of the table, one a frame or one for all (``P = 1``).
        state: from :func:`init` or the previous step.
        x: samples at ``coefficients.sigma``.
        velocity: the model's prediction, ``noise - data``, at ``x``.
        update: frames that move; the others keep sample and state.

    Samples may be bfloat16. They are then rounded where the original rounds: after each step, after
    the corrector, and each product of a sample with its weight; estimates of data stay float32.
    """
    dtype = x.dtype

    def per_frame(values: Array | np.ndarray) -> Array:
        return jnp.asarray(values).reshape(values.shape + (1,) * (x.ndim - 1))

    def rounded(values: Array) -> Array:
        # XLA may drop a cast and its undo, but not this.
        if dtype == jnp.bfloat16:
            return jax.lax.reduce_precision(values, exponent_bits=8, mantissa_bits=7)
        return values

    c = Coefficients(*map(per_frame, coefficients))
    sample, start = x.astype(jnp.float32), state.start.astype(jnp.float32)
    current = sample - velocity * c.sigma
    corrected = rounded(
        rounded(sample * c.from_sample)
        + rounded(start * c.from_start)
        + current * c.from_current
        + state.previous * c.from_previous
        + state.older * c.from_older
    )
    following = rounded(
        rounded(corrected * c.keep) + current * c.add_current + state.previous * c.add_previous
    )
    following, corrected = following.astype(dtype), corrected.astype(dtype)
    moved = SolverState(start=corrected, previous=current, older=state.previous)
    moves = per_frame(update)
    return jax.tree.map(lambda new, old: jnp.where(moves, new, old), (following, moved), (x, state))


def _order(step: int, num_steps: int) -> int:
    """The predictor's order: 1 where there is no history yet, and in the last step."""
    return min(2, step + 1, num_steps - step)


def _corrector(
    step: int, sigmas: Float[np.ndarray, " points"], log_snr: np.ndarray, *, rounded: bool
) -> tuple[float, float, float, float, float]:
    """Weights of sample, start, current, previous and older data in the corrected sample.

    The corrector repeats the last predictor's step, of that predictor's order, with the data
    estimate at its end point as one more node.
    """
    if step == 0:
        return 1.0, 0.0, 0.0, 0.0, 0.0
    width = log_snr[step] - log_snr[step - 1]
    growth = np.expm1(-width)
    scale = (1 - sigmas[step]) * growth
    to_older, to_current = 0.0, 0.5
    ratio = 1.0
    if _order(step - 1, len(sigmas) - 1) == 2:
        ratio = (log_snr[step - 2] - log_snr[step - 1]) / width
        first = growth / -width - 1
        second = first / -width - 0.5
        system = np.array([[1.0, 1.0], [ratio, 1.0]])
        to_older, to_current = np.linalg.solve(system, [first / growth, 2 * second / growth])
    if rounded:
        to_older, to_current = np.array([to_older, to_current]).astype(jnp.bfloat16).astype(float)
    from_older = -scale * to_older / ratio
    from_current = -scale * to_current
    from_previous = -scale - from_older - from_current
    return 0.0, sigmas[step] / sigmas[step - 1], from_current, from_previous, from_older


def _predictor(
    step: int, sigmas: Float[np.ndarray, " points"], log_snr: np.ndarray
) -> tuple[float, float, float]:
    """Weights of the corrected sample, current and previous data in the next sample."""
    width = log_snr[step + 1] - log_snr[step]  # infinite in the last step, where growth is -1
    scale = (1 - sigmas[step + 1]) * np.expm1(-width)
    add_previous = 0.0
    if _order(step, len(sigmas) - 1) == 2:
        ratio = (log_snr[step - 1] - log_snr[step]) / width
        add_previous = -scale * 0.5 / ratio
    return sigmas[step + 1] / sigmas[step], -scale - add_previous, add_previous
