"""Settings of a step cache, and the cache that they make for one run."""

from dataclasses import dataclass
from typing import Final

import numpy as np

from skyreels_jax.diffusion.easycache import EasyCache
from skyreels_jax.diffusion.step_cache import NoCache, StepCache
from skyreels_jax.diffusion.teacache import TeaCache

CACHES: Final = ("none", "teacache", "easycache")
# The original's default of TeaCache; the middle of what EasyCache's authors show.
THRESHOLDS: Final = {"none": 0.0, "teacache": 0.2, "easycache": 0.05}
# Steps that TeaCache always runs at the start and the end: with the projected embedding or not.
_TEA_KEPT: Final = {True: (5, 0), False: (1, 1)}
# EasyCache runs a tenth of the steps at the start, two at least, and the last one.
_EASY_FIRST: Final = 0.1


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


def step_cache(settings: CacheSettings, steps: int, iterations: int) -> StepCache:
    """The cache of a run of ``iterations``, in which each frame takes ``steps`` steps.

    Threshold 0 is no cache at all: it costs no memory then.
    """
    if settings.name == "none" or settings.threshold == 0:
        return NoCache()
    threshold = np.float32(settings.threshold)
    if settings.name == "easycache":
        first = max(2, round(_EASY_FIRST * steps))
        return EasyCache(np.array(threshold), _int32(first), _int32(1))
    first, last = _TEA_KEPT[settings.use_ret_steps]
    return TeaCache(
        np.array(threshold),
        np.array(settings.coefficients or (), np.float32),
        _int32(first),
        _int32(last),
        _int32(iterations if settings.original_counter else 0),
        settings.use_ret_steps,
    )


def _int32(number: int) -> np.ndarray:
    """A number that goes to the device, so that another one compiles nothing."""
    return np.array(number, np.int32)
