"""Finished latents on disk, so that a decode that fails never costs the denoising."""

import json
from pathlib import Path
from typing import Final

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from skyreels_jax.errors import RequestError
from skyreels_jax.files import whole_file
from skyreels_jax.generation.api import Sample
from skyreels_jax.geometry import LATENT_CHANNELS, frame_rate

TENSOR: Final = "latents"
SETTINGS: Final = "settings"


def save_latents(path: Path, sampled: Sample) -> None:
    """Write latents and settings to a safetensors file."""
    metadata = {SETTINGS: json.dumps(dict(sampled.settings), ensure_ascii=False)}
    with whole_file(path) as temporary:
        save_file({TENSOR: np.ascontiguousarray(sampled.latents)}, temporary, metadata)


def load_latents(path: Path) -> Sample:
    """Read what :func:`save_latents` wrote.

    Raises:
        RequestError: the file is missing, or is not such a file.
    """
    if not path.is_file():
        raise RequestError(f"--resume-latents {path}: there is no such file")
    try:
        with safe_open(path, framework="np") as file:
            settings = json.loads((file.metadata() or {})[SETTINGS])
            latents = file.get_tensor(TENSOR)
            fps = frame_rate(settings["fps"])
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise RequestError(
            f"--resume-latents {path}: not a latents file of this program ({error})"
        ) from error
    if latents.ndim != 4 or latents.shape[0] != LATENT_CHANNELS or latents.dtype != np.float32:
        raise RequestError(
            f"--resume-latents {path}: latents are {latents.shape} of {latents.dtype}; expected "
            f"({LATENT_CHANNELS}, frames, height, width) of float32"
        )
    return Sample(latents, settings, fps)
