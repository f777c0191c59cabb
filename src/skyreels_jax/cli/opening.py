"""From the options of a command, or of a job that was interrupted, to a pipeline."""

from collections.abc import Mapping
from typing import Any, Final

from skyreels_jax.cache_dirs import enable_compilation_cache, prompt_cache_folder
from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.pipeline import Pipeline

# What :func:`open_pipeline` needs to know.
OPTIONS: Final = (
    *("model", "revision", "preset", "backend", "dtype", "no_prompt_cache"),
    *("vae_tiling", "vae_dtype"),
)


def open_pipeline(options: Mapping[str, Any]) -> Pipeline:
    """A pipeline with the caches of the command line; nothing of its weights is read."""
    enable_compilation_cache()
    checkpoint = Checkpoint.open(
        options["model"], revision=options["revision"], preset=options["preset"]
    )
    return Pipeline(
        checkpoint,
        backend=options["backend"],
        dtype=options["dtype"],
        prompt_cache=None if options["no_prompt_cache"] else prompt_cache_folder(),
        vae_tiling=options["vae_tiling"],
        vae_dtype=options["vae_dtype"],
    )
