"""The step cache of a request: its settings decided and checked."""

import math

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.diffusion.cache_settings import CACHES, THRESHOLDS, CacheSettings
from skyreels_jax.errors import RequestError


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
