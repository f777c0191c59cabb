"""Every way in which a checkpoint folder can be wrong gives one WeightsError naming the file."""

import json
import shutil
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.weights.tiny import DF, edit_json, edit_tensors, save

from skyreels_jax.checkpoints import Checkpoint, load_transformer
from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.components.transformer import stored_transformer

SHARD = "model-00002-of-00007.safetensors"
INDEX = "model.safetensors.index.json"
NAME = "blocks.1.self_attn.q.bias"
MATRIX = "blocks.1.self_attn.q.weight"
F4 = np.ones(24, np.float32)


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("good")
    return {
        "single": save(root / "single", DF),
        "sharded": save(root / "sharded", DF, max_shard_bytes=25_000),
        "diffusers": save(root / "diffusers", DF, "diffusers"),
    }


def load(folder: Path) -> None:
    load_transformer(Checkpoint.open(folder), dtype=np.float32)


def copy(good: dict[str, Path], which: str, target: Path) -> Path:
    return Path(shutil.copytree(good[which], target / "folder"))


@pytest.mark.parametrize("which", ["single", "sharded", "diffusers"])
def test_the_unbroken_folders_load(good, which):
    load(good[which])


def header_of(file: Path) -> tuple[dict, bytes]:
    raw = file.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_header(file: Path, header: dict | bytes, data: bytes) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def edit_header(file: Path, name: str, **changes) -> None:
    header, data = header_of(file)
    header[name] = {**header[name], **changes}
    write_header(file, header, data)


def first(folder: Path) -> Path:
    return folder / "model.safetensors"


def rename_tensor(folder: Path) -> None:
    value = load_file(first(folder))[NAME]
    edit_tensors(first(folder), **{NAME: None, "blocks.1.self_attn.query.bias": value})


def drop_layer(folder: Path) -> None:
    names = [n for n in load_file(first(folder)) if n.startswith("blocks.1.")]
    edit_tensors(first(folder), **dict.fromkeys(names))


def add_layer(folder: Path) -> None:
    values = load_file(first(folder))
    extra = {n.replace(".2.", ".3.", 1): v for n, v in values.items() if n.startswith("blocks.2.")}
    edit_tensors(first(folder), **extra)


def with_value(value: float):
    def change(folder: Path) -> None:
        edit_tensors(first(folder), **{NAME: np.full(24, value, np.float32)})

    return change


def truncate(to: int):
    """Keep the first ``to`` bytes, or all but so many if negative."""

    def change(folder: Path) -> None:
        first(folder).write_bytes(first(folder).read_bytes()[:to])

    return change


def overlap(folder: Path) -> None:
    header, data = header_of(first(folder))
    names = [n for n in header if header[n].get("shape") == [24]]
    header[names[0]]["data_offsets"] = header[names[1]]["data_offsets"]
    write_header(first(folder), header, data)


def hole(folder: Path) -> None:
    header, data = header_of(first(folder))
    del header[NAME]
    write_header(first(folder), header, data)


def twice_in_one_file(folder: Path) -> None:
    header, data = header_of(first(folder))
    entry = json.dumps({NAME: header[NAME]})[1:-1]
    write_header(first(folder), (json.dumps(header)[:-1] + "," + entry + "}").encode(), data)


def fp8(folder: Path) -> None:
    header, data = header_of(first(folder))
    begin, end = header[MATRIX]["data_offsets"]
    header[MATRIX] = {"dtype": "F8_E4M3", "shape": [end - begin], "data_offsets": [begin, end]}
    header["scaled_fp8"] = {"dtype": "F8_E4M3", "shape": [0], "data_offsets": [0, 0]}
    write_header(first(folder), header, data)


def in_two_shards(folder: Path) -> None:
    (folder / INDEX).unlink()
    other = folder / "model-00001-of-00007.safetensors"
    save_file(load_file(other) | {NAME: F4}, other)
    shutil.copy(other, folder / SHARD)


def point_index(target: object):
    def change(folder: Path) -> None:
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"][NAME] = target
        (folder / INDEX).write_text(json.dumps(index))

    return change


def swap_in_index(folder: Path) -> None:
    index = json.loads((folder / INDEX).read_text())
    here = index["weight_map"][NAME]
    point_index(next(f for f in index["weight_map"].values() if f != here))(folder)


def write(name: str, text: str | bytes):
    def change(folder: Path) -> None:
        (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())

    return change


def remove(*names: str):
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def config(**changes):
    return lambda folder: edit_json(folder / "config.json", **changes)


def tensor(value: np.ndarray | None, name: str = NAME):
    return lambda folder: edit_tensors(first(folder), **{name: value})


def header(**changes):
    return lambda folder: edit_header(first(folder), NAME, **changes)


def empty(folder: Path) -> None:
    for file in folder.iterdir():
        file.unlink()


