"""What the command line says of a generation, before and after."""

import statistics
from collections.abc import Iterator

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.generation.request.names import in_flags
from skyreels_jax.generation.request.resolved import ResolvedRequest
from skyreels_jax.generation.request.settings import declared
from skyreels_jax.sampling.progress import Timings


def describe(checkpoint: Checkpoint, request: ResolvedRequest) -> Iterator[str]:
    """What will be done, each setting with where it came from."""
    name = checkpoint.guess.preset.name if checkpoint.guess.preset else "no released checkpoint"
    yield f"checkpoint: {request.model} ({name}: {checkpoint.guess.reason})"
    for setting in declared():
        if setting in request.sources:
            value = request.value_of(setting)
            shown = shortened(value) if setting == "negative_prompt" else value
            yield f"  {setting.replace('_', '-'):<16} {shown}  [{request.sources[setting]}]"
    for warning in request.warnings:
        yield in_flags(f"note: {warning}")


def shortened(text: str, limit: int = 60) -> str:
    """``text`` in quotes, cut with its length named."""
    return repr(text) if len(text) <= limit else f"{text[:limit]!r}... ({len(text)} characters)"


def summarise(timings: Timings) -> Iterator[str]:
    """Seconds by stage, compilation apart from running."""
    for stage, seconds in timings.stages.items():
        detail = ""
        if stage == "denoise" and timings.steps:
            detail = f" ({statistics.median(timings.steps):.2f} s a step"
            if timings.computed < timings.calls:
                detail += f"; {timings.calls - timings.computed} of {timings.calls} calls left out"
            computed, blocks = timings.blocks
            if computed < blocks:
                detail += f"; {blocks - computed} of {blocks} passes of blocks left out"
            detail += ")"
        yield f"  {stage:<10} {seconds:8.2f} s{detail}"
