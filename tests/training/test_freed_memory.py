"""What a step frees is there for the next one, without the system."""

import platform
import subprocess
import sys

import pytest

# A thread asks for 64 MiB and frees them, as a step of training does, and counts the pages that the
# system had to give.
_STEPS = """
import resource, threading
def steps():
    for _ in range(2):
        bytearray(64 * 2**20)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(4):
        bytearray(64 * 2**20)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=steps)
thread.start()
thread.join()
"""
_KEPT = """
from skyreels_jax.training.freed_memory import keep_freed_memory
assert keep_freed_memory()
"""


def _new_pages(program: str) -> int:
    command = [sys.executable, "-c", program]
    return int(subprocess.run(command, capture_output=True, check=True, text=True).stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="what is tested is glibc's")
def test_freed_memory_is_not_asked_for_again():
    assert _new_pages(_KEPT + _STEPS) <= 64  # measured: 0
    assert _new_pages(_STEPS) > 1000  # measured: 65,536 pages of 4 KiB
