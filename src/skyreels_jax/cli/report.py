"""What the command line says of a generation, before and after."""

import statistics
from collections.abc import Iterator
from typing import Final

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.generation.request import ResolvedRequest
from skyreels_jax.sampling.progress import Timings

# In the order they are printed; the rest of a request has no default worth telling.
REPORTED: Final = (
    *("height", "width", "num_frames", "fps", "steps", "guidance_scale", "shift", "seed", "noise"),
    "negative_prompt",
)
OF_FORCING: Final = (
    *("base_num_frames", "overlap_history", "ar_step", "causal_block_size", "addnoise_condition"),
    *("addnoise_once", "hand_over", "causal_attention"),
)


def describe(checkpoint: Checkpoint, request: ResolvedRequest) -> Iterator[str]:
    """What will be done, each setting with where it came from."""
    name = checkpoint.guess.preset.name if checkpoint.guess.preset else "no released checkpoint"
    yield f"checkpoint: {request.model} ({name}: {checkpoint.guess.reason})"
    for setting in REPORTED:
        value = getattr(request, setting)
        shown = shortened(value) if isinstance(value, str) else value
        yield f"  {setting.replace('_', '-'):<16} {shown}  [{request.sources[setting]}]"
    if request.forcing is not None:
        for setting in OF_FORCING:
            value = getattr(request.forcing, setting)
            yield f"  {setting.replace('_', '-'):<16} {value}  [{request.sources[setting]}]"
    for notice in request.notices:
        yield f"note: {notice}"


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
