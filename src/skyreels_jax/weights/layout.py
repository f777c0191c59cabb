"""What a checkpoint folder holds: the original format, diffusers', or a transformer alone.

==================  =======================================  ==============================
component           original                                 diffusers
==================  =======================================  ==============================
transformer         ``config.json``, ``*.safetensors``       ``transformer/``
VAE                 ``Wan2.1_VAE.pth``                       ``vae/``
text encoder        ``models_t5_umt5-xxl-enc-bf16.pth``      ``text_encoder/``
tokenizer           ``google/umt5-xxl/``                     ``tokenizer/``
image encoder       ``models_clip_open-clip-….pth``          ``image_encoder/``
image processor                                              ``image_processor/``
scheduler                                                    ``scheduler/``
==================  =======================================  ==============================

A transformer's own folder is read too, as one with nothing else in it; a single file too, by
:mod:`~skyreels_jax.weights.model_file`. Folders in diffusers' format that lie side by side may
share components: ``model_index.json`` names the folder that has them (:data:`COMPONENTS_IN`).
"""

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal, get_args

from skyreels_jax import files
from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.folder_files import read_object, safetensors_of
from skyreels_jax.weights.open_file import SHARD, open_tensors, series_of
from skyreels_jax.weights.plan import Format
from skyreels_jax.weights.relatives import refuse_config, refuse_relatives, refuse_tensors
from skyreels_jax.weights.repackaged import Held, Packed, UnpackedSource, packed_in, refuse_gguf
from skyreels_jax.weights.safetensors_file import SafetensorsSource

ComponentName = Literal[
    "vae", "text_encoder", "tokenizer", "image_encoder", "image_processor", "scheduler"
]

PATHS: Final[Mapping[Format, Mapping[ComponentName, str]]] = {
    "original": {
        "vae": "Wan2.1_VAE.pth",
        "text_encoder": "models_t5_umt5-xxl-enc-bf16.pth",
        "tokenizer": "google/umt5-xxl",
        "image_encoder": "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth",
    },
    "diffusers": {name: name for name in get_args(ComponentName)},
}
MODEL_INDEX: Final = "model_index.json"
CONFIG: Final = "config.json"
# In ``model_index.json``: the folder beside this one with the components that this one lacks.
COMPONENTS_IN: Final = "_components_in"
# Beside a transformer's ``config.json``: how a causal student is sampled.
STREAMING: Final = "streaming.json"
# Classes of transformers that are read: Skywork's, diffusers' port of it, and the Wan 2.1 model
# that both descend from (same parameters, no frame rates). The first one is written.
TRANSFORMER_CLASSES: Final[Mapping[Format, tuple[str, ...]]] = {
    "original": ("WanModel",),
    "diffusers": ("SkyReelsV2Transformer3DModel", "WanTransformer3DModel"),
}
# Of a component's folder.
_FILES: Final = (
    *("config.json", "*_config.json", "*.safetensors.index.json", "[!.]*.safetensors"),
    *("tokenizer.json", "special_tokens_map.json", "*.model"),
)


