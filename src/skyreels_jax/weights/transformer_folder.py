"""The transformer's folder as a whole: read into a model, written from one, or translated."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.weights.convert import (
    Place,
    export,
    exported,
    load_into,
    on_default_device,
    rename,
    renamed,
    verify,
)
from skyreels_jax.weights.layout import CONFIG, Layout
from skyreels_jax.weights.rounding import RoundedSource, all_rounded
from skyreels_jax.weights.rules import Dialect
from skyreels_jax.weights.source import TensorSpec
from skyreels_jax.weights.transformer_json import config_json, transformer_config
from skyreels_jax.weights.transformer_rules import TRANSFORMER_IGNORED, transformer_rules
from skyreels_jax.weights.writer import (
    MAX_SHARD_BYTES,
    TRANSFORMER_STEM,
    new_folder,
    write_json,
    write_tensors,
)


def read_config(layout: Layout) -> TransformerConfig:
    """The configuration of a folder's transformer, from ``config.json`` and the tensors' shapes.

    Raises:
        WeightsError: if they are unsound or contradict each other.
    """
    tensors = layout.tensors().tensors()
    return transformer_config(layout.config, tensors, layout.dialect, str(layout.config_file))


def abstract_transformer(
    config: TransformerConfig, dtype: DTypeLike = jnp.bfloat16, param_dtype: DTypeLike | None = None
) -> WanModel:
    """A :class:`WanModel` of shapes only; takes no memory and no random numbers."""
    params = dtype if param_dtype is None else param_dtype
    return nnx.eval_shape(
        lambda: WanModel(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=params)
    )


def verify_transformer(layout: Layout, config: TransformerConfig) -> None:
    """Prove that the folder holds exactly the tensors of ``config``, reading headers only.

    Raises:
        WeightsError: with everything that is missing, left over or misshapen.
    """
    verify(
        abstract_transformer(config),
        transformer_rules(config),
        layout.tensors(),
        layout.dialect,
        ignored=TRANSFORMER_IGNORED,
    )


def load_transformer_state(
    layout: Layout,
    config: TransformerConfig,
    *,
    dtype: DTypeLike,
    place: Place = on_default_device,
) -> nnx.State:
    """The parameters of a folder's transformer as the state of a :class:`WanModel`.

    Raises:
        WeightsError: if the folder and the model do not cover each other, or a value is not finite.
    """
    return load_into(
        abstract_transformer(config),
        transformer_rules(config),
        layout.tensors(),
        layout.dialect,
        dtype=dtype,
        ignored=TRANSFORMER_IGNORED,
        place=place,
    )


def save_transformer(
    folder: Path,
    state: nnx.Module | nnx.State,
    config: TransformerConfig,
    *,
    layout: Dialect,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> list[Path]:
    """Write a transformer's folder: ``config.json``, safetensors and an index if there are shards.

    Args:
        folder: to make; it appears complete or not at all.
        state: the model or its state.
        config: of the model.
        layout: whose names, shapes and config keys to write.
        dtype: to round to; None keeps the state's.
        max_shard_bytes: size at which a new shard is begun.
        overwrite: replace a folder that is there.

    Returns:
        The files, relative to ``folder``.

    Raises:
        RequestError: if ``folder`` is there and may not be replaced.
        WeightsError: if a value is not finite or the disk refuses.
    """
    rules = transformer_rules(config)
    with new_folder(folder, overwrite=overwrite) as partial:
        write_json(partial / CONFIG, config_json(config, layout))
        files = write_tensors(
            partial,
            TRANSFORMER_STEM[layout],
            with_dtype(exported(state, rules, layout), dtype),
            all_rounded(export(state, rules, layout), dtype, "the model"),
            max_shard_bytes=max_shard_bytes,
        )
        return [Path(CONFIG), *(file.relative_to(partial) for file in files)]


def convert_transformer(
    folder: Path,
    source: Layout,
    config: TransformerConfig,
    *,
    layout: Dialect,
    dtype: DTypeLike | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> list[Path]:
    """Write ``source``'s transformer into the existing ``folder``, one tensor in memory at a time.

    Args and errors as for :func:`save_transformer`; the files are written in place, so ``folder``
    is one that :func:`skyreels_jax.weights.writer.new_folder` keeps out of sight.
    """
    verify_transformer(source, config)
    tensors = RoundedSource(source.tensors(), dtype)
    arguments = (transformer_rules(config), tensors, source.dialect, layout)
    write_json(folder / CONFIG, config_json(config, layout))
    files = write_tensors(
        folder,
        TRANSFORMER_STEM[layout],
        renamed(*arguments, ignored=TRANSFORMER_IGNORED),
        rename(*arguments, ignored=TRANSFORMER_IGNORED),
        max_shard_bytes=max_shard_bytes,
    )
    return [folder / CONFIG, *files]


def with_dtype(specs: dict[str, TensorSpec], dtype: DTypeLike | None) -> dict[str, TensorSpec]:
    """``specs`` after rounding to ``dtype`` (None keeps theirs)."""
    if dtype is None:
        return specs
    return {name: TensorSpec(spec.shape, np.dtype(dtype)) for name, spec in specs.items()}
