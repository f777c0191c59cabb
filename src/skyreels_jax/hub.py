"""Where checkpoints come from, and where things are kept between runs.

A checkpoint is a local folder or is fetched from the Hugging Face hub: the only network code.

One folder holds all that is kept: ``$SKYREELS_JAX_CACHE``, or ``skyreels-jax`` in the user's cache
folder (``$XDG_CACHE_HOME``, else ``~/.cache``). Deleting it is always safe, and so is having none:
a folder that cannot be written to is said once, and gone without.
"""

import difflib
import errno
import fnmatch
import hashlib
import io
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import huggingface_hub
import jax
import numpy as np
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from skyreels_jax.built_in import BUILT_IN
from skyreels_jax.errors import RequestError
from skyreels_jax.outputs import path_of

# Everything that either layout needs, and nothing else: the repositories also hold a tokenizer of
# CLIP's unused text encoder, and pictures. `*` matches slashes here.
NEEDED: Final = (
    "*.json",
    "*.safetensors",
    "Wan2.1_VAE.pth",
    "models_t5_umt5-xxl-enc-bf16.pth",
    "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    "google/umt5-xxl/*",
    "tokenizer/*",
)
# Those without a transformer's weights, for components of another checkpoint.
NEEDED_COMPONENTS: Final = (
    *(pattern for pattern in NEEDED if pattern not in ("*.json", "*.safetensors")),
    *("vae/*", "text_encoder/*", "image_encoder/*", "image_processor/*"),
)
# Where the components are that a checkpoint lacks and nobody gave: a folder or an id.
COMPONENTS_VARIABLE: Final = "SKYREELS_JAX_COMPONENTS"
_NOT_NEEDED: Final = ("xlm-roberta-large/*",)
# Where those of :data:`BUILT_IN` are.
ASSETS: Final = Path(__file__).parent / "assets"
_ID: Final = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A file in a repository: a transformer's, in either format.
_PICKLES: Final = (".pt", ".pth", ".ckpt")
_FILE_ID: Final = re.compile(rf"({_ID.pattern})/([^/].*\.(?:pt|pth|ckpt|safetensors))")
ROOT_VARIABLE: Final = "SKYREELS_JAX_CACHE"
# Compilations faster than this are not worth a file.
MIN_COMPILE_SECONDS: Final = 0.5

logger = logging.getLogger(__name__)
_said: set[Path] = set()


# Change when what a fingerprint covers changes.
_FINGERPRINT: Final = "prompt-embedding-1"
_SAMPLES: Final = 4096
_SAMPLE_BYTES: Final = 256
_READ_WHOLE: Final = 1 << 24


@dataclass(frozen=True)
class Location:
    """A folder or file on this machine, and the id it was fetched by (None for what was here)."""

    folder: Path
    repo: str | None = None


def locate(
    path_or_id: str | Path,
    revision: str | None = None,
    *,
    needed: Sequence[str] = NEEDED,
    known: Sequence[str] | None = None,
) -> Location:
    """Find a checkpoint: what is here as it is, one of this package, or a Hugging Face id.

    An id is fetched into the hub's own cache (once), or found there when ``HF_HUB_OFFLINE`` is set.
    A local folder needs no network.

    Args:
        path_or_id: a folder or file, a name in :data:`BUILT_IN`, or ``owner/name``.
        revision: branch, tag or commit of an id.
        needed: patterns of the files of an id to fetch.
        known: names of transformers' files as ``owner/name/path``, of which one may be an id's
            only one that is meant. Where they are given, even none, ``path_or_id`` may be such a
            name, and an id whose repository has files of PyTorch's alone is that file.

    Raises:
        RequestError: if there is no such folder or id, saying what was looked for; or the id's
            repository has several files of PyTorch's, of which none or more than one is known.
    """
    text = str(path_or_id)
    if not text.strip():
        raise RequestError("no checkpoint was given: expected a folder or a Hugging Face id")
    folder = path_of(text, "checkpoint")
    if folder.is_dir():
        if revision is not None:
            raise RequestError(
                f"`revision` {revision!r} goes with a Hugging Face id, but {text} is a local folder"
            )
        return Location(folder)
    if folder.exists():
        if revision is not None:
            raise RequestError(
                f"`revision` {revision!r} goes with a Hugging Face id, but {text} is a local file"
            )
        return Location(folder)
    if text in BUILT_IN:
        if (ASSETS / text).is_dir():
            return Location(ASSETS / text)
        raise RequestError(
            f"{text} does not come with this installation; make it with `make mini` (hours), or "
            "name a folder or a Hugging Face id"
        )
    is_text = not isinstance(path_or_id, Path)
    if is_text and known is not None and (file := _FILE_ID.fullmatch(text)):
        return Location(_fetch_file(file[1], file[2], revision), file[1])
    if not is_text or not _ID.fullmatch(text):
        raise RequestError(
            f"{text} is neither a folder here{_similar(folder)} nor a Hugging Face id, which has "
            "the form owner/name"
        )
    folder = _fetch(text, revision, needed)
    if known is None or next(folder.rglob("*.safetensors"), None) is not None:
        return Location(folder, text)
    chosen = _only_pickle(text, revision, folder, known)
    return Location(folder if chosen is None else _fetch_file(text, chosen, revision), text)


def _only_pickle(repo: str, revision: str | None, folder: Path, known: Sequence[str]) -> str | None:
    """The file of PyTorch's in a repository that is the transformer; ``None`` where none is."""
    try:
        with _refusals(repo, revision):
            listed = huggingface_hub.list_repo_files(repo, revision=revision)
    except RequestError:
        # Without the hub: what was fetched before.
        listed = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    files = [
        name
        for name in sorted(listed)
        if name.endswith(_PICKLES) and not any(fnmatch.fnmatch(name, n) for n in NEEDED)
    ]
    meant = sorted({name for name in files if f"{repo}/{name}" in known})
    if len(files) <= 1 or len(meant) == 1:
        return next(iter(meant or files), None)
    named = ", ".join(f"{repo}/{name}" for name in meant or files)
    raise RequestError(
        f"{repo} has no safetensors and {len(files)} files of PyTorch's, and nothing says which is "
        f"meant: give one of them in place of the id, {named}"
        + ("; or say which by `preset`" if meant else "")
    )


def _fetch_file(repo: str, name: str, revision: str | None) -> Path:
    with _refusals(repo, revision, name):
        return Path(huggingface_hub.hf_hub_download(repo, name, revision=revision))


def _similar(folder: Path) -> str:
    try:
        names = [p.name for p in folder.absolute().parent.iterdir() if p.is_dir()]
    except OSError:
        return f" (nor is {folder.absolute().parent})"
    close = difflib.get_close_matches(folder.name, names, n=1)
    return f" (there is {folder.with_name(close[0])})" if close else ""


def _is_disks(error: Exception) -> bool:
    """Whether the folder that is written to is what refuses."""
    refusals = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.ENOSPC, errno.EDQUOT)
    return isinstance(error, OSError) and error.errno in refusals


def _fetch(repo: str, revision: str | None, needed: Sequence[str]) -> Path:
    with _refusals(repo, revision):
        return Path(
            huggingface_hub.snapshot_download(
                repo,
                revision=revision,
                allow_patterns=list(needed),
                ignore_patterns=list(_NOT_NEEDED),
            )
        )


@contextmanager
def _refusals(repo: str, revision: str | None, file: str | None = None) -> Iterator[None]:
    """What the hub raises inside, in words."""
    what = f"{repo}/{file}" if file else repo
    what += f" at revision {revision}" if revision else ""
    try:
        yield
    except RevisionNotFoundError as error:
        raise RequestError(
            f"{repo} has no revision {revision!r} on the Hugging Face hub"
        ) from error
    except GatedRepoError as error:
        raise RequestError(
            f"{repo} is gated: accept its terms on the Hugging Face hub and log in (hf auth login)"
        ) from error
    except RepositoryNotFoundError as error:
        raise RequestError(
            f"{repo} is neither a folder here{_similar(Path(repo))} nor a public repository on the "
            "Hugging Face hub; for a private one, log in (hf auth login)"
        ) from error
    except LocalEntryNotFoundError as error:
        raise RequestError(
            f"{what} is neither a folder here{_similar(Path(repo))} nor in the Hugging Face cache, "
            "and the hub was not asked or does not answer (offline, or HF_HUB_OFFLINE is set)"
        ) from error
    except EntryNotFoundError as error:
        raise RequestError(f"{what}: there is no such file on the Hugging Face hub") from error
    except (OSError, ValueError) as error:
        raise RequestError(
            f"{what} could not be fetched from the Hugging Face hub: {error}"
            + ("; HF_HOME names another folder to keep it in" if _is_disks(error) else "")
        ) from error


def cache_root() -> Path | None:
    """The folder of all caches, which need not exist; ``None`` where there is no home folder."""
    if chosen := os.environ.get(ROOT_VARIABLE):
        return Path(chosen)
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError:  # A user without an entry, as containers have.
        return None
    return Path(base) / "skyreels-jax"


def compilation_cache_folder() -> Path | None:
    """Where compiled programs are kept: JAX's own setting if there is one, else under the root."""
    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    return Path(chosen) if chosen else _below_root("compiled")


def prompt_cache_folder() -> Path | None:
    """Where encoded prompts are kept."""
    return _below_root("prompts")


def _below_root(name: str) -> Path | None:
    root = cache_root()
    return None if root is None else root / name


def enable_compilation_cache() -> Path | None:
    """Keep compiled programs between processes; returns the folder, ``None`` for nowhere.

    Settings that the user made through JAX's own variables (``JAX_COMPILATION_CACHE_DIR``,
    ``JAX_ENABLE_COMPILATION_CACHE=false``) stay in force. In a folder that cannot be written to,
    programs are looked up all the same.
    """
    folder, least = compilation_cache_folder(), MIN_COMPILE_SECONDS
    if folder is None:
        warn_unwritable(Path("~/.cache"), "there is no home folder")
    elif (refusal := _refusal(folder)) is not None:
        warn_unwritable(folder, refusal)
        least = math.inf
        folder = folder if folder.is_dir() and os.access(folder, os.R_OK | os.X_OK) else None
    jax.config.update("jax_compilation_cache_dir", None if folder is None else str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", least)
    return folder


def warn_unwritable(folder: Path, reason: object) -> None:
    """Say that a cache is done without; once for all that are under the root."""
    root = cache_root()
    place = root if root is not None and folder.is_relative_to(root) else folder
    if place in _said:
        return
    _said.add(place)
    logger.warning(
        "the cache folder %s cannot be written to (%s): going on without; %s names another",
        *(place, reason, ROOT_VARIABLE),
    )


def _refusal(folder: Path) -> str | None:
    """Why nothing can be kept in ``folder``, which is made; found out by trying."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as attempt:
            attempt.write(b"x")
    except OSError as error:
        return error.strerror or str(error)
    return None


def folder_size(folder: Path) -> tuple[int, int]:
    """``(files, bytes)`` under ``folder``; zeros where it does not exist."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)


def fingerprint(files: Iterable[Path], *settings: str, times: bool = True) -> str:
    """A hash that changes when the weights change, without reading all of them.

    It covers every file's name, size and time of change, its first mebibyte (the names and shapes)
    and 4096 samples of 256 bytes spread over the rest: 2 MB read of the 11 GB of UMT5-XXL. Without
    ``times`` of change it is the same on every machine that has the files.
    """
    digest = hashlib.sha256(_FINGERPRINT.encode())
    for setting in settings:
        digest.update(b"\0" + setting.encode())
    for path in sorted(files):
        stat = path.stat()
        changed = f"\0{stat.st_mtime_ns}" if times else ""
        digest.update(f"\0{path.name}\0{stat.st_size}{changed}".encode())
        with path.open("rb") as opened:
            # From memory where it is small: 4096 reads take longer than one.
            file = io.BytesIO(opened.read()) if stat.st_size <= _READ_WHOLE else opened
            digest.update(file.read(1 << 20))
            for offset in np.linspace(0, stat.st_size, _SAMPLES, endpoint=False, dtype=np.int64):
                file.seek(int(offset))
                digest.update(file.read(_SAMPLE_BYTES))
    return digest.hexdigest()
