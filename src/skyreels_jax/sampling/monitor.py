"""Follows the device through a run without holding it up."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Array, Bool

from skyreels_jax.diffusion.frame_schedule import FrameSchedule
from skyreels_jax.errors import NumericsError
from skyreels_jax.sampling.progress import Clock

# Steps handed to the device before the first of them is waited for: enough that it never idles.
_IN_FLIGHT: Final = 2


class IterationReport(NamedTuple):
    """What an iteration says to the host: are all predictions finite, and which calls ran.

    A call is ``computed`` if its blocks ran; a cache may answer in their place.
    """

    finite: Bool[Array, ""]
    computed: Bool[Array, " calls"]


@dataclass
class StepMonitor:
    """Waits for old steps, checks and times them, reports progress, stops where it is asked to."""

    clock: Clock
    schedule: FrameSchedule
    pending: deque[IterationReport] = field(default_factory=deque)
    seconds: list[float] = field(default_factory=list)
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
        done = len(self.seconds)
        if not finite:
            timestep = self.schedule.timesteps[done - 1].max()
            raise NumericsError(
                f"the transformer's prediction in step {done} of {self.schedule.iterations} "
                f"(timestep {timestep}) holds NaN or infinity: its weights, the conditioning or "
                "the starting noise do, or a value overflowed; check the weights "
                "(`skyreels-jax info`) and try --dtype float32"
            )
        self.computed += int(np.sum(report.computed))
        self.calls += len(report.computed)
        self.clock.progress.advance("denoise", done)
        self.clock.check()
