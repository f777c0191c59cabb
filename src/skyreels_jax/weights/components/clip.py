"""CLIP's vision encoder: its weight table, its configuration in files, and how it is opened.

Names: the ``visual.`` part of Wan's open-clip XLM-R ``.pth`` on the left, transformers' CLIP vision
models on the right. The two names of the norm before the blocks are theirs: ``pre_layrnorm``.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Final

from skyreels_jax.errors import WeightsError
from skyreels_jax.models.clip_vision import ClipVision, ClipVisionConfig
from skyreels_jax.weights.components.stored import (
    MAX_LAYERS,
    ComponentSpec,
    JsonFields,
    StoredComponent,
    open_files,
)
from skyreels_jax.weights.layout import Layout
from skyreels_jax.weights.plan import (
    CONV,
    COPY,
    LINEAR,
    Format,
    Rule,
    Source,
    Transform,
    leading_ones,
    rule,
)

# The text encoder and the temperature, which video generation never uses; and a table of indices
# that older versions of transformers stored.
_IGNORED: Final = (
    r"textual\..*",
    r"log_scale",
    r"(vision_model\.)?embeddings\.position_ids",
)

# Of CLIPVisionModelWithProjection, and of hub files of any class.
CLIP_PREFIX: Final = "vision_model."
# The widths of heads of ViT-H; a file without config.json does not say.
_HEAD_DIM: Final = 80


def clip_prefix(names: Iterable[str]) -> str:
    """What stands before a file's names: transformers 5 saves a CLIPVisionModel without prefix."""
    return CLIP_PREFIX if any(name.startswith(CLIP_PREFIX) for name in names) else ""


def _dense(target: str, original: str, diffusers: str) -> list[Rule]:
    return [
        rule(f"{target}.kernel", f"{original}.weight", f"{diffusers}.weight", LINEAR),
        rule(f"{target}.bias", f"{original}.bias", f"{diffusers}.bias"),
    ]


def _norm(target: str, original: str, diffusers: str) -> list[Rule]:
    return [
        rule(f"{target}.scale", f"{original}.weight", f"{diffusers}.weight"),
        rule(f"{target}.bias", f"{original}.bias", f"{diffusers}.bias"),
    ]


def _fused(target: str, original: str, diffusers: str, third: int) -> list[Rule]:
    """One of queries, keys and values: a third of the original's rows, a tensor in diffusers."""

    def one(ours: str, theirs: str, transform: Transform) -> Rule:
        return Rule(
            f"{target}.{ours}",
            Source(f"{original}.{theirs}", transform, (third, 3)),
            Source(f"{diffusers}.{theirs}", transform),
        )

    return [one("kernel", "weight", LINEAR), one("bias", "bias", COPY)]


def clip_rules(config: ClipVisionConfig, *, prefix: str = CLIP_PREFIX) -> tuple[Rule, ...]:
    """The rules of an encoder; ``prefix`` is that of the diffusers names."""
    original, theirs = "visual.transformer.{i}", f"{prefix}encoder.layers.{{i}}"
    attention = f"{theirs}.self_attn"
    rules = [
        Rule(
            "cls_embedding",
            Source("visual.cls_embedding", leading_ones(2)),
            Source(f"{prefix}embeddings.class_embedding"),
        ),
        Rule(
            "pos_embedding",
            Source("visual.pos_embedding", leading_ones(1)),
            Source(f"{prefix}embeddings.position_embedding.weight"),
        ),
        rule(
            "patch_embedding.kernel",
            "visual.patch_embedding.weight",
            f"{prefix}embeddings.patch_embedding.weight",
            CONV,
        ),
        *_norm("pre_norm", "visual.pre_norm", f"{prefix}pre_layrnorm"),
        *_norm("blocks.norm1", f"{original}.norm1", f"{theirs}.layer_norm1"),
        *_fused("blocks.attn.q", f"{original}.attn.to_qkv", f"{attention}.q_proj", 0),
        *_fused("blocks.attn.k", f"{original}.attn.to_qkv", f"{attention}.k_proj", 1),
        *_fused("blocks.attn.v", f"{original}.attn.to_qkv", f"{attention}.v_proj", 2),
        *_dense("blocks.attn.proj", f"{original}.attn.proj", f"{attention}.out_proj"),
        *_norm("blocks.norm2", f"{original}.norm2", f"{theirs}.layer_norm2"),
        *_dense("blocks.mlp.fc1", f"{original}.mlp.0", f"{theirs}.mlp.fc1"),
        *_dense("blocks.mlp.fc2", f"{original}.mlp.2", f"{theirs}.mlp.fc2"),
        *_norm("post_norm", "visual.post_norm", f"{prefix}post_layernorm"),
    ]
    if config.projection_dim is not None:
        # The original multiplies by it from the right: it is stored as ours is.
        rules.append(
            Rule("head", Source("visual.head"), Source("visual_projection.weight", LINEAR))
        )
    return tuple(rules)


