"""What is read from a checkpoint's folder: JSON objects, and safetensors files as one source."""

import re
from collections.abc import Collection
from pathlib import Path

from skyreels_jax import files
from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.low_precision import dequantized
from skyreels_jax.weights.open_file import SHARD, series_names
from skyreels_jax.weights.plan import natural
from skyreels_jax.weights.repackaged import refuse_gguf
from skyreels_jax.weights.safetensors_file import SafetensorsSource, TensorSource


def read_object(file: Path) -> dict[str, object]:
    """A JSON object from a file.

    Raises:
        WeightsError: naming the file, if it is no regular file, cannot be read or is none.
    """
    value = files.read_json(file, error=WeightsError)
    if not isinstance(value, dict):
        raise WeightsError(f"{file} holds no JSON object but a {type(value).__name__}")
    return value


def safetensors_of(folder: Path, *, without: Collection[str] = ()) -> TensorSource:
    """All safetensors files of a folder as one source of floats, with or without an index.

    Files whose names are in ``without`` hold something else.

    Raises:
        WeightsError: if there are none, one that the index or the numbering names is missing, one
            is not in the index, or a tensor is not in the shard that the index says.
    """
    # Names that begin with a dot are macOS's notes on the files of other file systems.
    present = {
        path.name: path
        for path in folder.glob("[!.]*.safetensors")
        # Latents that somebody kept there are no part of a model.
        if not (path.name in without or path.name.endswith(files.LATENTS_SUFFIX))
    }
    indices = sorted(folder.glob("[!.]*.safetensors.index.json"))
    if len(indices) > 1:
        names = ", ".join(p.name for p in indices)
        raise WeightsError(f"{folder} holds several indices ({names}): keep the one that is meant")
    index = _read_index(indices[0]) if indices else {}
    if not present and not index:
        refuse_gguf(folder)
        raise WeightsError(f"{folder} holds no *.safetensors files: expected the transformer's")
    series = {(m[1], m[3]) for m in map(SHARD.fullmatch, present) if m}
    expected = {name for one in series for name in series_names(*one)} | set(index.values())
    missing = expected - present.keys()
    if missing:
        named = f"{indices[0].name} names" if indices else "the numbering asks for"
        raise WeightsError(f"{folder}: {named} files that are missing: {_listed(missing)}")
    if extra := present.keys() - set(index.values()) if index else set():
        raise WeightsError(
            f"{folder}: {indices[0].name} does not name {_listed(extra)}; move away what does not "
            "belong to the transformer"
        )
    source = SafetensorsSource(present[name] for name in sorted(present, key=natural))
    for name, file in index.items():
        info = source.tensors().get(name)
        if info is None or Path(info.file).name != file:
            raise WeightsError(f"{folder / file} lacks {name}, which {indices[0].name} puts there")
    if index and (unlisted := source.tensors().keys() - index.keys()):
        raise WeightsError(
            f"{folder}: {indices[0].name} does not name {_listed(unlisted)}, which the files hold"
        )
    return dequantized(source)


def _read_index(file: Path) -> dict[str, str]:
    """Tensor name to file name, which must be a plain name within the folder."""
    weight_map = read_object(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{file} has no weight_map of tensor names to files")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and re.fullmatch(r"[\w.-]+\.safetensors", shard)
        if not plain:
            raise WeightsError(
                f"{file} puts {name:.200} into {shard!r:.80}: expected the name of a *.safetensors "
                "file in the same folder"
            )
    return weight_map


def _listed(names: Collection[str]) -> str:
    ordered = sorted(names, key=natural)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")
