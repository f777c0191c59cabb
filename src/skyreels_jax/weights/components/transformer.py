"""The transformer: its weight table, its ``config.json`` in both formats, and how it is opened.

The table, one line a tensor: ours, Skywork's name, diffusers' name. The two number the norms of a
block differently: the original's ``norm3`` is diffusers' ``norm2``. Published configurations leave
keys out (the original never writes some), so every number that a shape tells is read off the
tensors too; where both speak they must agree.
"""

import math
from collections.abc import Callable, Mapping
from pathlib import PurePath
from typing import Any, Final

from skyreels_jax.errors import WeightsError
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import FLF2V_1_3B, TransformerConfig
from skyreels_jax.weights.components.stored import ComponentSpec, StoredComponent
from skyreels_jax.weights.layout import TRANSFORMER_CLASSES, Layout
from skyreels_jax.weights.plan import (
    CONV,
    LINEAR,
    Format,
    Problems,
    Rule,
    Transform,
    layers_in_file,
    leading_ones,
    rule,
)
from skyreels_jax.weights.repackaged import UnpackedSource
from skyreels_jax.weights.safetensors_file import TensorInfo, TensorSpec

# diffusers builds a norm for image queries that its forward never calls, and its own loader ignores
# the name; files written by its early versions carry it.
_IGNORED: Final = (r"blocks\.\d+\.attn2\.norm_added_q\.weight",)


def _dense(target: str, original: str, diffusers: str, kernel: Transform = LINEAR) -> list[Rule]:
    return [
        rule(f"{target}.kernel", f"{original}.weight", f"{diffusers}.weight", kernel),
        rule(f"{target}.bias", f"{original}.bias", f"{diffusers}.bias"),
    ]


def _norm(target: str, original: str, diffusers: str) -> list[Rule]:
    return [
        rule(f"{target}.scale", f"{original}.weight", f"{diffusers}.weight"),
        rule(f"{target}.bias", f"{original}.bias", f"{diffusers}.bias"),
    ]


def _scale(target: str, original: str, diffusers: str) -> list[Rule]:
    return [rule(f"{target}.scale", f"{original}.weight", f"{diffusers}.weight")]


def _attention(target: str, original: str, diffusers: str) -> list[Rule]:
    return [
        *_dense(f"{target}.q", f"{original}.q", f"{diffusers}.to_q"),
        *_dense(f"{target}.k", f"{original}.k", f"{diffusers}.to_k"),
        *_dense(f"{target}.v", f"{original}.v", f"{diffusers}.to_v"),
        *_dense(f"{target}.o", f"{original}.o", f"{diffusers}.to_out.0"),
        *_scale(f"{target}.norm_q", f"{original}.norm_q", f"{diffusers}.norm_q"),
        *_scale(f"{target}.norm_k", f"{original}.norm_k", f"{diffusers}.norm_k"),
    ]


_EMBEDDER: Final = "condition_embedder"
_ONE: Final = leading_ones(1)

_COMMON: Final = (
    *_dense("patch_embedding", "patch_embedding", "patch_embedding", CONV),
    *_dense("text_embedding.fc1", "text_embedding.0", f"{_EMBEDDER}.text_embedder.linear_1"),
    *_dense("text_embedding.fc2", "text_embedding.2", f"{_EMBEDDER}.text_embedder.linear_2"),
    *_dense("time_embedding.fc1", "time_embedding.0", f"{_EMBEDDER}.time_embedder.linear_1"),
    *_dense("time_embedding.fc2", "time_embedding.2", f"{_EMBEDDER}.time_embedder.linear_2"),
    *_dense("time_projection", "time_projection.1", f"{_EMBEDDER}.time_proj"),
    rule("blocks.modulation", "blocks.{i}.modulation", "blocks.{i}.scale_shift_table", _ONE),
    *_attention("blocks.self_attn", "blocks.{i}.self_attn", "blocks.{i}.attn1"),
    *_norm("blocks.norm3", "blocks.{i}.norm3", "blocks.{i}.norm2"),
    *_attention("blocks.cross_attn", "blocks.{i}.cross_attn", "blocks.{i}.attn2"),
    *_dense("blocks.ffn.fc1", "blocks.{i}.ffn.0", "blocks.{i}.ffn.net.0.proj"),
    *_dense("blocks.ffn.fc2", "blocks.{i}.ffn.2", "blocks.{i}.ffn.net.2"),
    rule("head.modulation", "head.modulation", "scale_shift_table", _ONE),
    *_dense("head.linear", "head.head", "proj_out"),
)

