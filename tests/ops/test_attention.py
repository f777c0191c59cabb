"""One conformance suite for every way to compute attention, then what each way promises itself."""

import dataclasses
import sys
import types
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skyreels_jax.errors import UnsupportedError
from skyreels_jax.ops.attention import (
    ATTENTION_PATHS,
    SMALL_SCORES,
    attention,
    choose_path,
    paths_with_past,
    reference_attention,
)
from skyreels_jax.ops.kernels.chunked import ScoreTiling, chunked_attention, even_tile
from skyreels_jax.ops.kernels.contract import (
    AttentionCall,
    PastKeyValues,
    by_query_block,
)
from skyreels_jax.ops.kernels.cudnn import cudnn_attention
from skyreels_jax.ops.kernels.splash import splash_attention
from skyreels_jax.ops.masks import BlockCausal
from skyreels_jax.ops.target import Device

Attention = Callable[..., jax.Array]


def prefix_calls(query, key, value, *, mask, scale):
    """The decomposition that cuDNN is served with, around the plain path."""
    plain = partial(reference_attention, mask=None, scale=scale)
    return by_query_block(plain, query, key, value, mask=mask)


WAYS: dict[str, Attention] = {
    "xla": ATTENTION_PATHS["xla"].compute,
    "chunked in small tiles": partial(chunked_attention, tiling=ScoreTiling(4, 6)),
    "chunked with heads together": partial(chunked_attention, tiling=ScoreTiling(5, 3, True)),
    "calls on prefixes": prefix_calls,
}
each_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS.keys())

SHORT_LAST = "blocks of two frames, the last short"
# (L, S, heads, features, mask): one token, odd lengths, many keys, short last blocks.
CASES = {
    "one token": (1, 1, 1, 8, None),
    "odd": (13, 13, 3, 8, None),
    "many keys": (5, 29, 2, 16, None),
    "blocks of one frame": (15, 15, 2, 8, BlockCausal(3, 1)),
    SHORT_LAST: (15, 15, 2, 8, BlockCausal(3, 2)),
    "masked, many keys": (6, 15, 1, 8, BlockCausal(3, 1)),
}
each_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())

F32_TOL = 3e-6  # measured 5.0e-7
BF16_TOL = 1.2e-2  # measured 4.2e-3
GRAD_TOL = 5e-6  # measured 9.6e-7
BF16_GRAD_TOL = 3e-2  # measured 9.0e-3, of gradients up to 2.4


