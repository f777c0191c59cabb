"""Mutated PyTorch archives: the right tensors or one WeightsError, in little time and memory.

Two kinds of mutation. Of the whole file: checksums must catch what changes the tensors. Of the
pickle alone, with the archive around it made sound again: then what our reader accepts, torch's own
restricted unpickler must accept as well and with the same tensors.
"""

import gc
import io
import random
import struct
import time
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.weights.pth_files import MAGIC, archive, mapping, storage_bytes, tensor, text, write
from tests.weights.pth_files import zipped as zipped_members

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights import torch_file
from skyreels_jax.weights.torch_file import PthSource

SEED = 20260923
# Files, and pickles.
each_count = pytest.mark.parametrize("count", [1000, pytest.param(5000, marks=pytest.mark.slow)])
SECONDS = 5.0


def originals() -> list[bytes]:
    """Small files that between them use every opcode and record."""
    base = torch.arange(24, dtype=torch.float32).reshape(2, 3, 4)
    module = torch.nn.BatchNorm1d(2)
    values = [
        {"a": base, "b": base.transpose(0, 2), "c": base[1, 1:], "d": torch.tensor(1.5)},
        module.state_dict(),
        {"state_dict": dict(module.named_parameters())},
        {"e": torch.arange(300, dtype=torch.bfloat16), "f": torch.ones(2, dtype=torch.uint16)},
    ]
    contents = []
    for value in values:
        stream = io.BytesIO()
        torch.save(value, stream)
        contents.append(stream.getvalue())
    return [*contents, archive(mapping(tensor()), [storage_bytes()], version=b"3\n")]


def mutated(content: bytes, rng: random.Random) -> bytes:
    """One to four random edits."""
    data = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at = rng.randrange(len(data) + 1)
        kind = rng.randrange(7)
        if kind == 0:
            data[at : at + 1] = bytes([rng.randrange(256)])
        elif kind == 1 and at < len(data):
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 2:
            del data[at : at + rng.choice((1, 2, 4, 16, 200))]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.choice((1, 2, 4, 16)))
        elif kind == 4:
            source = rng.randrange(len(data) + 1)
            data[at:at] = data[source : source + rng.choice((1, 3, 8, 60))]
        elif kind == 5:
            wide = rng.choice((0, 1, 0x7F, 0xFF, 0xFFFF, 2**31, 2**32 - 1, 2**63, 2**64 - 1))
            field = struct.pack("<Q", wide)[: rng.choice((1, 2, 4, 8))]
            data[at : at + len(field)] = field
        else:
            del data[at:]
    return bytes(data)


def read_all(file: Path) -> dict[str, np.ndarray] | None:
    """All tensors, or ``None`` if the file is refused; any other exception fails the test."""
    try:
        source = PthSource(file)
        return {name: source.read(name) for name in source.tensors()}
    except WeightsError:
        return None


def assert_tensors_equal(actual: dict[str, np.ndarray], expected: dict[str, torch.Tensor]):
    if len(expected) == 1 and isinstance(inner := next(iter(expected.values())), dict):
        expected = inner
    assert list(actual) == list(expected)
    for name, value in expected.items():
        assert actual[name].shape == tuple(value.shape)
        assert str(actual[name].dtype) == str(value.dtype).removeprefix("torch.")
        raw = value.detach().contiguous().reshape(-1)
        if raw.numel():
            assert actual[name].tobytes() == raw.view(torch.uint8).numpy().tobytes()


def fuzz(
    folder: Path, count: int, mutate: Callable[[bytes, random.Random], bytes]
) -> list[tuple[int, bytes, dict[str, np.ndarray]]]:
    """What was accepted: the original's number, the mutated file, its tensors."""
    rng = random.Random(SEED)
    contents = originals()
    accepted, slowest = [], 0.0
    file = folder / "x.pth"
    for i in range(count):
        number = i % len(contents)
        content = mutate(contents[number], rng)
        # A new file each time: the last one may still be mapped.
        file.unlink(missing_ok=True)
        file.write_bytes(content)
        start = time.perf_counter()
        tensors = read_all(file)
        slowest = max(slowest, time.perf_counter() - start)
        if tensors is not None:
            accepted.append((number, content, tensors))
    # Measured 0.02 s on a busy machine; this is what users are promised, not a measure of speed.
    assert slowest < SECONDS
    return accepted


def torch_loads(content: bytes) -> dict[str, torch.Tensor]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)


@each_count
def test_mutated_files_give_the_right_tensors_or_one_error(tmp_path: Path, count: int):
    expected = [torch_loads(content) for content in originals()]
    accepted = fuzz(tmp_path, count, mutated)
    for number, _, tensors in accepted:
        assert_tensors_equal(tensors, expected[number])
    # Measured 498 of 5000: dates, padding, trailing records. Not all, not none.
    assert count / 25 < len(accepted) < count / 4


