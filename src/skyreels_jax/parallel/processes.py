"""Several processes that make one video together: joining, telling each other, leaving.

Joining, collectives and heartbeats are :mod:`jax.distributed`'s, whose store of keys and values
carries what is said here. A thread in every process, the watch, tells the others once a second how
far its process is, and ends the process when another has failed or stands still: a process that
hangs but lives sends heartbeats for ever, and its peers would wait in a collective as long.
"""

import json
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final, NoReturn

import jax

from skyreels_jax.errors import RequestError, UnsupportedError
from skyreels_jax.parallel.coordinator import CoordinatorStore
from skyreels_jax.parallel.standstill import STALL_SECONDS, Beat, Standstill

# Seconds; of jax.distributed, whose own are 100 and 300.
_HEARTBEAT: Final = 20
_SHUTDOWN: Final = 15
_JOINING: Final = 300
_POLL: Final = 1.0
# How long a process that fails waits for others to have read why.
_READ: Final = 5.0
_CHUNK: Final = 1 << 20
_NOT_TOGETHER: Final = "`coordinator`, `num_processes` and `process_id` go together"

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class JoinOptions:
    """Which processes join, checked before anything expensive.

    Attributes:
        coordinator: ``HOST:PORT`` at which process 0 can be reached; ``None`` leaves all three to
            the cluster (Slurm, Kubernetes, TPU slices, MPI), which JAX detects.
        num_processes: in all.
        process_id: of this one, from 0.
        stall_limit: seconds that a process may stand still while others go on; 0 for ever.

    Raises:
        RequestError: some are missing, or a value is none.
    """

    coordinator: str | None = None
    num_processes: int | None = None
    process_id: int | None = None
    stall_limit: float = STALL_SECONDS

    def __post_init__(self) -> None:
        given = (self.coordinator, self.num_processes, self.process_id)
        if any(one is None for one in given) and any(one is not None for one in given):
            raise RequestError(f"{_NOT_TOGETHER}: give all, or none in a cluster that JAX knows")
        if not 0 <= self.stall_limit < float("inf"):
            raise RequestError(f"`stall_limit` {self.stall_limit:g}: seconds, or 0 for no limit")
        if self.coordinator is None or self.num_processes is None or self.process_id is None:
            return
        host, _, port = self.coordinator.rpartition(":")
        if not (host and port.isascii() and port.isdecimal() and 0 < int(port) < 1 << 16):
            raise RequestError(
                f"`coordinator` {self.coordinator!r}: expected HOST:PORT of process 0, such as "
                "node-0:1234"
            )
        if self.num_processes < 1:
            raise RequestError(f"`num_processes` {self.num_processes}: there is at least one")
        if not 0 <= self.process_id < self.num_processes:
            raise RequestError(
                f"`process_id` {self.process_id}: of {self.num_processes} processes, ids are 0 to "
                f"{self.num_processes - 1}"
            )