def operands(case, dtype, seed: int = 0) -> tuple[jax.Array, ...]:
    q_len, k_len, heads, width, _ = case
    rng = np.random.default_rng(seed)
    shapes = [(2, n, heads, width) for n in (q_len, k_len, k_len)]
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def in_float64(query, key, value, mask, scale: float) -> tuple[np.ndarray, np.ndarray]:
    """The definition in NumPy: the result and the attention weights ``[B, N, L, S]``."""
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    scores = np.einsum("blnk,bsnk->bnls", query, key) * scale
    if mask is not None:
        scores = np.where(mask.as_array(*scores.shape[2:]), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return np.einsum("bnls,bsnk->blnk", weights, value), weights


def gradients_in_float64(query, key, value, mask, scale: float) -> list[np.ndarray]:
    """Of half the sum of squares of the result, by hand."""
    out, weights = in_float64(query, key, value, mask, scale)
    query, key, value = (np.asarray(x, np.float64) for x in (query, key, value))
    to_weights = np.einsum("blnk,bsnk->bnls", out, value)
    to_scores = weights * (to_weights - (weights * to_weights).sum(-1, keepdims=True))
    return [
        scale * np.einsum("bnls,bsnk->blnk", to_scores, key),
        scale * np.einsum("bnls,blnk->bsnk", to_scores, query),
        np.einsum("bnls,blnk->bsnk", weights, out),
    ]


def furthest(found, expected) -> float:
    return float(np.abs(np.asarray(found, np.float64) - expected).max())


def check_result(way: Attention, case, dtype, tolerance: float):
    mask = case[-1]
    arrays = operands(case, dtype)
    found = jax.jit(partial(way, mask=mask, scale=0.3))(*arrays)
    assert found.dtype == dtype
    assert furthest(found, in_float64(*arrays, mask, 0.3)[0]) < tolerance


@each_way
@each_case
def test_conforms_to_the_definition(way: Attention, case):
    check_result(way, case, jnp.float32, F32_TOL)


@each_way
def test_conforms_to_the_definition_in_half_precision(way: Attention):
    check_result(way, CASES[SHORT_LAST], jnp.bfloat16, BF16_TOL)


def check_gradients(way: Attention, case, dtype, tolerance: float):
    mask = case[-1]
    arrays = operands(case, dtype)

    def half_square(*arrays):
        return 0.5 * jnp.sum(jnp.square(way(*arrays, mask=mask, scale=0.3).astype(jnp.float32)))

    found = jax.jit(jax.grad(half_square, argnums=(0, 1, 2)))(*arrays)
    for gradient, expected in zip(found, gradients_in_float64(*arrays, mask, 0.3), strict=True):
        assert furthest(gradient, expected) < tolerance


@each_way
@pytest.mark.parametrize("name", ["many keys", SHORT_LAST])
def test_gradients_conform_to_the_definition(way: Attention, name: str):
    check_gradients(way, CASES[name], jnp.float32, GRAD_TOL)


@each_way
def test_gradients_conform_to_the_definition_in_half_precision(way: Attention):
    check_gradients(way, CASES[SHORT_LAST], jnp.bfloat16, BF16_GRAD_TOL)


@pytest.mark.parametrize("mask", [None, BlockCausal(100, 2)], ids=["full", "block-causal"])
def test_the_tiled_path_conforms_at_the_size_of_its_own_tiles(mask):
    case = (700, 2100, 1, 8, mask)  # two tiles of queries, two of keys
    tiled = partial(attention, implementation="chunked")
    check_result(tiled, case, jnp.float32, F32_TOL)


@each_way
def test_a_wrong_mask_scale_or_operand_is_caught(way: Attention):
    case = CASES[SHORT_LAST]
    query, key, value = operands(case, jnp.float32)
    mask = case[-1]
    expected = in_float64(query, key, value, mask, 0.3)[0]
    run = jax.jit(way, static_argnames=("mask", "scale"))
    broken = {
        "shorter blocks": run(query, key, value, mask=BlockCausal(3, 1), scale=0.3),
        "another scale": run(query, key, value, mask=mask, scale=0.29),
        "keys for values": run(query, key, key, mask=mask, scale=0.3),
    }
    for what, found in broken.items():
        assert furthest(found, expected) > 100 * F32_TOL, what


@each_way
def test_huge_scores_saturate_and_never_overflow(way: Attention):
    rng = np.random.default_rng(0)
    # Powers of two: sums of products are exact, so that equal scores stay equal.
    query, key = (
        jnp.asarray(2.0**20 * rng.integers(-1, 2, (1, 12, 2, 8)), jnp.float32) for _ in range(2)
    )
    value = jnp.asarray(rng.normal(size=(1, 12, 2, 8)), jnp.float32)
    mask = BlockCausal(2, 2)
    found = jax.jit(partial(way, mask=mask, scale=0.25))(query, key, value)
    assert furthest(found, in_float64(query, key, value, mask, 0.25)[0]) < F32_TOL


def test_without_its_peak_taken_out_a_softmax_does_overflow():
    scores = jnp.asarray([1e6, 2e6], jnp.float32)
    assert jnp.isnan(jnp.exp(scores) / jnp.exp(scores).sum()).any()


@each_way
def test_a_hidden_key_has_no_influence_at_all(way: Attention):
    case = CASES[SHORT_LAST]
    query, key, value = operands(case, jnp.float32)
    run = jax.jit(partial(way, mask=case[-1], scale=0.3))
    before = run(query, key, value)
    after = run(query, key.at[:, 6:].multiply(100.0), value.at[:, 6:].add(100.0))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert furthest(before[:, 6:], np.asarray(after[:, 6:])) > 1


def arrays_in(jaxpr: Any) -> Iterator[Any]:
    """Every value computed anywhere in a jaxpr."""
    for equation in jaxpr.eqns:
        yield from (variable.aval for variable in equation.outvars)
        for parameter in jax.tree.leaves(
            equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")
        ):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from arrays_in(inner)


def largest(function: Attention, *arguments) -> int:
    """Elements of the largest array that ``function`` or its gradient computes."""

    def total(*arguments):
        return function(*arguments).astype(jnp.float32).sum()

    closed = jax.make_jaxpr(jax.grad(total, argnums=(0, 1, 2)))(*arguments)
    return max(aval.size for aval in arrays_in(closed.jaxpr))


@pytest.mark.parametrize("mask", [None, BlockCausal(4, 3)], ids=["full", "block-causal"])
def test_only_the_plain_path_draws_all_scores_out(mask):
    query = key = value = jnp.zeros((1, 96, 1, 4))
    for together in (False, True):
        tiled = partial(
            chunked_attention, mask=mask, scale=1.0, tiling=ScoreTiling(12, 16, together)
        )
        # At most one number for each query and each tile (not element) of keys.
        assert largest(tiled, query, key, value) <= 96 * 96 // 16
    plain = partial(reference_attention, mask=mask, scale=1.0)
    assert largest(plain, query, key, value) >= 96 * 96


@pytest.mark.parametrize("length", [1, 511, 512, 513, 2550, 51_000])
def test_tiles_are_even(length: int):
    size = even_tile(length, 512)
    count = -(-length // size)
    assert size <= 512
    assert 0 <= size * count - length < count


# What is chosen, and what is refused.

CPU, TPU, HOPPER = Device("cpu"), Device("tpu"), Device("cuda", 9.0)
SMALL = AttentionCall(CPU, "bfloat16", (1, 64, 2, 128), 64)
VIDEO = AttentionCall(CPU, "bfloat16", (1, 51_000, 12, 128), 51_000)


def with_changes(call: AttentionCall, **changes) -> AttentionCall:
    return dataclasses.replace(call, **changes)


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (SMALL, "xla"),
        (VIDEO, "chunked"),
        (with_changes(VIDEO, key_len=512), "chunked"),
        (with_changes(VIDEO, device=TPU), "splash"),
        (with_changes(SMALL, device=TPU), "xla"),
        (with_changes(VIDEO, device=TPU, query=(1, 51_000, 12, 48)), "splash"),
        (with_changes(VIDEO, device=TPU, query=(1, 51_000, 1, 384)), "chunked"),
        (with_changes(VIDEO, device=TPU, dtype="float32"), "chunked"),
        (with_changes(VIDEO, device=HOPPER), "cudnn"),
        (with_changes(SMALL, device=HOPPER), "cudnn"),
        (with_changes(VIDEO, device=HOPPER, dtype="float32"), "chunked"),
        (with_changes(SMALL, device=HOPPER, dtype="float32"), "xla"),
        (with_changes(VIDEO, device=Device("cuda", 7.5)), "chunked"),
        (with_changes(VIDEO, device=Device("rocm")), "chunked"),
        (with_changes(VIDEO, device=HOPPER, query=(1, 51_000, 12, 12)), "chunked"),
    ],
)
def test_the_choice_follows_from_device_and_shape(call: AttentionCall, expected: str):
    assert choose_path(call) == expected
    assert ATTENTION_PATHS[expected].refusal(call) is None