@dataclass(frozen=True)
class Layout:
    """A checkpoint, taken apart.

    Attributes:
        folder: the checkpoint; a file, where it is one.
        format: whose names the transformer's files and tensors have.
        transformer: the folder of the transformer; ``folder`` itself in the original format, and
            where that is a file.
        config: the transformer's ``config.json``, parsed.
        components: paths of the other components that are there, each in a format of its own.
        model_index: diffusers' ``model_index.json``, parsed; empty where there is none.
        weights_key: which mapping of a file with several is the transformer.
    """

    folder: Path
    format: Format
    transformer: Path
    config: Mapping[str, object]
    components: Mapping[ComponentName, Path] = field(default_factory=dict)
    model_index: Mapping[str, object] = field(default_factory=dict)
    weights_key: str | None = None

    @property
    def is_file(self) -> bool:
        """Whether the transformer is a single file."""
        return self.transformer.is_file()

    @property
    def config_file(self) -> Path:
        """Where ``config`` was read from, or would be."""
        return (self.transformer.parent if self.is_file else self.transformer) / CONFIG

    @property
    def streaming_file(self) -> Path | None:
        """Where a causal student says how it is sampled; None where it does not."""
        if self.is_file and not self.config:
            return None  # What lies beside may be another's.
        file = self.config_file.with_name(STREAMING)
        return file if file.is_file() else None

    def component(self, name: ComponentName) -> Path:
        """The path of a component but the transformer.

        Raises:
            WeightsError: if the folder lacks it, naming the path it was looked for at.
        """
        if name in self.components:
            return self.components[name]
        path = PATHS[self.format].get(name)
        if self.is_file:
            flag = "text_encoder" if name == "tokenizer" else name
            raise WeightsError(
                f"{self.folder} holds no {name.replace('_', ' ')}: give one by `{flag}` (a file or "
                "folder) or `components` (a checkpoint's folder or Hugging Face id, for all that "
                "is missing)"
            )
        if path is None:
            raise WeightsError(f"{self.folder}: the {self.format} format has no {name}")
        raise WeightsError(
            f"{self.folder / path} is missing: it holds the {name.replace('_', ' ')} of a "
            f"checkpoint in the {self.format} format; fetch it, or use a complete folder"
        )

    def files(self) -> list[Path]:
        """The transformer's file, or the safetensors files in its folder, those of macOS aside."""
        if self.is_file:
            return series_of(self.transformer)
        return sorted(self.transformer.glob("[!.]*.safetensors"))

    @property
    def deciding_files(self) -> tuple[Path, ...]:
        """All files that decide what the checkpoint makes, and no other that lies beside them."""
        found = [self.folder / MODEL_INDEX]
        if self.is_file:
            found += [*self.files(), *([self.config_file] if self.config else [])]
        for path in {self.transformer, *self.components.values()}:
            found += [path] if path.is_file() else _files_of(path)
        return tuple(sorted({path for path in found if path.is_file()}))

    def tensors(self) -> UnpackedSource:
        """The transformer's tensors, under the names of the format.

        Raises:
            WeightsError: if a shard is missing, unsound, or holds what another one holds, or they
                are another model's.
        """
        if self.is_file:
            source = UnpackedSource(open_tensors(self.transformer, key=self.weights_key))
            refuse_tensors(self.transformer, source.tensors())
            return source
        # Not a full checkpoint, which has the transformer too.
        others = {
            path.name
            for path in self.components.values()
            if path.parent == self.transformer and path.suffix == ".safetensors"
            if all(one.component != "transformer" for one in _held_in(path))
        }
        source = UnpackedSource(safetensors_of(self.transformer, without=others))
        refuse_tensors(self.transformer, source.tensors())
        return source


def _files_of(folder: Path) -> list[Path]:
    """The files of a component's folder, by the names that they have in published ones."""
    found = {path for pattern in _FILES for path in folder.glob(pattern)}
    return [path for path in found if not path.name.endswith(files.LATENTS_SUFFIX)]


def read_layout(folder: Path) -> Layout:
    """Find out what ``folder`` is.

    Raises:
        WeightsError: if it is no checkpoint, saying what was found and what was expected.
    """
    if not folder.is_dir():
        raise WeightsError(f"{folder} is no folder: expected a checkpoint folder")
    if (folder / MODEL_INDEX).exists() or (folder / "transformer").is_dir():
        index = read_object(folder / MODEL_INDEX) if (folder / MODEL_INDEX).exists() else {}
        refuse_relatives(folder, index)
        transformer = folder / "transformer"
        config = _read_config(transformer)
        format = _format_of(config, transformer / CONFIG)
        if format != "diffusers":
            raise WeightsError(
                f"{transformer / CONFIG} is in the {format} format inside a diffusers folder"
            )
        return Layout(folder, format, transformer, config, known_components(folder, format), index)
    refuse_relatives(folder, {})
    packed = packed_files(folder)
    packed_model = packed.get("transformer")
    if packed_model is not None and not (folder / CONFIG).exists():
        config, format = {}, packed_model[1]
    else:
        config = _read_config(folder)
        format = _format_of(config, folder / CONFIG)
    # A diffusers transformer on its own has no components: they would stand beside it, not in it.
    components = known_components(folder, format) if format == "original" else {}
    for name, (file, _) in packed.items():
        if name != "transformer":
            components.setdefault(name, file)
    return Layout(folder, format, folder, config, components)


