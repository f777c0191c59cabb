"""Damaged and hostile JSON in every component's place: only the program's own errors, at once."""

import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tests.cli.commands import linked, rewrite
from tests.fabricate import Checkpoints

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.errors import SkyReelsError
from skyreels_jax.prompts import Tokenizer
from skyreels_jax.weights.components.clip import stored_image_encoder
from skyreels_jax.weights.components.transformer import stored_transformer
from skyreels_jax.weights.components.umt5 import stored_text_encoder
from skyreels_jax.weights.components.vae import stored_vae

# Processor seconds that any of them may take; measured 0.6 at most, in tests that check types.
SECONDS = 2.0

# What reads each file.
READERS: dict[str, Callable[[Checkpoint], object]] = {
    "model_index.json": lambda made: made.about,
    "transformer/config.json": lambda made: (
        made.block_length,
        stored_transformer(made.layout).verify(),
    ),
    "vae/config.json": lambda made: stored_vae(made.layout).verify(),
    "text_encoder/config.json": lambda made: stored_text_encoder(made.layout).verify(),
    "image_encoder/config.json": lambda made: stored_image_encoder(made.layout).verify(),
    "scheduler/scheduler_config.json": lambda made: made.about,
    "tokenizer/tokenizer.json": lambda made: Tokenizer.from_folder(made.tokenizer).encode(["a"]),
}
NUMBERS = (0, 1, -1, 7, 64, 2**31, 2**64, -(2**64), 10**300, 0.5, 1e308, 1e-320, -0.0, math.inf)
OTHERS = (math.nan, None, True, False, "", "x" * 5000, "auto", "\ud800", "../..", [], {}, [[]])
LARGE = ([0] * 3000, {"a": [{"b": {}}]}, [1e9] * 4, [-1, 2, 2], [2, 2], ["a", "b"], [None] * 4)
HOSTILE = (*NUMBERS, *OTHERS, *LARGE)
WHOLE = (b"", b"[]", b"null", b"7", b'"x"', b"\xff\xfe{}", b"[" * 200_000, b'{"a":' * 50_000)


def places(value: Any, path: tuple = ()) -> list[tuple]:
    """Every place in a JSON value."""
    found = [path]
    if isinstance(value, dict | list):
        inner = value.items() if isinstance(value, dict) else enumerate(value)
        for key, part in list(inner)[:60]:
            found += places(part, (*path, key))
    return found


def changed(value: Any, rng: np.random.Generator) -> Any:
    """The value with something in it replaced, taken out, added or doubled."""
    value = json.loads(json.dumps(value))
    for _ in range(int(rng.integers(1, 4))):
        path = places(value)[int(rng.integers(len(places(value))))]
        if not path:
            continue
        holder = value
        try:
            for key in path[:-1]:
                holder = holder[key]
            match int(rng.integers(5)):
                case 0:
                    del holder[path[-1]]
                case 1:
                    holder[path[-1]] = [holder[path[-1]]] * int(rng.integers(4))
                case _:
                    holder[path[-1]] = HOSTILE[int(rng.integers(len(HOSTILE)))]
        except (KeyError, IndexError, TypeError):
            continue
    return value


def content(original: bytes, rng: np.random.Generator) -> bytes:
    """What stands in the file's place."""
    kind = int(rng.integers(10))
    if kind == 0:
        return WHOLE[int(rng.integers(len(WHOLE)))]
    if kind == 1:
        return original[: int(rng.integers(len(original)))]
    if kind == 2:
        broken = bytearray(original)
        for _ in range(3):
            broken[int(rng.integers(len(broken)))] ^= 1 << int(rng.integers(8))
        return bytes(broken)
    text = json.dumps(changed(json.loads(original), rng))
    return text.encode("utf-8", "surrogatepass")


def read(folder: Path, name: str) -> str:
    """What comes of a folder: ``read``, or the error's class; others pass through."""
    start = time.process_time()
    try:
        READERS[name](Checkpoint.open(folder))
        outcome = "read"
    except SkyReelsError as error:
        assert 0 < len(str(error)) < 2000
        outcome = type(error).__name__
    assert time.process_time() - start < SECONDS
    return outcome


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize(
    "count", [pytest.param(14, id="few"), pytest.param(143, id="many", marks=pytest.mark.slow)]
)
def test_only_errors_of_ours_come_of_hostile_json(
    name: str, count: int, checkpoints: Checkpoints, tmp_path: Path
):
    folder = linked(checkpoints("i2v", "diffusers"), tmp_path / "m")
    original = (folder / name).read_bytes()
    assert read(folder, name) == "read"
    rng = np.random.default_rng([*name.encode()])
    outcomes = []
    for _ in range(count):
        damaged = content(original, rng)
        rewrite(folder / name, damaged)
        try:
            outcomes.append(read(folder, name))
        except Exception as error:
            raise AssertionError(f"{damaged[:2000]!r}") from error
    assert "WeightsError" in outcomes or name == "model_index.json"
    # Negative twin: as it was, it is read again, with a byte-order mark too.
    for good in (original, b"\xef\xbb\xbf" + original):
        rewrite(folder / name, good)
        assert read(folder, name) == "read"


@pytest.mark.parametrize("name", READERS)
@pytest.mark.parametrize("kind", ["pipe", "endless", "folder"])
def test_what_is_no_regular_file_is_refused_at_once(
    name: str, kind: str, checkpoints: Checkpoints, tmp_path: Path
):
    folder = linked(checkpoints("i2v", "diffusers"), tmp_path / "m")
    (folder / name).unlink()
    if kind == "pipe":
        os.mkfifo(folder / name)
    elif kind == "endless":
        (folder / name).symlink_to("/dev/zero")
    else:
        (folder / name).mkdir()
    with pytest.raises(SkyReelsError, match=r"not a regular file") as caught:
        READERS[name](Checkpoint.open(folder))
    assert Path(name).name in str(caught.value)


def test_notes_of_macos_are_passed_over(checkpoints: Checkpoints, tmp_path: Path):
    folder = linked(checkpoints("i2v", "diffusers"), tmp_path / "m")
    for file in [*folder.rglob("*.json"), *folder.rglob("*.safetensors")]:
        (file.parent / f"._{file.name}").write_bytes(b"\x00\x05\x16\x07" + b"\x00" * 60)
    for name in ("transformer/config.json", "vae/config.json", "tokenizer/tokenizer.json"):
        assert read(folder, name) == "read"


def test_a_tokenizer_of_any_size_is_not_read(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder = linked(checkpoints("t2v", "diffusers"), tmp_path / "m")
    file = folder / "tokenizer" / "tokenizer.json"
    file.unlink()
    with file.open("wb") as stream:
        stream.truncate(2**40)  # A hole: it takes no disk.
    with pytest.raises(SkyReelsError, match=r"tokenizer\.json has 1099511627776 bytes; at most"):
        Tokenizer.from_folder(folder / "tokenizer")