def test_the_plain_path_ends_where_its_scores_grow_large():
    tokens = int((SMALL_SCORES / 4) ** 0.5)
    edge = with_changes(SMALL, query=(1, tokens, 1, 128), key_len=tokens)
    assert choose_path(edge) == "xla"
    assert choose_path(with_changes(edge, key_len=tokens + 1)) == "chunked"


@pytest.mark.parametrize(
    ("name", "call", "reason"),
    [
        ("cudnn", VIDEO, "CUDA"),
        ("cudnn", with_changes(VIDEO, device=Device("rocm")), "CUDA"),
        ("cudnn", with_changes(VIDEO, device=Device("cuda", 7.5)), "capability"),
        ("cudnn", with_changes(VIDEO, device=HOPPER, dtype="float32"), "float32"),
        ("cudnn", with_changes(VIDEO, device=HOPPER, query=(1, 8, 1, 12)), "multiple of 8"),
        ("cudnn", with_changes(VIDEO, device=HOPPER, query=(1, 8, 1, 264)), "at most 256"),
        ("splash", VIDEO, "TPU"),
        ("splash", with_changes(VIDEO, device=TPU, query=(1, 8, 1, 12)), "multiple of 8"),
        ("splash", with_changes(VIDEO, device=TPU, query=(1, 8, 1, 264)), "at most 256"),
        ("tokamax", VIDEO, "not installed"),
    ],
)
def test_a_path_says_why_it_refuses(name: str, call: AttentionCall, reason: str):
    refusal = ATTENTION_PATHS[name].refusal(call)
    assert refusal is not None
    assert reason in refusal


