import re
from dataclasses import replace

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from tests.weights.fakes import DEPTH, RULES, WIDTH, InMemory, abstract_model, original_tensors

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.engine import export, load_into, parameters, rename, verify
from skyreels_jax.weights.plan import Source, rule
from skyreels_jax.weights.safetensors_file import TensorSpec


def load(tensors, rules=RULES, format="original", **kwargs):
    kwargs = {"dtype": np.float32} | kwargs
    return load_into(abstract_model(), rules, InMemory(tensors), format, **kwargs)


def test_each_rule_lands_where_it_says():
    tensors = original_tensors()
    state = {k: np.asarray(v.get_value()) for k, v in parameters(load(tensors)).items()}
    for i in range(DEPTH):
        fused = tensors[f"b.{i}.qk"]
        np.testing.assert_array_equal(state["blocks.q"][i], fused[:WIDTH].T)
        np.testing.assert_array_equal(state["blocks.k"][i], fused[WIDTH:].T)
        np.testing.assert_array_equal(state["blocks.modulation"][i], tensors[f"b.{i}.mod"][0])
    np.testing.assert_array_equal(state["conv"], np.einsum("oidhw->dhwio", tensors["patch.weight"]))
    np.testing.assert_array_equal(state["tail.1.kernel"], tensors["t.1.w"].T)


def test_the_loaded_state_completes_the_abstract_model():
    graph, abstract = nnx.split(abstract_model())
    model = nnx.merge(
        graph,
        load_into(abstract, RULES, InMemory(original_tensors()), "original", dtype=jnp.bfloat16),
    )
    assert model.tail[0](jnp.ones((1, 2), jnp.bfloat16)).dtype == jnp.bfloat16
    assert {v.get_value().dtype for v in parameters(model).values()} == {jnp.dtype("bfloat16")}


def test_round_trips_through_both_dialects_are_bit_exact():
    tensors = original_tensors()
    for name in tensors:  # signed zeros and subnormals survive too
        tensors[name].flat[:2] = [-0.0, 1e-42]
    there = dict(export(load(tensors), RULES, "diffusers"))
    back = dict(export(load(there, format="diffusers"), RULES, "original"))
    assert back.keys() == tensors.keys() != there.keys()
    for name, value in tensors.items():
        assert value.tobytes() == back[name].tobytes(), name


def test_export_announces_the_shapes_it_yields():
    state = load(original_tensors(), dtype=jnp.bfloat16)
    for format in ("original", "diffusers"):
        yielded = {n: TensorSpec(a.shape, a.dtype) for n, a in export(state, RULES, format)}
        assert yielded == export(state, RULES, format).specs
        assert list(yielded) == list(export(state, RULES, format).specs)


def test_renaming_equals_loading_and_exporting():
    tensors = original_tensors()
    via_jax = dict(export(load(tensors), RULES, "diffusers"))
    there = dict(rename(RULES, InMemory(tensors), "original", "diffusers"))
    assert there.keys() == via_jax.keys()
    for name, value in there.items():
        np.testing.assert_array_equal(value, via_jax[name])
    specs = rename(RULES, InMemory(tensors), "original", "diffusers").specs
    assert specs == {n: TensorSpec(a.shape, a.dtype) for n, a in there.items()}
    again = dict(rename(RULES, InMemory(there), "diffusers", "original"))
    for name, value in tensors.items():
        assert value.tobytes() == again[name].tobytes(), name


def test_rounding_is_to_nearest_with_ties_to_even():
    tensors = original_tensors()
    ties = np.array([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -3.0], np.float32)
    tensors["b.0.norm"] = ties
    scale = parameters(load(tensors, dtype=jnp.bfloat16))["blocks.scale"].get_value()
    expected = np.array([1.0, 1 + 2**-6, 1 + 2**-7, -3.0])
    np.testing.assert_array_equal(np.asarray(scale[0], np.float64), expected)


def test_tensors_are_read_once_and_only_the_rules_own():
    source = InMemory(original_tensors() | {"textual.x": np.zeros(3, np.int64)})
    load_into(
        abstract_model(), RULES, source, "original", dtype=np.float32, ignored=(r"textual\..*",)
    )
    fused = [f"b.{i}.qk" for i in range(DEPTH)]
    assert sorted(source.reads) == sorted([*original_tensors(), *fused])  # one read per part


