"""The reader of PyTorch archives: equal to torch.load on sound files, a refusal on all others."""

import io
import pickle
import struct
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.weights.pth_files import (
    FLOAT_PID,
    HOOKS,
    MAGIC,
    REBUILD,
    archive,
    mapping,
    storage_bytes,
    tensor,
    text,
    write,
    zipped,
)

from skyreels_jax.errors import WeightsError
from skyreels_jax.weights.safetensors_file import TensorSource
from skyreels_jax.weights.torch_file import PthSource

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
BYTE_COUNTED = (
    *(torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.uint16, torch.uint32, torch.uint64),
)


def bits(array: np.ndarray) -> np.ndarray:
    """For comparisons in which NaN equals itself and -0 is not 0."""
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def assert_equal_to_torch(file: Path) -> PthSource:
    source = PthSource(file)
    expected = torch.load(file, weights_only=True)
    if len(expected) == 1 and isinstance(inner := next(iter(expected.values())), dict):
        expected = inner
    assert list(source.tensors()) == list(expected)
    for name, value in expected.items():
        array = source.read(name)
        info = source.tensors()[name]
        assert info.shape == array.shape == tuple(value.shape)
        assert info.dtype == array.dtype
        assert str(array.dtype) == str(value.dtype).removeprefix("torch.")
        value = value.detach().contiguous()
        raw = value.reshape(-1).view(torch.uint8).numpy() if value.numel() else bits(array)
        np.testing.assert_array_equal(bits(array), raw)
        assert not array.flags.writeable or array.size == 0
    return source


def saved(folder: Path, value: object, **options) -> Path:
    file = folder / "x.pth"
    torch.save(value, file, **options)
    return file


# Files made by torch


@pytest.mark.parametrize("dtype", (*DTYPES, *BYTE_COUNTED), ids=str)
def test_every_dtype(tmp_path: Path, dtype: torch.dtype):
    bytes_ = torch.randint(0, 2 if dtype == torch.bool else 256, (3, 5, 8), dtype=torch.uint8)
    value = bytes_.view(dtype)
    assert_equal_to_torch(saved(tmp_path, {"a": value, "b": value[1:2].clone()}))


def views() -> dict[str, torch.Tensor]:
    base = torch.arange(120, dtype=torch.float32).reshape(4, 5, 6)
    return {
        "whole": base,
        "slice": base[1:3],
        "column": base[:, 2],
        "transposed": base.transpose(0, 2),
        "permuted": base.permute(1, 2, 0),
        "steps": base[::2, 1::3, ::5],
        "diagonal": base[0].diagonal(),
        "scalar": base[2, 3, 4],
        "expanded": torch.tensor([1.0, 2.0]).reshape(2, 1).expand(2, 3),
        "empty": torch.empty(0),
        "empty 2": torch.empty(3, 0, 2, dtype=torch.bfloat16),
        "ones": torch.ones(1, 1, 1).transpose(0, 2),
        "windows": torch.arange(9.0).unfold(0, 3, 1),
        "half": torch.arange(12, dtype=torch.bfloat16).reshape(3, 4).T,
    }


def test_views_that_share_storages_and_are_not_contiguous(tmp_path: Path):
    source = assert_equal_to_torch(saved(tmp_path, views()))
    assert isinstance(source, TensorSource)


def test_contiguous_tensors_are_mapped_and_others_copied(tmp_path: Path):
    source = PthSource(saved(tmp_path, views()))

    def is_mapped(array: np.ndarray | None) -> bool:
        return array is not None and (isinstance(array, np.memmap) or is_mapped(array.base))

    assert is_mapped(source.read("whole"))
    assert is_mapped(source.read("slice"))
    assert not is_mapped(source.read("transposed"))


def test_state_dict_of_a_module_with_its_metadata(tmp_path: Path):
    module = torch.nn.Sequential(torch.nn.Conv3d(2, 3, 2), torch.nn.BatchNorm3d(3))
    assert_equal_to_torch(saved(tmp_path, module.state_dict()))
    assert_equal_to_torch(saved(tmp_path, dict(module.named_parameters())))
    assert_equal_to_torch(saved(tmp_path, {"state_dict": module.state_dict()}))
    assert_equal_to_torch(saved(tmp_path, OrderedDict()))


def test_files_without_checksums_and_from_devices(tmp_path: Path):
    torch.serialization.set_crc32_options(False)
    try:
        file = saved(tmp_path, views())
    finally:
        torch.serialization.set_crc32_options(True)
    assert_equal_to_torch(file)
    file.write_bytes(file.read_bytes().replace(b"cpuq", b"gpuq"))
    assert list(PthSource(file).tensors()) == list(views())