@pytest.mark.parametrize("name", ["cudnn", "splash", "tokamax"])
def test_a_named_path_is_never_replaced_by_another(name: str):
    arrays = operands(CASES["odd"], jnp.bfloat16)
    with pytest.raises(UnsupportedError, match=f"'{name}' cannot serve.*'xla' is taken"):
        attention(*arrays, implementation=name)


def test_an_unknown_path_is_refused_with_the_known_ones():
    arrays = operands(CASES["odd"], jnp.bfloat16)
    with pytest.raises(UnsupportedError, match=r"'flash' does not exist.*xla, chunked, cudnn"):
        attention(*arrays, implementation="flash")


def test_the_table_cannot_be_changed():
    with pytest.raises(TypeError):
        ATTENTION_PATHS["xla"] = ATTENTION_PATHS["chunked"]  # pyright: ignore[reportIndexIssue]


def test_the_scale_defaults_to_the_root_of_the_head_width():
    arrays = operands(CASES["odd"], jnp.float32)
    expected = in_float64(*arrays, None, 8**-0.5)[0]
    assert furthest(attention(*arrays), expected) < F32_TOL
    assert furthest(attention(*arrays, scale=8**-0.25), expected) > 100 * F32_TOL


# Kernels that cannot run here: what they are asked for.


class Recorder:
    """Stands in for a fused kernel and answers with the plain path."""

    def __init__(self):
        self.calls: list[tuple[int, int]] = []
        self.options: list[dict[str, Any]] = []

    def __call__(self, query, key, value, *, scale, **options):
        self.calls.append((query.shape[1], key.shape[1]))
        self.options.append(options)
        return reference_attention(query, key, value, mask=None, scale=scale)


@pytest.mark.parametrize("name", ["many keys", SHORT_LAST])
def test_the_tpu_kernel_conforms_when_interpreted(name: str):
    splash = partial(splash_attention, interpret=True)
    check_result(splash, CASES[name], jnp.float32, F32_TOL)
    check_gradients(splash, CASES[name], jnp.float32, GRAD_TOL)


@pytest.mark.parametrize("width", [48, 80])
def test_the_tpu_kernel_takes_heads_that_do_not_fill_its_lanes(width: int):
    splash = partial(splash_attention, interpret=True)
    check_result(splash, (5, 29, 2, width, None), jnp.float32, F32_TOL)


def test_cudnn_is_asked_once_a_block_and_never_with_a_mask(monkeypatch):
    fused = Recorder()
    monkeypatch.setattr(jax.nn, "dot_product_attention", fused)
    case = CASES[SHORT_LAST]
    arrays = operands(case, jnp.float32)
    found = cudnn_attention(*arrays, mask=case[-1], scale=0.3)
    assert fused.calls == [(6, 6), (6, 12), (3, 15)]
    assert fused.options == [{"implementation": "cudnn"}] * 3
    assert furthest(found, in_float64(*arrays, case[-1], 0.3)[0]) < F32_TOL


