"""How a generation reports where it is, and how long its stages took."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event
from typing import Literal, Protocol, runtime_checkable

from skyreels_jax.errors import Stopped

Stage = Literal["text", "image", "condition", "load", "compile", "denoise", "decode"]


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
    """Seconds by stage; ``compile`` is apart from ``denoise``, and ``steps`` are its parts."""

    stages: dict[str, float]
    steps: tuple[float, ...]


@dataclass
class Clock:
    """Times the stages of one generation and passes them on to a :class:`Progress`.

    Whoever sets ``stop``, from another thread or a signal handler, ends the generation after the
    step or the frames under way.
    """

    progress: Progress = field(default_factory=NoProgress)
    seconds: dict[str, float] = field(default_factory=dict)
    stop: Event = field(default_factory=Event)

    def check(self) -> None:
        """Between two steps, and between two pieces of decoded video.

        Raises:
            Stopped: ``stop`` is set.
        """
        if self.stop.is_set():
            raise Stopped("stopped, as asked")

    @contextmanager
    def stage(self, stage: Stage, total: int | None = None) -> Iterator[None]:
        """Time the body. A stage entered again adds to its seconds."""
        self.progress.begin(stage, total)
        start = time.perf_counter()
        yield
        elapsed = time.perf_counter() - start
        self.seconds[stage] = self.seconds.get(stage, 0.0) + elapsed
        self.progress.end(stage, elapsed)