def packed_files(
    folder: Path, suffixes: Collection[str] = (".safetensors",)
) -> dict[Held, tuple[Path, Format]]:
    """What the files of a folder with such ``suffixes`` hold; other tools put components there."""
    if next(folder.glob("[!.]*.safetensors.index.json"), None) is not None:
        return {}
    found: dict[Held, tuple[Path, Format]] = {}
    for file in sorted(folder.glob("[!.]*")):
        if file.suffix in suffixes and file.is_file() and not SHARD.fullmatch(file.name):
            for held in _held_in(file):
                found.setdefault(held.component, (file, held.format))
    return found


def _held_in(file: Path) -> list[Packed]:
    is_plain = file.suffix == ".safetensors"
    return packed_in((SafetensorsSource([file]) if is_plain else open_tensors(file)).tensors())


def components_of(folder: Path) -> Layout:
    """A folder in diffusers' format of which the transformer is not asked for, and may be missing.

    Raises:
        WeightsError: if it is no folder, or holds no component of a checkpoint.
    """
    components = known_components(folder, "diffusers")
    if not components:
        names = ", ".join(PATHS["diffusers"])
        raise WeightsError(f"{folder} holds no component of a checkpoint: expected one of {names}")
    return Layout(folder, "diffusers", folder / "transformer", {}, components)


def _read_config(folder: Path) -> Mapping[str, object]:
    if (folder / CONFIG).exists():
        config = read_object(folder / CONFIG)
        refuse_config(folder / CONFIG, config)
        return config
    refuse_gguf(folder)
    found = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) if folder.is_dir() else ""
    raise WeightsError(
        f"{folder / CONFIG} is missing (found there: {found or 'nothing'}): expected the original "
        f"format ({CONFIG} and *.safetensors), the diffusers format ({MODEL_INDEX} and "
        "transformer/), or a transformer's own folder"
    )


def _format_of(config: Mapping[str, object], file: Path) -> Format:
    """Which format a transformer's ``config.json`` is in."""
    name = config.get("_class_name")
    for format, classes in TRANSFORMER_CLASSES.items():
        if name in classes:
            return format
    if name is None and ("num_attention_heads" in config or "in_channels" in config):
        return "diffusers"
    if name is None and ("dim" in config or "num_heads" in config):
        return "original"
    known = ", ".join(name for classes in TRANSFORMER_CLASSES.values() for name in classes)
    raise WeightsError(f"{file} is of class {name!r:.80}; known transformer classes are {known}")


def known_components(folder: Path, format: Format) -> dict[ComponentName, Path]:
    """The components that a folder has under the names of a format, or names in another's."""
    names = PATHS[format]
    found: dict[ComponentName, Path] = {
        name: folder / path for name, path in names.items() if (folder / path).exists()
    }
    return found if format == "original" else {**_shared_components(folder), **found}


def _shared_components(folder: Path) -> dict[ComponentName, Path]:
    """Those that the folder beside it has which its ``model_index.json`` names."""
    index = read_object(folder / MODEL_INDEX) if (folder / MODEL_INDEX).exists() else {}
    named = index.get(COMPONENTS_IN)
    if named is None:
        return {}
    if not (isinstance(named, str) and re.fullmatch(r"[\w-]+", named)):
        rule = "expected the name of a folder beside this one"
        raise WeightsError(f"{folder / MODEL_INDEX}: {COMPONENTS_IN} = {named!r:.80}: {rule}")
    beside = folder.resolve().parent / named
    if not beside.is_dir():
        raise WeightsError(
            f"{folder} takes its components from {beside}, which is missing: put it there, or make "
            "a whole copy with `skyreels-jax convert SRC DST --format diffusers`"
        )
    names = PATHS["diffusers"]
    return {n: beside / p for n, p in names.items() if n in index and (beside / p).exists()}
