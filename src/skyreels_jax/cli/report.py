"""What the command line says of a generation: before, during (a bar or plain lines) and after."""

import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.generation.request.declaration import in_flags
from skyreels_jax.generation.request.resolved import ResolvedRequest
from skyreels_jax.generation.request.settings import declared
from skyreels_jax.sampling.progress import Progress, Stage, Timings

# Seconds between two plain lines of one stage: logs stay readable.
QUIET_SECONDS = 10.0


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


@contextmanager
def console_progress() -> Iterator[Progress]:
    """A bar if standard error is a terminal, else lines."""
    console = Console(stderr=True)
    if not console.is_terminal:
        yield Lines()
        return
    columns = (
        TextColumn("{task.description:<10}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[pace]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with RichProgress(*columns, console=console) as bars:
        yield Bars(bars)


@dataclass
class Bars:
    """One bar a stage; ``pace`` is seconds a step."""

    bars: RichProgress
    tasks: dict[Stage, TaskID] = field(default_factory=dict)
    started: dict[Stage, float] = field(default_factory=dict)

    def begin(self, stage: Stage, total: int | None = None) -> None:
        """A bar appears; one without a total only shows that time passes."""
        self.started[stage] = time.perf_counter()
        self.tasks[stage] = self.bars.add_task(stage, total=total, pace="")

    def advance(self, stage: Stage, done: int) -> None:
        """It grows."""
        each = (time.perf_counter() - self.started[stage]) / done
        unit = "step" if stage == "denoise" else "frame"
        self.bars.update(self.tasks[stage], completed=done, pace=f"{each:.2f} s/{unit}")

    def end(self, stage: Stage, seconds: float) -> None:
        """It is full; one without a total becomes one of one."""
        task = next(task for task in self.bars.tasks if task.id == self.tasks[stage])
        total = task.total or 1
        self.bars.update(task.id, total=total, completed=total, pace=f"{seconds:.1f} s")


@dataclass
class Lines:
    """A line when a stage ends, and in long stages one every ten seconds."""

    totals: dict[Stage, int | None] = field(default_factory=dict)
    started: dict[Stage, float] = field(default_factory=dict)
    said: float = 0.0

    def begin(self, stage: Stage, total: int | None = None) -> None:
        """Remembered, not said."""
        self.totals[stage] = total
        self.started[stage] = self.said = time.perf_counter()

    def advance(self, stage: Stage, done: int) -> None:
        """Said if the last line is some time ago."""
        now = time.perf_counter()
        if now - self.said < QUIET_SECONDS:
            return
        self.said = now
        total = self.totals[stage] or done
        each = (now - self.started[stage]) / done
        left = each * (total - done)
        print(f"{stage}: {done}/{total}, {each:.2f} s each, {left:.0f} s left", file=sys.stderr)

    def end(self, stage: Stage, seconds: float) -> None:
        """Said."""
        print(f"{stage}: done in {seconds:.1f} s", file=sys.stderr)
