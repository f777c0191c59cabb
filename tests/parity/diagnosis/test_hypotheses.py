"""Explanations, each on a small twin that has the fault and on one that has it not."""

import math

import jax
import numpy as np
import pytest

from skyreels_jax.parity.diagnosis import hypotheses as tries
from skyreels_jax.parity.diagnosis.attention_faults import (
    attend,
    explain_cross_attention,
    explain_self_attention,
    rotate,
    rotations,
)
from skyreels_jax.parity.diagnosis.hypotheses import (
    CallShape,
    fit_line,
    nearest_explanation,
    normalise,
    split_frames,
)
from skyreels_jax.parity.diagnosis.linear_faults import LinearMap, explain_linear

SHAPE = CallShape(grid=(2, 3, 4), heads=2, eps=1e-6)
TOKENS, WIDTH = 24, 32


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng([seed, *shape]).standard_normal(shape)


# Activations

FUNCTIONS = {
    "GELU by the error function, not its tanh approximation": jax.nn.gelu,
    "SiLU": jax.nn.silu,
    "ReLU": jax.nn.relu,
    "none at all": lambda x: x,
}


@pytest.mark.parametrize("words", FUNCTIONS)
def test_activations_are_told_apart(words: str):
    x = random(2, 500).astype(np.float32)
    how = {"approximate": False} if "GELU" in words else {}
    after = np.asarray(FUNCTIONS[words](x, **how))
    assert tries.explain_activation_function(x, after) == ("activation", words)


def test_the_right_activation_is_no_fault():
    x = random(2, 500).astype(np.float32)
    after = np.asarray(jax.nn.gelu(x, approximate=True))
    assert tries.explain_activation_function(x, after) is None


# Attention


def self_attention(**changes: np.ndarray) -> dict[str, np.ndarray]:
    parts = {name: random(1, TOKENS, WIDTH, seed=n) for n, name in enumerate(("q", "k", "v"))}
    values = {"norm_q": parts["q"], "norm_k": parts["k"], "v": parts["v"]} | changes
    return {f"blocks.0.self_attn.{name}": value for name, value in values.items()}


