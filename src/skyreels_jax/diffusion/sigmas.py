"""The sigmas of a flow-matching run: which ones a video passes through, and in what order.

A latent at ``sigma`` is ``(1 - sigma) * data + sigma * noise``; the model is given
``timestep = int(1000 * sigma)``. Everything here is host arithmetic in float64.
"""

from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float, Int

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
