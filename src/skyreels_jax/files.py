"""Writing and opening files: whole or not at all, and only regular ones.

Everything that this package writes is written under a temporary name in the same folder and
renamed when it is whole, so that whatever interrupts the writing, no half file has the name that
was asked for. Everything that it reads is opened here first: a pipe, a device or a folder in a
file's place is refused at once instead of being waited for.
"""

import errno
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Final

from skyreels_jax.errors import RequestError, SkyReelsError

if TYPE_CHECKING:
    import numpy as np

# Begins the name of every temporary file of ours, and of nobody else's.
TEMPORARY_PREFIX: Final = ".skyreels-"
MAX_JSON_BYTES: Final = 16 * 2**20
# Suffixes decide a format where a library writes; none that does is longer.
_MAX_SUFFIX: Final = 16
# Of a safetensors file's header. The format allows fifty times as much; the largest released model
# has one of 0.2 MB, and JSON can take 25 times its size in memory.
MAX_HEADER_BYTES: Final = 2_000_000
# Of files with tensors that we write.
_MAX_TENSORS: Final = 64 * 2**30
_CHECKSUM: Final = "sha256"
# Latents that somebody keeps have this name, which no file of a checkpoint has.
LATENTS_SUFFIX: Final = ".latents.safetensors"


@contextmanager
def whole_file(path: Path, *, replace: bool = True) -> Iterator[Path]:
    """A temporary path beside ``path`` that takes its name when the body ends, or is removed.

    The name has the suffix of ``path`` and is short, however long that of ``path`` is.

    Args:
        path: of the file.
        replace: what is there; else that is a FileExistsError.

    Raises:
        OSError: the file system refuses; nothing is left behind.
    """
    suffix = path.suffix if len(os.fsencode(path.suffix)) <= _MAX_SUFFIX else ""
    temporary = temporary_beside(path, suffix)
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        take_name(temporary, path, replace=replace)
    finally:
        # What made the body fail says more than what makes the removal fail.
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def temporary_beside(path: Path, suffix: str = "") -> Path:
    """A name of ours in the folder of ``path`` that nothing has; it is short, whatever that is."""
    return path.with_name(f"{TEMPORARY_PREFIX}{os.urandom(6).hex()}{suffix}")


def take_name(source: Path, target: Path, *, replace: bool) -> None:
    """Give a file another name on its file system, in place of what has it only if asked to.

    Raises:
        OSError: the file system refuses; a FileExistsError where something has the name.
    """
    if replace:
        source.replace(target)
        return
    try:
        # Of the two calls that name a file, the one that never replaces.
        os.link(source, target, follow_symlinks=False)
    except FileExistsError:
        raise
    except OSError:
        # Some file systems have no links.
        if os.path.lexists(target):
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target)) from None
        source.rename(target)
    else:
        source.unlink()


def write_text(path: Path, text: str) -> None:
    """Write a whole text file in UTF-8; raises OSError."""
    with whole_file(path) as temporary:
        temporary.write_text(text, "utf-8")


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write a whole JSON file; raises OSError, ValueError or TypeError for what is no JSON."""
    write_text(path, json_text(value, indent=2) + "\n")


def json_text(value: Mapping[str, Any], *, indent: int | None = None) -> str:
    """A value as JSON that can be encoded in UTF-8; raises ValueError or TypeError for none.

    Names of files may hold bytes that are no UTF-8: these are written as escapes.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=False)
    try:
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(value, indent=indent, allow_nan=False)
    return text


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
        require_regular(os.stat(path), path, what, error)
        handle = os.open(path, flags)
    except SkyReelsError:
        raise
    except FileNotFoundError as missing:
        raise error(f"{what} {path}: there is no such file") from missing
    except (OSError, ValueError) as refusal:
        raise error(f"{what} {path} cannot be read: {reason_of(refusal)}") from refusal
    try:
        require_regular(os.fstat(handle), path, what, error)
    except BaseException:
        os.close(handle)
        raise
    return os.fdopen(handle, "rb")


def require_regular(
    status: os.stat_result, path: str | Path, what: str, error: type[SkyReelsError]
) -> None:
    """Raise ``error`` where ``status`` is not that of a regular file, saying what it is."""
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


def reason_of(error: OSError | ValueError) -> str:
    """What the operating system says, without the path and the number."""
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
            # Not the limit: as many bytes would be taken before anything is read.
            most = min(limit, max(size, 2**16))
            content = file.read(most + 1) if size <= limit else b""
        except OSError as refusal:
            raise error(f"{what} {path} cannot be read: {reason_of(refusal)}") from refusal
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


def save_tensors(
    path: Path,
    tensors: "Mapping[str, np.ndarray]",
    metadata: Mapping[str, str] | None = None,
    *,
    replace: bool = True,
) -> None:
    """Write a safetensors file with a checksum of all that it holds.

    Raises:
        OSError: it cannot be written, whatever the library calls that.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    texts = dict(metadata or {})
    texts[_CHECKSUM] = _checksum(tensors, texts)
    with whole_file(path, replace=replace) as temporary:
        try:
            save_file(dict(tensors), temporary, texts)
        except SafetensorError as error:
            raise OSError(errno.EIO, str(error), str(path)) from error


def load_tensors(
    path: Path, what: str = "file", *, unchecked: bool = False
) -> "tuple[dict[str, np.ndarray], dict[str, str]]":
    """The tensors and texts that :func:`save_tensors` wrote, as long as not one bit is another.

    Args:
        path: of the file.
        what: it is, for the messages.
        unchecked: files without a checksum are read too.

    Raises:
        RequestError: it is missing or no such file, or its checksum is another.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    content = read_bytes(path, what, limit=_MAX_TENSORS)
    try:
        length = int.from_bytes(content[:8], "little")
        if length > min(MAX_HEADER_BYTES, len(content)):
            raise ValueError(f"a header of {length} bytes")
        header = parse_json(content[8 : 8 + length].decode(), f"{what} {path}")
        texts = dict(header.get("__metadata__", {}))
        tensors = load(content)
    except (SafetensorError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise RequestError(
            f"{what} {path} is damaged or not a safetensors file: {error}"
        ) from error
    stated = texts.pop(_CHECKSUM, None)
    if stated is None and unchecked:
        return tensors, texts
    if stated != _checksum(tensors, texts):
        raise RequestError(f"{what} {path} is damaged: its checksum is another")
    return tensors, texts


def _checksum(tensors: "Mapping[str, np.ndarray]", texts: Mapping[str, str]) -> str:
    import hashlib  # Here: the command line's help opens no file.

    digest = hashlib.sha256(json.dumps(sorted(texts.items())).encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"\0{name}\0{tensor.dtype}\0{tensor.shape}\0".encode())
        digest.update(tensor.tobytes())
    return digest.hexdigest()