def test_many_tensors_use_long_memo_indices(tmp_path: Path):
    # Of up to 255 one byte is enough, and a tensor takes several.
    value = {f"blocks.{i}.weight": torch.full((i % 7,), i) for i in range(400)}
    assert_equal_to_torch(saved(tmp_path, value))


def test_offsets_above_two_and_four_gigabytes_are_read_from_64_bit_fields(tmp_path: Path):
    """A sparse file: its storages take no disk, but their places need 64 bits."""
    file = tmp_path / "x.pth"
    # Written with checksums left out, of which nine gigabytes of zeros need none.
    torch.serialization.set_crc32_options(False)
    try:
        with torch.serialization.skip_data():
            value = {"a": torch.empty(9 << 30, dtype=torch.uint8), "b": torch.empty(3)}
            torch.save(value, file)
    finally:
        torch.serialization.set_crc32_options(True)
    assert file.stat().st_blocks * 512 < 1 << 30
    source = PthSource(file)
    assert source.tensors()["a"].shape == (9 << 30,)
    assert source.read("b").shape == (3,)
    assert source.read("a")[-1] == 0


def test_hand_made_files_are_read_like_those_of_torch(tmp_path: Path):
    file = write(tmp_path, archive(mapping(tensor()), [storage_bytes()], version=b"3\n"))
    assert_equal_to_torch(file)
    size = b"ctorch\nSize\nK\x02K\x03\x86\x85R"
    assert_equal_to_torch(
        write(
            tmp_path,
            archive(mapping(tensor(shape=size)), [storage_bytes()], version=b"3\n"),
        )
    )


