"""What the command line says of a generation: before, during (a bar or plain lines) and after."""

import statistics
import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Final

from rich.console import Console
from rich.progress import BarColumn, TextColumn
from rich.progress import Progress as RichProgress

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.cli.flags import QUIET
from skyreels_jax.generation.request.declaration import in_flags
from skyreels_jax.generation.request.resolved import ResolvedRequest
from skyreels_jax.generation.request.settings import declared
from skyreels_jax.sampling.progress import NoProgress, Progress, Stage, Timings

# Seconds between two plain lines of one stage: logs stay readable.
LINE_SECONDS = 60.0
# Columns from which on a bar has room for words.
_WIDE: Final = 72
# Steps and frames whose median is the pace.
_PACES: Final = 15


def describe(checkpoint: Checkpoint, request: ResolvedRequest) -> Iterator[str]:
    """What will be done, each setting with where it came from."""
    name = checkpoint.guess.preset.name if checkpoint.guess.preset else "no released checkpoint"
    yield f"checkpoint: {request.model} ({name}: {checkpoint.guess.reason})"
    for setting in declared():
        if setting in request.sources:
            value = request.value_of(setting)
            shown = shortened(value) if setting == "negative_prompt" else value
            yield f"  {setting.replace('_', '-'):<16} {shown}  [{request.sources[setting]}]"
    if (student := checkpoint.guess.causal) is not None:
        yield in_flags(f"note: {student.words()}")
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
def console_progress(windows: int = 1, finished: int = 0) -> Iterator[Progress]:
    """One bar if standard error is a terminal, else a line a stage; nothing where asked for.

    Args:
        windows: of the video.
        finished: how many of them were finished before.
    """
    console = Console(stderr=True)
    if QUIET.get():
        yield NoProgress()
    elif not console.is_terminal:
        yield Lines(windows=windows, finished=finished)
    else:
        columns = TextColumn("{task.fields[words]}"), BarColumn(bar_width=None)
        shares = TextColumn("{task.percentage:>3.0f}%")
        with RichProgress(*columns, shares, console=console, expand=True) as bars:
            yield Bars(bars, windows=windows, finished=finished)


@dataclass(kw_only=True)
class _Journey:
    """Where a run is, over all its windows: what both ways to show it have in common.

    Attributes:
        windows: of the video.
        finished: how many of them are finished.
        stage: under way.
        done: of its steps or frames.
        total: of them, if it has any.
        paces: seconds of the last steps and frames. Only time between two of one stage counts:
            neither loading, compiling nor the wait for another window.
        shown: of the video's frames, how many are decoded, of how many.
    """

    windows: int = 1
    finished: int = 0
    stage: Stage | None = None
    done: int = 0
    total: int | None = None
    paces: dict[Stage, deque[float]] = field(default_factory=dict)
    shown: tuple[int, int] = (0, 0)
    _mark: float = 0.0
    _steps: int = 0

    def begin(self, stage: Stage, total: int | None = None) -> None:
        """A stage starts."""
        self.stage, self.done, self.total = stage, 0, total
        if stage == "denoise":
            self._steps = total or 0
        if stage == "decode":
            self.shown = (0, total or 0)
        self._mark = time.perf_counter()

    def advance(self, stage: Stage, done: int) -> None:
        """``done`` units of a stage are finished."""
        now = time.perf_counter()
        before = self.shown[0] if stage == "decode" else self.done
        if stage == self.stage and done > before:
            pace = self.paces.setdefault(stage, deque(maxlen=_PACES))
            pace.append((now - self._mark) / (done - before))
        # Frames are decoded between the windows: their stage goes on where another has ended.
        self.stage, self.done = stage, done
        if stage == "decode":
            self.shown = (done, self.shown[1])
            self.total = self.shown[1]
        self._mark = now

    def end(self, stage: Stage, seconds: float) -> None:
        """A stage is finished."""
        del seconds
        if stage == "denoise":
            self.finished += 1
        self.stage, self._mark = None, time.perf_counter()

    @property
    def window(self) -> int:
        """The number of the window at work, from 1."""
        return min(self.finished + 1, self.windows)

    def pace(self, stage: Stage) -> float | None:
        """Seconds that a step or a frame takes."""
        paces = self.paces.get(stage)
        return statistics.median(paces) if paces else None

    @property
    def left(self) -> float | None:
        """Seconds that are left, as far as they are known."""
        step, frame = self.pace("denoise"), self.pace("decode")
        if step is None and frame is None:
            return None
        frames_left = self.shown[1] - self.shown[0]
        return (step or 0.0) * self._steps_left + (frame or 0.0) * frames_left

    @property
    def _steps_left(self) -> int:
        """Steps of this window and those after it, which are taken to be like it."""
        begun = self.done if self.stage == "denoise" else 0
        return self._steps * max(0, self.windows - self.finished) - begun

    @property
    def share(self) -> float:
        """The part of the whole that is done, decoding as a twentieth."""
        inside = self.done / self.total if self.stage == "denoise" and self.total else 0.0
        made = min(1.0, (self.finished + inside) / self.windows)
        return 0.95 * made + 0.05 * self.shown[0] / max(1, self.shown[1])

    def words(self, stage: Stage, width: int) -> str:
        """All of it in a line that fits on a terminal of ``width`` columns."""
        narrow = width < _WIDE
        several = (
            f"{self.window}/{self.windows}"
            if narrow
            else (f"window {self.window} of {self.windows}")
        )
        pace, left = self.pace(stage), self.left
        parts = [
            several if self.windows > 1 else "",
            stage,
            f"{self.done}/{self.total}" if self.total and self.stage == stage else "",
            f"{pace:.2f} s each" if pace is not None and not narrow else "",
            f"{clock_time(left)} left" if left is not None else "",
        ]
        return (" " if narrow else "  ").join(filter(None, parts))


