"""What a checkpoint folder holds: the original layout, diffusers', or a transformer alone.

==================  =======================================  ==============================
part                original                                 diffusers
==================  =======================================  ==============================
transformer         ``config.json``, ``*.safetensors``       ``transformer/``
VAE                 ``Wan2.1_VAE.pth``                       ``vae/``
text encoder        ``models_t5_umt5-xxl-enc-bf16.pth``      ``text_encoder/``
tokenizer           ``google/umt5-xxl/``                     ``tokenizer/``
image encoder       ``models_clip_open-clip-….pth``          ``image_encoder/``
image processor                                              ``image_processor/``
scheduler                                                    ``scheduler/``
==================  =======================================  ==============================

A transformer's own folder (``config.json`` and its tensors in either dialect) is a layout too: the
original one with nothing else in it.
"""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Literal, get_args

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.plan import natural
from skyreels_jax.weights.rules import Dialect
from skyreels_jax.weights.safetensors_file import SafetensorsSource
from skyreels_jax.weights.transformer_json import dialect_of_config

Part = Literal["vae", "text_encoder", "tokenizer", "image_encoder", "image_processor", "scheduler"]
PARTS: Final[tuple[Part, ...]] = get_args(Part)

PATHS: Final[Mapping[Dialect, Mapping[Part, str]]] = {
    "original": {
        "vae": "Wan2.1_VAE.pth",
        "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
        "tokenizer": "google/umt5-xxl",
        "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    },
    "diffusers": {part: part for part in PARTS},
}
MODEL_INDEX: Final = "model_index.json"
CONFIG: Final = "config.json"
_SHARD: Final = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.safetensors")


@dataclass(frozen=True)
class Layout:
    """A checkpoint folder, taken apart.

    Attributes:
        folder: the checkpoint.
        dialect: whose names its files and tensors have.
        transformer: the folder of the transformer; ``folder`` itself in the original layout.
        config: the transformer's ``config.json``, parsed.
        parts: paths of the other parts that are there.
        model_index: diffusers' ``model_index.json``, parsed; empty where there is none.
    """

    folder: Path
    dialect: Dialect
    transformer: Path
    config: Mapping[str, Any]
    parts: Mapping[Part, Path] = field(default_factory=dict)
    model_index: Mapping[str, Any] = field(default_factory=dict)

    @property
    def config_file(self) -> Path:
        """Where ``config`` was read from."""
        return self.transformer / CONFIG

    def part(self, part: Part) -> Path:
        """The path of a part.

        Raises:
            WeightsError: if the folder lacks it, naming the path it was looked for at.
        """
        if part in self.parts:
            return self.parts[part]
        name = PATHS[self.dialect].get(part)
        if name is None:
            raise WeightsError(f"{self.folder}: the {self.dialect} layout has no {part}")
        raise WeightsError(
            f"{self.folder / name} is missing: it holds the {part.replace('_', ' ')} of a "
            f"checkpoint in the {self.dialect} layout; fetch it, or use a complete folder"
        )

    def tensors(self) -> SafetensorsSource:
        """The transformer's tensors.

        Raises:
            WeightsError: if a shard is missing, unsound, or holds what another one holds.
        """
        return safetensors_of(self.transformer)


def read_layout(folder: Path) -> Layout:
    """Find out what ``folder`` is.

    Raises:
        WeightsError: if it is no checkpoint, saying what was found and what was expected.
    """
    if not folder.is_dir():
        raise WeightsError(f"{folder} is no folder: expected a checkpoint folder")
    if (folder / MODEL_INDEX).is_file() or (folder / "transformer").is_dir():
        index = read_json(folder / MODEL_INDEX) if (folder / MODEL_INDEX).is_file() else {}
        transformer = folder / "transformer"
        config = _read_config(transformer)
        dialect = dialect_of_config(config, str(transformer / CONFIG))
        if dialect != "diffusers":
            raise WeightsError(
                f"{transformer / CONFIG} speaks the {dialect} dialect inside a diffusers folder"
            )
        return Layout(folder, dialect, transformer, config, _parts(folder, dialect), index)
    config = _read_config(folder)
    dialect = dialect_of_config(config, str(folder / CONFIG))
    # A diffusers transformer on its own has no parts: they would stand beside it, not in it.
    parts = _parts(folder, dialect) if dialect == "original" else {}
    return Layout(folder, dialect, folder, config, parts)


def parts_of(folder: Path) -> Layout:
    """A folder in diffusers' layout of which the transformer is not asked for, and may be missing.

    Raises:
        WeightsError: if it is no folder, or holds no part of a checkpoint.
    """
    parts = _parts(folder, "diffusers")
    if not parts:
        names = ", ".join(PATHS["diffusers"])
        raise WeightsError(f"{folder} holds no part of a checkpoint: expected one of {names}")
    return Layout(folder, "diffusers", folder / "transformer", {}, parts)


def _read_config(folder: Path) -> Mapping[str, Any]:
    if (folder / CONFIG).is_file():
        return read_json(folder / CONFIG)
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else ""
    raise WeightsError(
        f"{folder / CONFIG} is missing (found there: {found or 'nothing'}): expected the original "
        f"layout ({CONFIG} and *.safetensors), the diffusers layout ({MODEL_INDEX} and "
        "transformer/), or a transformer's own folder"
    )


def _parts(folder: Path, dialect: Dialect) -> dict[Part, Path]:
    found: dict[Part, Path] = {}
    for part, name in PATHS[dialect].items():
        if (folder / name).exists():
            found[part] = folder / name
    return found


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object from a file.

    Raises:
        WeightsError: naming the file, if it cannot be read or is none.
    """
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise WeightsError(f"{file} cannot be read: {error.strerror or error}") from error
    except (ValueError, RecursionError) as error:
        raise WeightsError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise WeightsError(f"{file} holds no JSON object but a {type(value).__name__}")
    return value


def safetensors_of(folder: Path) -> SafetensorsSource:
    """All safetensors files of a folder as one source, with or without an index.

    Raises:
        WeightsError: if there are none, one that the index or the numbering names is missing, one
            is not in the index, or a tensor is not in the shard that the index says.
    """
    present = {p.name: p for p in folder.glob("*.safetensors")}
    indices = sorted(folder.glob("*.safetensors.index.json"))
    if len(indices) > 1:
        names = ", ".join(p.name for p in indices)
        raise WeightsError(f"{folder} holds several indices ({names}): keep the one that is meant")
    index = _read_index(indices[0]) if indices else {}
    if not present and not index:
        raise WeightsError(f"{folder} holds no *.safetensors files: expected the transformer's")
    missing = (_numbered(present) | set(index.values())) - present.keys()
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
    return source


def _read_index(file: Path) -> dict[str, str]:
    """Tensor name to file name, which must be a plain name within the folder."""
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise WeightsError(f"{file} has no weight_map of tensor names to files")
    for name, shard in weight_map.items():
        plain = isinstance(shard, str) and re.fullmatch(r"[\w.-]+\.safetensors", shard)
        if not plain:
            raise WeightsError(
                f"{file} puts {name} into {shard!r}: expected the name of a *.safetensors file in "
                "the same folder"
            )
    return weight_map


def _numbered(names: Mapping[str, Path]) -> set[str]:
    """All files of each ``stem-00001-of-00012`` series of which one is there."""
    series = {(m[1], int(m[3])) for m in map(_SHARD.fullmatch, names) if m}
    return {
        f"{stem}-{k:05d}-of-{count:05d}.safetensors"
        for stem, count in series
        for k in range(1, count + 1)
    }


def _listed(names: set[str]) -> str:
    ordered = sorted(names, key=natural)
    return ", ".join(ordered[:5]) + (f" and {len(ordered) - 5} more" if len(ordered) > 5 else "")
