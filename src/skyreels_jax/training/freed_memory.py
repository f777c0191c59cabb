"""Memory that one step of training frees stays with the process, for the next step."""

import ctypes
import platform
from typing import Final

# Parameters of mallopt(3), from glibc's malloc.h.
_TRIM_THRESHOLD: Final = -1
_MMAP_MAX: Final = -4
_ARENA_MAX: Final = -8


def keep_freed_memory() -> bool:
    """Have glibc keep what is freed; ``False`` where the C library is another.

    On a CPU, XLA allocates what a step has in between when it begins and frees it when it ends.
    glibc gives pieces of that size back to the system, which must fill every page with zeros again
    at the next step: a tenth of a step's processor time, more where the machine is a virtual one
    (``docs/performance.md``). To be called before JAX starts its threads, since a thread that has
    memory of its own keeps to it.
    """
    if platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    # One piece of memory for all threads, grown and never cut: pieces of a thread's own are too
    # small for what a step needs, and what is asked of the system instead is given back.
    settings = ((_ARENA_MAX, 1), (_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1))
    return [mallopt(name, value) for name, value in settings] == [1, 1, 1]
