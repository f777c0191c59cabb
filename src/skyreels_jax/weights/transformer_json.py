"""The transformer's ``config.json`` in both dialects, completed from and held against the tensors.

Published files leave keys out (the original never writes some), so every number that a shape tells
is read off the tensors too; where both speak they must agree.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any, Final

from skyreels_jax.errors import WeightsError
from skyreels_jax.models.transformer_config import FLF2V_1_3B, TransformerConfig
from skyreels_jax.weights.plan import Problems, layers_in_file
from skyreels_jax.weights.rules import Dialect
from skyreels_jax.weights.source import TensorSpec
from skyreels_jax.weights.transformer_rules import transformer_rules

# Classes whose files this package reads: Skywork's, diffusers' port of it, and the Wan 2.1 model
# that both descend from (same parameters, no frame rates).
CLASSES: Final[Mapping[Dialect, tuple[str, ...]]] = {
    "original": ("WanModel",),
    "diffusers": ("SkyReelsV2Transformer3DModel", "WanTransformer3DModel"),
}
# Heads are this wide in every released model; for configs that do not say how many there are.
HEAD_DIM: Final = 128

_KEYS: Final[Mapping[Dialect, Mapping[str, str]]] = {
    "original": {
        **{key: key for key in ("model_type", "dim", "in_dim", "num_heads", "out_dim", "text_len")},
    },
    "diffusers": {
        "in_dim": "in_channels",
        "out_dim": "out_channels",
        "num_heads": "num_attention_heads",
        "image_dim": "image_dim",
        "pos_embed_seq_len": "pos_embed_seq_len",
    },
}
_SHARED_KEYS: Final = (
    *("ffn_dim", "num_layers", "freq_dim", "text_dim", "patch_size", "eps", "inject_sample_info"),
)
# Architecture switches of the two code bases, at the only values that any release has.
_FIXED: Final[Mapping[str, tuple[object, ...]]] = {
    "qk_norm": (True, "rms_norm_across_heads"),
    "cross_attn_norm": (True,),
    "window_size": ([-1, -1],),
}
_EVERYTHING: Final = {
    rule.target: rule
    for rule in transformer_rules(
        TransformerConfig(**{**vars(FLF2V_1_3B), "inject_sample_info": True})
    )
}


def dialect_of_config(json: Mapping[str, Any], where: str) -> Dialect:
    """Which dialect a ``config.json`` speaks.

    Raises:
        WeightsError: if it is another model's.
    """
    name = json.get("_class_name")
    for dialect, classes in CLASSES.items():
        if name in classes:
            return dialect
    if name is None and ("num_attention_heads" in json or "in_channels" in json):
        return "diffusers"
    if name is None and ("dim" in json or "num_heads" in json):
        return "original"
    known = ", ".join(name for classes in CLASSES.values() for name in classes)
    raise WeightsError(f"{where} is of class {name!r}; known transformer classes are {known}")


def transformer_config(
    json: Mapping[str, Any], tensors: Mapping[str, TensorSpec], dialect: Dialect, where: str
) -> TransformerConfig:
    """The configuration that ``config.json`` and the tensors agree on.

    Args:
        json: the parsed file.
        tensors: of the transformer, by ``dialect``'s names.
        dialect: of both.
        where: the file's path, for errors.

    Raises:
        WeightsError: if a value is illegal, both speak and differ, or neither does.
    """
    problems = Problems()
    stated = _stated(json, dialect, problems)
    derived = _derived(tensors, dialect)
    for key, value in derived.items():
        if key in stated and stated[key] != value:
            problems.add(
                "values on which the config and the tensors differ",
                f"{key}: {stated[key]!r} in the config, {value!r} by the tensors' names and shapes",
            )
    values = {**derived, **stated}
    values.setdefault("num_heads", values.get("dim", HEAD_DIM) // HEAD_DIM)
    for key in ("dim", "ffn_dim", "num_layers", "in_dim"):
        if key not in values:
            problems.add("values that neither the config nor the tensors tell", key)
    problems.raise_for(where)
    try:
        return TransformerConfig(**values)
    except ValueError as error:
        raise WeightsError(f"{where}: {error}") from error


def _stated(json: Mapping[str, Any], dialect: Dialect, problems: Problems) -> dict[str, Any]:
    """What the file says, under our names."""
    for key, allowed in _FIXED.items():
        if key in json and json[key] not in allowed:
            problems.add("settings that no SkyReels-V2 model has", f"{key} = {json[key]!r}")
    keys = {**_KEYS[dialect], **{key: key for key in _SHARED_KEYS}}
    stated = {}
    for ours, theirs in keys.items():
        value = json.get(theirs)
        if value is None:
            continue
        rule, parse = _LEGAL.get(ours, _SIZE)
        parsed = parse(value)
        if parsed is None:
            problems.add("illegal values", f"{theirs} = {value!r}: must be {rule}")
        else:
            stated[ours] = parsed
    if dialect == "diffusers" and "attention_head_dim" in json and "num_heads" in stated:
        width = _SIZE[1](json["attention_head_dim"])
        if width is None:
            problems.add("illegal values", f"attention_head_dim = {json['attention_head_dim']!r}")
        else:
            stated["dim"] = stated["num_heads"] * width
    return stated


def _derived(tensors: Mapping[str, TensorSpec], dialect: Dialect) -> dict[str, Any]:
    """What the tensors tell; nothing of a tensor that is missing or has an odd rank."""

    def shape(target: str, rank: int) -> tuple[int, ...] | None:
        source = _EVERYTHING[target].source(dialect)
        spec = tensors.get(source.name.replace("{i}", "0")) if source else None
        return spec.shape if spec is not None and len(spec.shape) == rank else None

    values: dict[str, Any] = {}
    if patch := shape("patch_embedding.kernel", 5):
        values |= {"dim": patch[0], "in_dim": patch[1], "patch_size": tuple(patch[2:])}
        if head := shape("head.linear.kernel", 2):
            values["out_dim"] = head[0] // max(1, math.prod(patch[2:]))
    for key, target, axis in (
        ("ffn_dim", "blocks.ffn.fc1.kernel", 0),
        ("text_dim", "text_embedding.fc1.kernel", 1),
        ("freq_dim", "time_embedding.fc1.kernel", 1),
        ("image_dim", "img_emb.fc1.kernel", 1),
    ):
        if found := shape(target, 2):
            values[key] = found[axis]
    if positions := shape("img_emb.pos_embed", 3):
        values["pos_embed_seq_len"] = positions[1]
    if depth := layers_in_file(tensors, dialect)(_EVERYTHING["blocks.modulation"]):
        values["num_layers"] = depth
    values["inject_sample_info"] = shape("fps_embedding.embedding", 2) is not None
    values["model_type"] = "i2v" if "image_dim" in values else "t2v"
    return values


Parse = Callable[[Any], Any]


def _size(value: Any) -> int | None:
    return value if type(value) is int and 0 < value < 1 << 24 else None


def _sizes(value: Any) -> tuple[int, ...] | None:
    fits = isinstance(value, list | tuple) and len(value) == 3 and all(map(_size, value))
    return tuple(value) if fits else None


_SIZE: Final[tuple[str, Parse]] = ("a positive integer", _size)
_LEGAL: Final[Mapping[str, tuple[str, Parse]]] = {
    "model_type": ("'t2v' or 'i2v'", lambda v: v if v in ("t2v", "i2v") else None),
    "eps": (
        "a number between 0 and 1",
        lambda v: v if type(v) is float and 0 < v < 1 else None,
    ),
    "inject_sample_info": ("true or false", lambda v: v if type(v) is bool else None),
    "patch_size": ("three positive integers", _sizes),
}


def config_json(config: TransformerConfig, dialect: Dialect) -> dict[str, Any]:
    """``config`` as the ``config.json`` of a dialect, with the keys that its own writer has.

    The original leaves ``text_dim`` and ``patch_size`` out; the tensors' shapes tell them.
    """
    shared = {
        key: getattr(config, key)
        for key in ("eps", "ffn_dim", "freq_dim", "inject_sample_info", "num_layers")
    }
    if dialect == "original":
        keys = ("dim", "in_dim", "model_type", "num_heads", "out_dim", "text_len")
        return {"_class_name": CLASSES[dialect][0]} | shared | {k: getattr(config, k) for k in keys}
    return shared | {
        "_class_name": CLASSES[dialect][0],
        "added_kv_proj_dim": None if config.image_dim is None else config.dim,
        "attention_head_dim": config.head_dim,
        "cross_attn_norm": True,
        "image_dim": config.image_dim,
        "in_channels": config.in_dim,
        "num_attention_heads": config.num_heads,
        "num_frame_per_block": 1,
        "out_channels": config.out_dim,
        "patch_size": list(config.patch_size),
        "pos_embed_seq_len": config.pos_embed_seq_len,
        "qk_norm": "rms_norm_across_heads",
        "rope_max_seq_len": 1024,
        "text_dim": config.text_dim,
    }
