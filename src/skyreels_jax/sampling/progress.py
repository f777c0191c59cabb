"""How a run is followed: stages and timings, and the device's steps without holding it up."""

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final, Literal, NamedTuple, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Array, Bool

from skyreels_jax.errors import NumericsError, Stopped
from skyreels_jax.interrupt import StopRequest

Stage = Literal["text", "image", "condition", "load", "compile", "denoise", "decode"]
# Steps handed to the device before the first of them is waited for: enough that it never idles.
_IN_FLIGHT: Final = 2


@runtime_checkable
class Progress(Protocol):
    """Told of every stage, in order; ``denoise`` counts steps and ``decode`` frames."""

    def begin(self, stage: Stage, total: int | None = None) -> None:
        """A stage starts, of ``total`` units where it has any."""
        ...

    def advance(self, stage: Stage, done: int) -> None:
        """``done`` units of the stage are finished."""
        ...

    def end(self, stage: Stage, seconds: float) -> None:
        """The stage is finished; never called if it failed."""
        ...


class NoProgress:
    """Says nothing."""

    def begin(self, stage: Stage, total: int | None = None) -> None:
        """Nothing."""

    def advance(self, stage: Stage, done: int) -> None:
        """Nothing."""

    def end(self, stage: Stage, seconds: float) -> None:
        """Nothing."""


@dataclass(frozen=True)
class Timings:
    """Seconds by stage; ``compile`` is apart from ``denoise``, and ``steps`` are its parts.

    Of ``calls`` of the transformer, ``computed`` ran; a step cache answered the rest. ``blocks``:
    how many passes of single blocks ran, of how many, where block-causal attention made some
    superfluous.
    """

    stages: dict[str, float]
    steps: tuple[float, ...]
    computed: int = 0
    calls: int = 0
    blocks: tuple[int, int] = (0, 0)


@dataclass
class Clock:
    """Times the stages of one generation and passes them on to a :class:`Progress`.

    Whoever sets ``stop``, from another thread or a signal handler, ends the denoising after the
    step under way. ``on_submit`` is called before each step is handed to the device.
    """

    progress: Progress = field(default_factory=NoProgress)
    seconds: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    computed: int = 0
    calls: int = 0
    blocks: tuple[int, int] = (0, 0)
    stop: StopRequest = field(default_factory=StopRequest)
    on_submit: Callable[[], None] = lambda: None
    _inside: float = 0.0

    def check(self) -> None:
        """Between two steps.

        Raises:
            Stopped: ``stop`` is set.
        """
        if self.stop.is_set():
            raise Stopped("stopped, as asked", self.stop.exit_code)

    def ran(
        self,
        steps: tuple[float, ...],
        computed: int,
        calls: int,
        blocks: tuple[int, int] = (0, 0),
    ) -> None:
        """A run of the transformer: seconds of its steps, the rest as in :class:`Timings`."""
        self.steps.extend(steps)
        self.blocks = (self.blocks[0] + blocks[0], self.blocks[1] + blocks[1])
        self.computed += computed
        self.calls += calls

    @property
    def timings(self) -> "Timings":
        """All so far."""
        return Timings(
            dict(self.seconds), tuple(self.steps), self.computed, self.calls, self.blocks
        )

    @contextmanager
    def stage(self, stage: Stage, total: int | None = None) -> Iterator[None]:
        """Time the body, without stages inside it. A stage entered again adds to its seconds."""
        self.progress.begin(stage, total)
        outer, self._inside = self._inside, 0.0
        start = time.perf_counter()
        try:
            yield
        finally:
            whole = time.perf_counter() - start
            own = whole - self._inside
            self._inside = outer + whole
        self.seconds[stage] = self.seconds.get(stage, 0.0) + own
        self.progress.end(stage, own)


class IterationReport(NamedTuple):
    """What an iteration says to the host: are all predictions finite, and which calls ran.

    A call is ``computed`` if its blocks ran; a cache may answer in their place.
    """

    finite: Bool[Array, ""]
    computed: Bool[Array, " calls"]


@dataclass
class StepMonitor:
    """Waits for old steps, checks and times them, reports progress, stops where it is asked to.

    ``describe`` names a step, given how many were ``done`` with it. Who makes steps without an end
    clears ``seconds``.
    """

    clock: Clock
    describe: Callable[[int], str]
    pending: deque[IterationReport] = field(default_factory=deque)
    seconds: list[float] = field(default_factory=list)
    done: int = 0
    computed: int = 0
    calls: int = 0
    last: float = field(default_factory=time.perf_counter)

    def submitted(self, report: IterationReport) -> None:
        """A step was handed to the device."""
        self.pending.append(report)
        if len(self.pending) > _IN_FLIGHT:
            self._wait_for_oldest()

    def finish(self) -> None:
        """Wait for all that is still under way."""
        while self.pending:
            self._wait_for_oldest()

    def _wait_for_oldest(self) -> None:
        report = self.pending.popleft()
        finite = bool(report.finite)
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now
        self.done += 1
        if not finite:
            raise NumericsError(
                f"the transformer's prediction in {self.describe(self.done)} holds NaN or "
                "infinity: its weights, the conditioning or the starting noise do, or a value "
                "overflowed; check the weights (`skyreels-jax info`) and try `dtype` float32"
            )
        self.computed += int(np.sum(report.computed))
        self.calls += len(report.computed)
        self.clock.progress.advance("denoise", self.done)
        self.clock.check()