def broken(**changes):
    tensors = original_tensors()
    for name, value in changes.items():
        name = name.replace("__", ".")
        if value is None:
            del tensors[name]
        else:
            tensors[name] = value
    return tensors


ONES = np.ones((3,), np.float32)


@pytest.mark.parametrize(
    ("tensors", "words"),
    [
        (broken(b__1__norm=None), ["1 tensors that the file lacks", "b.1.norm"]),
        (broken(b__3__norm=ONES), ["no place for", "b.3.norm (a.safetensors)"]),
        (broken(b__0__norm2=ONES), ["no place for", "b.0.norm2"]),
        (broken(xb__0__norm=ONES), ["no place for", "xb.0.norm"]),
        (broken(b__0__norm=ONES), ["wrong shape", "b.0.norm: [3] in a.safetensors, [4] expected"]),
        (broken(b__0__qk=np.ones((4, 4), np.float32)), ["b.0.qk: [4, 4]", "[8, 4] expected"]),
        (broken(b__0__norm=np.ones(4, np.int8)), ["not floating point", "b.0.norm: int8"]),
        (
            broken(b__0__norm=np.ones(4, ml_dtypes.float8_e4m3fn)),
            ["not floating point", "b.0.norm: float8_e4m3fn"],
        ),
        (
            broken(b__0__norm=np.array([1, np.nan, 1, np.inf], np.float32)),
            ["b.0.norm has 2 values"],
        ),
    ],
)
def test_what_does_not_fit_is_named(tensors, words):
    with pytest.raises(WeightsError) as error:
        load(tensors)
    for word in words:
        assert word in str(error.value)


def test_all_problems_come_in_one_error_and_long_lists_are_counted():
    tensors = broken(b__1__norm=None, t__0__b=ONES)
    tensors |= {f"extra.{i}": ONES for i in range(40)}
    with pytest.raises(WeightsError) as error:
        load(tensors)
    text = str(error.value)
    assert "b.1.norm" in text
    assert "t.0.b: [3]" in text
    assert "40 tensors that the model has no place for" in text
    assert "and 28 more" in text
    assert re.search(r"extra\.2 .*\n.*extra\.3 ", text), "sorted by number"
    assert len(text.splitlines()) < 30


def test_a_value_too_large_for_the_target_dtype_is_refused_and_fits_a_wider_one():
    tensors = broken(b__0__norm=np.full(4, 1e6, np.float32))
    with pytest.raises(WeightsError, match="range of float16"):
        load(tensors, dtype=np.float16)
    load(tensors, dtype=jnp.bfloat16)


@pytest.mark.parametrize(
    ("rules", "words"),
    [
        (RULES[:-1], "parameters that no rule fills"),
        ((*RULES, rule("gone", "t.0.b", "t.0.b")), "tensors with two rules"),
        ((*RULES, rule("blocks.scale", "b.{i}.other", "other.{i}")), "parameters with two rules"),
        ((*RULES[1:],), "parameters that no rule fills"),
        ((replace(RULES[0], original=None), *RULES[1:]), "no name for"),
        ((*RULES, rule("gone", "gone", "gone")), "rules whose parameter the model lacks"),
        (
            (replace(RULES[0], original=Source("b.{i}.qk", slice=(0, 3))), *RULES[1:]),
            "a slice has no rule",
        ),
    ],
)
def test_an_incomplete_table_is_refused(rules, words):
    with pytest.raises(WeightsError, match=words):
        verify(abstract_model(), rules, InMemory(original_tensors()), "original")


def test_exporting_by_an_incomplete_table_is_refused():
    state = load(original_tensors())
    with pytest.raises(WeightsError, match="no rule for \\['conv'\\]"):
        list(export(state, tuple(r for r in RULES if r.target != "conv"), "original"))


def test_renaming_refuses_a_gap_in_the_layers():
    tensors = {k: v for k, v in original_tensors().items() if not k.startswith("b.1.")}
    with pytest.raises(WeightsError, match=r"b\.1\.qk"):
        rename(RULES, InMemory(tensors), "original", "diffusers")


def test_a_huge_layer_index_is_refused_without_planning_for_it():
    tensors = broken(b__99999999999__norm=ONES)
    with pytest.raises(WeightsError, match="no place for"):
        rename(RULES, InMemory(tensors), "original", "diffusers")
