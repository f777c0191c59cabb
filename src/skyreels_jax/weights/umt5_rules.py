"""The weight table of the UMT5 encoder, and its configuration from either layout.

Names: Wan's ``models_t5_umt5-xxl-enc-bf16.pth`` on the left, transformers' UMT5EncoderModel on the
right.
"""

from collections.abc import Mapping, Sequence
from typing import Any, Final

from skyreels_jax.errors import UnsupportedError, WeightsError
from skyreels_jax.models.umt5 import BUCKETS, MAX_DISTANCE, Umt5Config
from skyreels_jax.weights.rules import LINEAR, Dialect, Rule, rule

# A second name that older files give the embedding (``shared.weight``).
UMT5_IGNORED: Final = (r"encoder\.embed_tokens\.weight",)

_BLOCK: Final = "encoder.block.{i}.layer"
_ATTENTION: Final = f"{_BLOCK}.0.SelfAttention"
_FFN: Final = f"{_BLOCK}.1.DenseReluDense"


def _kernel(target: str, original: str, diffusers: str) -> Rule:
    return rule(f"{target}.kernel", f"{original}.weight", f"{diffusers}.weight", LINEAR)


def _scale(target: str, original: str, diffusers: str) -> Rule:
    return rule(f"{target}.scale", f"{original}.weight", f"{diffusers}.weight")


UMT5_RULES: Final = (
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


def config_from_tensors(shapes: Mapping[str, Sequence[int]], dialect: Dialect) -> Umt5Config:
    """What the shapes in a file say of the encoder.

    Raises:
        WeightsError: tensors that the answer depends on are missing or contradict each other.
    """
    names = {rule.target: rule.source(dialect) for rule in UMT5_RULES}

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


def config_from_json(config: Mapping[str, Any]) -> Umt5Config:
    """From transformers' ``config.json``.

    Raises:
        WeightsError: a key is missing or its value illegal.
        UnsupportedError: another activation or other position buckets than UMT5's.
    """
    fixed = {
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": BUCKETS,
        "relative_attention_max_distance": MAX_DISTANCE,
    }
    for key, value in fixed.items():
        if config.get(key, value) != value:
            raise UnsupportedError(f"text encoder with {key} {config[key]!r}; only {value!r}")
    try:
        return Umt5Config(
            vocab_size=int(config["vocab_size"]),
            dim=int(config["d_model"]),
            head_dim=int(config["d_kv"]),
            num_heads=int(config["num_heads"]),
            ffn_dim=int(config["d_ff"]),
            num_layers=int(config["num_layers"]),
            eps=float(config.get("layer_norm_epsilon", 1e-6)),
        )
    except KeyError as error:
        raise WeightsError(f"the text encoder's config.json lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise WeightsError(f"the text encoder's config.json is unsound: {error}") from error
