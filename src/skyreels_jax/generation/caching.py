"""The step cache of a request: its settings decided and checked, and the cache of a window."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.diffusion.easycache import EasyCache
from skyreels_jax.diffusion.step_cache import NoCache, StepCache
from skyreels_jax.diffusion.teacache import TeaCache
from skyreels_jax.errors import RequestError

CACHES: Final = ("none", "teacache", "easycache")
# The original's default of TeaCache; the middle of what EasyCache's authors show.
THRESHOLDS: Final = {"none": 0.0, "teacache": 0.2, "easycache": 0.05}
# Steps that TeaCache always runs at the start and the end: with the projected embedding or not.
TEA_KEPT: Final = {True: (5, 0), False: (1, 1)}
# EasyCache runs a tenth of the steps at the start, two at least, and the last one.
EASY_FIRST: Final = 0.1


@dataclass(frozen=True)
class CacheSettings:
    """Which calls of the transformer are left out.

    Attributes:
        name: ``none``, ``teacache`` or ``easycache``.
        threshold: how much change may go by; 0 leaves nothing out.
        use_ret_steps: TeaCache looks at the projected time embedding.
        coefficients: of TeaCache's polynomial, highest power first.
        original_counter: TeaCache counts as the original does.
    """

    name: str = "none"
    threshold: float = 0.0
    use_ret_steps: bool = False
    coefficients: tuple[float, ...] | None = None
    original_counter: bool = False


def resolve_cache(
    name: str | None,
    threshold: float | None,
    checkpoint: Checkpoint,
    *,
    use_ret_steps: bool = False,
    original_counter: bool = False,
) -> CacheSettings:
    """Settings with everything decided.

    Raises:
        RequestError: an unknown cache, a bad threshold, or TeaCache for a checkpoint that it was
            never fitted to.
    """
    name = name or "none"
    if name not in CACHES:
        raise RequestError(f"--cache {name!r} does not exist; there are {', '.join(CACHES)}")
    if name == "none" and threshold is not None:
        raise RequestError(
            f"--cache-threshold {threshold} without --cache: name one of {CACHES[1:]}"
        )
    if use_ret_steps and name != "teacache":
        raise RequestError("--use-ret-steps is a setting of --cache teacache")
    threshold = THRESHOLDS[name] if threshold is None else threshold
    if not (math.isfinite(threshold) and threshold >= 0):
        raise RequestError(
            f"--cache-threshold {threshold} must be a number of at least 0; 0.05 to 0.3 are usual"
        )
    if name != "teacache":
        return CacheSettings(name, threshold)
    preset = checkpoint.guess.preset
    if preset is None or preset.cache is None:
        raise RequestError(
            "--cache teacache: its coefficients are fitted to mini and the released checkpoints; "
            "this is none of them: use --cache easycache, or --preset if it has the weights of one"
        )
    tables = preset.cache
    coefficients = tables.retained if use_ret_steps else tables.plain
    return CacheSettings(name, threshold, use_ret_steps, coefficients, original_counter)


def step_cache(settings: CacheSettings, steps: int, rows: int) -> StepCache:
    """The cache of a run of ``rows`` rows, in which each frame takes ``steps`` steps.

    Threshold 0 is no cache at all: it costs no memory then.
    """
    if settings.name == "none" or settings.threshold == 0:
        return NoCache()
    threshold = np.float32(settings.threshold)
    if settings.name == "easycache":
        first = max(2, round(EASY_FIRST * steps))
        return EasyCache(np.array(threshold), whole(first), whole(1))
    first, last = TEA_KEPT[settings.use_ret_steps]
    coefficients: Sequence[float] = settings.coefficients or ()
    return TeaCache(
        np.array(threshold),
        np.array(coefficients, np.float32),
        whole(first),
        whole(last),
        whole(rows if settings.original_counter else 0),
        settings.use_ret_steps,
    )


def whole(number: int) -> np.ndarray:
    """A number that goes to the device, so that another one compiles nothing."""
    return np.array(number, np.int32)