SINGLE = {
    "empty folder": (empty, ["config.json is missing", "found there: nothing"]),
    "config missing": (remove("config.json"), ["config.json is missing", "model.safetensors"]),
    "config not JSON": (write("config.json", "dim: 24"), ["config.json is no JSON"]),
    "config not UTF-8": (write("config.json", b"\xff\xfe{}"), ["config.json is no text in UTF-8"]),
    "config no object": (write("config.json", "[1]"), ["config.json holds no JSON object"]),
    "config nested without end": (
        write("config.json", "[" * 100_000),
        ["config.json is nested too deeply"],
    ),
    "config of another model": (
        config(_class_name="FluxTransformer2DModel"),
        ["config.json is of class 'FluxTransformer2DModel'"],
    ),
    "config without any key": (write("config.json", "{}"), ["config.json is of class None"]),
    "config text for a number": (config(dim="24"), ["config.json", "dim = '24': must be"]),
    "config negative": (config(num_layers=-3), ["config.json", "num_layers = -3: must be"]),
    "config boolean for a number": (config(ffn_dim=True), ["config.json", "ffn_dim = True"]),
    "config model type": (
        config(model_type="v2v"),
        ["model_type = 'v2v': must be 't2v', 'i2v'"],
    ),
    "config eps": (config(eps=2.0), ["config.json", "eps = 2.0: must be"]),
    "config heads do not divide": (config(num_heads=5), ["config.json", "num_heads = 5"]),
    "config without query norm": (config(qk_norm=False), ["config.json", "qk_norm = False"]),
    "config depth against tensors": (
        config(num_layers=4),
        ["config.json", "num_layers: 4 in the config, 3 by the tensors"],
    ),
    "config width against tensors": (config(dim=48), ["dim: 48 in the config, 24 by the tensors"]),
    "config frame rate against tensors": (
        config(inject_sample_info=False),
        ["inject_sample_info: False in the config, True by"],
    ),
    "config type against tensors": (
        config(model_type="i2v"),
        ["model_type: 'i2v' in the config, 't2v' by the tensors"],
    ),
    "no tensors": (remove("model.safetensors"), ["folder holds no *.safetensors"]),
    "file truncated": (truncate(-100), ["model.safetensors is truncated"]),
    "file truncated in its header": (truncate(500), ["model.safetensors is truncated"]),
    "file of 3 bytes": (truncate(3), ["model.safetensors is truncated: 3 bytes"]),
    "file empty": (write("model.safetensors", ""), ["model.safetensors is truncated: 0 bytes"]),
    "file too long": (
        lambda f: first(f).write_bytes(first(f).read_bytes() + b"xx"),
        ["model.safetensors is corrupt"],
    ),
    "no safetensors file": (
        write("model.safetensors", b"PK\x03\x04" + bytes(5000)),
        ["model.safetensors is truncated or not a safetensors file"],
    ),
    "web page": (
        write("model.safetensors", "<!DOCTYPE html>" * 9),
        ["model.safetensors is truncated or not a safetensors file"],
    ),
    "LFS pointer": (
        write("model.safetensors", "version https://git-lfs.github.com/spec/v1\noid sha256:0\n"),
        ["model.safetensors is a Git LFS pointer"],
    ),
    "header no object": (
        lambda f: write_header(first(f), b"[1, 2]", b""),
        ["model.safetensors is not a safetensors file"],
    ),
    "header no UTF-8": (
        lambda f: write_header(first(f), b'{"\xff": 1}', b""),
        ["model.safetensors is not a safetensors file"],
    ),
    "header shape against bytes": (header(shape=[25]), ["model.safetensors is corrupt", NAME]),
    "header shape negative": (header(shape=[-24]), ["model.safetensors is corrupt", NAME]),
    "header shape overflows": (header(shape=[2**62, 8]), ["model.safetensors is corrupt", NAME]),
    "header offsets backwards": (
        header(data_offsets=[96, 0]),
        ["model.safetensors is corrupt", NAME],
    ),
    "header offsets past the end": (
        header(data_offsets=[10**12, 10**12 + 96]),
        ["model.safetensors is corrupt"],
    ),
    "header offsets no numbers": (
        header(data_offsets=["0", "96"]),
        ["model.safetensors is corrupt", NAME],
    ),
    "header dtype unknown": (header(dtype="Q4_K"), ["model.safetensors", "'Q4_K'; known are"]),
    "header overlap": (overlap, ["model.safetensors is corrupt: its tensors"]),
    "header hole": (hole, ["model.safetensors is corrupt: its tensors leave a hole"]),
    "tensor twice in a file": (
        twice_in_one_file,
        ["model.safetensors is not a safetensors file", f"{NAME!r} stands there twice"],
    ),
    "tensor renamed": (
        rename_tensor,
        [
            *("1 tensors that the file lacks", NAME),
            *("no place for", "blocks.1.self_attn.query.bias (model.safetensors)"),
        ],
    ),
    "tensor missing": (tensor(None), ["model.safetensors", "that the file lacks", NAME]),
    "tensor extra": (tensor(F4, "lora.down"), ["no place for", "lora.down (model.safetensors)"]),
    "tensor of a wrong shape": (
        tensor(np.ones(23, np.float32)),
        [f"{NAME}: [23] in model.safetensors, [24] expected"],
    ),
    "tensor transposed": (
        tensor(np.ones((24, 40), np.float32), "blocks.0.ffn.0.weight"),
        ["ffn_dim: 40 in the config, 24 by the tensors"],
    ),
    "tensor of integers": (
        tensor(np.ones(24, np.int32)),
        ["not floating point", f"{NAME}: int32 in model.safetensors"],
    ),
    "tensor in 8-bit floats without its scale": (
        fp8,
        ["model.safetensors", f"{MATRIX}: its scale is missing"],
    ),
    "tensor NaN": (with_value(np.nan), [f"model.safetensors: {NAME} has 24 values that are NaN"]),
    "tensor infinite": (with_value(-np.inf), [f"model.safetensors: {NAME} has 24 values"]),
    "layer missing": (drop_layer, ["27 tensors that the file lacks", "blocks.1.ffn.0.bias"]),
    "layer extra": (add_layer, ["num_layers: 3 in the config, 4 by the tensors"]),
}