def with_mutated_pickle(content: bytes, rng: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as members:
        parts = {name: members.read(name) for name in members.namelist()}
    name = next(name for name in parts if name.endswith("/data.pkl"))
    parts[name] = mutated(parts[name], rng)
    return zipped_members(parts)


@each_count
def test_mutated_pickles_mean_what_they_mean_to_torch(tmp_path: Path, count: int):
    accepted = fuzz(tmp_path, count, with_mutated_pickle)
    for _, content, tensors in accepted:
        assert_tensors_equal(tensors, torch_loads(content))
    # Measured 67 of 5000: names and numbers that nothing contradicts.
    assert count * 0.006 < len(accepted) < count / 4


def test_without_checksums_the_fuzzer_finds_wrong_tensors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """Negative twin."""
    monkeypatch.setattr(torch_file, "check_crc", lambda *_: None)
    expected = [torch_loads(content) for content in originals()]
    with pytest.raises(AssertionError):
        for number, _, tensors in fuzz(tmp_path, 500, mutated):
            assert_tensors_equal(tensors, expected[number])


# Memory

KIB = 1 << 10
# In place of 4 MiB, so that small files, which are quick to trace, are limited by their size.
FLOOR = 256 * KIB


def listed(item: bytes, count: int) -> bytes:
    """A list of ``count`` times 4,000 items."""
    return archive(MAGIC + b"](" + (item * 4000 + b"e(") * count)


def bombs() -> dict[str, bytes]:
    """Files of 70 KiB and more whose descriptions would become many times as large."""
    names = [text(f"{i:06}") for i in range(6000)]
    return {
        "lists waiting": archive(MAGIC + b"]" * 80 * KIB),
        "lists in lists": archive(MAGIC + b"]" + b"](" * 35 * KIB),
        "lists kept": listed(b"]", 18),
        "mappings kept": listed(b"}", 18),
        "integers kept": listed(b"J\xff\xff\xff\x7f", 4),
        "wide texts kept": listed(b"X\x05\0\0\0a\xf0\x9f\x98\x80", 2),
        "globals kept": listed(b"ctorch\nSize\n", 2),
        "calls kept": listed(b"ccollections\nOrderedDict\n)R", 1),
        "tuples in tuples": archive(MAGIC + b"N" + b"\x85" * 70 * KIB),
        "marks": archive(MAGIC + b"(" * 70 * KIB),
        "entries": archive(MAGIC + b"}" + b"".join(name + b"Ns" for name in names) + b"."),
        "memo": archive(
            MAGIC + b"N" + b"".join(b"r" + struct.pack("<I", i) for i in range(15_000))
        ),
        "one tensor by many names": archive(
            MAGIC
            + tensor()
            + b"q\0"
            + b"}"
            + b"".join(name + b"h\0s" for name in names)
            + b"\x86.",
            [storage_bytes()],
        ),
        "members": zipped_members({f"x/{i:x}": b"" for i in range(1000)}),
        "a large member": archive(mapping(tensor()), [storage_bytes()], pad=bytes(70 * KIB)),
        "a long end": archive(mapping(tensor()), [storage_bytes()]) + bytes(70 * KIB),
    }


BOMBS = bombs()


@pytest.fixture
def small_floor(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch_file, "ALLOWANCE_FLOOR", FLOOR)


def peak_of(file: Path) -> int:
    gc.collect()
    tracemalloc.start()
    try:
        read_all(file)
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def limit_of(file: Path) -> int:
    return max(4 * file.stat().st_size, FLOOR)


@pytest.mark.usefixtures("small_floor")
@pytest.mark.parametrize("kind", BOMBS)
def test_no_file_takes_four_times_its_size_in_memory(tmp_path: Path, kind: str):
    file = write(tmp_path, BOMBS[kind])
    # Measured: 3.5 times the size at most ("members").
    assert peak_of(file) <= limit_of(file)


def test_without_the_allowance_a_bomb_takes_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Negative twin."""
    monkeypatch.setattr(torch_file, "ALLOWANCE_FACTOR", 1000)
    file = write(tmp_path, listed(b"]", 3))
    assert peak_of(file) > limit_of(file)


@pytest.mark.usefixtures("small_floor")
def test_mutated_larger_files_stay_within_the_memory(tmp_path: Path):
    stream = io.BytesIO()
    torch.save({f"w{i}": torch.zeros(1000).reshape(10, 100).T for i in range(80)}, stream)
    rng = random.Random(SEED)
    for i in range(8):
        file = write(tmp_path, mutated(stream.getvalue(), rng), f"{i}.pth")
        assert peak_of(file) <= limit_of(file)
