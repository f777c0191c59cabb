"""Mutated LoRA files: a transformer with them or one of the program's errors, soon and small."""

import json
import random as randomly
import struct
import time
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from tests.fabricate import Checkpoints
from tests.weights.lora.files import linears, low_rank, random, stored, weights, write
from tests.weights.lora.rows import ROWS
from tests.weights.test_torch_file_fuzz import mutated

from skyreels_jax.errors import SkyReelsError
from skyreels_jax.weights.lora.binding import Lora
from skyreels_jax.weights.lora.source import StoredTransformer, proven

SEED = 20261129
SECONDS = 2.0
# Of what a transformer of 32 features takes by itself.
FLOOR = 16 << 20


def originals(folder: Path, root: Path) -> list[bytes]:
    there = weights(folder)
    found = []
    for row in ROWS:
        if row.kind == "df":
            found.append(write(root / "x.safetensors", row.tensors(there), row.metadata))
            found[-1] = found[-1].read_bytes()
    return found


def edited_header(content: bytes, rng: randomly.Random) -> bytes:
    """Another shape, name or dtype, with a header that is sound."""
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    name = rng.choice([k for k in header if k != "__metadata__"])
    entry = header[name]
    kind = rng.randrange(4)
    if kind == 0:
        entry["shape"] = rng.choice([entry["shape"][::-1], [int(np.prod(entry["shape"]))], []])
    elif kind == 1:
        words = ["alpha", "diff", "lora_mid.weight", "lokr_w1", "hada_w1_a", "dora_scale", "x"]
        header[f"{name.rpartition('.')[0]}.{rng.choice(words)}"] = header.pop(name)
    elif kind == 2:
        entry["dtype"] = rng.choice(["F16", "BF16", "I32", "F8_E4M3", "F64"])
    else:
        size = entry["data_offsets"][1] - entry["data_offsets"][0]
        a = rng.choice([1, 2, 4, 8, 1 << 20])
        entry["shape"] = [a, max(1, size // 4 // a)]
    raw = json.dumps(header).encode()
    return struct.pack("<Q", len(raw)) + raw + content[8 + length :]


def read_all(model: StoredTransformer, file: Path) -> bool:
    """Whether the file is taken; any error that is not the program's fails the test."""
    try:
        merged = proven(model, [Lora(file)])
        for name in merged.source.tensors():
            merged.source.read(name)
    except SkyReelsError:
        return False
    return True


def fuzz(folder: Path, root: Path, count: int) -> int:
    rng = randomly.Random(SEED)
    contents, model = originals(folder, root), stored(folder)
    taken = 0
    for i in range(count):
        content = contents[i % len(contents)]
        content = mutated(content, rng) if i % 2 else edited_header(content, rng)
        file = root / f"{i}.safetensors"
        file.write_bytes(content)
        # Of every fourth only: what traces memory takes most of the time.
        if traced := i % 8 in (0, 5):
            tracemalloc.start()
        start = time.process_time()
        taken += read_all(model, file)
        assert time.process_time() - start < SECONDS
        if traced:
            assert tracemalloc.get_traced_memory()[1] < 4 * len(content) + FLOOR
            tracemalloc.stop()
        file.unlink()
    return taken


def test_mutated_files_give_one_error(checkpoints: Checkpoints, tmp_path: Path):
    taken = fuzz(checkpoints("df", "original"), tmp_path, 32)
    assert 0 < taken < 22


@pytest.mark.slow
def test_many_mutated_files_give_one_error(checkpoints: Checkpoints, tmp_path: Path):
    taken = fuzz(checkpoints("df", "original"), tmp_path, 2000)
    assert 150 < taken < 1300


def test_a_file_whose_product_would_be_huge_takes_no_memory(
    checkpoints: Checkpoints, tmp_path: Path
):
    """Ranks and shapes are proved against the weight before anything is multiplied."""
    folder = checkpoints("df", "original")
    q = "diffusion_model.blocks.0.self_attn.q"
    file = write(
        tmp_path / "x.safetensors",
        {f"{q}.lora_A.weight": random(1, 1 << 16), f"{q}.lora_B.weight": random(1 << 16, 1)},
    )
    tracemalloc.start()
    assert not read_all(stored(folder), file)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < FLOOR
    shapes = weights(folder)
    good = low_rank({n.removesuffix(".weight"): shapes[n].shape for n in linears(folder)})
    assert read_all(stored(folder), write(tmp_path / "y.safetensors", good))
