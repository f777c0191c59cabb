"""The weight table of CLIP's vision tower, and its configuration from either layout.

Names: the ``visual.`` part of Wan's open-clip XLM-R ``.pth`` on the left, transformers' CLIP vision
models on the right. The two names of the norm before the blocks are theirs: ``pre_layrnorm``.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final

from skyreels_jax.errors import UnsupportedError, WeightsError
from skyreels_jax.models.clip_vision import ClipVisionConfig
from skyreels_jax.weights.rules import (
    CONV,
    COPY,
    LINEAR,
    Dialect,
    Rule,
    Source,
    Transform,
    leading_ones,
    rule,
)

# The text tower and the temperature, which video generation never uses; and a table of indices
# that older versions of transformers stored.
CLIP_IGNORED: Final = (
    r"textual\..*",
    r"log_scale",
    r"(vision_model\.)?embeddings\.position_ids",
)

# Of CLIPVisionModelWithProjection, and of hub files of any class.
DEFAULT_PREFIX: Final = "vision_model."
# The widths of heads of ViT-H; a file without config.json does not say.
HEAD_DIM: Final = 80


def diffusers_prefix(names: Iterable[str]) -> str:
    """What stands before a file's names: transformers 5 saves a CLIPVisionModel without prefix."""
    return DEFAULT_PREFIX if any(name.startswith(DEFAULT_PREFIX) for name in names) else ""


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


def _fused(target: str, original: str, diffusers: str, part: int) -> list[Rule]:
    """One of queries, keys and values: a third of the original's rows, a tensor in diffusers."""

    def one(ours: str, theirs: str, transform: Transform) -> Rule:
        return Rule(
            f"{target}.{ours}",
            Source(f"{original}.{theirs}", transform, (part, 3)),
            Source(f"{diffusers}.{theirs}", transform),
        )

    return [one("kernel", "weight", LINEAR), one("bias", "bias", COPY)]


def clip_rules(config: ClipVisionConfig, *, prefix: str = DEFAULT_PREFIX) -> tuple[Rule, ...]:
    """The rules of a tower; ``prefix`` is that of the diffusers names."""
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


def config_from_tensors(shapes: Mapping[str, Sequence[int]], dialect: Dialect) -> ClipVisionConfig:
    """What the shapes in a file say of the tower; heads are 80 wide, as in ViT-H.

    Raises:
        WeightsError: tensors that the answer depends on are missing or contradict each other.
    """
    tower = "visual." if dialect == "original" else diffusers_prefix(shapes)
    if dialect == "original":
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
            raise WeightsError(f"not a CLIP vision tower: {name} is missing or not of rank {rank}")
        return shapes[name]

    def first_mlp(i: int) -> str:
        return f"{tower}{layer.format(i=i)}.{hidden}"

    dim, _, patch_size, _ = shape(tower + patch, 4)
    grid = round((shape(tower + positions, 3 if dialect == "original" else 2)[-2] - 1) ** 0.5)
    ffn_dim, _ = shape(first_mlp(0), 2)
    projection = shape(head, 2) if head in shapes else None
    if dim % HEAD_DIM:
        raise WeightsError(f"CLIP vision tower of width {dim}: not heads of {HEAD_DIM}, as ViT-H")
    try:
        return ClipVisionConfig(
            dim=dim,
            ffn_dim=ffn_dim,
            num_heads=dim // HEAD_DIM,
            num_layers=sum(first_mlp(i) in shapes for i in range(len(shapes))),
            image_size=grid * patch_size,
            patch_size=patch_size,
            projection_dim=projection[1 if dialect == "original" else 0] if projection else None,
        )
    except ValueError as error:
        raise WeightsError(f"not a CLIP vision tower: {error}") from error


def config_from_json(config: Mapping[str, Any]) -> ClipVisionConfig:
    """From transformers' ``config.json``; its ``architectures`` tell whether there is a projection.

    Raises:
        WeightsError: a key is missing or its value illegal.
        UnsupportedError: another activation than the exact GELU (OpenAI's own towers have one).
    """
    activation = config.get("hidden_act", "quick_gelu")
    if activation != "gelu":
        raise UnsupportedError(f"image encoder with hidden_act {activation!r}; only 'gelu'")
    projects = "CLIPVisionModel" not in (config.get("architectures") or ())
    try:
        return ClipVisionConfig(
            dim=int(config["hidden_size"]),
            ffn_dim=int(config["intermediate_size"]),
            num_heads=int(config["num_attention_heads"]),
            num_layers=int(config["num_hidden_layers"]),
            image_size=int(config.get("image_size", 224)),
            patch_size=int(config["patch_size"]),
            projection_dim=int(config.get("projection_dim", 512)) if projects else None,
            eps=float(config.get("layer_norm_eps", 1e-5)),
        )
    except KeyError as error:
        raise WeightsError(f"the image encoder's config.json lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise WeightsError(f"the image encoder's config.json is unsound: {error}") from error