_FRAME_RATE: Final = (
    rule("fps_embedding.embedding", "fps_embedding.weight", "fps_embedding.weight"),
    *_dense("fps_projection.fc1", "fps_projection.0", "fps_projection.net.0.proj"),
    *_dense("fps_projection.fc2", "fps_projection.2", "fps_projection.net.2"),
)

_IMAGE: Final = (
    *_norm("img_emb.norm1", "img_emb.proj.0", f"{_EMBEDDER}.image_embedder.norm1"),
    *_dense("img_emb.fc1", "img_emb.proj.1", f"{_EMBEDDER}.image_embedder.ff.net.0.proj"),
    *_dense("img_emb.fc2", "img_emb.proj.3", f"{_EMBEDDER}.image_embedder.ff.net.2"),
    *_norm("img_emb.norm2", "img_emb.proj.4", f"{_EMBEDDER}.image_embedder.norm2"),
    *_dense(
        "blocks.cross_attn.k_img", "blocks.{i}.cross_attn.k_img", "blocks.{i}.attn2.add_k_proj"
    ),
    *_dense(
        "blocks.cross_attn.v_img", "blocks.{i}.cross_attn.v_img", "blocks.{i}.attn2.add_v_proj"
    ),
    *_scale(
        "blocks.cross_attn.norm_k_img",
        "blocks.{i}.cross_attn.norm_k_img",
        "blocks.{i}.attn2.norm_added_k",
    ),
)

_IMAGE_POSITIONS: Final = (
    rule("img_emb.pos_embed", "img_emb.emb_pos", f"{_EMBEDDER}.image_embedder.pos_embed", _ONE),
)


def transformer_rules(config: TransformerConfig) -> tuple[Rule, ...]:
    """The rules of exactly the parameters that a model of ``config`` has."""
    return (
        *_COMMON,
        *(_FRAME_RATE if config.inject_sample_info else ()),
        *(_IMAGE if config.image_dim is not None else ()),
        *(_IMAGE_POSITIONS if config.pos_embed_seq_len is not None else ()),
    )


# Heads are this wide in every released model; for configs that do not say how many there are.
_HEAD_DIM: Final = 128

