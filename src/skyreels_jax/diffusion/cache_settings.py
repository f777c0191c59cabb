"""The table of step caches: settings of one, and the cache that they make for one run.

Nothing heavy is imported before a cache is made: the command line's help lists them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from skyreels_jax.diffusion.step_cache import StepCache

# Steps that TeaCache always runs at the start and the end: with the projected embedding or not.
_TEA_KEPT: Final = {True: (5, 0), False: (1, 1)}
# EasyCache runs a tenth of the steps at the start, two at least, and the last one.
_EASY_FIRST: Final = 0.1


@dataclass(frozen=True)
class CacheSettings:
    """Which calls of the transformer are left out.

    Attributes:
        name: ``none`` or a key of :data:`CACHE_KINDS`.
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


@dataclass(frozen=True)
class CacheKind:
    """A way to leave calls out.

    Attributes:
        threshold: where none is given.
        make: the cache of settings, for a run of so many steps of each frame and iterations.
        fitted: whether it takes coefficients that were fitted to a checkpoint.
    """

    threshold: float
    make: "Callable[[CacheSettings, int, int], StepCache]"
    fitted: bool = False


def step_cache(settings: CacheSettings, steps: int, iterations: int) -> "StepCache":
    """The cache of a run of ``iterations``, in which each frame takes ``steps`` steps.

    Threshold 0 is no cache at all: it costs no memory then.
    """
    from skyreels_jax.diffusion.step_cache import NoCache

    if settings.name == "none" or settings.threshold == 0:
        return NoCache()
    return CACHE_KINDS[settings.name].make(settings, steps, iterations)


def _teacache(settings: CacheSettings, steps: int, iterations: int) -> "StepCache":
    import numpy as np

    from skyreels_jax.diffusion.teacache import TeaCache

    del steps
    first, last = _TEA_KEPT[settings.use_ret_steps]
    # Arrays go to the device, so that other numbers compile nothing anew.
    return TeaCache(
        np.array(settings.threshold, np.float32),
        np.array(settings.coefficients or (), np.float32),
        np.array(first, np.int32),
        np.array(last, np.int32),
        np.array(iterations if settings.original_counter else 0, np.int32),
        settings.use_ret_steps,
    )


def _easycache(settings: CacheSettings, steps: int, iterations: int) -> "StepCache":
    import numpy as np

    from skyreels_jax.diffusion.easycache import EasyCache

    del iterations
    return EasyCache(
        np.array(settings.threshold, np.float32),
        np.array(max(2, round(_EASY_FIRST * steps)), np.int32),
        np.array(1, np.int32),
    )


# The thresholds: the original's default of TeaCache; the middle of what EasyCache's authors show.
CACHE_KINDS: Final[Mapping[str, CacheKind]] = {
    "teacache": CacheKind(0.2, _teacache, fitted=True),
    "easycache": CacheKind(0.05, _easycache),
}
CACHES: Final = ("none", *CACHE_KINDS)
