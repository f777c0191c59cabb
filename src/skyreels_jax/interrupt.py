"""Signals that ask a run to stop, and what they become.

Ctrl-C (SIGINT), SIGTERM (Slurm, Kubernetes, ``kill``) and SIGHUP (a terminal that closes) raise
where nothing is prepared for them, and set a :class:`StopRequest` inside :func:`stop_requested`,
so that a step under way is finished. A second one raises there too.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Final, NoReturn

INTERRUPTED: Final = 130
TERMINATED: Final = 143
HUNG_UP: Final = 129
# SIGHUP does not exist on Windows.
SIGNALS: Final = tuple(
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)
)
# Seconds until a signal that came to nothing is sent anew.
_AGAIN: Final = 0.05


class Terminated(KeyboardInterrupt):
    """SIGTERM or SIGHUP, as an exception: what is under way cleans up as it does after Ctrl-C.

    Attributes:
        number: of the signal.
    """

    def __init__(self, number: int = signal.SIGTERM):
        super().__init__()
        self.number = number


class StopRequest(threading.Event):
    """Set when somebody asks a run to stop; ``number`` is the signal's, if it was one."""

    number: int | None = None

    @property
    def exit_code(self) -> int:
        """What a shell returns for a program that this signal ended."""
        return 128 + (self.number or signal.SIGINT)


def exit_code(stop: KeyboardInterrupt) -> int:
    """What a shell returns for a program that was ended by this."""
    return 128 + (stop.number if isinstance(stop, Terminated) else signal.SIGINT)


@contextmanager
def signals_raise() -> Iterator[None]:
    """SIGTERM and SIGHUP raise :class:`Terminated` in the body, as SIGINT does without this.

    A SIGHUP that is ignored, as under ``nohup``, stays ignored.
    """
    before: dict[int, Any] = {}
    for number in SIGNALS[1:]:
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    del frame
    raise Terminated(number)


@contextmanager
def stop_requested(on_ask: Callable[[], None] | None = None) -> Iterator[StopRequest]:
    """A request that the first signal sets; a second one acts as it did before.

    In a thread that is not the main one, which Python hands no signals, it is never set.

    Args:
        on_ask: called when it is set, in the handler.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    before = {n: handler for n, handler in before.items() if handler is not signal.SIG_IGN}

    def ask(number: int, frame: FrameType | None) -> None:
        del frame
        request.number = number
        request.set()
        for each, handler in before.items():
            signal.signal(each, handler)
        if on_ask is not None:
            on_ask()

    for number in before:
        signal.signal(number, ask)
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def deferred() -> Iterator[None]:
    """A signal that comes in the body acts when that is over; a second one at once.

    For what takes moments and must not be half done, such as keeping what was finished.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    # None: not installed from Python, and so not ours to put back.
    before = {n: h for n, h in before.items() if h not in (signal.SIG_IGN, None)}
    came: list[int] = []

    def wait(number: int, frame: FrameType | None) -> None:
        del frame
        came.append(number)
        if len(came) > 1:
            act()

    def act() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)
        if came:
            number = came[-1]
            came.clear()
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, wait)
    try:
        yield
    finally:
        act()


def send_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """Send a signal anew whose exception came to nothing: for ``sys.unraisablehook``.

    A signal that arrives in a finalizer or a callback of the garbage collector raises there, where
    Python drops exceptions; a run of hours would go on as if nobody had asked it to stop.
    """
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    stop = unraisable.exc_value
    number = stop.number if isinstance(stop, Terminated) else signal.SIGINT
    # Later: at once would be in the same place.
    again = threading.Timer(_AGAIN, os.kill, (os.getpid(), number))
    again.daemon = True
    again.start()
