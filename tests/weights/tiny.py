"""Tiny transformers with a random value in every parameter, as states and as folders."""

import dataclasses
import json
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.weights.components.transformer import TRANSFORMER
from skyreels_jax.weights.plan import Format

T2V = TransformerConfig(
    model_type="t2v",
    dim=24,
    ffn_dim=40,
    num_heads=2,
    num_layers=3,
    in_dim=16,
    freq_dim=8,
    text_dim=20,
)
DF = dataclasses.replace(T2V, inject_sample_info=True)
I2V = dataclasses.replace(T2V, model_type="i2v", in_dim=36, image_dim=12)
FLF2V = dataclasses.replace(I2V, pos_embed_seq_len=514)
CONFIGS = {"t2v": T2V, "df": DF, "i2v": I2V, "flf2v": FLF2V}


@cache
def random_state(config: TransformerConfig, dtype=jnp.float32, seed: int = 0) -> nnx.State:
    """Every parameter normal: biases, norms and modulations too."""
    state = nnx.state(TRANSFORMER.abstract(config))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: jnp.asarray(rng.standard_normal(p.shape), dtype), state)


def save(folder: Path, config: TransformerConfig, format: Format = "original", **kwargs) -> Path:
    """A transformer's folder with random values; returns it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    TRANSFORMER.save(folder, random_state(config), config, format=format, **kwargs)
    return folder


def edit_json(file: Path, **changes) -> None:
    """Change keys of a JSON file; None removes one."""
    value = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in value.items() if v is not None}))


def edit_tensors(file: Path, **changes) -> None:
    """Change tensors of a safetensors file with the format's own library; None removes one."""
    from safetensors.numpy import load_file, save_file

    tensors = {**load_file(file), **{k.replace("__", "."): v for k, v in changes.items()}}
    save_file({k: v for k, v in tensors.items() if v is not None}, file)
