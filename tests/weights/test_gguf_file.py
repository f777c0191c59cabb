"""GGUF files: each type against its definition, shapes and names, and one error for the rest."""

import struct
import sys
from dataclasses import replace
from pathlib import Path

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter
from gguf.quants import quantize
from tests.weights import gguf_files
from tests.weights.gguf_files import (
    DEFINITIONS,
    architecture,
    defined,
    gguf,
    key,
    plain,
    random_blocks,
    sizes,
    text,
    write,
)
from tests.weights.tiny import T2V, random_state

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights import gguf_header
from skyreels_jax.weights.components.transformer import TRANSFORMER
from skyreels_jax.weights.engine import export, load_into, parameters
from skyreels_jax.weights.gguf_file import GgufSource

RNG = np.random.default_rng(0)
F = np.float32


@pytest.mark.parametrize("kind", DEFINITIONS)
def test_blocks_are_what_their_definition_says(tmp_path: Path, kind: str):
    tensor = random_blocks(kind, (5, 512), RNG)
    source = GgufSource(write(tmp_path / "m.gguf", {"a.weight": tensor}))
    info = source.tensors()["a.weight"]
    assert (info.shape, info.dtype) == ((5, 512), F)
    np.testing.assert_array_equal(source.read("a.weight"), defined(tensor))