_KEYS: Final[Mapping[Format, Mapping[str, str]]] = {
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


def _transformer_config(
    json: Mapping[str, object], tensors: Mapping[str, TensorSpec], format: Format, where: str
) -> TransformerConfig:
    """The configuration that ``config.json`` and the tensors agree on.

    Args:
        json: the parsed file.
        tensors: of the transformer, by ``format``'s names.
        format: of both.
        where: the file's path, for errors.

    Raises:
        WeightsError: if a value is illegal, both speak and differ, or neither does.
    """
    problems = Problems()
    stated = _stated(json, format, problems)
    derived = _derived(tensors, format)
    for key, value in derived.items():
        if key in stated and stated[key] != value:
            problems.add(
                "values on which the config and the tensors differ",
                f"{key}: {stated[key]!r} in the config, {value!r} by the tensors' names and shapes",
            )
    values = {**derived, **stated}
    values.setdefault("num_heads", values.get("dim", _HEAD_DIM) // _HEAD_DIM)
    for key in ("dim", "ffn_dim", "num_layers", "in_dim"):
        if key not in values:
            problems.add("values that neither the config nor the tensors tell", key)
    problems.raise_for(where)
    try:
        return TransformerConfig(**values)
    except ValueError as error:
        raise WeightsError(f"{where}: {error}") from error


def _check_told(layout: Layout, tensors: Mapping[str, TensorInfo]) -> None:
    """Refuse tensors without a ``config.json`` that do not tell the number of heads."""
    width = _derived(tensors, layout.format).get("dim", 0)
    if not layout.config and width % _HEAD_DIM:
        files = ", ".join(sorted({PurePath(info.file).name for info in tensors.values()}))
        raise WeightsError(
            f"{layout.config_file} is missing, and {files} does not tell the number of heads: a "
            f"width of {width} is no multiple of {_HEAD_DIM}; put it there, or give `preset`"
        )


def _stated(json: Mapping[str, object], format: Format, problems: Problems) -> dict[str, Any]:
    """What the file says, under our names."""
    for key, allowed in _FIXED.items():
        if key in json and json[key] not in allowed:
            problems.add("settings that no SkyReels-V2 model has", f"{key} = {json[key]!r:.80}")
    keys = {**_KEYS[format], **{key: key for key in _SHARED_KEYS}}
    stated = {}
    for ours, theirs in keys.items():
        value = json.get(theirs)
        if value is None:
            continue
        rule, parse = _LEGAL.get(ours, _SIZE)
        parsed = parse(value)
        if parsed is None:
            problems.add("illegal values", f"{theirs} = {value!r:.80}: must be {rule}")
        else:
            stated[ours] = parsed
    if format == "diffusers" and "attention_head_dim" in json and "num_heads" in stated:
        width = _SIZE[1](json["attention_head_dim"])
        if width is None:
            problems.add(
                "illegal values", f"attention_head_dim = {json['attention_head_dim']!r:.80}"
            )
        else:
            stated["dim"] = stated["num_heads"] * width
    return stated


def _derived(tensors: Mapping[str, TensorSpec], format: Format) -> dict[str, Any]:
    """What the tensors tell; nothing of a tensor that is missing or has an odd rank."""

    def shape(target: str, rank: int) -> tuple[int, ...] | None:
        source = _EVERYTHING[target].source(format)
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
    if depth := layers_in_file(tensors, format)(_EVERYTHING["blocks.modulation"]):
        values["num_layers"] = depth
    values["inject_sample_info"] = shape("fps_embedding.embedding", 2) is not None
    values["model_type"] = "i2v" if "image_dim" in values else "t2v"
    return values


_Parse = Callable[[object], object]
# Wan 2.1 calls its first-last-frame model a type of its own.
_MODEL_TYPES: Final = {"t2v": "t2v", "i2v": "i2v", "flf2v": "i2v"}


def _size(value: object) -> int | None:
    return value if type(value) is int and 0 < value < 1 << 24 else None


def _sizes(value: object) -> tuple[int, ...] | None:
    if isinstance(value, list | tuple) and len(value) == 3 and all(map(_size, value)):
        return tuple(value)
    return None


_SIZE: Final[tuple[str, _Parse]] = ("a positive integer", _size)
_LEGAL: Final[Mapping[str, tuple[str, _Parse]]] = {
    "model_type": (
        "'t2v', 'i2v' or 'flf2v'",
        lambda v: _MODEL_TYPES.get(v) if type(v) is str else None,
    ),
    "eps": (
        "a number between 0 and 1",
        lambda v: v if type(v) is float and 0 < v < 1 else None,
    ),
    "inject_sample_info": ("true or false", lambda v: v if type(v) is bool else None),
    "patch_size": ("three positive integers", _sizes),
}


def transformer_json(config: TransformerConfig, format: Format) -> dict[str, Any]:
    """``config`` as the ``config.json`` of a format, with the keys that its own writer has.

    The original leaves ``text_dim`` and ``patch_size`` out; the tensors' shapes tell them.
    """
    shared = {
        key: getattr(config, key)
        for key in ("eps", "ffn_dim", "freq_dim", "inject_sample_info", "num_layers")
    }
    if format == "original":
        keys = ("dim", "in_dim", "model_type", "num_heads", "out_dim", "text_len")
        return (
            {"_class_name": TRANSFORMER_CLASSES[format][0]}
            | shared
            | {k: getattr(config, k) for k in keys}
        )
    return shared | {
        "_class_name": TRANSFORMER_CLASSES[format][0],
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


TRANSFORMER: Final = ComponentSpec(WanModel, transformer_rules, transformer_json, ignored=_IGNORED)


def stored_transformer(
    layout: Layout, source: UnpackedSource | None = None
) -> StoredComponent[TransformerConfig, WanModel]:
    """The transformer of a folder or file; only headers are read.

    Args:
        layout: of the checkpoint.
        source: its tensors, where they have been opened already.

    Raises:
        WeightsError: its configuration or a file is unsound, or they contradict each other.
    """
    source = layout.tensors() if source is None else source
    where = str(layout.config_file)
    _check_told(layout, source.tensors())
    config = _transformer_config(layout.config, source.tensors(), layout.format, where)
    rules = transformer_rules(config)
    return StoredComponent(TRANSFORMER, config, source, layout.format, rules)