def test_reading_needs_no_torch(tmp_path: Path):
    file = saved(tmp_path, {"a": torch.arange(6, dtype=torch.bfloat16)})
    code = (
        "import sys; from pathlib import Path\n"
        "from skyreels_jax.weights.torch_file import PthSource;"
        f"print(PthSource(Path({str(file)!r})).read('a').sum(), 'torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout.split() == ["15", "False"], answer.stderr


# Files that are of another kind, damaged or contradictory


def torchscript() -> bytes:
    stream = io.BytesIO()
    torch.jit.save(torch.jit.trace(torch.nn.ReLU(), torch.ones(1)), stream)
    return stream.getvalue()


def legacy() -> bytes:
    stream = io.BytesIO()
    torch.save({"a": torch.ones(2)}, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


def by_torch(value: object) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


def patched(content: bytes, old: bytes, new: bytes) -> bytes:
    assert old in content and len(old) == len(new)
    return content.replace(old, new)


def one(value: bytes, *storages: bytes) -> bytes:
    return archive(mapping(value), storages or [storage_bytes()])


SOUND = one(tensor())
PARAMETER = b"ctorch._utils\n_rebuild_parameter\n"
BYTES_PID = FLOAT_PID.replace(b"ctorch\nFloat", b"ctorch.storage\nUntyped")
BIG = b"\x8a\x08" + b"\xff" * 7 + b"\x7f"

REFUSED: dict[str, tuple[bytes, str]] = {
    "nothing": (b"", "no PyTorch file"),
    "text": (b"hello", "no PyTorch file"),
    "lfs pointer": (b"version https://git-lfs.github.com/spec/v1\n", "Git LFS pointer"),
    "legacy": (legacy(), "bare pickle"),
    "plain pickle": (pickle.dumps({"a": 1}), "bare pickle"),
    "torchscript": (torchscript(), "TorchScript"),
    "torchscript, stored": (
        zipped({"x/data.pkl": mapping(tensor()), "x/constants.pkl": b"\x80\x02)."}),
        "TorchScript",
    ),
    "other zip": (zipped({"x/readme": b"hello"}), "without FOLDER/data.pkl"),
    "empty zip": (b"PK\x05\x06" + bytes(18), "does not begin"),
    "two folders": (zipped({"x/data.pkl": b"", "y/data.pkl": b""}), "without FOLDER"),
    "truncated": (by_torch(views())[:-1], "truncated"),
    "half": (by_torch(views())[:1500], "truncated"),
    "bytes after the end": (SOUND + b"\0", "truncated"),
    "comment": (SOUND[:-2] + b"\1\0", "end record"),
    "several disks": (SOUND[:-18] + b"\1" + SOUND[-17:], "end record"),
    "deflated": (zipped({"x/data.pkl": b"", "x/data/0": b""}, method=8), "compressed"),
    "encrypted": (zipped({"x/data.pkl": b""}, flags=1), "encrypted"),
    "path escape": (zipped({"x/data.pkl": b".", "x/../y": b""}), "not to be trusted"),
    "absolute path": (zipped({"/x/data.pkl": b"."}), "not to be trusted"),
    "backslash": (zipped({"x\\data.pkl": b"."}), "not to be trusted"),
    "member twice": (zipped([("x/data.pkl", b"."), ("x/data.pkl", b".")]), "twice"),
    "names contradict": (SOUND.replace(b"x/data/0", b"x/data/1", 1), "contradicts"),
    "wrong checksum": (patched(SOUND, struct.pack("<f", 5), struct.pack("<f", 6)), "checksum"),
    "big endian": (
        zipped({"x/data.pkl": mapping(tensor()), "x/byteorder": b"big"}),
        "byte order",
    ),
    "storage missing": (archive(mapping(tensor())), "the archive lacks"),
    "storage too small": (one(tensor(), storage_bytes(5)), "24 bytes that has 20"),
    "storage too large": (one(tensor(), storage_bytes(7)), "24 bytes that has 28"),
    "offset beyond": (one(tensor(offset=b"K\1")), "beyond its storage"),
    "shape beyond": (one(tensor(shape=b"K\x02K\x04\x86")), "beyond its storage"),
    "strides beyond": (one(tensor(strides=b"K\x04K\x01\x86")), "beyond its storage"),
    "huge strides": (one(tensor(strides=BIG + b"K\x01\x86")), "beyond its storage"),
    "huge offset": (one(tensor(offset=BIG)), "beyond its storage"),
    "huge shape": (one(tensor(shape=BIG + BIG + b"\x86")), "beyond its storage"),
    "expanded bomb": (one(tensor(shape=BIG + b"K\1\x86", strides=b"K\0K\1\x86")), "repeats"),
    "empty bomb": (one(tensor(shape=BIG + b"K\0\x86")), "has shape"),
    "negative shape": (one(tensor(shape=b"J\xff\xff\xff\xffK\x03\x86")), "unsound"),
    "negative stride": (one(tensor(strides=b"J\xff\xff\xff\xffK\x01\x86")), "unsound"),
    "negative offset": (one(tensor(offset=b"J\xff\xff\xff\xff")), "unsound"),
    "bool for a size": (one(tensor(shape=b"\x88K\x03\x86")), "unsound"),
    "float for a size": (one(tensor(offset=b"G" + bytes(8))), "unsound"),
    "ranks differ": (one(tensor(strides=b"K\x01\x85")), "unsound"),
    "17 dimensions": (
        one(tensor(shape=b"(" + 17 * b"K\1" + b"t", strides=b"(" + 17 * b"K\1" + b"t")),
        "unsound",
    ),
    "hooks": (one(tensor(hooks=b"}" + text("a") + b"Ns")), "unsound"),
    "no hooks": (one(tensor(hooks=b"")), "unsound"),
    "typed storage as bytes": (
        one(tensor(hooks=HOOKS + b"ctorch\nuint16\n", rebuild=REBUILD.replace(b"v2", b"v3"))),
        "other arguments",
    ),
    "bytes without dtype": (one(tensor(pid=BYTES_PID)), "other arguments"),
    "tensor of a tensor": (one(REBUILD + tensor() + b"\x85R"), "other arguments"),
    "parameter of a storage": (one(PARAMETER + FLOAT_PID + b"\x89" + HOOKS + b"\x87R"), "other"),
    "a list": (archive(MAGIC + b"]."), "holds a list"),
    "a tensor": (archive(MAGIC + tensor() + b".", [storage_bytes()]), "holds a PickledTensor"),
    "a number beside": (by_torch({"a": torch.ones(1), "epoch": 3}), "'epoch' is a int"),
    "lists beside": (by_torch({"a": torch.ones(1), "b": [1.5, [2]]}), "'b' is a list"),
    "two levels": (by_torch({"a": {"b": {"c": torch.ones(1)}}}), "'b' is a dict"),
    "two mappings": (by_torch({"a": {"b": torch.ones(1)}, "c": {}}), "several mappings"),
    "itself": (archive(MAGIC + b"}q\0" + text("a") + b"h\0s."), "'a' is a dict"),
    "optimizer state": (by_torch({"state": {0: torch.ones(1)}}), "key of type int"),
    "complex": (by_torch({"a": torch.ones(1, dtype=torch.complex64)}), "ComplexFloatStorage"),
    "sparse": (by_torch({"a": torch.eye(2).to_sparse()}), "sparse"),
    "key twice": (archive(MAGIC + b"}(" + 2 * (text("a") + b"N") + b"u."), "twice"),
    "protocol 4": (archive(pickle.dumps({}, protocol=4)), "protocol 4"),
    "nothing after": (archive(MAGIC), "makes no sense"),
    "stops with more": (archive(MAGIC + b"}}."), "left when it stops"),
    "goes on after": (archive(MAGIC + b"}.}"), "left when it stops"),
    "stops in a mark": (archive(MAGIC + b"(}."), "left when it stops"),
    "stack underflow": (archive(MAGIC + b"ss."), "makes no sense"),
    "no mark": (archive(MAGIC + b"}u."), "makes no sense"),
    "memo missing": (archive(MAGIC + b"}h\7."), "makes no sense"),
    "memo far": (archive(MAGIC + b"}r\xff\xff\xff\x7f."), "memo entry"),
    "text too long": (archive(MAGIC + b"X\xff\xff\xff\xff."), "text of"),
    "text ends early": (archive(MAGIC + b"X\x09\0\0\0."), "ends early"),
    "no text": (archive(MAGIC + b"X\1\0\0\0\xff."), "makes no sense"),
    "name without end": (archive(MAGIC + b"ctorch"), "does not end"),
    "long integer": (archive(MAGIC + b"\x8a\x09" + bytes(9) + b"."), "integer of 9"),
    "short tuple": (archive(MAGIC + b"N\x87."), "too few"),
    "append to a mapping": (archive(MAGIC + b"}Na."), "no list"),
    "items for a list": (archive(MAGIC + b"]" + text("a") + b"Ns."), "no mapping"),
    "odd items": (archive(MAGIC + b"}(" + text("a") + b"u."), "no mapping"),
    "surrogates": (archive(mapping(tensor(), name="\ud800"), [storage_bytes()]), "no sense"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_other_files_are_refused_by_name(tmp_path: Path, kind: str):
    content, message = REFUSED[kind]
    file = write(tmp_path, content)
    with pytest.raises(WeightsError, match=message) as caught:
        PthSource(file).read("w")
    assert str(file) in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path):
    for file, words in ((tmp_path, "is a folder"), (tmp_path / "none.pth", "no such file")):
        with pytest.raises(WeightsError, match=words):
            PthSource(file)


def test_a_file_that_shrinks_after_opening_is_refused(tmp_path: Path):
    file = write(tmp_path, SOUND)
    source = PthSource(file)
    file.write_bytes(b"")
    with pytest.raises(WeightsError, match="any more"):
        source.read("w")


# Files that want to run something. Each would create the canary if it were unpickled.


def call(function: bytes, arguments: bytes) -> bytes:
    return function + arguments + b"R"


def attacks(canary: str) -> dict[str, bytes]:
    shell = text(f"touch {canary}")
    python = text(f"open({canary!r}, 'w')")
    system, evaluate = b"cos\nsystem\n", b"cbuiltins\neval\n"
    getter = b"cbuiltins\ngetattr\n"
    module = call(b"cimportlib\nimport_module\n", text("os") + b"\x85")
    return {
        "os.system": call(system, shell + b"\x85"),
        "posix.system": call(b"cposix\nsystem\n", shell + b"\x85"),
        "eval": call(evaluate, python + b"\x85"),
        "exec": call(b"c__builtin__\nexec\n", python + b"\x85"),
        "subprocess": call(
            b"csubprocess\ncall\n", b"]" + text("touch") + b"a" + text(canary) + b"a\x85"
        ),
        "open": call(b"cio\nopen\n", text(canary) + text("w") + b"\x86"),
        "getattr chain": call(call(getter, module + text("system") + b"\x86"), shell + b"\x85"),
        "dotted name": call(b"ctorch\nserialization.os.system\n", shell + b"\x85"),
        "torch.load": call(b"ctorch\nload\n", text(canary) + b"\x85"),
        "torch.hub": call(b"ctorch.hub\nload\n", text("a/b") + text("c") + b"\x86"),
        "apply a tensor": call(tensor(), shell + b"\x85"),
        "nested reduce": tensor(offset=call(system, shell + b"\x85")),
        "in a persistent id": b"(" + text("storage") + call(system, shell + b"\x85") + b"tQ",
        "partial": call(call(b"cfunctools\npartial\n", system + shell + b"\x86"), b")"),
        "stack global": text("os") + text("system") + b"\x93" + shell + b"\x85R",
        "inst": b"(" + shell + b"ios\nsystem\n",
        "obj": b"(" + system + shell + b"o",
        "newobj": b"csubprocess\nPopen\n" + text(f"touch {canary}") + b"\x85\x81",
        "newobj_ex": b"csubprocess\nPopen\n)}\x92",
        "ext1": b"\x82\x01" + shell + b"\x85R",
        "ext2": b"\x83\x01\0",
        "ext4": b"\x84\x01\0\0\0",
        "text persistent id": b"Pos.system\n",
        "odd persistent id": b"(" + text("module") + system + shell + b"tQ",
        "integer persistent id": b"K\x01Q",
        "storage class by name": b"(" + text("storage") + text("os.system") + shell + b"K\1tQ",
        "build with state": HOOKS + b"}" + text("__class__") + system + b"sb",
        "build setstate": HOOKS + b"}" + text("__setstate__") + system + b"sb",
        "build on a tensor": tensor() + b"}" + text("grad_fn") + system + b"sb",
        "build on a class": b"ctorch\nFloatStorage\n}b",
        "build slots": HOOKS + b"}}\x86b",
        "dict by reduce": call(b"ccollections\nOrderedDict\n", b"](" + shell + b"Nee\x85"),
        "typed storage": call(b"ctorch.storage\nTypedStorage\n", b")"),
        "rebuild_from_type": call(
            b"ctorch._tensor\n_rebuild_from_type_v2\n", system + shell + b"\x86"
        ),
        "bytecode": call(b"ctypes\nCodeType\n", b")"),
        "bytes": b"C\x01a",
        "frame": b"\x95" + bytes(8) + b"}",
        "pop and dup": b"}20",
        "string": b"S'touch'\n",
    }


@pytest.mark.parametrize("kind", attacks(""))
def test_nothing_in_a_pickle_is_ever_executed(tmp_path: Path, kind: str):
    canary = tmp_path / "canary"
    for value in (attacks(str(canary))[kind], attacks(str(canary))[kind] + b"0" + tensor()):
        file = write(tmp_path, one(value))
        with pytest.raises(WeightsError, match=r"not to be trusted|corrupt"):
            PthSource(file)
    assert not canary.exists()


@pytest.mark.parametrize("kind", ["os.system", "open", "getattr chain", "stack global", "inst"])
def test_the_attacks_work_on_a_reader_that_unpickles(tmp_path: Path, kind: str):
    """Negative twin: the canary is real."""
    canary = tmp_path / "canary"
    pickle.loads(MAGIC + attacks(str(canary))[kind] + b".")
    assert canary.exists()


# Files made by hand by somebody else: what they hold, or one refusal, and nothing is executed

DATA = Path(__file__).parent / "data" / "pth"
ZEROS = {"a": [0.0] * 4}
# The tensors of the few that are sound, by name of the file.
SOUND_FILES = {
    "all_crc_zeroed,_data_altered": {"a": [1e9, 0, 0, 0]},  # Without checksums, as torch may write.
    "bool_storage_with_7": {"a": [7] * 16},
    "crc_wrong_local_only": ZEROS,
    "cuda_device": ZEROS,
    "good": ZEROS,
    "key_newline_esc": {"a\x1b[31m\n": [0.0] * 4},
    "no_byteorder": ZEROS,
    "zero_stride_within_file_(repeat)": {"a": [0.0] * 16},
}


@pytest.mark.parametrize("file", sorted(DATA.glob("*.pth")), ids=lambda file: file.stem)
def test_files_made_by_hand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: Path):
    monkeypatch.chdir(tmp_path)  # Where what is executed would leave its mark.
    if file.stem in SOUND_FILES:
        source = PthSource(file)
        arrays = {name: source.read(name) for name in source.tensors()}
        as_numbers = {n: x.view(np.uint8) if x.dtype == bool else x for n, x in arrays.items()}
        assert {n: x.tolist() for n, x in as_numbers.items()} == SOUND_FILES[file.stem]
    else:
        with pytest.raises(WeightsError):
            source = PthSource(file)
            for name in source.tensors():
                source.read(name)
    assert list(tmp_path.iterdir()) == []


def test_the_files_made_by_hand_are_all_there():
    assert len(list(DATA.glob("*.pth"))) == 62