class Processes:
    """The processes that this one has joined.

    Attributes:
        count: how many there are.
        id: of this one; 0 writes files and prints.
    """

    def __init__(self, stall_limit: float):
        """For :func:`initialize`."""
        self.count, self.id = jax.process_count(), jax.process_index()
        self.stopping = self._has_said = False
        self._store = CoordinatorStore()
        self._said = 0
        self._beat = Beat()
        self._last_step = 0.0
        self._standstill = Standstill(stall_limit)
        self._over = threading.Event()
        if self.count > 1:
            threading.Thread(target=self._watch, name="watch", daemon=True).start()

    @property
    def first(self) -> bool:
        """Whether this one writes files, prints and decides."""
        return self.id == 0

    def share(self, make: Callable[[], bytes]) -> bytes:
        """What process 0 makes, to all processes; each must call this at the same place."""
        self._said += 1
        key = f"shared/{self._said}"
        if self.first:
            value = make()
            chunks = [value[start : start + _CHUNK] for start in range(0, len(value), _CHUNK)]
            for number, chunk in enumerate(chunks):
                self._store.put(f"{key}/{number}", chunk)
            self._store.put(f"{key}/count", str(len(chunks)).encode())
        else:
            count = int(self._store.wait(f"{key}/count"))
            value = b"".join(self._store.wait(f"{key}/{number}") for number in range(count))
        self._store.put(f"read/{self._said}/{self.id}", b"1")
        if self.first:
            while len(self._store.all(f"read/{self._said}")) < self.count:
                time.sleep(0.01)
            self._store.remove(f"{key}/")
            self._store.remove(f"read/{self._said}/")
        return value

    def agree_to_stop(self, asked: bool) -> bool:
        """Whether any process was asked to stop, decided by process 0 for all, at each step.

        A process that was asked tells it; it is stopped with all others, a few steps later.
        """
        if asked:
            self._store.put(f"asked/{self.id}", b"1")
        self._said += 1
        key = f"stop/{self._said}"
        if self.first:
            stop = bool(self._store.all("asked"))
            self._store.put(key, b"1" if stop else b"0")
            # Nobody is so far behind: the steps of all devices wait for each other.
            with suppress(jax.errors.JaxRuntimeError):
                self._store.remove(f"stop/{self._said - 64}")
        else:
            stop = self._store.wait(key) == b"1"
        self.stopping = self.stopping or stop
        return stop

    def beat(self, stage: str, *, open_ended: bool = False, step: bool = False) -> None:
        """This process goes on.

        Args:
            stage: that it is in now.
            open_ended: whether nobody knows how long until the next beat.
            step: whether one of several alike is finished.
        """
        now = time.monotonic()
        if step:
            if self._last_step:
                longest = max(self._standstill.longest, now - self._last_step)
                self._standstill.longest = longest
            self._last_step = now
        elif stage != self._beat.stage:
            self._last_step = 0.0
        self._beat = Beat(self._beat.count + 1, stage, open_ended)

    def failed(self, reason: str) -> None:
        """Tell the others why this one ends; they end too.

        Nothing is told where another failed before: a broken connection to it is no cause.
        """
        with suppress(jax.errors.JaxRuntimeError):
            if not self._store.all("failed"):
                self._store.put(f"failed/{self.id}", reason.encode())

    def leave(self, code: int) -> None:
        """End the process if it failed, and else wait for the others to be done as well."""
        if code and not self.stopping:
            # A broken connection is heard of before its cause is.
            with suppress(jax.errors.JaxRuntimeError):
                for process, reason in self._failed():
                    self._say(f"process {process} failed: {reason}")
            if self.first:
                # The store ends with this process.
                self._wait_for("left", _READ)
            self._end(code)
        with suppress(jax.errors.JaxRuntimeError):
            self._store.put(f"done/{self.id}", b"1")
            # The watch goes on until then: who writes may fail yet.
            self._store.wait("done/0")
            self._over.set()
            jax.distributed.shutdown()
        if code:
            self._end(code)

    def _wait_for(self, folder: str, seconds: float) -> None:
        until = time.monotonic() + seconds
        with suppress(jax.errors.JaxRuntimeError):
            while len(self._store.all(folder)) < self.count - 1 and time.monotonic() < until:
                time.sleep(0.1)

    def _watch(self) -> None:
        """Tell how far this process is; end it when another failed or stands still."""
        while not self._over.wait(_POLL):
            try:
                own = self._beat
                self._store.put(f"beat/{self.id}", json.dumps(list(vars(own).values())).encode())
                for process, reason in self._failed():
                    self._give_up(f"process {process} failed: {reason}")
                beats = self._store.all("beat").items()
                beats = {process: Beat(*json.loads(value)) for process, value in beats}
            except jax.errors.JaxRuntimeError as error:
                if self._over.is_set():
                    return
                self._give_up(f"process 0 does not answer, or another is gone ({_line(error)})")
            if wrong := self._standstill.judge(beats, time.monotonic()):
                self.failed(wrong)
                self._give_up(wrong)

    def _failed(self) -> Sequence[tuple[int, str]]:
        """Which other processes failed, and why."""
        found = self._store.all("failed").items()
        return [(process, reason.decode()) for process, reason in found if process != self.id]

    def _say(self, reason: str) -> None:
        """Why this process ends, which is another; once."""
        if self._has_said:
            return
        self._has_said = True
        print(
            f"skyreels-jax: error: process {self.id} of {self.count} ends: {reason}; finished "
            "windows are kept",
            file=sys.stderr,
            flush=True,
        )

    def _give_up(self, reason: str) -> NoReturn:
        """End this process because of another."""
        self._say(reason)
        with suppress(jax.errors.JaxRuntimeError):
            self._store.put(f"left/{self.id}", b"1")
            if self.first:
                self._wait_for("left", _READ)
        self._end(1)

    @staticmethod
    def _end(code: int) -> NoReturn:
        """At once: a Python that ends in order would wait for processes that are gone."""
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code)


def _line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0][:160]


_joined: list[Processes] = []


def current_processes() -> Processes | None:
    """The processes that this one has joined, if it has."""
    return _joined[0] if _joined else None


def initialize(
    coordinator: str | None = None,
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    stall_limit: float = STALL_SECONDS,
) -> Processes:
    """Join the other processes of a run, before JAX is used: every one of them calls this.

    From then on JAX finds the devices of all of them, and a mesh may be of all. An exception that
    nobody catches ends this process at once, and the others within seconds.

    Args:
        coordinator: as all that follow, of :class:`JoinOptions`; without the first three, what the
            cluster says.
        num_processes: in all.
        process_id: of this one.
        stall_limit: seconds that a process may stand still while others go on.

    Raises:
        RequestError: a value is missing or is none, no cluster is found, or this was done before.
        UnsupportedError: the others cannot be reached.
    """
    options = JoinOptions(
        coordinator=coordinator,
        num_processes=num_processes,
        process_id=process_id,
        stall_limit=stall_limit,
    )
    if _joined:
        raise RequestError("this process has joined others already")
    # Its handler of SIGTERM would take the place of ours.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            *(options.coordinator, options.num_processes, options.process_id),
            initialization_timeout=_JOINING,
            heartbeat_timeout_seconds=_HEARTBEAT,
            shutdown_timeout_seconds=_SHUTDOWN,
            cluster_detection_method=None if options.coordinator is None else "deactivate",
        )
        # All together, as finding devices is a conversation.
        jax.devices()
    except ValueError as error:
        raise RequestError(
            f"JAX finds no cluster that says which process this is ({_line(error)}): give "
            "`coordinator`, `num_processes` and `process_id`"
        ) from error
    except RuntimeError as error:
        raise UnsupportedError(
            f"the other processes cannot be joined by way of {options.coordinator or 'the cluster'}"
            f" ({_line(error)})"
        ) from error
    processes = Processes(options.stall_limit)
    _joined.append(processes)
    usual = sys.excepthook

    def on_error(kind: type[BaseException], error: BaseException, trace) -> None:
        usual(kind, error, trace)
        processes.failed(traceback.format_exception_only(error)[-1].strip()[:400])
        processes.leave(1)

    sys.excepthook = on_error
    return processes
