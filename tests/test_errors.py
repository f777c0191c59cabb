"""Memory that runs out is known whoever says so."""

import errno

import jax
import numpy as np
import pytest
import torch

from skyreels_jax.errors import MemoryExhausted, RequestError, is_out_of_memory, out_of_memory
from skyreels_jax.memory import refused_in_words

RAN_OUT = {
    "python": MemoryError(),
    "jax": jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 9 bytes."),
    "inside": jax.errors.JaxRuntimeError("INTERNAL: RESOURCE_EXHAUSTED: failed to allocate"),
    "torch": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.\nGPU 0"),
    "torch on the CPU": RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to"),
    "system": OSError(errno.ENOMEM, "Cannot allocate memory"),
}
OTHER = {
    "bug": jax.errors.JaxRuntimeError("INTERNAL: a bug"),
    "value": ValueError("bad"),
    "disk": OSError(errno.ENOSPC, "No space left on device"),
    "ours": RequestError("out of memory is a strange prompt"),
    "key": KeyError("out of memory"),
}


@pytest.mark.parametrize("kind", RAN_OUT)
def test_memory_that_runs_out_is_one_line_with_a_way_out(kind: str):
    with pytest.raises(MemoryExhausted) as caught, refused_in_words("use `dtype` bfloat16"):
        raise RAN_OUT[kind]
    (line,) = str(caught.value).splitlines()
    assert line.startswith("not enough memory")
    assert line.endswith(": use `dtype` bfloat16")


@pytest.mark.parametrize("kind", OTHER)
def test_other_failures_are_no_lack_of_memory(kind: str):
    assert not is_out_of_memory(OTHER[kind])
    with pytest.raises(type(OTHER[kind])), refused_in_words("-"):
        raise OTHER[kind]


def test_what_numpy_cannot_allot_is_told_with_its_size():
    with pytest.raises(MemoryError) as caught:
        np.empty(2**55)
    assert "256. PiB" in out_of_memory(caught.value)
