"""Translates a checkpoint folder into the other format, or into another dtype."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from jax.typing import DTypeLike

from skyreels_jax.errors import RequestError
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.outputs import path_of
from skyreels_jax.weights.components.clip import image_processor_json, stored_image_encoder
from skyreels_jax.weights.components.stored import StoredComponent
from skyreels_jax.weights.components.umt5 import stored_text_encoder
from skyreels_jax.weights.components.vae import stored_vae
from skyreels_jax.weights.layout import COMPONENTS_IN, MODEL_INDEX, PATHS, STREAMING, Layout
from skyreels_jax.weights.pipeline_folder import (
    About,
    needed_components,
    write_card,
    write_pipeline_files,
)
from skyreels_jax.weights.plan import Format
from skyreels_jax.weights.quantized_stream import StoredPrecision
from skyreels_jax.weights.tokenizer_file import open_tokenizer
from skyreels_jax.weights.writer import new_folder, write_config


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote, as paths within the new folder, and what it did not and why."""

    written: list[Path] = field(default_factory=list)
    copied: list[Path] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def convert_folder(
    source: Layout,
    stored: StoredComponent[TransformerConfig, WanModel],
    target: Path,
    *,
    format: Format,
    about: About,
    dtype: DTypeLike | None = None,
    weights: StoredPrecision | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write ``source`` into the new folder ``target``, which appears complete or not at all.

    The transformer is always translated, a tensor in memory at a time. The tokenizer is the same
    in both formats. The other components are copied where the format stays, and translated into
    diffusers'; the original has them as PyTorch pickles, which are not written. What cannot follow
    is named in the result.

    Args:
        source: the folder to read.
        stored: its transformer, with LoRAs if they are to be written into it.
        target: the folder to make.
        format: to write.
        about: what a pipeline folder of diffusers says of itself.
        dtype: of the transformer; None keeps each tensor's.
        weights: to store the matrices of its blocks in, and UMT5's where diffusers' format is
            written from the other; None keeps the floats.
        overwrite: replace a folder that is there and holds only what an earlier call wrote.

    Raises:
        RequestError: if ``target`` is there, or lies in ``source`` or around it; ComfyUI's layout
            is asked for under other names than the original's.
        WeightsError: if ``source`` is not sound or the disk refuses.
    """
    if weights == "comfy-fp8" and format != "original":
        raise RequestError("ComfyUI reads the original's names: add --format original")
    config, target = stored.config, path_of(target, "folder to write to")
    _check_apart(source.folder, target)
    alone = source.transformer == source.folder and not source.components
    nested = format == "diffusers" and not alone
    result = Conversion()
    with new_folder(target, overwrite=overwrite, marked=True) as partial:
        transformer = partial / "transformer" if nested else partial
        files = stored.write(transformer, format, dtype=dtype, weights=weights)
        if nested:
            files.append(write_card(partial, config, about))
        of_files = source.is_file or any(path.is_file() for path in source.components.values())
        translated = nested and (source.format != format or of_files)
        if translated:
            files += _write_components(partial, source, config, about, weights)
        if source.streaming_file is not None:
            target_name = (transformer / STREAMING).relative_to(partial)
            _copy(source.streaming_file, partial, str(target_name), result)
        result.written.extend(file.relative_to(partial) for file in files)
        if source.format == format and source.model_index:
            _copy_index(source, partial, result)
        for name, path in source.components.items():
            if name == "tokenizer" and path.is_file():
                file = open_tokenizer(path).save(partial / PATHS[format][name])
                result.written.append(file.relative_to(partial))
            elif name == "tokenizer" or (not translated and _keeps(source, path, format)):
                # Under its own name where another tool has packed it as safetensors.
                packed = path.suffix == ".safetensors"
                _copy(path, partial, path.name if packed else PATHS[format][name], result)
        if (source.format != format or source.is_file) and not alone:
            result.left_out.update(_left_out(source, config, format))
    return result


def _keeps(source: Layout, path: Path, format: Format) -> bool:
    """Whether a component is copied as it is: a folder to folders, a file of its own to files."""
    return path.is_dir() if format == "diffusers" else path.is_file() and path != source.transformer


def _write_components(
    folder: Path,
    source: Layout,
    config: TransformerConfig,
    about: About,
    weights: StoredPrecision | None,
) -> list[Path]:
    """Translate the components of a folder in the original format, a tensor in memory at a time.

    All but the transformer and the tokenizer's files, which are the same in both formats. Tensors
    keep their dtype. ``model_index.json`` is written where every component of the pipeline is
    there.
    """
    needed = needed_components(config)
    files: list[Path] = []
    if "vae" in source.components:
        files += stored_vae(source).write(folder / "vae", "diffusers")
    if "text_encoder" in source.components:
        files += stored_text_encoder(source).write(
            folder / "text_encoder", "diffusers", weights=weights
        )
    image_config = None
    if "image_encoder" in needed and "image_encoder" in source.components:
        image = stored_image_encoder(source)
        image_config = image.config
        files += image.write(folder / "image_encoder", "diffusers")
        files.append(folder / "image_processor" / "preprocessor_config.json")
        files[-1].parent.mkdir()
        write_config(files[-1], image_processor_json(image_config))
    listed = needed if source.components.keys() >= set(needed) else ()
    if listed and image_config is not None:
        listed = (*listed, "image_processor")
    named = (folder, about.pipeline, listed, about.flow_shift, image_config)
    return [*files, *write_pipeline_files(*named)]


def _check_apart(source: Path, target: Path) -> None:
    """Refuse to replace what is being read."""
    a, b = source.resolve(), target.resolve()
    if a == b or a in b.parents or b in a.parents:
        raise RequestError(f"{target} is {source} or lies in or around it; write somewhere else")


def _copy(path: Path, folder: Path, name: str, result: Conversion) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    if path.is_dir():
        shutil.copytree(path, folder / name)
    else:
        shutil.copyfile(path, folder / name)
    result.copied.append(Path(name))


def _copy_index(source: Layout, folder: Path, result: Conversion) -> None:
    """``model_index.json``, which no longer names a folder with components: they are copied."""
    if COMPONENTS_IN not in source.model_index:
        _copy(source.folder / MODEL_INDEX, folder, MODEL_INDEX, result)
        return
    index = {name: value for name, value in source.model_index.items() if name != COMPONENTS_IN}
    write_config(folder / MODEL_INDEX, index)
    result.written.append(Path(MODEL_INDEX))


def _left_out(
    source: Layout, config: TransformerConfig, format: Format
) -> Iterator[tuple[str, str]]:
    """Names of what a translation does not hold, and why."""
    needed = needed_components(config)
    if format == "diffusers":
        for name in set(needed) - source.components.keys():
            yield name, f"{PATHS['original'][name]} is missing, and so {MODEL_INDEX} is left out"
        for name in source.components.keys() - set(needed):
            yield source.components[name].name, "a pipeline for this transformer does not take it"
        return
    for name, path in source.components.items():
        original = PATHS["original"].get(name)
        if original is None:
            yield path.name, "the original format has no such component"
        elif name != "tokenizer" and not _keeps(source, path, format):
            yield path.name, f"the original format has it as {original}, a PyTorch pickle"
