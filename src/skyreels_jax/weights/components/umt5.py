"""The UMT5 encoder: its weight table, its configuration in files, and how it is opened.

Names: Wan's ``models_t5_umt5-xxl-enc-bf16.pth`` on the left, transformers' UMT5EncoderModel on the
right.
"""

from collections.abc import Mapping, Sequence
from typing import Final

from skyreels_jax.errors import WeightsError
from skyreels_jax.models.umt5 import BUCKETS, MAX_DISTANCE, Umt5Config, Umt5Encoder
from skyreels_jax.weights.components.stored import (
    MAX_LAYERS,
    ComponentSpec,
    JsonFields,
    StoredComponent,
    open_files,
)
from skyreels_jax.weights.layout import Layout
from skyreels_jax.weights.plan import LINEAR, Format, Rule, rule

# A second name that older files give the embedding (``shared.weight``); the tokenizer, which
# ComfyUI puts into the file, and a temperature that it stores with every text encoder.
_IGNORED: Final = (r"encoder\.embed_tokens\.weight", r"(.*\.)?(spiece_model|logit_scale)")

_BLOCK: Final = "encoder.block.{i}.layer"
_ATTENTION: Final = f"{_BLOCK}.0.SelfAttention"
_FFN: Final = f"{_BLOCK}.1.DenseReluDense"


def _kernel(target: str, original: str, diffusers: str) -> Rule:
    return rule(f"{target}.kernel", f"{original}.weight", f"{diffusers}.weight", LINEAR)


def _scale(target: str, original: str, diffusers: str) -> Rule:
    return rule(f"{target}.scale", f"{original}.weight", f"{diffusers}.weight")


_RULES: Final = (
    rule("token_embedding.embedding", "token_embedding.weight", "shared.weight"),
    _scale("blocks.norm1", "blocks.{i}.norm1", f"{_BLOCK}.0.layer_norm"),
    _kernel("blocks.attn.q", "blocks.{i}.attn.q", f"{_ATTENTION}.q"),
    _kernel("blocks.attn.k", "blocks.{i}.attn.k", f"{_ATTENTION}.k"),
    _kernel("blocks.attn.v", "blocks.{i}.attn.v", f"{_ATTENTION}.v"),
    _kernel("blocks.attn.o", "blocks.{i}.attn.o", f"{_ATTENTION}.o"),
    rule(
        "blocks.pos_embedding.embedding",
        "blocks.{i}.pos_embedding.embedding.weight",
        f"{_ATTENTION}.relative_attention_bias.weight",
    ),
    _scale("blocks.norm2", "blocks.{i}.norm2", f"{_BLOCK}.1.layer_norm"),
    _kernel("blocks.ffn.gate", "blocks.{i}.ffn.gate.0", f"{_FFN}.wi_0"),
    _kernel("blocks.ffn.fc1", "blocks.{i}.ffn.fc1", f"{_FFN}.wi_1"),
    _kernel("blocks.ffn.fc2", "blocks.{i}.ffn.fc2", f"{_FFN}.wo"),
    _scale("norm", "norm", "encoder.final_layer_norm"),
)


def umt5_config_from_tensors(shapes: Mapping[str, Sequence[int]], format: Format) -> Umt5Config:
    """What the shapes in a file say of the encoder.

    Raises:
        WeightsError: tensors that the answer depends on are missing or contradict each other.
    """
    names = {rule.target: rule.source(format) for rule in _RULES}

    def shape(target: str) -> Sequence[int]:
        source = names[target]
        assert source is not None
        name = source.name.format(i=0)
        if len(shapes.get(name, ())) != 2:
            raise WeightsError(f"not a UMT5 encoder: {name} is missing or not a matrix")
        return shapes[name]

    vocab_size, dim = shape("token_embedding.embedding")
    buckets, num_heads = shape("blocks.pos_embedding.embedding")
    attention_dim, _ = shape("blocks.attn.q.kernel")
    ffn_dim, _ = shape("blocks.ffn.fc1.kernel")
    if buckets != BUCKETS or attention_dim % num_heads:
        raise WeightsError(
            f"not a UMT5 encoder: position bias {buckets} x {num_heads} (expected {BUCKETS} rows) "
            f"with attention of width {attention_dim}"
        )
    query = names["blocks.attn.q.kernel"]
    assert query is not None
    return Umt5Config(
        vocab_size=vocab_size,
        dim=dim,
        head_dim=attention_dim // num_heads,
        num_heads=num_heads,
        ffn_dim=ffn_dim,
        num_layers=sum(query.name.format(i=i) in shapes for i in range(len(shapes))),
    )


def umt5_config_from_json(config: Mapping[str, object]) -> Umt5Config:
    """From transformers' ``config.json``.

    Raises:
        WeightsError: a key is missing or its value illegal.
        UnsupportedError: another activation or other position buckets than UMT5's.
    """
    fields = JsonFields(config, "text encoder")
    fields.require(
        {
            "feed_forward_proj": "gated-gelu",
            "relative_attention_num_buckets": BUCKETS,
            "relative_attention_max_distance": MAX_DISTANCE,
        }
    )
    return Umt5Config(
        vocab_size=fields.size("vocab_size", most=1 << 24),
        dim=fields.size("d_model"),
        head_dim=fields.size("d_kv"),
        num_heads=fields.size("num_heads"),
        ffn_dim=fields.size("d_ff"),
        num_layers=fields.size("num_layers", most=MAX_LAYERS),
        eps=fields.small("layer_norm_epsilon", 1e-6),
    )


def _umt5_json(config: Umt5Config, format: Format = "diffusers") -> dict[str, object]:
    """``config.json`` of ``UMT5EncoderModel``; the original format has none."""
    del format
    return {
        "architectures": ["UMT5EncoderModel"],
        "d_ff": config.ffn_dim,
        "d_kv": config.head_dim,
        "d_model": config.dim,
        "decoder_start_token_id": 0,
        "dense_act_fn": "gelu_new",
        "dropout_rate": 0.1,
        "eos_token_id": 1,
        "feed_forward_proj": "gated-gelu",
        "is_encoder_decoder": True,
        "is_gated_act": True,
        "layer_norm_epsilon": config.eps,
        "model_type": "umt5",
        "num_decoder_layers": config.num_layers,
        "num_heads": config.num_heads,
        "num_layers": config.num_layers,
        "pad_token_id": 0,
        "relative_attention_max_distance": MAX_DISTANCE,
        "relative_attention_num_buckets": BUCKETS,
        "vocab_size": config.vocab_size,
    }


UMT5: Final = ComponentSpec(
    Umt5Encoder, lambda config: _RULES, _umt5_json, stem="model", ignored=_IGNORED
)


def stored_text_encoder(layout: Layout) -> StoredComponent[Umt5Config, Umt5Encoder]:
    """The UMT5 encoder of a folder; only headers are read.

    Raises:
        WeightsError: it is missing or unsound.
        UnsupportedError: it is a variant that SkyReels-V2 does not use.
    """
    source, config, format = open_files(
        layout, "text_encoder", umt5_config_from_json, umt5_config_from_tensors
    )
    return StoredComponent(UMT5, config, source, format, _RULES)
