"""The weight table of the transformer: one line a part, in both published dialects.

Each line: ours, Skywork's name, diffusers' name. The two number the norms of a block differently:
the original's ``norm3`` is diffusers' ``norm2``.
"""

from typing import Final

from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.weights.rules import CONV, LINEAR, Rule, Transform, leading_ones, rule

# diffusers builds a norm for image queries that its forward never calls, and its own loader ignores
# the name; files written by its early versions carry it.
TRANSFORMER_IGNORED: Final = (r"blocks\.\d+\.attn2\.norm_added_q\.weight",)


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
