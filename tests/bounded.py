"""How much memory a body of a test took, whatever took more before it."""

import ctypes
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

_C: Final = ctypes.CDLL(None)
# The most that any damaged file may take, beside four times its own bytes.
MOST: Final = 300 * 10**6


@contextmanager
def memory_below(nbytes: int) -> Iterator[None]:
    """The process's peak stands less than so many bytes above where it was before the body.

    What was freed before goes back to the system: in it the body's memory would find room unseen,
    where training has run in this process, which keeps what is freed.
    """
    if hasattr(_C, "malloc_trim"):
        _C.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # The peak is counted from here.
    before = _status("VmRSS")
    yield
    assert _status("VmHWM") - before < nbytes


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))
