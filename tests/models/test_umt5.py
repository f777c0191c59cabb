"""The UMT5 encoder against transformers', every parameter random."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tests.models.encoder_oracles import (
    UMT5,
    padded_ids,
    relative,
    run_umt5_oracle,
    tensors_of,
    umt5_from,
    umt5_oracle,
)

from skyreels_jax.models import umt5
from skyreels_jax.models.umt5 import UMT5_XXL, Umt5Config, Umt5Encoder, position_buckets

# Measured 8.1e-7 to 1.2e-5. Of the largest, transformers is 4.1e-6 from float64 and ours 8.8e-6:
# scores are not scaled, so the softmax magnifies the last bits.
TOL = 2e-5
WRONG = 1e-3  # the least that a mistake changes; measured 0.53 and more

CASES = {
    "odd widths": (UMT5, (40, 7, 1), 40),
    "full length": (UMT5, (512, 200), 512),
    "one head": (replace(UMT5, num_heads=1, head_dim=16, num_layers=1), (9,), 16),
    "wide heads": (replace(UMT5, dim=16, num_heads=4, head_dim=64, ffn_dim=24), (130, 64), 200),
    "deep": (replace(UMT5, num_layers=8), (33,), 64),
}


def run(model: Umt5Encoder, ids: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.asarray(model(jnp.asarray(ids), jnp.asarray(mask)))


def error(config: Umt5Config, lengths: tuple[int, ...], size: int) -> float:
    oracle = umt5_oracle(config, seed=size)
    ids, mask = padded_ids(lengths, size, config.vocab_size)
    ours = run(umt5_from(config, tensors_of(oracle)), ids, mask)
    return relative(ours, run_umt5_oracle(oracle, ids, mask))


@pytest.mark.parametrize("case", CASES)
def test_equals_transformers(case: str):
    assert error(*CASES[case]) <= TOL


MISTAKES = {
    "keys after the query in the rows of those before": (
        "position_buckets",
        lambda distance: position_buckets(-distance),
    ),
    "all distances beyond 8 alike": (
        "position_buckets",
        lambda distance: position_buckets(np.clip(distance, -8, 8)),
    ),
    "exact GELU": ("gelu_tanh", lambda x: jax.nn.gelu(x, approximate=False)),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_wrong_formula_is_caught(mistake: str, monkeypatch: pytest.MonkeyPatch):
    name, replacement = MISTAKES[mistake]
    monkeypatch.setattr(umt5, name, replacement)
    # The two GELUs differ by at most 5e-4; measured 8.6e-4.
    assert error(*CASES["odd widths"]) > (10 * TOL if "GELU" in mistake else WRONG)


def test_wrong_weights_are_caught():
    oracle = umt5_oracle(UMT5)
    tensors = tensors_of(oracle)
    ids, mask = padded_ids((40, 7), 40, UMT5.vocab_size)
    expected = run_umt5_oracle(oracle, ids, mask)
    attention = "encoder.block.1.layer.0.SelfAttention."
    dense = "encoder.block.1.layer.1.DenseReluDense."
    bias = "relative_attention_bias.weight"
    mistakes = {
        "queries and keys swapped": {
            attention + "q.weight": tensors[attention + "k.weight"],
            attention + "k.weight": tensors[attention + "q.weight"],
        },
        "gate and value swapped": {
            dense + "wi_0.weight": tensors[dense + "wi_1.weight"],
            dense + "wi_1.weight": tensors[dense + "wi_0.weight"],
        },
        "one bias for all layers": {
            attention + bias: tensors[attention.replace(".1.", ".0.", 1) + bias]
        },
        "scores scaled": {attention + "q.weight": tensors[attention + "q.weight"] * 10**-0.5},
    }
    for mistake, changed in mistakes.items():
        ours = run(umt5_from(UMT5, tensors | changed), ids, mask)
        assert relative(ours, expected) > WRONG, mistake


def test_a_dropped_mask_is_caught():
    oracle = umt5_oracle(UMT5)
    ids, mask = padded_ids((7,), 40, UMT5.vocab_size)
    expected = run_umt5_oracle(oracle, ids, mask)
    ours = run(umt5_from(UMT5, tensors_of(oracle)), ids, np.ones_like(mask))
    assert relative(ours * mask[:, :, None], expected) > WRONG
    assert np.abs(ours[:, 7:]).max() > WRONG


def test_padding_is_exactly_zero_and_changes_nothing():
    model = umt5_from(UMT5, tensors_of(umt5_oracle(UMT5)))
    ids, mask = padded_ids((100, 30), 512, UMT5.vocab_size)
    long = run(model, ids, mask)
    assert not long[~mask].any()
    short = run(model, ids[:, :128], mask[:, :128])
    assert relative(short, long[:, :128]) <= 2e-6  # measured 0
    alone = run(model, ids[1:], mask[1:])
    assert relative(alone, long[1:]) <= 2e-6  # measured 0
    # What stands in the padding does not matter.
    ids[~mask] = 3
    np.testing.assert_array_equal(run(model, ids, mask), long)


def test_buckets_by_hand():
    distance = [-300, -128, -64, -16, -9, -8, -7, -1, 0, 1, 7, 8, 9, 16, 64, 128, 300]
    rows = [15, 15, 14, 10, 8, 8, 7, 1, 0, 17, 23, 24, 24, 26, 30, 31, 31]
    assert position_buckets(np.array(distance)).tolist() == rows


def test_buckets_are_those_of_transformers_at_every_distance():
    distance = np.arange(-1024, 1025)
    theirs = umt5_oracle(UMT5).encoder.block[0].layer[0].SelfAttention
    expected = theirs._relative_position_bucket(torch.from_numpy(distance)).numpy()
    np.testing.assert_array_equal(position_buckets(distance), expected)


def test_bfloat16_is_at_least_as_exact_as_transformers():
    config = replace(UMT5, dim=64, num_heads=4, head_dim=16, ffn_dim=160, num_layers=4)
    oracle = umt5_oracle(config)
    tensors = {k: v.astype(jnp.bfloat16).astype(np.float32) for k, v in tensors_of(oracle).items()}
    oracle.load_state_dict({k: torch.from_numpy(v) for k, v in tensors.items()})
    ids, mask = padded_ids((128, 50), 128, config.vocab_size)
    exact = run_umt5_oracle(oracle, ids, mask)
    theirs = run_umt5_oracle(oracle.to(torch.bfloat16), ids, mask)
    ours = run(umt5_from(config, tensors, "bfloat16"), ids, mask)

    def rms(x: np.ndarray) -> float:
        return float(np.sqrt(np.mean((x - exact) ** 2) / np.mean(exact**2)))

    assert 1e-4 < rms(ours) <= rms(theirs)  # measured 3.8e-2 against 4.1e-2


def test_the_released_encoder_has_its_published_size():
    model = nnx.eval_shape(lambda: Umt5Encoder(UMT5_XXL, rngs=nnx.Rngs(0)))
    leaves = jax.tree.leaves(nnx.state(model))
    assert sum(leaf.size for leaf in leaves) == 5_680_910_336


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_does_not_grow_with_depth(dtype: str):
    """Neither by a bias a layer nor by bfloat16 weights widened all at once."""

    def temporary_bytes(layers: int) -> int:
        config = replace(UMT5, num_layers=layers)
        model = umt5_from(config, tensors_of(umt5_oracle(config)), dtype)
        ids, mask = (jnp.asarray(x) for x in padded_ids((200,), 256, config.vocab_size))
        compiled = nnx.jit(lambda m, i, k: m(i, k)).lower(model, ids, mask).compile()
        return compiled.compiled.memory_analysis().temp_size_in_bytes

    one_layer = 4 * (UMT5.dim * (4 * UMT5.attention_dim + 3 * UMT5.ffn_dim))
    assert temporary_bytes(8) - temporary_bytes(2) < one_layer  # 0; by `lax.scan` 141,696


@pytest.mark.parametrize("field", ["vocab_size", "num_heads", "num_layers"])
def test_a_config_without_size_is_refused(field: str):
    with pytest.raises(ValueError, match="at least 1"):
        replace(UMT5, **{field: 0})
