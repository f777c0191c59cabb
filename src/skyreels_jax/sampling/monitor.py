"""Follows the device through a run without holding it up."""

import time
from collections import deque
from dataclasses import dataclass, field
from typing import Final, NamedTuple

import numpy as np
from jaxtyping import Array, Bool

from skyreels_jax.diffusion.frame_schedule import Timetable
from skyreels_jax.errors import NumericsError
from skyreels_jax.sampling.progress import Clock

# Steps handed to the device before the first of them is waited for: enough that it never idles.
IN_FLIGHT: Final = 2


class Report(NamedTuple):
    """What the host is told of a step: all predictions finite, and which calls the model ran for.

    ``computed`` counts a call whose blocks ran; a cache may answer in their place.
    """

    finite: Bool[Array, ""]
    computed: Bool[Array, " calls"]


@dataclass
class Watch:
    """Waits for old steps, checks and times them, reports progress, stops where it is asked to."""

    clock: Clock
    frames: Timetable
    pending: deque[Report] = field(default_factory=deque)
    seconds: list[float] = field(default_factory=list)
    computed: int = 0
    calls: int = 0
    last: float = field(default_factory=time.perf_counter)

    def started(self, report: Report) -> None:
        """A step was handed to the device."""
        self.pending.append(report)
        if len(self.pending) > IN_FLIGHT:
            self._settle()

    def finish(self) -> None:
        """Wait for all that is still under way."""
        while self.pending:
            self._settle()

    def _settle(self) -> None:
        report = self.pending.popleft()
        finite = bool(report.finite)
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now
        done = len(self.seconds)
        if not finite:
            timestep = self.frames.timesteps[done - 1].max()
            raise NumericsError(
                f"the transformer's prediction in step {done} of {self.frames.rows} (timestep "
                f"{timestep}) holds NaN or infinity: its weights, the conditioning or the given "
                "noise do, or a value overflowed; check the weights (`skyreels-jax info`) and try "
                "--dtype float32"
            )
        self.computed += int(np.sum(report.computed))
        self.calls += len(report.computed)
        self.clock.progress.advance("denoise", done)
        self.clock.check()
