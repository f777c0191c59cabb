"""``skyreels-jax generate --dry-run``: what each stage takes, and whether that is there."""

from typing import Final

import jax

from skyreels_jax.backends import Backend
from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.components.encoders import VaeTiling
from skyreels_jax.errors import UnsupportedError
from skyreels_jax.generation.dry_run.plan import Memory, StagePlan, plan
from skyreels_jax.generation.request.resolved import ResolvedRequest
from skyreels_jax.memory import available_memory

_GIB: Final = 2**30
_HEADINGS: Final = ("stage", "weights", "state", "work", "total", "operations", "compiled in")
_ROW: Final = "{:<20}{:>10}{:>12}{:>12}{:>12}{:>14}{:>13}"
_UNKNOWN: Final = "?"


def report(
    checkpoint: Checkpoint,
    request: ResolvedRequest,
    backend: Backend,
    tiling: VaeTiling,
    vae_dtype: str,
) -> int:
    """Print a line a stage and the verdict; 0 if everything fits, or if nobody can tell.

    Args:
        checkpoint: to generate from.
        request: settled.
        backend: who runs the encoders and the VAE.
        tiling: whether the VAE cuts frames into tiles.
        vae_dtype: of the VAE.

    Raises:
        UnsupportedError: the largest stage takes more than is free.
    """
    print("memory in GiB: weights, state (latents, caches), work (the compiler's own count)")
    print(_ROW.format(*_HEADINGS))
    free = available_memory()
    stages: list[StagePlan] = []
    memory, hybrid = Memory(free, tiling), backend == "hybrid"
    for stage in plan(checkpoint, request, hybrid=hybrid, memory=memory, vae_dtype=vae_dtype):
        print(_line(stage), flush=True)
        stages.append(stage)
    largest = max(stages, key=lambda stage: stage.total)
    partial = any(stage.work is None or stage.work.temporary is None for stage in stages)
    least = "at least " if partial else ""
    together = "transformer and VAE are" if request.is_long else "one stage is"
    needed = (
        f"the largest stage, {largest.stage}, takes {least}{largest.total / _GIB:.2f} GiB; "
        f"{together} in memory at a time"
    )
    device = jax.local_devices()[0]
    if free is None:
        print(f"{needed}; {device.device_kind} does not tell what is free")
        return 0
    there = f"{device.device_kind} has {free / _GIB:.2f} GiB free"
    if largest.total > free:
        raise UnsupportedError(
            f"does not fit: {needed}, and {there}; use fewer frames, a smaller size"
            + (", --dtype bfloat16" if request.dtype == "float32" else "")
            + (", --weights int8" if request.weights in (None, "bf16") else "")
            + " or a smaller checkpoint"
        )
    print(f"fits: {needed}, and {there}")
    return 0


def _line(stage: StagePlan) -> str:
    """One stage of the table; ``?`` where nothing is known."""
    work = stage.work
    temporary = None if work is None else work.temporary
    return _ROW.format(
        stage.stage if stage.tiles == 1 else f"{stage.stage} ({stage.tiles} tiles)",
        _gib(stage.weights),
        _gib(None if work is None else work.state),
        _gib(temporary),
        _gib(stage.total),
        _UNKNOWN if work is None else f"{stage.operations:.3g}",
        _UNKNOWN if work is None else f"{work.compile_seconds:.1f} s",
    )


def _gib(size: int | None) -> str:
    """Bytes in GiB."""
    return _UNKNOWN if size is None else f"{size / _GIB:.3f}"
