"""LoRA files made by hand, and what a weight is with them, by formulas that stand here."""

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.weights.components.transformer import stored_transformer
from skyreels_jax.weights.lora.binding import Lora
from skyreels_jax.weights.lora.source import StoredTransformer, with_loras
from skyreels_jax.weights.plan import FORMATS, layers_in_file, make_plan

RANK = 4
Tensors = dict[str, np.ndarray]
PAIRS = {
    "peft": ("lora_A.weight", "lora_B.weight"),
    "kohya": ("lora_down.weight", "lora_up.weight"),
}


def random(*shape: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng([seed, *shape]).standard_normal(shape)
    return (0.3 * values).astype(np.float32)


@cache
def stored(folder: Path) -> StoredTransformer:
    return stored_transformer(Checkpoint.open(folder).layout)


def weights(folder: Path) -> Tensors:
    """All tensors of a checkpoint's transformer, by the names of its files."""
    return dict(_weights(folder))


@cache
def _weights(folder: Path) -> Tensors:
    source = stored(folder).source
    return {name: np.array(source.read(name)) for name in source.tensors()}


@cache
def names_in(folder: Path, format: str) -> dict[str, str]:
    """Every tensor's name in its files, and in a format."""
    there = stored(folder)
    layers = layers_in_file(there.source.tensors(), there.format)
    plans = {f: make_plan(there.rules, f, layers) for f in FORMATS}
    return {s.name: plans[format][slot].name for slot, s in plans[there.format].items()}


def linears(folder: Path) -> list[str]:
    """The weights that a LoRA is usually of: all matrices, and the patch embedding."""
    return [
        name
        for name, w in weights(folder).items()
        if w.ndim >= 2
        and name.endswith(".weight")
        and "fps_embedding" not in name
        and "modulation" not in name
    ]


def low_rank(
    modules: Mapping[str, Sequence[int]],
    *,
    prefix: str = "",
    pair: str = "peft",
    alpha: float | None = None,
    underscores: bool = False,
    rank: int = RANK,
) -> Tensors:
    """A LoRA of modules, whose weights have these shapes."""
    found: Tensors = {}
    down, up = PAIRS[pair]
    for seed, (module, shape) in enumerate(modules.items()):
        stem = prefix + (module.replace(".", "_") if underscores else module)
        found[f"{stem}.{down}"] = random(rank, *shape[1:], seed=seed)
        found[f"{stem}.{up}"] = random(shape[0], rank, *(1,) * (len(shape) - 2), seed=seed + 999)
        if alpha is not None:
            found[f"{stem}.alpha"] = np.float32(alpha)
    return found


def merged_low_rank(weight: np.ndarray, down: np.ndarray, up: np.ndarray, scale: float):
    """``W + scale * up @ down``, in float64."""
    product = up.reshape(len(up), -1).astype(np.float64) @ down.reshape(len(down), -1)
    return weight + scale * product.reshape(weight.shape)


def write(
    path: Path,
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, object] | str | None = None,
) -> Path:
    """A LoRA file; ``metadata`` becomes PEFT's configuration in its header."""
    texts = {"format": "pt"}
    if metadata is not None:
        text = metadata if isinstance(metadata, str) else json.dumps(dict(metadata))
        texts["lora_adapter_metadata"] = text
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, texts)
    return path


def with_file(folder: Path, file: Path, scale: float = 1.0, *others: Lora) -> Tensors:
    """All tensors of a checkpoint's transformer with a LoRA, as ours reads them."""
    source = with_loras(stored(folder), [Lora(file, scale), *others]).source
    return {name: np.asarray(source.read(name)) for name in source.tensors()}


def distance(ours: Mapping[str, np.ndarray], expected: Mapping[str, np.ndarray]) -> float:
    """The largest difference, relative to the largest value of its tensor."""
    assert ours.keys() == expected.keys()
    return max(
        float(np.abs(ours[n] - e).max() / max(np.abs(e).max(), 1e-30)) for n, e in expected.items()
    )