def test_tokamax_is_asked_once_a_block_and_never_with_a_mask(monkeypatch):
    fused = Recorder()
    package = types.ModuleType("tokamax")
    package.__dict__["dot_product_attention"] = fused
    monkeypatch.setitem(sys.modules, "tokamax", package)
    case = CASES["blocks of one frame"]
    arrays = operands(case, jnp.float32)
    found = ATTENTION_PATHS["tokamax"].compute(*arrays, mask=case[-1], scale=0.3)
    assert fused.calls == [(3, 3), (3, 6), (3, 9), (3, 12), (3, 15)]
    assert fused.options == [{}] * 5
    assert furthest(found, in_float64(*arrays, case[-1], 0.3)[0]) < F32_TOL


def behind(way: Attention, case, filled: int, slots: int, dtype=jnp.float32):
    """``way`` with ``filled`` past keys in slots for more, and the same drawn out in float64."""
    query, key, value = operands(case, dtype)
    shape = (2, slots, *key.shape[2:])
    rng = np.random.default_rng(1)
    before = [jnp.asarray(rng.normal(size=shape), dtype) for _ in range(2)]
    past = PastKeyValues(before[0], before[1], jnp.int32(filled))
    mask, scale = case[4], query.shape[-1] ** -0.5
    out = way(query, key, value, past=past, mask=mask, scale=scale)
    own = np.ones((key.shape[1],) * 2, bool) if mask is None else mask.as_array(*[key.shape[1]] * 2)
    seen = np.concatenate([np.ones((key.shape[1], filled), bool), own], axis=1)
    drawn = types.SimpleNamespace(as_array=lambda *_: seen)
    both = [
        jnp.concatenate([b[:, :filled], o], 1) for b, o in zip(before, (key, value), strict=True)
    ]
    return out, in_float64(query, *both, drawn, scale)[0]


def lengths_calls(query, key, value, *, past, mask, scale):
    """The decomposition that cuDNN is served with, around JAX's own plain path."""
    plain = partial(jax.nn.dot_product_attention, scale=scale, implementation="xla")
    return by_query_block(plain, query, key, value, past=past, mask=mask)


WITH_PAST: dict[str, Attention] = {
    "xla": reference_attention,
    "chunked in small tiles": partial(chunked_attention, tiling=ScoreTiling(4, 6)),
    "chunked with heads together": partial(chunked_attention, tiling=ScoreTiling(5, 3, True)),
    "lengths": lengths_calls,
    "the TPU kernel interpreted": partial(splash_attention, interpret=True),
}


@pytest.mark.parametrize("way", WITH_PAST.values(), ids=WITH_PAST.keys())
@pytest.mark.parametrize("name", ["odd", "blocks of one frame", SHORT_LAST])
@pytest.mark.parametrize("filled", [0, 3, 7, 12])
def test_earlier_keys_are_seen_by_every_query_and_empty_slots_by_none(way, name: str, filled: int):
    out, expected = behind(way, CASES[name], filled, 12)
    assert furthest(out, expected) < F32_TOL


@pytest.mark.parametrize("way", WITH_PAST.values(), ids=WITH_PAST.keys())
def test_one_earlier_key_too_many_is_caught(way):
    more, _ = behind(way, CASES[SHORT_LAST], 8, 12)
    _, expected = behind(way, CASES[SHORT_LAST], 7, 12)
    assert furthest(more, expected) > 100 * F32_TOL


def test_paths_that_cannot_take_earlier_keys_say_so(monkeypatch):
    bare = {"bare": dataclasses.replace(ATTENTION_PATHS["xla"], takes_past=False)}
    monkeypatch.setattr("skyreels_jax.ops.attention.ATTENTION_PATHS", {**ATTENTION_PATHS, **bare})
    query, key, value = operands(CASES["odd"], jnp.float32)
    past = PastKeyValues(key, value, jnp.int32(2))
    with pytest.raises(UnsupportedError, match="choose one of xla, chunked, cudnn, splash"):
        attention(query, key, value, past=past, implementation="bare")
    assert "bare" not in paths_with_past()
    through = attention(query, key, value, past=past)
    assert through.shape == query.shape
