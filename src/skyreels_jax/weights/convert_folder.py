"""Translates a checkpoint folder into the other layout, or into another dtype."""

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from jax.typing import DTypeLike

from skyreels_jax.errors import RequestError
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.weights.layout import MODEL_INDEX, PATHS, Layout, Part
from skyreels_jax.weights.rules import Dialect
from skyreels_jax.weights.store import new_folder
from skyreels_jax.weights.transformer_folder import convert_transformer


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
    dtype: DTypeLike | None = None,
    overwrite: bool = False,
) -> Conversion:
    """Write ``source`` into the new folder ``target``, which appears complete or not at all.

    The transformer is always translated, a tensor in memory at a time. The tokenizer is the same
    in both layouts; the other parts are copied where the layout stays, and named in the result
    where they cannot follow.

    Args:
        source: the folder to read.
        config: of its transformer.
        target: the folder to make.
        layout: to write.
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
        result.written.extend(file.relative_to(partial) for file in files)
        if source.dialect == layout and source.model_index:
            _copy(source.folder / MODEL_INDEX, partial, MODEL_INDEX, result)
        for part, path in source.parts.items():
            if part == "tokenizer" or source.dialect == layout:
                _copy(path, partial, PATHS[layout][part], result)
            else:
                result.left_out[path.name] = _reason(part, layout)
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


def _reason(part: Part, layout: Dialect) -> str:
    if part not in PATHS[layout]:
        return f"the {layout} layout has no such part"
    reasons: Mapping[Dialect, str] = {
        "original": f"the original layout has it as {PATHS['original'][part]}, a PyTorch pickle",
        "diffusers": "only the transformer's and the tokenizer's translation is written",
    }
    return reasons[layout]
