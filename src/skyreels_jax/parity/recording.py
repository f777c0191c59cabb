"""Results and traces on disk: npz archives written one array at a time, never all in memory."""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from skyreels_jax.files import whole_file
from skyreels_jax.parity.capture import Note


@contextmanager
def writing(path: Path) -> Iterator[Note]:
    """An npz archive that takes named arrays as they come; it appears when all are in it.

    Raises:
        ValueError: a name comes twice.
    """
    with whole_file(path) as partial, zipfile.ZipFile(partial, "w") as archive:
        known: set[str] = set()

        def note(name: str, values: np.ndarray) -> None:
            if name in known:
                raise ValueError(f"{name!r} is noted twice")
            known.add(name)
            with archive.open(f"{name}.npy", "w", force_zip64=True) as entry:
                np.lib.format.write_array(entry, np.ascontiguousarray(values), allow_pickle=False)

        yield note


def arrays(path: Path) -> Mapping[str, np.ndarray]:
    """The arrays of an archive, each read when it is asked for, in the order written."""
    return np.load(path, allow_pickle=False)


def save_call(note: Note, step: int, call: Mapping[str, Any]) -> None:
    """What diffusers' transformer was given in a step."""
    for name, value in call.items():
        if name != "return_dict":
            note(f"call.{step}.{name}", np.asarray(value))


def load_call(results: Mapping[str, np.ndarray], step: int) -> dict[str, Any]:
    """What :func:`save_call` has kept."""
    start = f"call.{step}."
    call: dict[str, Any] = {
        name.removeprefix(start): results[name] for name in results if name.startswith(start)
    }
    if "fps" in call:
        call["fps"] = call["fps"].tolist()
    if "enable_diffusion_forcing" in call:
        call["enable_diffusion_forcing"] = bool(call["enable_diffusion_forcing"])
    return call | {"return_dict": False}