SHARDED = {
    "shard missing": (remove(SHARD), [INDEX, f"names files that are missing: {SHARD}"]),
    "shard missing without index": (
        remove(SHARD, INDEX),
        ["the numbering asks for files that are missing", SHARD],
    ),
    "shard truncated": (
        lambda f: (f / SHARD).write_bytes((f / SHARD).read_bytes()[:-1]),
        [f"{SHARD} is truncated"],
    ),
    "tensor in two shards": (in_two_shards, ["is in both", SHARD]),
    "index not JSON": (write(INDEX, "{"), [f"{INDEX} is no JSON"]),
    "index without map": (write(INDEX, '{"metadata": {}}'), [f"{INDEX} has no weight_map"]),
    "index outside the folder": (
        point_index("../single/model.safetensors"),
        [INDEX, "'../single/model.safetensors'", "the same folder"],
    ),
    "index absolute": (point_index("/etc/passwd"), [INDEX, "'/etc/passwd'"]),
    "index to no text": (point_index(3), [INDEX, "into 3"]),
    "index to the wrong shard": (swap_in_index, [INDEX, f"lacks {NAME}"]),
    "file not in the index": (
        lambda f: shutil.copy(f / SHARD, f / "backup.safetensors"),
        [INDEX, "does not name backup.safetensors"],
    ),
    "two indices": (
        lambda f: shutil.copy(f / INDEX, f / "other.safetensors.index.json"),
        ["holds several indices", "other.safetensors.index.json"],
    ),
}


@pytest.mark.parametrize("kind", SINGLE)
def test_a_broken_folder_is_one_error_naming_the_file(good, tmp_path, kind):
    break_it, words = SINGLE[kind]
    check(copy(good, "single", tmp_path), break_it, words)


@pytest.mark.parametrize("kind", SHARDED)
def test_a_broken_set_of_shards_is_one_error_naming_the_file(good, tmp_path, kind):
    break_it, words = SHARDED[kind]
    check(copy(good, "sharded", tmp_path), break_it, words)


def check(folder: Path, break_it, words: list[str]) -> None:
    break_it(folder)
    with pytest.raises(WeightsError) as error:
        load(folder)
    for word in words:
        assert word in str(error.value), str(error.value)
    assert len(str(error.value).splitlines()) < 40


def test_the_other_formats_config_is_refused(good, tmp_path):
    folder = copy(good, "single", tmp_path)
    shutil.copy(good["diffusers"] / "config.json", folder)
    with pytest.raises(WeightsError, match="no place for"):
        load(folder)


def test_an_original_config_in_a_diffusers_folder_is_refused(good, tmp_path):
    shutil.copytree(good["single"], tmp_path / "transformer")
    with pytest.raises(WeightsError, match="is in the original format"):
        load(tmp_path)


def test_a_diffusers_folder_without_its_transformer_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(WeightsError, match=r"transformer/config\.json is missing"):
        load(tmp_path)


def test_a_float16_overflow_names_the_file_and_the_tensor(good, tmp_path):
    folder = copy(good, "single", tmp_path)
    with_value(1e30)(folder)
    checkpoint = Checkpoint.open(folder)
    load_transformer(checkpoint, param_dtype=ml_dtypes.bfloat16)
    with pytest.raises(WeightsError, match=rf"{NAME} has values beyond the range of float16"):
        stored_transformer(checkpoint.layout).load_state(np.float16)
