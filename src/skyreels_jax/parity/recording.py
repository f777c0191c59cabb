"""Where both sides' results lie on disk: npz archives written one array at a time."""

import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from skyreels_jax.files import whole_file
from skyreels_jax.torch_side.hooks import TransformerCall

# Takes the name of an array and its values.
Record = Callable[[str, np.ndarray], None]
# What a report holds, and parts of it.
JsonObject = Mapping[str, Any]
# Arrays by name, as of an archive.
Arrays = Mapping[str, np.ndarray]


def side_folder(folder: Path, side: str) -> Path:
    """Return the folder of a side's results."""
    return folder / "raw" / side


def result_file(folder: Path, side: str, test: int) -> Path:
    """Return the archive of frames, stages and transformer inputs of a test."""
    return side_folder(folder, side) / f"test-{test}.npz"


def trace_file(folder: Path, side: str, test: int, step: int) -> Path:
    """Return the archive of the activations of one call of the transformer."""
    return side_folder(folder, side) / f"trace-{test}-{step}.npz"


def decoded_file(folder: Path, test: int) -> Path:
    """Return the archive of what our VAE decodes from the reference's latents."""
    return side_folder(folder, "jax") / f"decoded-{test}.npz"


@contextmanager
def writing(path: Path) -> Iterator[Record]:
    """Open an npz archive that takes named arrays as they come; it appears when all are in it.

    Raises:
        ValueError: a name comes twice.
    """
    with whole_file(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        known: set[str] = set()

        def record(name: str, values: np.ndarray) -> None:
            if name in known:
                raise ValueError(f"{name!r} is recorded twice")
            known.add(name)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.ascontiguousarray(values), allow_pickle=False)

        yield record


def arrays(path: Path) -> Arrays:
    """Open an archive; each array is read when it is asked for, in the order written."""
    return np.load(path, allow_pickle=False)


def save_call(record: Record, step: int, call: TransformerCall) -> None:
    """Record what diffusers' transformer was given in a step."""
    for name, value in call.items():
        if name != "return_dict":
            record(f"call.{step}.{name}", np.asarray(value))


def load_call(results: Arrays, step: int) -> TransformerCall:
    """Return what :func:`save_call` has recorded, as arguments of diffusers' transformer."""
    start = f"call.{step}."
    call: TransformerCall = {
        name.removeprefix(start): results[name] for name in results if name.startswith(start)
    }
    if "fps" in call:
        call["fps"] = call["fps"].tolist()
    if "enable_diffusion_forcing" in call:
        call["enable_diffusion_forcing"] = bool(call["enable_diffusion_forcing"])
    return call | {"return_dict": False}
