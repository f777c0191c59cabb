"""The exceptions this package raises on purpose.

Everything else that escapes is a bug. The command line turns each into one line on standard error
and the exit code below.
"""

import errno
import re
from typing import Final

# How Python, XLA, PyTorch and drivers say that memory ran out.
_EXHAUSTED: Final = re.compile(
    "RESOURCE_EXHAUSTED|out of memory|can't allocate memory|cannot allocate memory|bad_alloc",
    re.IGNORECASE,
)


class SkyReelsError(Exception):
    """Base of all errors raised on purpose; ``exit_code`` is what the command line returns."""

    exit_code: int = 2


class RequestError(SkyReelsError, ValueError):
    """A setting, prompt, image or path is illegal: says what was given, the rule, legal values."""


class WeightsError(SkyReelsError):
    """A checkpoint folder or file is incomplete, inconsistent, corrupt or not to be trusted."""


class UnsupportedError(SkyReelsError, NotImplementedError):
    """A named part (an attention path, a layout, a device) cannot serve the request; says why."""


class MemoryExhausted(UnsupportedError):
    """Memory ran out; says in which stage, how much was asked for, and what takes less."""


class NumericsError(SkyReelsError, ArithmeticError):
    """A computation gave NaN or infinity; says where, and what may be the cause."""


class Stopped(SkyReelsError):
    """A generation ended early because somebody asked it to; says what is kept."""

    # What a shell returns for a program that SIGINT ended.
    exit_code = 130

    def __init__(self, message: str, exit_code: int = 130):
        super().__init__(message)
        self.exit_code = exit_code


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory ran out, in the words of Python, XLA or PyTorch."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    if isinstance(error, SkyReelsError) or not isinstance(error, RuntimeError | ValueError):
        return isinstance(error, MemoryError)
    return _EXHAUSTED.search(str(error)) is not None


def out_of_memory(error: BaseException, advice: str = "make less at once") -> str:
    """One line on memory that ran out: what was asked for, and what to do."""
    asked = str(error).strip().partition("\n")[0].removeprefix("RESOURCE_EXHAUSTED").strip(": .")
    return f"not enough memory{f' ({asked[:160]})' if asked else ''}: {advice}"
