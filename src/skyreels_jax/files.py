"""Writing and opening files: whole or not at all, and only regular ones.

Everything that this package writes is written under a temporary name in the same folder and
renamed when it is whole, so that whatever interrupts the writing, no half file has the name that
was asked for. Everything that it reads is opened here first: a pipe, a device or a folder in a
file's place is refused at once instead of being waited for.
"""

import json
import math
import os
import secrets
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, Final

from skyreels_jax.errors import RequestError, SkyReelsError

# Begins the name of every temporary file of ours, and of nobody else's.
TEMPORARY_PREFIX: Final = ".skyreels-"
# Most bytes of a file's name, on every file system that is common.
MAX_NAME_BYTES: Final = 255
MAX_JSON_BYTES: Final = 16 * 2**20
# Suffixes decide a format where a library writes; none that does is longer.
_MAX_SUFFIX: Final = 16


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name when the body ends, or is removed.

    The name has the suffix of ``path`` and is short, however long that of ``path`` is.

    Raises:
        OSError: the file system refuses; nothing is left behind.
    """
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= _MAX_SUFFIX else ""
    temporary = path.with_name(f"{TEMPORARY_PREFIX}{secrets.token_hex(6)}{suffix}")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        # What made the body fail says more than what makes the removal fail.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a whole text file in UTF-8; raises OSError."""
    with whole_file(path) as temporary:
        temporary.write_text(text, "utf-8")


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a whole JSON file; raises OSError, ValueError or TypeError for what is no JSON."""
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)
    write_text(path, text + "\n")


def remove_temporary(folder: Path) -> None:
    """Remove temporary files in ``folder`` that an interruption has left."""
    for left in folder.glob(f"{TEMPORARY_PREFIX}*"):
        with suppress(OSError):
            left.unlink()


def open_regular(
    path: str | Path, what: str = "file", *, error: type[SkyReelsError] = RequestError
) -> BinaryIO:
    """Open a regular file for reading; never waits.

    Args:
        path: of the file; links to regular files are followed.
        what: it is, for the messages.
        error: to raise.

    Raises:
        SkyReelsError: of class ``error``: there is no such file, it is no regular one, or it cannot
            be read.
    """
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
    flags |= getattr(os, "O_BINARY", 0)
    try:
        # Before it is opened: opening alone moves some devices, and a pipe's other end notices.
        _require_regular(os.stat(path), path, what, error)
        handle = os.open(path, flags)
    except SkyReelsError:
        raise
    except FileNotFoundError as missing:
        raise error(f"{what} {path}: there is no such file") from missing
    except (OSError, ValueError) as refusal:
        raise error(f"{what} {path} cannot be read: {_reason(refusal)}") from refusal
    try:
        _require_regular(os.fstat(handle), path, what, error)
    except BaseException:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def _require_regular(
    status: os.stat_result, path: str | Path, what: str, error: type[SkyReelsError]
) -> None:
    if stat.S_ISREG(status.st_mode):
        return
    kinds = (
        (stat.S_ISDIR, "a folder"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a device"),
        (stat.S_ISBLK, "a device"),
    )
    kind = next((name for test, name in kinds if test(status.st_mode)), "something else")
    raise error(f"{what} {path} is {kind}, not a regular file")


def _reason(error: OSError | ValueError) -> str:
    return error.strerror or str(error) if isinstance(error, OSError) else str(error)


def read_bytes(
    path: str | Path,
    what: str = "file",
    *,
    limit: int,
    error: type[SkyReelsError] = RequestError,
) -> bytes:
    """The content of a regular file of at most ``limit`` bytes; raises as :func:`open_regular`."""
    with open_regular(path, what, error=error) as file:
        try:
            size = os.fstat(file.fileno()).st_size
            content = file.read(limit + 1) if size <= limit else b""
        except OSError as refusal:
            raise error(f"{what} {path} cannot be read: {_reason(refusal)}") from refusal
    if size > limit or len(content) > limit:
        raise error(f"{what} {path} has {size} bytes; at most {limit} are read")
    return content


def read_text(
    path: str | Path,
    what: str = "file",
    *,
    limit: int = MAX_JSON_BYTES,
    error: type[SkyReelsError] = RequestError,
) -> str:
    """A text file in UTF-8, with or without a byte-order mark; raises as :func:`open_regular`."""
    try:
        return read_bytes(path, what, limit=limit, error=error).decode("utf-8-sig")
    except UnicodeDecodeError as refusal:
        raise error(f"{what} {path} is no text in UTF-8: {refusal}") from refusal


def read_json(
    path: str | Path,
    what: str = "file",
    *,
    limit: int = MAX_JSON_BYTES,
    error: type[SkyReelsError] = RequestError,
) -> Any:
    """The value of a JSON file, in which every number is finite and every key stands once.

    Args:
        path: of the file.
        what: it is, for the messages.
        limit: most bytes.
        error: to raise.

    Raises:
        SkyReelsError: of class ``error``: as :func:`open_regular`, or the content is no such JSON.
    """
    return parse_json(
        read_text(path, what, limit=limit, error=error), f"{what} {path}", error=error
    )


def parse_json(text: str, where: str, *, error: type[SkyReelsError] = RequestError) -> Any:
    """The value of a JSON text, as :func:`read_json`; ``where`` begins the messages."""
    try:
        return json.loads(
            text,
            object_pairs_hook=_once_each,
            parse_constant=_not_finite,
            parse_float=_finite,
        )
    except RecursionError as refusal:
        raise error(f"{where} is nested too deeply") from refusal
    except ValueError as refusal:
        raise error(f"{where} is no JSON that can be read: {refusal}") from refusal


def _once_each(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice[:80]!r} stands there twice")
    return found


def _not_finite(constant: str) -> float:
    raise ValueError(f"{constant} is no finite number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:40]} is too large a number")
    return number


def check_names(paths: Iterable[Path]) -> None:
    """Refuse names that no file can have, before any work is done for it.

    Raises:
        RequestError: a name is too long, or holds a character that no name may have.
    """
    for path in paths:
        size = len(os.fsencode(path.name))
        if size > MAX_NAME_BYTES:
            raise RequestError(
                f"output {path.name[:40]}…: a name of {size} bytes; file systems take at most "
                f"{MAX_NAME_BYTES}, so shorten it by at least {size - MAX_NAME_BYTES} bytes"
            )
        if "\0" in path.name:
            raise RequestError(f"output {path.name!r}: a name cannot hold a null character")