def clip_config_from_tensors(
    shapes: Mapping[str, Sequence[int]], format: Format
) -> ClipVisionConfig:
    """What the shapes in a file say of the encoder; heads are 80 wide, as in ViT-H.

    Raises:
        WeightsError: tensors that the answer depends on are missing or contradict each other.
    """
    prefix = "visual." if format == "original" else clip_prefix(shapes)
    if format == "original":
        patch, positions, layer = "patch_embedding.weight", "pos_embedding", "transformer.{i}"
        hidden, head = "mlp.0.weight", "visual.head"
    else:
        patch, positions = (
            "embeddings.patch_embedding.weight",
            "embeddings.position_embedding.weight",
        )
        layer, hidden, head = "encoder.layers.{i}", "mlp.fc1.weight", "visual_projection.weight"

    def shape(name: str, rank: int) -> Sequence[int]:
        if len(shapes.get(name, ())) != rank:
            raise WeightsError(
                f"not a CLIP vision encoder: {name} is missing or not of rank {rank}"
            )
        return shapes[name]

    def first_mlp(i: int) -> str:
        return f"{prefix}{layer.format(i=i)}.{hidden}"

    dim, _, patch_size, _ = shape(prefix + patch, 4)
    grid = round((shape(prefix + positions, 3 if format == "original" else 2)[-2] - 1) ** 0.5)
    ffn_dim, _ = shape(first_mlp(0), 2)
    projection = shape(head, 2) if head in shapes else None
    if dim % _HEAD_DIM:
        raise WeightsError(f"CLIP encoder of width {dim}: not heads of {_HEAD_DIM}, as ViT-H")
    try:
        return ClipVisionConfig(
            dim=dim,
            ffn_dim=ffn_dim,
            num_heads=dim // _HEAD_DIM,
            num_layers=sum(first_mlp(i) in shapes for i in range(len(shapes))),
            image_size=grid * patch_size,
            patch_size=patch_size,
            projection_dim=projection[1 if format == "original" else 0] if projection else None,
        )
    except ValueError as error:
        raise WeightsError(f"not CLIP's vision encoder: {error}") from error


def clip_config_from_json(config: Mapping[str, object]) -> ClipVisionConfig:
    """From transformers' ``config.json``; its ``architectures`` tell whether there is a projection.

    Raises:
        WeightsError: a key is missing or its value illegal.
        UnsupportedError: another activation than the exact GELU (OpenAI's own encoders have one).
    """
    fields = JsonFields({"hidden_act": "quick_gelu"} | dict(config), "image encoder")
    fields.require({"hidden_act": "gelu"})
    classes = config.get("architectures") or ()
    if not isinstance(classes, list | tuple):
        raise WeightsError(
            f"the image encoder's config.json is unsound: architectures = {classes!r:.80}"
        )
    try:
        return ClipVisionConfig(
            dim=fields.size("hidden_size"),
            ffn_dim=fields.size("intermediate_size"),
            num_heads=fields.size("num_attention_heads"),
            num_layers=fields.size("num_hidden_layers", most=MAX_LAYERS),
            image_size=fields.size("image_size", 224, most=1 << 14),
            patch_size=fields.size("patch_size", most=1 << 14),
            projection_dim=(
                None if "CLIPVisionModel" in classes else fields.size("projection_dim", 512)
            ),
            eps=fields.small("layer_norm_eps", 1e-5),
        )
    except ValueError as error:
        raise WeightsError(f"the image encoder's config.json is unsound: {error}") from error


def _clip_json(config: ClipVisionConfig, format: Format = "diffusers") -> dict[str, object]:
    """``config.json`` of ``CLIPVisionModelWithProjection``, or of ``CLIPVisionModel`` without a
    projection; the original format has none."""
    del format
    written: dict[str, object] = {
        "architectures": [clip_class(config)],
        "hidden_act": "gelu",
        "hidden_size": config.dim,
        "image_size": config.image_size,
        "intermediate_size": config.ffn_dim,
        "layer_norm_eps": config.eps,
        "model_type": "clip_vision_model",
        "num_attention_heads": config.num_heads,
        "num_channels": 3,
        "num_hidden_layers": config.num_layers,
        "patch_size": config.patch_size,
    }
    if config.projection_dim is not None:
        written["projection_dim"] = config.projection_dim
    return written


def clip_class(config: ClipVisionConfig) -> str:
    """The class of transformers that reads such an image encoder."""
    return "CLIPVisionModel" if config.projection_dim is None else "CLIPVisionModelWithProjection"


def image_processor_json(config: ClipVisionConfig) -> dict[str, object]:
    """``preprocessor_config.json``: short edge to the encoder's size, its centre, normalised."""
    side = config.image_size
    return {
        "crop_size": {"height": side, "width": side},
        "do_center_crop": True,
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_processor_type": "CLIPImageProcessor",
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "resample": 3,
        "rescale_factor": 1 / 255,
        "size": {"shortest_edge": side},
    }


def _default_rules(config: ClipVisionConfig) -> tuple[Rule, ...]:
    return clip_rules(config)


CLIP: Final = ComponentSpec(ClipVision, _default_rules, _clip_json, stem="model", ignored=_IGNORED)


def stored_image_encoder(layout: Layout) -> StoredComponent[ClipVisionConfig, ClipVision]:
    """The CLIP vision encoder of a folder; only headers are read.

    Raises:
        WeightsError: it is missing or unsound.
        UnsupportedError: it is a variant that SkyReels-V2 does not use.
    """
    source, config, format = open_files(
        layout, "image_encoder", clip_config_from_json, clip_config_from_tensors
    )
    prefix = clip_prefix(source.tensors()) if format == "diffusers" else CLIP_PREFIX
    rules = clip_rules(config, prefix=prefix)
    return StoredComponent(CLIP, config, source, format, rules)
