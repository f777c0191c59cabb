"""Checkpoints that are single files, and components that come from elsewhere.

A file of other tools holds a transformer alone, or several components under prefixes
(:mod:`~skyreels_jax.weights.repackaged`). What it lacks is given as a file, a folder, or a folder
that has it, and goes before what the checkpoint has of its own.
"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Final, cast

from skyreels_jax.errors import WeightsError
from skyreels_jax.prompts import TOKENIZER_FILES
from skyreels_jax.weights.folder_files import read_object
from skyreels_jax.weights.layout import (
    CONFIG,
    TRANSFORMER_CLASSES,
    ComponentName,
    Layout,
    known_components,
    packed_files,
)
from skyreels_jax.weights.open_file import WEIGHT_SUFFIXES, open_tensors
from skyreels_jax.weights.plan import Format
from skyreels_jax.weights.relatives import refuse_foreign, refuse_vae
from skyreels_jax.weights.repackaged import Held, Packed, UnpackedSource, packed_in
from skyreels_jax.weights.tokenizer_file import holds_tokenizer
from skyreels_jax.weights.torch_file import LORA_MAPPING

# What may be given beside a transformer; the tokenizer comes with the text encoder or in a folder.
Given = Mapping[ComponentName, Path]
_TOKENIZER_FOLDERS: Final = ("tokenizer", "google/umt5-xxl")
# ComfyUI's folder of models has one folder a kind.
_COMFY_FOLDERS: Final = ("vae", "text_encoders", "clip", "clip_vision")
_NEEDED: Final[tuple[ComponentName, ...]] = (
    *("vae", "text_encoder", "tokenizer", "image_encoder", "image_processor"),
)


def read_file(path: Path, *, key: str | None = None) -> Layout:
    """Find out what a file is.

    Args:
        path: a file with a transformer in it.
        key: which mapping of a file with several is the transformer.

    Raises:
        WeightsError: it is no checkpoint, or another model's, saying what was found.
    """
    source = open_tensors(path, key=key)
    packed = packed_in(source.tensors())
    models = [one for one in packed if one.component == "transformer"]
    if not models:
        if packed:
            raise WeightsError(
                f"{path} holds the {_words(packed)} and no transformer: give it by "
                f"`{packed[0].component}`, and the transformer's file or folder as the model"
            )
        if getattr(source, "mapping", None) == LORA_MAPPING:
            raise WeightsError(
                f"{path} holds the LoRA of a causal student ({LORA_MAPPING}, as LongLive's lora.pt "
                "does): give its base (longlive_base.pt) as the model, and this one by `lora`"
            )
        refuse_foreign(path, source.tensors())
    format = models[0].format
    components: dict[ComponentName, Path] = {
        cast(ComponentName, one.component): path for one in packed if one.component != "transformer"
    }
    config = _config_beside(path, format)
    return Layout(path, format, path, config, components, weights_key=key)


def _config_beside(path: Path, format: Format) -> Mapping[str, object]:
    """A transformer's ``config.json`` beside its file; empty if there is none of one."""
    file = path.parent / CONFIG
    if not file.is_file():
        return {}
    config = read_object(file)
    return config if config.get("_class_name") in TRANSFORMER_CLASSES[format] else {}


def with_components(layout: Layout, given: Given) -> Layout:
    """A checkpoint with components from elsewhere, which go before its own.

    Args:
        layout: of the checkpoint.
        given: a file or folder for each component.

    Raises:
        WeightsError: a file or folder does not hold the component, saying what it holds.
    """
    found: dict[ComponentName, Path] = {
        name: component_at(name, path) for name, path in given.items()
    }
    text = found.get("text_encoder")
    if text is not None and "tokenizer" not in found and (own := _tokenizer_of(text)):
        found["tokenizer"] = own
    components = {**layout.components, **found}
    packed = components.get("text_encoder")
    if packed is not None and "tokenizer" not in components and holds_tokenizer(packed):
        components["tokenizer"] = packed
    return replace(layout, components=components)


def components_in(folder: Path) -> dict[ComponentName, Path]:
    """The components that a folder has: a checkpoint in either format, or single files in it.

    ComfyUI's folder of models, with a folder for each kind, is looked through too.

    Raises:
        WeightsError: there are none.
    """
    found: dict[ComponentName, Path] = {}
    suffixes = [suffix for suffix in WEIGHT_SUFFIXES if suffix != ".bin"]
    for format in ("diffusers", "original"):
        for name, path in known_components(folder, format).items():
            if name in _NEEDED and (path.is_file() or _is_component(path)):
                found.setdefault(name, path)
    for place in (folder, *(folder / name for name in _COMFY_FOLDERS)):
        if place.is_dir():
            for name, (file, _) in packed_files(place, suffixes).items():
                if name != "transformer":
                    found.setdefault(name, file)
    if "tokenizer" not in found and _has_tokenizer(folder):
        found["tokenizer"] = folder
    text = found.get("text_encoder")
    if text is not None and "tokenizer" not in found and holds_tokenizer(text):
        found["tokenizer"] = text
    if not found:
        raise WeightsError(f"{folder} holds no component of a checkpoint: expected a VAE, encoders")
    return found


def _is_component(folder: Path) -> bool:
    """Whether a folder is one component's, and not ComfyUI's with files of several."""
    return any((folder / name).is_file() for name in (CONFIG, *TOKENIZER_FILES)) or any(
        folder.glob("*_config.json")
    )


def component_at(name: ComponentName, path: Path) -> Path:
    """Where a component is: ``path``, or its place in the checkpoint that ``path`` is.

    Raises:
        WeightsError: it is not there, saying what is.
    """
    if path.is_dir():
        if name not in ("vae", "text_encoder", "image_encoder") or (path / CONFIG).is_file():
            return path
        inside = components_in(path)
        if name not in inside:
            raise WeightsError(f"{path} holds {', '.join(inside)} and no {name.replace('_', ' ')}")
        return inside[name]
    if not path.exists():
        raise WeightsError(f"{path} does not exist: expected a file or folder with the `{name}`")
    if name != "tokenizer":
        open_component(path, name)
    return path


def open_component(file: Path, name: ComponentName) -> tuple[UnpackedSource, Format]:
    """A component's tensors in a file, and whose names they have.

    Raises:
        WeightsError: the file holds something else, which is named.
    """
    source = open_tensors(file)
    packed = packed_in(source.tensors())
    if packed and all(one.component != name for one in packed):
        raise WeightsError(
            f"{file} holds the {_words(packed)}, and was taken for the {name.replace('_', ' ')}"
        )
    if not packed:
        refuse_foreign(file, source.tensors())
    unpacked = UnpackedSource(source, cast(Held, name))
    if name == "vae":
        refuse_vae(file, {own: info.shape for own, info in unpacked.tensors().items()})
    return unpacked, unpacked.format


def _has_tokenizer(folder: Path) -> bool:
    return any((folder / name).is_file() for name in TOKENIZER_FILES)


def _tokenizer_of(text_encoder: Path) -> Path | None:
    """The tokenizer that lies with a text encoder, or in its file."""
    folder = text_encoder if text_encoder.is_dir() else text_encoder.parent
    around = (folder, folder.parent)
    places = (folder, *(place / name for place in around for name in _TOKENIZER_FOLDERS))
    beside = next((place for place in places if _has_tokenizer(place)), None)
    return beside or (text_encoder if holds_tokenizer(text_encoder) else None)


def _words(packed: Collection[Packed]) -> str:
    return " and the ".join(dict.fromkeys(one.component.replace("_", " ") for one in packed))
