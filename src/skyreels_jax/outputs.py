"""Paths that users give; whether their names, folders and disk allow output, and who works on it.

All of this is asked before any work is done for it, so that what took hours is not lost to a name.
"""

import errno
import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from skyreels_jax.errors import RequestError
from skyreels_jax.files import LATENTS_SUFFIX, reason_of, require_regular, temporary_beside

# Most bytes of a file's name, on every file system that is common.
_MAX_NAME_BYTES: Final = 255
# Characters of a path in a message that cannot say more about it.
_SHOWN: Final = 200
# How long a lock is waited for.
LOCK_SECONDS: Final = 0.2


def path_of(given: str | Path, what: str) -> Path:
    """The path that a user gave, with ``~`` written out; nothing needs to be there.

    Raises:
        RequestError: nothing can have this name, or what is there cannot be looked at. Python would
            say so with an error of its own wherever the path is used first.
    """
    try:
        path = Path(given).expanduser()
        with suppress(FileNotFoundError, NotADirectoryError):
            path.stat()
    except RuntimeError as error:
        raise RequestError(f"{what} {_short(given)}: there is no such home folder") from error
    except (OSError, ValueError) as error:
        raise RequestError(f"{what} {_short(given)}: {reason_of(error)}") from error
    return path


def folder_of(given: str | Path, what: str) -> Path:
    """The same of a folder.

    Raises:
        RequestError: as :func:`path_of`, or a file is where the folder or one above it belongs.
    """
    folder = path_of(given, what)
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise RequestError(f"{what} {_short(given)}: {path} is a file; name a folder")
    return folder


def make_folder(given: str | Path, what: str) -> Path:
    """Make a folder that a user named, and those above it, unless it is there.

    Raises:
        RequestError: as :func:`folder_of`, or it cannot be made.
    """
    folder = folder_of(given, what)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RequestError(f"{what} {folder} cannot be made: {reason_of(error)}") from error
    return folder


def _short(given: str | Path) -> str:
    text = str(given)
    return repr(text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…")


def check_names(paths: Iterable[Path]) -> None:
    """Refuse names that no file can have, before any work is done for it.

    Raises:
        RequestError: a name is too long, or holds a character that no name may have.
    """
    for path in paths:
        if "\0" in str(path):
            raise RequestError(f"output {str(path)!r}: a name cannot hold a null character")
        size, most = len(os.fsencode(path.name)), _longest_name(path.parent)
        if size > most:
            raise RequestError(
                f"output {path.name[:40]}…: a name of {size} bytes; the file system takes at most "
                f"{most}, so shorten it by at least {size - most} bytes"
            )
        try:
            os.lstat(path)
        except (FileNotFoundError, NotADirectoryError, PermissionError):
            pass
        except OSError as error:
            raise RequestError(f"output {path}: no file can have this name: {error}") from error


def _longest_name(folder: Path) -> int:
    try:
        return min(_MAX_NAME_BYTES, os.pathconf(folder, "PC_NAME_MAX"))
    except (OSError, ValueError, AttributeError):
        return _MAX_NAME_BYTES


def check_place(path: Path, what: str = "output") -> None:
    """Refuse a path at which no regular file can be made, by trying a temporary name beside it.

    Raises:
        RequestError: it is something else than a file, its name is illegal, or its folder does not
            exist or cannot be written to.
    """
    check_names([path])
    if path.is_dir():
        raise RequestError(f"{what} {path} is a folder; name a file in it")
    if path.exists():
        require_regular(path.stat(), path, what, RequestError)
    if not path.parent.is_dir():
        raise RequestError(f"{what} {path}: the folder {path.parent} does not exist; create it")
    attempt = temporary_beside(path)
    try:
        attempt.touch(exist_ok=False)
        attempt.unlink()
    except OSError as error:
        raise RequestError(
            f"{what} {path}: the folder {path.parent} cannot be written to ({reason_of(error)})"
        ) from error


def check_space(folder: Path, sizes: Sequence[int], what: str) -> None:
    """Refuse to begin what the disk of ``folder``, or a limit of the process, has no room for.

    Args:
        folder: where it is written.
        sizes: of the files, in bytes.
        what: is written, for the message.

    Raises:
        RequestError: less is free, or a file would be larger than files may be.
    """
    try:
        free = shutil.disk_usage(folder).free
    except OSError:
        free = None  # A file system that does not say; writing will tell.
    if free is not None and free < sum(sizes):
        raise RequestError(
            f"{what} takes about {_mebibytes(sum(sizes))} and {folder} has {_mebibytes(free)} "
            "free: make room, or write elsewhere"
        )
    most = _largest_file()
    if most is not None and max(sizes, default=0) > most:
        raise RequestError(
            f"{what} takes a file of about {_mebibytes(max(sizes))} and this process may write "
            f"files of {_mebibytes(most)} at most (ulimit -f): raise the limit"
        )


def _mebibytes(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def _largest_file() -> int | None:
    """Bytes of the largest file that this process may write, where there is a limit."""
    try:
        import resource
    except ImportError:  # Windows has no such limit.
        return None
    soft, _ = resource.getrlimit(resource.RLIMIT_FSIZE)
    return None if soft == resource.RLIM_INFINITY else soft


@contextmanager
def locked(path: Path, what: str, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Keep other processes from working on ``path``, which need not exist, for the body.

    The lock is the operating system's: it ends with the process, however that ends. Another's is
    waited for so many ``seconds``.

    Raises:
        RequestError: another process has it.
    """
    from filelock import FileLock, Timeout

    # The name does not grow with that of `path`, and is one for all ways to write it.
    name = Path(os.path.abspath(path)).name
    digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
    file = Path(os.path.realpath(Path(os.path.abspath(path)).parent)) / f".lock-{digest}.skyreels"
    lock = FileLock(file)
    try:
        # Not zero: who held it may be about to remove the file.
        lock.acquire(timeout=seconds, poll_interval=LOCK_SECONDS / 4)
    except Timeout as error:
        raise RequestError(
            f"{what} {path} is being worked on by another process: wait for it, or name another"
        ) from error
    except OSError as error:
        raise RequestError(f"{what} {path} cannot be locked: {reason_of(error)}") from error
    try:
        yield
    finally:
        # While it is still held: who comes later makes a new one.
        with suppress(OSError):
            file.unlink(missing_ok=True)
        lock.release()


def state_of(path: Path) -> list[int] | None:
    """What tells a file from one that replaced it: size and time of change; ``None`` for none."""
    try:
        status = os.lstat(path)
    except OSError:
        return None
    return [status.st_size, status.st_mtime_ns]


def fallback_folders() -> Iterator[Path]:
    """Where what is finished may go when its own place refuses it, the most likely first."""
    for place in (tempfile.gettempdir, Path.home, Path.cwd):
        with suppress(OSError, RuntimeError):
            yield Path(place())


def free_name(path: Path) -> Path:
    """The first of ``name-1.suffix``, ``name-2.suffix``, … that nothing has, beside ``path``."""
    suffix = LATENTS_SUFFIX if path.name.endswith(LATENTS_SUFFIX) else path.suffix
    for number in range(1, 10_000):
        end = f"-{number}{suffix}"
        room = _longest_name(path.parent) - len(os.fsencode(end))
        stem = os.fsencode(path.name.removesuffix(suffix))[:room].decode(errors="ignore")
        if not os.path.lexists(found := path.with_name(f"{stem}{end}")):
            return found
    raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path))
