"""How far two sides are apart: activation by activation, stage by stage."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from skyreels_jax.errors import RequestError

# Relative L2 distance that an activation may have in float32 on the same inputs. Measured on the
# small checkpoints of all three tasks: at most 5.2e-6.
LAYER_BUDGET: Final = 2e-5
# The same in bfloat16, where we round once more than PyTorch (the original does, too).
_BF16_BUDGET: Final = 6e-3
# The same for stages; the latents depend on all of a run before them.
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
# In bfloat16 an error may be so many times the bf16 baseline's (PyTorch's distance from float32).
BASELINE_FACTOR: Final = 1.2
# A factor common to all values is no rounding: its effect does not average out. Measured 8.6e-7 at
# most; another epsilon in a norm is 4.5e-6 and would pass the other budget.
_SCALE_BUDGET: Final = 3e-6


@dataclass(frozen=True)
class Distance:
    """How far an array of ours is from the reference's.

    Attributes:
        name: of the activation or stage.
        step: of the run; None where there is none.
        max_abs: largest absolute difference.
        normalised: that, over the mean absolute value of the reference.
        relative_l2: norm of the difference over the norm of the reference.
        cosine: of the angle between them.
        scale: the factor that turns the reference into the other best, less 1.
        budget: what ``relative_l2`` may be.
        bf16_baseline: ``relative_l2`` of PyTorch in bfloat16, if it was computed.
    """

    name: str
    step: int | None
    max_abs: float
    normalised: float
    relative_l2: float
    cosine: float
    scale: float
    budget: float
    bf16_baseline: float | None = None

    @property
    def passed(self) -> bool:
        """Whether it is within the budget, and no factor is common to all values."""
        exact = self.budget <= LAYER_BUDGET
        return self.relative_l2 <= self.budget and not (exact and abs(self.scale) > _SCALE_BUDGET)


def distance(
    name: str,
    ours: np.ndarray,
    theirs: np.ndarray,
    budget: float,
    *,
    step: int | None = None,
    bf16_baseline: float | None = None,
) -> Distance:
    """Measure in float64; arrays of different sizes are infinitely far apart."""
    if ours.size != theirs.size:
        inf = float("inf")
        return Distance(name, step, inf, inf, inf, 0.0, inf, budget, bf16_baseline)
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
        bf16_baseline=bf16_baseline,
    )


def _over(a: float, b: float) -> float:
    """Return ``a / b``; zero over zero is zero."""
    if b == 0:
        return 0.0 if a == 0 else float("inf")
    return a / b


def compare_activations(
    names: Sequence[str],
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    step: int,
    baseline: Mapping[str, np.ndarray] | None = None,
) -> Iterator[Distance]:
    """Compare all activations of one call of the transformer, read one after the other.

    Args:
        names: of activations; those that neither side has are left out.
        ours: values by name.
        theirs: the reference's.
        step: of the run.
        baseline: the bf16 baseline's: then budgets are multiples of its distances.

    Raises:
        RequestError: only one side has an activation.
    """
    for name in names:
        if name not in ours and name not in theirs:
            continue
        if name not in ours or name not in theirs:
            raise RequestError(f"only one side has recorded {name!r}: they are not comparable")
        budget = LAYER_BUDGET if baseline is None else _BF16_BUDGET
        rounded = None if baseline is None else baseline[name]
        yield _beside_baseline(name, ours[name], theirs[name], rounded, budget, step)


def compare_stages(
    ours: Mapping[str, np.ndarray],
    theirs: Mapping[str, np.ndarray],
    baseline: Mapping[str, np.ndarray] | None = None,
) -> Iterator[Distance]:
    """Compare what led to a video, in the order of the work."""
    for name in (n for n in theirs if n.partition(".")[0] in STAGE_BUDGETS):
        kind, _, number = name.partition(".")
        computed = kind in ("text", "image", "latents")
        rounded = baseline[name] if baseline is not None and computed else None
        step = int(number) - 1 if number.isdecimal() else None
        values = ours.get(name, np.zeros(0))
        yield _beside_baseline(name, values, theirs[name], rounded, STAGE_BUDGETS[kind], step)


def _beside_baseline(
    name: str,
    ours: np.ndarray,
    theirs: np.ndarray,
    rounded: np.ndarray | None,
    budget: float,
    step: int | None,
) -> Distance:
    """Measure against ``budget``, or more where PyTorch's own bfloat16 is farther away."""
    own = None if rounded is None else distance(name, rounded, theirs, 0.0).relative_l2
    if own is not None:
        budget = max(BASELINE_FACTOR * own, budget)
    return distance(name, ours, theirs, budget, step=step, bf16_baseline=own)
