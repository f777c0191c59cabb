"""How a stream keeps up with somebody who plays it."""

import time
from dataclasses import dataclass, replace
from fractions import Fraction


@dataclass(frozen=True)
class LiveTimes:
    """What is known at the last delivery.

    Attributes:
        frames: that were delivered.
        first_frame: seconds from the first asking to the first frame; ``None`` before it.
        rate: frames a second since then; ``None`` before the second delivery.
        lag: seconds by which the last delivery came after it was due, to somebody who plays since
            the first; below 0 it was early.
        largest_lag: the largest so far: who plays so much later never waits.
        held: seconds that the consumer took between deliveries.
    """

    frames: int = 0
    first_frame: float | None = None
    rate: float | None = None
    lag: float = 0.0
    largest_lag: float = 0.0
    held: float = 0.0


class Pacemaker:
    """Measures a stream of ``fps`` frames a second."""

    def __init__(self, fps: int | Fraction):
        """It begins with the first asking."""
        self.times = LiveTimes()
        self._fps = fps
        self._asked: float | None = None
        self._first: float | None = None
        self._of_first = 0
        self._delivered: float | None = None

    def asked(self) -> None:
        """Somebody wants frames."""
        now = time.perf_counter()
        self._asked = self._asked or now
        if self._delivered is not None:
            self.times = replace(self.times, held=self.times.held + now - self._delivered)

    def delivered(self, count: int) -> None:
        """Somebody has got ``count`` frames."""
        now = self._delivered = time.perf_counter()
        assert self._asked is not None
        times, frames = self.times, self.times.frames + count
        if self._first is None:
            self._first, self._of_first = now, count
            self.times = LiveTimes(frames, now - self._asked)
            return
        since = now - self._first
        lag = since - float(times.frames / self._fps)
        self.times = replace(
            times,
            frames=frames,
            rate=(frames - self._of_first) / since,
            lag=lag,
            largest_lag=max(lag, times.largest_lag),
        )
