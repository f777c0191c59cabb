"""Translates a checkpoint folder into the other layout, or into another dtype."""

import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from jax.typing import DTypeLike

from skyreels_jax.errors import RequestError
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.weights.diffusers_folder import About, needed_parts, write_card, write_parts
from skyreels_jax.weights.layout import MODEL_INDEX, PATHS, Layout
from skyreels_jax.weights.rules import Dialect
from skyreels_jax.weights.transformer_folder import convert_transformer
from skyreels_jax.weights.writer import new_folder


@dataclass(frozen=True)
class Conversion:
    """What a conversion wrote, as paths within the new folder, and what it did not and why."""

    written: list[Path] = field(default_factory=list)
    copied: list[Path] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)


def convert_folder(
    source: Layout,
    config: TransformerConfig,
    target: Path,
    *,
    layout: Dialect,
    about: About,
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write ``source`` into the new folder ``target``, which appears complete or not at all.

    The transformer is always translated, a tensor in memory at a time. The tokenizer is the same
    in both layouts. The other parts are copied where the layout stays, and translated into
    diffusers' layout; the original's has them as PyTorch pickles, which are not written. What
    cannot follow is named in the result.

    Args:
        source: the folder to read.
        config: of its transformer.
        target: the folder to make.
        layout: to write.
        about: what a pipeline folder of diffusers says of itself.
        dtype: of the transformer; None keeps each tensor's.
        overwrite: replace a folder that is there.

    Raises:
        RequestError: if ``target`` is there, or lies in ``source`` or around it.
        WeightsError: if ``source`` is not sound or the disk refuses.
    """
    _check_apart(source.folder, target)
    alone = source.transformer == source.folder and not source.parts
    result = Conversion()
    with new_folder(target, overwrite=overwrite) as partial:
        nested = layout == "diffusers" and not alone
        transformer = partial / "transformer" if nested else partial
        transformer.mkdir(exist_ok=True)
        files = convert_transformer(transformer, source, config, layout=layout, dtype=dtype)
        if nested:
            files.append(write_card(partial, config, about))
        if nested and source.dialect != layout:
            files += write_parts(partial, source, config, about)
        result.written.extend(file.relative_to(partial) for file in files)
        if source.dialect == layout and source.model_index:
            _copy(source.folder / MODEL_INDEX, partial, MODEL_INDEX, result)
        for part, path in source.parts.items():
            if part == "tokenizer" or source.dialect == layout:
                _copy(path, partial, PATHS[layout][part], result)
        if source.dialect != layout and not alone:
            result.left_out.update(_left_out(source, config, layout))
    return result


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


def _left_out(
    source: Layout, config: TransformerConfig, layout: Dialect
) -> Iterator[tuple[str, str]]:
    """Names of what a translation does not hold, and why."""
    needed = needed_parts(config)
    if layout == "diffusers":
        for part in set(needed) - source.parts.keys():
            yield part, f"{PATHS['original'][part]} is missing, and so {MODEL_INDEX} is left out"
        for part in source.parts.keys() - set(needed):
            yield source.parts[part].name, "a pipeline for this transformer does not take it"
        return
    for part, path in source.parts.items():
        name = PATHS["original"].get(part)
        if name is None:
            yield path.name, "the original layout has no such part"
        elif part != "tokenizer":
            yield path.name, f"the original layout has it as {name}, a PyTorch pickle"
