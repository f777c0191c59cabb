"""Where things are kept between runs, and the persistent compilation cache.

One folder holds all of it: ``$SKYREELS_JAX_CACHE``, or ``skyreels-jax`` in the user's cache folder
(``$XDG_CACHE_HOME``, else ``~/.cache``). Deleting it is always safe.
"""

import os
from pathlib import Path
from typing import Final

import jax

ROOT_VARIABLE: Final = "SKYREELS_JAX_CACHE"
# Compilations faster than this are not worth a file.
MIN_COMPILE_SECONDS: Final = 0.5


def cache_root() -> Path:
    """The folder of all caches; it need not exist."""
    if chosen := os.environ.get(ROOT_VARIABLE):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "skyreels-jax"


def compilation_cache_folder() -> Path:
    """Where compiled programs are kept: JAX's own setting if there is one, else under the root."""
    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    return Path(chosen) if chosen else cache_root() / "compiled"


def prompt_cache_folder() -> Path:
    """Where encoded prompts are kept."""
    return cache_root() / "prompts"


def enable_compilation_cache() -> Path:
    """Keep compiled programs between processes; returns the folder.

    Settings that the user made through JAX's own variables (``JAX_COMPILATION_CACHE_DIR``,
    ``JAX_ENABLE_COMPILATION_CACHE=false``) stay in force.
    """
    folder = compilation_cache_folder()
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", MIN_COMPILE_SECONDS)
    return folder


def folder_size(folder: Path) -> tuple[int, int]:
    """``(files, bytes)`` under ``folder``; zeros where it does not exist."""
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file()]
    return len(sizes), sum(sizes)
