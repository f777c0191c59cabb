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

    @property
    def first_steps(self) -> int:
        """Steps at the start that TeaCache always runs; a step of the original is two calls."""
        return 5 if self.use_ret_steps else 1


@dataclass(frozen=True)
class CallCounter:
    """The original's count of model calls in one window, which its TeaCache goes by.

    Attributes:
        start: of the window's first call.
        wrap: calls after which it starts again from 0.
        per_step: calls that the original makes in a step.
    """

    start: int
    wrap: int
    per_step: int

    def at(self, call: int) -> int:
        """The count of a call of the window, from 0."""
        if call == 0:
            return self.start
        # A count beyond the end, left by a window with a later one, ends with the first call.
        return (min(self.start, self.wrap - 1) + call) % self.wrap

    def after(self, iterations: int) -> int:
        """The count of the next window's first call."""
        return self.at(iterations * self.per_step)


@dataclass(frozen=True)
class CacheKind:
    """A way to leave calls out.

    Attributes:
        cls: its class, in the module of the same name; ``cls.of(settings, steps, counter)`` is
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
