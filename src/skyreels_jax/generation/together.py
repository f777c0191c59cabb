"""A video that several processes make together: what must be equal is what process 0 has.

All run the same program; process 0 alone has a store of windows on disk, and says for all which
request it is, which windows are finished, and after which step a run is stopped.
"""

import io
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from skyreels_jax.generation.job_record import IMAGES, from_json, to_json
from skyreels_jax.generation.request.resolved import ResolvedRequest, Window
from skyreels_jax.generation.store import NoStore, WindowStore
from skyreels_jax.interrupt import StopRequest
from skyreels_jax.parallel.processes import Processes
from skyreels_jax.sampling.progress import Clock, Progress, Stage
from skyreels_jax.shapes import HostLatents


@dataclass(frozen=True)
class SharedStore:
    """The windows of process 0's store, for all processes.

    Attributes:
        processes: that make the video.
        store: of process 0; others' are neither read nor written.
    """

    processes: Processes
    store: WindowStore

    def load(self, window: Window) -> HostLatents | None:
        """The latents that process 0 has of a window, if it has them."""

        def make() -> bytes:
            latents = self.store.load(window)
            return b"" if latents is None else _to_bytes(latents)

        value = self.processes.share(make)
        return _from_bytes(value) if value else None

    def save(self, window: Window, latents: HostLatents) -> None:
        """Process 0 keeps a finished window."""
        if self.processes.first:
            self.store.save(window, latents)


@dataclass(frozen=True)
class _WatchedProgress:
    """Tells the watch of every stage and step, and another :class:`.Progress`."""

    processes: Processes
    progress: Progress

    def begin(self, stage: Stage, total: int | None = None) -> None:
        """Only steps are alike: how long all else takes is not known before."""
        self.processes.beat(stage, open_ended=stage != "denoise")
        self.progress.begin(stage, total)

    def advance(self, stage: Stage, done: int) -> None:
        """Another step or some frames; the VAE compiles in between for another number of them."""
        self.processes.beat(stage, open_ended=stage != "denoise", step=stage == "denoise")
        self.progress.advance(stage, done)

    def end(self, stage: Stage, seconds: float) -> None:
        """On to the next."""
        self.processes.beat(f"after {stage}", open_ended=True)
        self.progress.end(stage, seconds)


class _AgreedStop(StopRequest):
    """Set for all processes at the same step, once one of them is asked to stop."""

    def __init__(self, processes: Processes, own: StopRequest):
        super().__init__()
        self._processes, self._own = processes, own

    def is_set(self) -> bool:
        """Whether all stop now; each process asks at the same places."""
        self.number = self._own.number
        return self._processes.agree_to_stop(self._own.is_set())


def shared_by_processes(
    processes: Processes, store: WindowStore | None, clock: Clock | None
) -> tuple[WindowStore, Clock]:
    """A store and a clock for the processes that this one has joined.

    The store is process 0's; the clock tells the watch, and all processes stop by it together.
    """
    clock = clock or Clock()
    clock.progress = _WatchedProgress(processes, clock.progress)
    clock.stop = _AgreedStop(processes, clock.stop)
    clock.on_submit = lambda: processes.beat("denoise")
    return SharedStore(processes, store or NoStore()), clock


def share_request(
    processes: Processes,
    make: Callable[[], tuple[ResolvedRequest, Mapping[str, object]]],
) -> tuple[ResolvedRequest, Mapping[str, object]]:
    """The request that process 0 resolves, and JSON values about it, for all processes.

    Args:
        processes: that make the video.
        make: gives them; called in process 0 alone.
    """

    def sent() -> bytes:
        request, others = make()
        images = {
            name: _to_bytes(image).hex()
            for name in IMAGES
            if (image := getattr(request, name)) is not None
        }
        record = {"request": to_json(request), "images": images, "others": dict(others)}
        return json.dumps(record).encode()

    record = json.loads(processes.share(sent))
    images = {name: _from_bytes(bytes.fromhex(text)) for name, text in record["images"].items()}
    return from_json(record["request"], images), record["others"]


def _to_bytes(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=False)
    return file.getvalue()


def _from_bytes(value: bytes) -> np.ndarray:
    return np.load(io.BytesIO(value), allow_pickle=False)
