"""The table of step caches, and the settings of one.

Nothing heavy is imported: the command line's help lists them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final


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
        cls: its class, in the module of the same name; ``cls.of(settings, steps, iterations)`` is
            the cache of a run (:func:`skyreels_jax.diffusion.step_cache.step_cache`).
        threshold: where none is given.
        fitted: whether it takes coefficients that were fitted to a checkpoint.
    """

    cls: str
    threshold: float
    fitted: bool = False


# The thresholds: the original's default of TeaCache; the middle of what EasyCache's authors show.
CACHE_KINDS: Final[Mapping[str, CacheKind]] = {
    "teacache": CacheKind("TeaCache", 0.2, fitted=True),
    "easycache": CacheKind("EasyCache", 0.05),
}
CACHES: Final = ("none", *CACHE_KINDS)