def clock_time(seconds: float) -> str:
    """Such as ``3:08`` or ``1:03:08``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


class Bars(_Journey):
    """One bar for the whole run."""

    def __init__(self, bars: RichProgress, *, windows: int = 1, finished: int = 0):
        """``windows`` of the video, of which so many were ``finished`` before."""
        super().__init__(windows=windows, finished=finished)
        self._bars = bars
        self._task = bars.add_task("", total=1.0, words="")

    def begin(self, stage: Stage, total: int | None = None) -> None:
        """Its words change."""
        super().begin(stage, total)
        self._show(stage)

    def advance(self, stage: Stage, done: int) -> None:
        """It grows."""
        super().advance(stage, done)
        self._show(stage)

    def end(self, stage: Stage, seconds: float) -> None:
        """It stays where it is."""
        super().end(stage, seconds)
        self._show(stage)

    def _show(self, stage: Stage) -> None:
        words = self.words(stage, self._bars.console.width)
        with suppress(OSError):  # What cannot be shown, in a closed pipe, ends no run.
            self._bars.update(self._task, completed=self.share, words=words)


class Lines(_Journey):
    """A line when a stage ends, and in long stages one a minute."""

    _said: float = 0.0

    def begin(self, stage: Stage, total: int | None = None) -> None:
        """Remembered, not said."""
        super().begin(stage, total)
        self._said = time.perf_counter()

    def advance(self, stage: Stage, done: int) -> None:
        """Said if the last line is some time ago."""
        super().advance(stage, done)
        if time.perf_counter() - self._said >= LINE_SECONDS:
            self._said = time.perf_counter()
            self._say(self.words(stage, _WIDE))

    def end(self, stage: Stage, seconds: float) -> None:
        """Said."""
        window, left = self.window, self.left
        super().end(stage, seconds)
        of = f" (window {window} of {self.windows}" if self.windows > 1 else ""
        if of and stage == "denoise":
            of += f", {clock_time(self.left or 0.0)} left)" if left is not None else ")"
        else:
            of = ""
        self._say(f"{stage}: done in {seconds:.1f} s{of}")

    @staticmethod
    def _say(line: str) -> None:
        with suppress(OSError):  # On a full disk, or in a closed pipe: it ends no run.
            print(line, file=sys.stderr, flush=True)
