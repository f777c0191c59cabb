"""Writes weights: streamed into safetensors shards, and folders that appear whole or not at all."""

import json
import os
import shutil
import struct
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Final

import numpy as np

from skyreels_jax.errors import RequestError, WeightsError
from skyreels_jax.files import read_json, temporary_beside, whole_file, write_json, write_text
from skyreels_jax.interrupt import deferred
from skyreels_jax.outputs import free_name, path_of
from skyreels_jax.weights.engine import TensorStream
from skyreels_jax.weights.safetensors_file import DTYPES, TensorSpec

_CODES: Final[Mapping[np.dtype, str]] = {dtype: code for code, dtype in DTYPES.items()}
# In a folder that may be replaced: its files and their sizes.
_LIST: Final = ".made-by-skyreels-jax.json"
# Files that a refusal names.
_NAMED: Final = 5
# What diffusers and transformers cut their own files to.
MAX_SHARD_BYTES: Final = 5_000_000_000


@contextmanager
def new_folder(folder: Path, *, overwrite: bool = False, marked: bool = False) -> Iterator[Path]:
    """A temporary folder that becomes ``folder`` when the block ends, and vanishes if it fails.

    Args:
        folder: to make; its parents are made too.
        overwrite: replace a folder that is there (only once the new one is complete).
        marked: a hidden file in it lists what it holds, and only what such a file lists is
            replaced.

    Raises:
        RequestError: if ``folder`` is there, holds files and may not be replaced; what came there
            while the new one was made stays, and the new one gets a free name.
        WeightsError: if the file system refuses a write.
    """
    folder = path_of(folder, "folder to write to")
    if folder.exists() and not folder.is_dir():
        raise RequestError(f"{folder} is a file; give a folder to write to")
    _check_replaceable(folder, overwrite, marked)
    # Not the name of a link, and "." has none.
    target = folder.resolve()
    partial = temporary_beside(target)
    try:
        partial.mkdir(parents=True)
        yield partial
        if marked:
            write_json(partial / _LIST, {"files": dict(_sizes(partial))})
        try:
            _check_replaceable(folder, overwrite, marked)
        except RequestError as error:
            free = free_name(target)
            partial.rename(free)
            raise RequestError(f"{error}; what was made is in {free}") from error
        _swap(partial, target)
    except OSError as error:
        raise WeightsError(f"{folder} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(folder: Path, overwrite: bool, marked: bool) -> None:
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not overwrite:
        raise RequestError(f"{folder} is there already: choose another, or allow overwriting it")
    if marked and (foreign := list(islice(_foreign(folder), _NAMED + 1))):
        names = ", ".join(foreign[:_NAMED]) + (" and more" if len(foreign) > _NAMED else "")
        raise RequestError(
            f"{folder} holds what this program did not write there: {names}; move that away, or "
            "choose another folder"
        )


def _foreign(folder: Path) -> Iterator[str]:
    """What a folder holds besides the files that its list names, as they were written."""
    listed: dict[str, int] = {}
    if (folder / _LIST).is_file():
        found = read_json(folder / _LIST)
        found = found.get("files") if isinstance(found, dict) else None
        listed = found if isinstance(found, dict) else {}
    parents = {str(parent) for name in listed for parent in Path(name).parents}
    for place, folders, files in os.walk(folder):
        for name in sorted(folders):
            path = Path(place, name)
            if path.is_symlink() or str(path.relative_to(folder)) not in parents:
                yield str(path.relative_to(folder))
        for name in sorted(files):
            path = Path(place, name)
            within = path.relative_to(folder)
            if str(within) != _LIST and listed.get(str(within)) != path.lstat().st_size:
                yield str(within)


def _sizes(folder: Path) -> Iterator[tuple[str, int]]:
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            yield str(path.relative_to(folder)), path.stat().st_size


def _swap(partial: Path, folder: Path) -> None:
    """Give a complete folder its name, and remove what had it; a signal waits for both."""
    replaced = temporary_beside(folder)
    with deferred():
        if folder.exists():
            folder.rename(replaced)
        try:
            partial.rename(folder)
        except BaseException:
            if replaced.exists():
                replaced.rename(folder)
            raise
        shutil.rmtree(replaced, ignore_errors=True)


def write_tensor_file(file: Path, tensors: TensorStream, *, overwrite: bool = False) -> None:
    """Stream tensors into one safetensors file, which appears whole or not at all.

    Args:
        file: to write.
        tensors: one is held at a time; their metadata goes into the header.
        overwrite: replace a file that is there.

    Raises:
        RequestError: something is there and may not be replaced.
        WeightsError: the file system refuses, or the values are not what the specs announce.
    """
    try:
        with whole_file(file, replace=overwrite) as temporary:
            _write_shard(temporary, tensors.specs, iter(tensors.values), tensors.metadata)
    except FileExistsError as error:
        raise RequestError(
            f"{file} is there already: choose another name, or `overwrite`"
        ) from error
    except OSError as error:
        raise WeightsError(f"{file} cannot be written: {error}") from error


def write_config(file: Path, value: Mapping[str, object]) -> None:
    """Write a JSON file as the published folders have them: indented, keys in order."""
    write_text(file, json.dumps(value, indent=2, sort_keys=True) + "\n")


def write_tensors(
    folder: Path, stem: str, tensors: TensorStream, *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> list[Path]:
    """Stream tensors into ``stem*.safetensors`` shards, with an index if there are several.

    Args:
        folder: an existing folder, usually one of :func:`new_folder`.
        stem: of the file names: ``stem.safetensors`` or ``stem-00001-of-00002.safetensors``.
        tensors: one is held at a time.
        max_shard_bytes: a shard grows no larger, unless by a single tensor.

    Returns:
        The files, index last.

    Raises:
        WeightsError: if the values are not what the specs announce.
    """
    specs = tensors.specs
    shards = _shards(specs, max_shard_bytes)
    files = [folder / _shard_name(stem, k, len(shards)) for k in range(len(shards))]
    stream = tensors.values
    for file, names in zip(files, shards, strict=True):
        _write_shard(file, {name: specs[name] for name in names}, stream, tensors.metadata)
    extra = next(stream, None)
    if extra is not None:
        raise WeightsError(f"{folder}: {extra[0]} was not announced")
    if len(files) > 1:
        index = {
            "metadata": {"total_size": sum(spec.nbytes for spec in specs.values())},
            "weight_map": {
                name: file.name for file, names in zip(files, shards, strict=True) for name in names
            },
        }
        files.append(folder / f"{stem}.safetensors.index.json")
        write_config(files[-1], index)
    return files


def _shards(specs: Mapping[str, TensorSpec], max_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    room = max_bytes
    for name, spec in specs.items():
        if spec.nbytes > room and shards[-1]:
            shards.append([])
            room = max_bytes
        shards[-1].append(name)
        room -= spec.nbytes
    return shards


def _shard_name(stem: str, index: int, count: int) -> str:
    number = "" if count == 1 else f"-{index + 1:05d}-of-{count:05d}"
    return f"{stem}{number}.safetensors"


@dataclass(frozen=True)
class _Header:
    raw: bytes
    offsets: Mapping[str, int]
    size: int


def _header(specs: Mapping[str, TensorSpec], metadata: Mapping[str, str]) -> _Header:
    """Wide dtypes first, so that every tensor is aligned to its own size."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    offsets: dict[str, int] = {}
    end = 0
    for name in sorted(specs, key=lambda name: -specs[name].dtype.itemsize):
        spec = specs[name]
        offsets[name] = end
        end += spec.nbytes
        entries[name] = {
            "dtype": _CODES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offsets[name], end],
        }
    raw = json.dumps(entries, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    return _Header(struct.pack("<Q", len(raw)) + raw, offsets, end)


def _write_shard(
    file: Path,
    specs: Mapping[str, TensorSpec],
    values: Iterator[tuple[str, np.ndarray]],
    metadata: Mapping[str, str],
) -> None:
    header = _header(specs, metadata)
    temporary = file.with_name(f".{file.name}.partial")
    with temporary.open("wb") as stream:
        stream.write(header.raw)
        for expected in specs:
            name, value = next(values, ("nothing", np.empty(0)))
            spec = specs[expected]
            if name != expected or (value.shape, value.dtype) != (spec.shape, spec.dtype):
                raise WeightsError(
                    f"{file}: {expected} {spec.dtype} {list(spec.shape)} was announced, "
                    f"{name} {value.dtype} {list(value.shape)} came"
                )
            stream.seek(len(header.raw) + header.offsets[name])
            stream.write(np.ascontiguousarray(value).reshape(-1).view(np.uint8).data)
        stream.truncate(len(header.raw) + header.size)
        stream.flush()
        os.fsync(stream.fileno())
    temporary.rename(file)
