"""How far two sides are apart: place by place, stage by stage."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from skyreels_jax.errors import RequestError

# Relative L2 distance that a place may have in float32 on the same inputs. Measured on the small
# checkpoints of all three tasks: at most 5.2e-6.
LAYER_BUDGET: Final = 2e-5
# The same in bfloat16, where a place rounds that PyTorch does not (the original does).
ROUNDED_BUDGET: Final = 6e-3
# Of stages that follow from nothing but the request, and of those that a run has led to.
STAGE_BUDGETS: Final[Mapping[str, float]] = {
    "text": 5e-5,
    "image": 5e-5,
    "mask": 0.0,
    "condition": 5e-5,
    "timesteps": 0.0,
    "sigmas": 1e-6,
    "latents": 1e-4,
    "vae": 5e-3,  # of 8-bit frames, in which rounding falls either way
}
# In bfloat16 an error may be so many times PyTorch's own, which is its distance from float32.
YARDSTICK: Final = 1.2
# A factor common to all values is no rounding: its effect does not average out. Measured 8.6e-7 at
# most; another epsilon in a norm is 4.5e-6 and would pass the other budget.
SCALE_BUDGET: Final = 3e-6


@dataclass(frozen=True)
class Distance:
    """Two arrays, the second the reference.

    Attributes:
        name: of the place.
        step: of the run; None where there is none.
        max_abs: largest absolute difference.
        normalised: that, over the mean absolute value of the reference.
        relative_l2: norm of the difference over the norm of the reference.
        cosine: of the angle between them.
        scale: the factor that turns the reference into the other best, less 1.
        budget: what ``relative_l2`` may be.
        yardstick: the distance of the reference's own bfloat16, if it was computed.
    """

    name: str
    step: int | None
    max_abs: float
    normalised: float
    relative_l2: float
    cosine: float
    scale: float
    budget: float
    yardstick: float | None = None

    @property
    def passed(self) -> bool:
        """Within the budget, and no factor common to all values."""
        exact = self.budget <= LAYER_BUDGET
        return self.relative_l2 <= self.budget and not (exact and abs(self.scale) > SCALE_BUDGET)


def distance(
    name: str,
    ours: np.ndarray,
    theirs: np.ndarray,
    budget: float,
    *,
    step: int | None = None,
    yardstick: float | None = None,
) -> Distance:
    """Measured in float64; arrays of different sizes are infinitely far apart."""
    if ours.size != theirs.size:
        inf = float("inf")
        return Distance(name, step, inf, inf, inf, 0.0, inf, budget, yardstick)
    a, b = (x.astype(np.float64).ravel() for x in (ours, theirs))
    gap = np.abs(a - b)
    norm, own = float(np.sqrt(b @ b)), float(np.sqrt(a @ a))
    apart = float(np.sqrt(gap @ gap))
    if not np.isfinite(apart):
        apart = float("inf")
    product = float(a @ b)
    return Distance(
        name=name,
        step=step,
        max_abs=float(gap.max(initial=0.0)),
        normalised=_over(float(gap.max(initial=0.0)), float(np.abs(b).mean())),
        relative_l2=_over(apart, norm),
        cosine=_over(product, norm * own) if norm * own else float(norm == own),
        scale=_over(product, norm * norm) - 1 if norm else 0.0,
        budget=budget,
        yardstick=yardstick,
    )


def _over(a: float, b: float) -> float:
    """``a / b``; nothing over nothing is nothing."""
    if b == 0:
        return 0.0 if a == 0 else float("inf")
    return a / b


def compare_places(
    names: Sequence[str],
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    step: int,
    rounded: Mapping[str, np.ndarray] | None = None,
) -> Iterator[Distance]:
    """All places of one call of the transformer, read from the archives one after the other.

    Args:
        names: of places; those that neither side has are left out.
        ours: values by name.
        theirs: of the reference.
        step: of the run.
        rounded: of the reference in bfloat16: then budgets are multiples of its distances.

    Raises:
        RequestError: only one side has a place.
    """
    for name in names:
        if name not in ours and name not in theirs:
            continue
        if name not in ours or name not in theirs:
            raise RequestError(f"only one side has recorded {name!r}: they are not comparable")
        reference = theirs[name]
        yardstick, budget = None, LAYER_BUDGET
        if rounded is not None:
            yardstick = distance(name, rounded[name], reference, 0.0).relative_l2
            budget = max(YARDSTICK * yardstick, ROUNDED_BUDGET)
        yield distance(name, ours[name], reference, budget, step=step, yardstick=yardstick)


def compare_stages(
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    rounded: Mapping[str, np.ndarray] | None = None,
) -> Iterator[Distance]:
    """What led to a video, in the order of the work."""
    for name in (n for n in theirs if n.partition(".")[0] in STAGE_BUDGETS):
        kind, _, number = name.partition(".")
        yardstick, budget = None, STAGE_BUDGETS[kind]
        if rounded is not None and kind in ("text", "image", "latents"):
            yardstick = distance(name, rounded[name], theirs[name], 0.0).relative_l2
            budget = max(YARDSTICK * yardstick, budget)
        step = int(number) - 1 if number.isdecimal() else None
        given = ours.get(name, np.zeros(0))
        yield distance(name, given, theirs[name], budget, step=step, yardstick=yardstick)
