"""Mutated GGUF, fp8 and NVFP4 files: floats or one WeightsError, in little time and memory."""

import gc
import random
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tests.weights import low_precision_files as files
from tests.weights.gguf_files import architecture, gguf, plain, random_blocks, sizes
from tests.weights.test_torch_file_fuzz import mutated

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.open_file import open_tensors

SEED = 20261128
SECONDS = 2.0
# What parsing takes whatever the file: modules, tables, one header.
CONSTANT = 2 << 20


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> list[bytes]:
    rng = np.random.default_rng(SEED)
    weight = rng.standard_normal((32, 64)).astype(np.float32)
    blocks = {k: random_blocks(k, (2, 256), rng) for k in ("Q4_K", "Q6_K", "Q8_0", "Q5_0")}
    others = {"b.bias": np.ones(4, np.float32), "scaled_fp8": np.zeros(0, files.E4M3)}
    file = tmp_path_factory.mktemp("originals") / "m.safetensors"
    contents = [gguf({**blocks, "f": plain(weight)}, (architecture("wan"), sizes("f", (64, 32))))]
    for make in (files.kijai, files.comfy_fp8, files.comfy_nvfp4, files.lightx2v_nvfp4):
        for in_header in (True, False):
            files.save(file, {"a": make(weight), "c": make(weight)}, others, in_header=in_header)
            contents.append(file.read_bytes())
    return contents


def read_all(file: Path) -> bool:
    """Whether the file is accepted; anything but a WeightsError fails the test."""
    try:
        source = open_tensors(file)
        for name, info in source.tensors().items():
            value = source.read(name)
            assert (value.shape, value.dtype) == (info.shape, info.dtype)
    except WeightsError as error:
        assert str(file.name) in str(error), str(error)
        return False
    return True


def changed(content: bytes, rng: random.Random) -> bytes:
    """Mutated anywhere, or in the first part, where the description stands."""
    if rng.random() < 0.5:
        return mutated(content, rng)
    cut = min(len(content), 1200)
    return mutated(content[:cut], rng) + content[cut:]


def fuzz(folder: Path, originals: list[bytes], count: int) -> int:
    rng = random.Random(SEED)
    accepted = 0
    for i in range(count):
        content = changed(originals[i % len(originals)], rng)
        file = folder / f"{i}.bin.safetensors"
        file.write_bytes(content)
        start = time.process_time()
        accepted += read_all(file)
        assert time.process_time() - start < SECONDS, i
        if i % 10 == 0:
            gc.collect()
            tracemalloc.start()
            read_all(file)
            peak = tracemalloc.get_traced_memory()[1]
            tracemalloc.stop()
            assert peak <= 4 * len(content) + CONSTANT, i
        file.unlink()
    return accepted


def test_some_mutated_files_are_floats_or_one_error(tmp_path: Path, originals: list[bytes]):
    assert 0 < fuzz(tmp_path, originals, 60) < 60


@pytest.mark.slow
def test_2000_mutated_files_are_floats_or_one_error(tmp_path: Path, originals: list[bytes]):
    # Values alone may change unseen: neither format has checksums.
    assert 200 < fuzz(tmp_path, originals, 2000) < 1800