def test_another_definition_is_told_apart(tmp_path: Path):
    """Negative twin: the high bits of Q5_K matter."""
    tensor = random_blocks("Q5_K", (1, 256), RNG)
    source = GgufSource(write(tmp_path / "m.gguf", {"a": tensor}))
    block = np.frombuffer(tensor[2], np.uint8)
    low = gguf_files._q45_k(block, np.zeros(32, int), block[48:])
    assert (source.read("a")[0] != low).any()


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q5_0"])
def test_what_the_package_writes_is_read(tmp_path: Path, kind: str):
    value = RNG.standard_normal((4, 64)).astype(F)
    writer = GGUFWriter(tmp_path / "m.gguf", "wan")
    writer.add_string("general.name", "a" * 300)
    writer.add_array("tokenizer.ggml.tokens", ["a", "bc"] * 20)
    writer.add_array("numbers", list(range(50)))
    blocks = quantize(value, GGMLQuantizationType[kind])
    writer.add_tensor("a", blocks, raw_dtype=GGMLQuantizationType[kind])
    writer.add_tensor("b", value[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    source = GgufSource(tmp_path / "m.gguf")
    np.testing.assert_array_equal(source.read("a"), defined((kind, (4, 64), blocks.tobytes())))
    np.testing.assert_array_equal(source.read("b"), value[0])
    assert source.notes == (f"GGUF: 1 in F32, 1 in {kind}",)


def test_what_the_tests_write_is_what_the_package_reads(tmp_path: Path):
    tensors = {"a": random_blocks("Q4_K", (2, 256), RNG), "b": plain(np.arange(3, dtype=F))}
    reader = GGUFReader(write(tmp_path / "m.gguf", tensors))
    found = {tensor.name: tensor for tensor in reader.tensors}
    assert found["a"].data.tobytes() == tensors["a"][2]
    assert found["a"].shape.tolist() == [256, 2]
    assert found["b"].data.tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_floats_are_mapped_as_they_are(tmp_path: Path, dtype: str):
    numpy = {"F32": F, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[dtype]
    value = RNG.standard_normal((2, 3, 1, 2, 2)).astype(numpy)
    source = GgufSource(write(tmp_path / "m.gguf", {"a": plain(value, dtype)}))
    np.testing.assert_array_equal(source.read("a"), value)
    assert source.tensors()["a"].dtype == numpy
    assert not source.read("a").flags.writeable


def test_the_shape_before_it_was_stored_is_given_back(tmp_path: Path):
    tensor = random_blocks("Q8_0", (4, 256), RNG)
    file = write(tmp_path / "m.gguf", {"a": tensor}, architecture("wan"), sizes("a", (8, 16, 8)))
    source = GgufSource(file)
    assert source.tensors()["a"].shape == (8, 16, 8)
    np.testing.assert_array_equal(source.read("a"), defined(tensor).reshape(8, 16, 8))


def test_a_text_encoder_has_the_names_of_transformers(tmp_path: Path):
    names = {
        "token_embd.weight": "shared.weight",
        "enc.output_norm.weight": "encoder.final_layer_norm.weight",
        "enc.blk.1.attn_q.weight": "encoder.block.1.layer.0.SelfAttention.q.weight",
        "enc.blk.1.attn_o.weight": "encoder.block.1.layer.0.SelfAttention.o.weight",
        "enc.blk.1.attn_norm.weight": "encoder.block.1.layer.0.layer_norm.weight",
        "enc.blk.1.attn_rel_b.weight": (
            "encoder.block.1.layer.0.SelfAttention.relative_attention_bias.weight"
        ),
        "enc.blk.1.ffn_norm.weight": "encoder.block.1.layer.1.layer_norm.weight",
        "enc.blk.1.ffn_gate.weight": "encoder.block.1.layer.1.DenseReluDense.wi_0.weight",
        "enc.blk.1.ffn_up.weight": "encoder.block.1.layer.1.DenseReluDense.wi_1.weight",
        "enc.blk.1.ffn_down.weight": "encoder.block.1.layer.1.DenseReluDense.wo.weight",
    }
    tensors = {name: plain(np.full(4, i, F)) for i, name in enumerate(names)}
    source = GgufSource(write(tmp_path / "t5.gguf", tensors, architecture("t5encoder")))
    assert list(source.tensors()) == list(names.values())
    for i, name in enumerate(names.values()):
        assert source.read(name).tolist() == [i] * 4


WIDE = replace(T2V, dim=256, ffn_dim=512, num_layers=2, text_dim=256)


def test_a_transformer_of_blocks_has_the_values_of_the_definition(tmp_path: Path):
    """Mixed as such files are: blocks for matrices, the rest as it is."""
    rules = TRANSFORMER.rules(WIDE)
    kinds = ("Q4_K", "Q6_K", "Q8_0", "Q5_K", "Q4_0", "Q5_0")
    stored, expected = {}, {}
    for i, (name, value) in enumerate(export(random_state(WIDE), rules, "original").values):
        blocks = value.ndim == 2 and value.size > 1024 and not value.shape[1] % 256
        tensor = random_blocks(kinds[i % 6], value.shape, RNG) if blocks else plain(value)
        stored[name], expected[name] = tensor, defined(tensor) if blocks else value
    source = GgufSource(write(tmp_path / "wan.gguf", stored))
    assert sum(kind != "F32" for kind, *_ in stored.values()) == 25
    state = load_into(TRANSFORMER.abstract(WIDE), rules, source, "original", dtype=jnp.float32)
    for name, value in export(state, rules, "original").values:
        np.testing.assert_array_equal(value, expected[name], name)
    assert parameters(state)


GOOD = {"a": plain(np.arange(8, dtype=F)), "b": random_blocks("Q8_0", (2, 32), RNG)}


def changed(at: int, value: bytes) -> bytes:
    content = bytearray(gguf(GOOD))
    content[at : at + len(value)] = value
    return bytes(content)


A = gguf(GOOD).index(text("a"), 60)
BAD = {
    "of one byte": (b"G", "truncated"),
    "an old version": (changed(4, struct.pack("<I", 1)), "of version 1"),
    "big-endian": (changed(4, struct.pack(">I", 3)), "other byte order"),
    "many tensors": (changed(8, struct.pack("<Q", 1 << 40)), "at most 65536"),
    "many keys": (changed(16, struct.pack("<Q", 1 << 60)), "at most 65536"),
    "a long name": (changed(24, struct.pack("<Q", 1 << 40)), "long"),
    "many dimensions": (changed(A + 9, struct.pack("<I", 4_000_000_000)), "dimensions"),
    "a huge size": (changed(A + 13, struct.pack("<Q", 1 << 63)), "shape"),
    "no size": (changed(A + 13, struct.pack("<Q", 0)), "shape"),
    "more than there is": (changed(A + 13, struct.pack("<Q", 800)), "truncated: a"),
    "data of another": (changed(A + 13, struct.pack("<Q", 16)), "overlap"),
    "an unknown type": (changed(A + 21, struct.pack("<I", 99)), "a is of type 99; read are F32"),
    "integers": (changed(A + 21, struct.pack("<I", 24)), "a is of type 24"),
    "an odd offset": (changed(A + 25, struct.pack("<Q", 1)), "begin at 1"),
    "data beyond the end": (changed(A + 25, struct.pack("<Q", 1 << 30)), "truncated"),
    "a cut end": (gguf(GOOD)[:-40], "truncated: b ends"),
    "a cut header": (gguf(GOOD)[:100], "truncated or corrupt"),
    "one name twice": (gguf(GOOD).replace(text("b"), text("a")), "a twice"),
    "another model": (gguf(GOOD, (architecture("llama"),)), "architecture 'llama'; wan"),
    "another image model": (gguf(GOOD, (architecture("flux"),)), "'flux'"),
    "a list of lists": (gguf(GOOD, (key("x", 9, struct.pack("<IQ", 9, 1)),)), "type 9"),
    "an endless list": (gguf(GOOD, (key("x", 9, struct.pack("<IQ", 0, 1 << 62)),)), "does not end"),
    "endless texts": (gguf(GOOD, (key("x", 9, struct.pack("<IQ", 8, 1 << 62)),)), "texts"),
    "texts past the end": (gguf(GOOD, (key("x", 9, struct.pack("<IQ", 8, 1 << 19)),)), "not end"),
    "a wrong shape": (gguf(GOOD, (sizes("a", (3, 3)),)), "is stored as [8] and said to be"),
    "a negative shape": (gguf(GOOD, (sizes("a", (-2, -4)),)), "said to be"),
    "no alignment": (gguf(GOOD, (key("general.alignment", 4, bytes(4)),)), "alignment is 0"),
    "no text": (changed(32, b"\xff\xff"), "no text"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_unsound_is_refused_by_name(tmp_path: Path, kind: str):
    content, words = BAD[kind]
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(WeightsError) as caught:
        GgufSource(file)
    assert words in str(caught.value) and "m.gguf" in str(caught.value)


def test_without_the_package_one_line_says_what_to_install(tmp_path: Path, monkeypatch):
    file = write(tmp_path / "m.gguf", GOOD)
    gguf_header._types.cache_clear()
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(WeightsError, match="pip install gguf") as caught:
        GgufSource(file)
    assert "\n" not in str(caught.value)
    gguf_header._types.cache_clear()