def split(x: np.ndarray) -> np.ndarray:
    return x.reshape(1, -1, SHAPE.heads, WIDTH // SHAPE.heads)


Q, K, V = (split(random(1, TOKENS, WIDTH, seed=n)) for n in range(3))
RIGHT = rotations(SHAPE.grid, WIDTH // SHAPE.heads)
SWAPPED = rotations(SHAPE.grid, WIDTH // SHAPE.heads, (0, 2, 1))
AHEAD = rotations(SHAPE.grid, WIDTH // SHAPE.heads, first=1)
CAUSAL = np.repeat(np.arange(2), 12)[:, None] >= np.repeat(np.arange(2), 12)[None]


def rotated(table: np.ndarray, keys: np.ndarray | None = None, **how) -> np.ndarray:
    return attend(rotate(Q, table), rotate(K, table if keys is None else keys), V, **how)


@pytest.mark.parametrize(
    ("seen", "kind"),
    [
        (attend(Q, K, V), "no rope"),
        (rotated(SWAPPED), "rope axes"),
        (rotated(RIGHT, AHEAD), "rope offset"),
        (rotated(RIGHT, RIGHT.conj()), "rope sign"),
        (attend(rotate(Q, RIGHT, halves=True), rotate(K, RIGHT, halves=True), V), "rope pairing"),
        (rotated(RIGHT, allowed=CAUSAL), "mask"),
        (rotated(RIGHT, scale=1.0), "scale"),
    ],
)
def test_faults_of_self_attention_are_told_apart(seen: np.ndarray, kind: str):
    found = explain_self_attention(self_attention(heads=seen), "blocks.0", SHAPE)
    assert found is not None
    assert found[0] == kind


def test_positions_moved_alike_cannot_be_seen():
    np.testing.assert_allclose(rotated(AHEAD), rotated(RIGHT), atol=1e-12)


def test_the_right_self_attention_is_no_fault():
    assert explain_self_attention(self_attention(heads=rotated(RIGHT)), "blocks.0", SHAPE) is None


def test_scores_are_scaled_as_asked():
    weights = np.exp(3.0 * Q[0, :, 1] @ K[0, :, 1].T)
    expected = (weights / weights.sum(1, keepdims=True)) @ V[0, :, 1]
    found = attend(Q, K, V, scale=3.0)[0, :, WIDTH // 2 :]
    np.testing.assert_allclose(found, expected, rtol=1e-9)


TEXT, LENGTH = 6, np.array([4])


def cross_attention(seen: np.ndarray) -> dict[str, np.ndarray]:
    values = {"norm_q": random(1, TOKENS, WIDTH, seed=0), "heads": seen}
    for number, name in enumerate(("norm_k", "v", "norm_k_img", "v_img"), 3):
        values[name] = random(1, TEXT, WIDTH, seed=number)
    return {f"blocks.0.cross_attn.{name}": value for name, value in values.items()}


OVER_TEXT, OVER_IMAGE = (
    attend(Q, *(split(random(1, TEXT, WIDTH, seed=n)) for n in pair)) for pair in ((3, 4), (5, 6))
)
MASKED = attend(
    Q,
    *(split(random(1, TEXT, WIDTH, seed=n)) for n in (3, 4)),
    allowed=np.arange(TEXT) < LENGTH[0],
)


@pytest.mark.parametrize(
    ("seen", "words"),
    [
        (OVER_TEXT, "the output over the image is left out"),
        (OVER_IMAGE, "the output over the text is left out"),
        (MASKED + OVER_IMAGE, "the padding of the text is hidden; the models attend to it"),
        (OVER_TEXT + OVER_IMAGE, None),
    ],
)
def test_faults_of_cross_attention_are_told_apart(seen: np.ndarray, words: str | None):
    found = explain_cross_attention(cross_attention(seen), "blocks.0", SHAPE, LENGTH)
    assert (found and found[1]) == words


# Linear maps

KERNEL, BIAS = random(WIDTH, WIDTH, seed=8), random(WIDTH, seed=9)
X = random(1, TOKENS, WIDTH, seed=10)
MAPS = {
    "blocks.0.self_attn.q": LinearMap(KERNEL, BIAS),
    "blocks.0.self_attn.k": LinearMap(random(WIDTH, WIDTH, seed=11), random(WIDTH, seed=12)),
    "blocks.1.self_attn.q": LinearMap(random(WIDTH, WIDTH, seed=13), random(WIDTH, seed=14)),
}


@pytest.mark.parametrize(
    ("seen", "kind"),
    [
        (X @ KERNEL, "missing bias"),
        (X @ KERNEL + 2 * BIAS, "bias"),
        (X @ KERNEL.T + BIAS, "transposition"),
        (1.01 * X @ KERNEL + BIAS, "scale"),
        (MAPS["blocks.0.self_attn.k"](X), "exchanged"),
        (MAPS["blocks.1.self_attn.q"](X), "repeated block"),
        (np.roll(X @ KERNEL + BIAS, 1, axis=-1), "order of elements"),
        (MAPS["blocks.0.self_attn.q"](X), None),
    ],
)
def test_faults_of_linear_maps_are_told_apart(seen: np.ndarray, kind: str | None):
    found = explain_linear("blocks.0.self_attn.q", {"blocks.0.norm1": X}, seen, MAPS)
    assert (found and found[0]) == kind


# Modulation and residuals


def block(rows: np.ndarray) -> dict[str, np.ndarray]:
    """What a block with a table ``[6, B, F, D]`` makes of random answers of its sub-layers."""

    def tokens(x: np.ndarray) -> np.ndarray:
        return x.reshape(1, TOKENS, WIDTH)

    shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = rows[:, :, :, None]
    start, o, crossed, answer = (random(1, 2, 12, WIDTH, seed=n) for n in range(20, 24))
    middle = start + gate * o
    end = middle + crossed
    return {
        "patch_embedding": tokens(start),
        "blocks.0.norm1": tokens(normalise(start, SHAPE.eps) * (1 + scale) + shift),
        "blocks.0.self_attn.o": tokens(o),
        "blocks.0.after_self_attn": tokens(middle),
        "blocks.0.cross_attn.o": tokens(crossed),
        "blocks.0.norm2": tokens(normalise(end, SHAPE.eps) * (1 + scale_ffn) + shift_ffn),
        "blocks.0.ffn.fc2": tokens(answer),
        "blocks.0": tokens(end + gate_ffn * answer),
    }


ROWS = random(6, 1, 2, WIDTH, seed=30)
THEIRS = block(ROWS)


def test_a_table_is_worked_out_of_what_a_block_did():
    found = tries.modulation_rows(THEIRS, "blocks.0", "patch_embedding", 2)
    assert found is not None
    np.testing.assert_allclose(found, ROWS, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("place", ["norm1", "norm2"])
def test_another_row_of_the_table_is_named(place: str):
    name = f"blocks.0.{place}"
    swapped = block(ROWS[[1, 0, 2, 4, 3, 5]])
    ours = THEIRS | {name: swapped[name]}
    found = tries.explain_modulated_norm(ours, THEIRS, name, "patch_embedding", SHAPE)
    assert found is not None
    assert found[0] == "modulation"
    assert "scale" in found[1].split(" and ")[0]
    assert tries.explain_modulated_norm(THEIRS, THEIRS, name, "patch_embedding", SHAPE) is None


@pytest.mark.parametrize(
    ("place", "answer", "start"),
    [
        ("blocks.0.after_self_attn", "self_attn.o", "patch_embedding"),
        ("blocks.0", "ffn.fc2", None),
    ],
)
def test_what_is_wrong_with_a_sum_is_named(place: str, answer: str, start: str | None):
    def kind(out: np.ndarray) -> tuple[str, str] | None:
        ours = THEIRS | {place: out}
        return tries.explain_residual(ours, THEIRS, place, "patch_embedding", SHAPE)

    before = THEIRS["blocks.0.after_self_attn"] + THEIRS["blocks.0.cross_attn.o"]
    before = before if start is None else THEIRS[start]
    assert kind(before + THEIRS[f"blocks.0.{answer}"]) == (
        *("missing gate", "the output is added without its gate"),
    )
    assert kind(before) == ("missing term", "the sub-layer's output is left out")
    assert kind(THEIRS[place] - before) == ("missing term", "the residual is left out")
    assert kind(THEIRS[place]) is None


# The measures they use


def test_a_norm_has_mean_nothing_and_deviation_one():
    x = 5 + 3 * random(4, 200)
    found = normalise(x, 0.0)
    np.testing.assert_allclose(found.mean(-1), 0, atol=1e-12)
    np.testing.assert_allclose(found.std(-1), 1)
    assert float(np.mean(normalise(x, 9.0).std(-1))) == pytest.approx(1 / math.sqrt(2), rel=0.1)


def test_tokens_of_a_frame_stay_together():
    tokens = np.arange(24.0).reshape(1, 12, 2)
    assert split_frames(tokens, 3).shape == (1, 3, 4, 2)
    np.testing.assert_array_equal(split_frames(tokens, 3)[0, 1], tokens[0, 4:8])


def test_a_feature_that_does_not_vary_has_no_slope():
    a, b = fit_line(np.ones((1, 1, 4, 2)), np.full((1, 1, 4, 2), 3.0))
    np.testing.assert_array_equal(a, np.zeros((1, 1, 2)))
    np.testing.assert_array_equal(b, np.full((1, 1, 2), 3.0))


def test_the_nearest_explanation_counts_if_it_is_near():
    seen = np.array([1.0, 2.0])
    near = ("near", "", lambda: seen * (1 + 1e-6))
    nearer = ("nearer", "", lambda: seen * (1 + 1e-9))
    far = ("far", "", lambda: seen * 2)
    assert nearest_explanation([near, far, nearer], seen) == ("nearer", "")
    assert nearest_explanation([far], seen) is None
