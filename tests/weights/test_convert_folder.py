import argparse
import importlib
import json
import re
import shutil

import ml_dtypes
import numpy as np
import pytest
from tests.fabricate import Checkpoints
from tests.weights.tiny import DF, I2V, T2V, edit_tensors, save

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.cli.main import build_parser
from skyreels_jax.errors import RequestError, WeightsError
from skyreels_jax.testing.random_checkpoint import Kind
from skyreels_jax.weights.components.transformer import stored_transformer
from skyreels_jax.weights.convert_folder import convert_folder
from skyreels_jax.weights.folder_files import safetensors_of
from skyreels_jax.weights.layout import read_layout
from skyreels_jax.weights.pipeline_folder import About

CLIP = "models_clip_open-clip-xlm-roberta-large-vit-huge-14.pth"
ABOUT = About(name="small", pipeline="SkyReelsV2Pipeline", flow_shift=8.0)
# What a diffusers pipeline takes, by the folder it stands in.
TEXT_TO_VIDEO = {
    "README.md",
    "model_index.json",
    "scheduler/scheduler_config.json",
    "text_encoder/config.json",
    "text_encoder/model.safetensors",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer_config.json",
    "transformer/config.json",
    "transformer/diffusion_pytorch_model.safetensors",
    "vae/config.json",
    "vae/diffusion_pytorch_model.safetensors",
}
IMAGE_TO_VIDEO = TEXT_TO_VIDEO | {
    "image_encoder/config.json",
    "image_encoder/model.safetensors",
    "image_processor/preprocessor_config.json",
}


def command(*words) -> argparse.Namespace:
    arguments = [str(word) for word in words]
    return build_parser(arguments[0]).parse_args(arguments)


def run(*words) -> int:
    arguments = command(*words)
    return importlib.import_module(f"skyreels_jax.cli.{words[0]}").run(arguments)


def add_parts(folder, names):
    """Stand-ins for the other parts: a name with a suffix is a file, another a folder."""
    for name in names:
        file = folder / name if name.endswith(".pth") else folder / name / "content"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(name)


def original_folder(root):
    folder = save(root / "original", I2V)
    add_parts(folder, ["Wan2.1_VAE.pth", "google/umt5-xxl", CLIP])
    return folder


def diffusers_folder(root):
    folder = root / "theirs"
    save(folder / "transformer", DF, "diffusers")
    add_parts(folder, ["vae", "tokenizer", "text_encoder"])
    (folder / "scheduler").mkdir()
    (folder / "scheduler" / "scheduler_config.json").write_text('{"flow_shift": 3.0}')
    (folder / "model_index.json").write_text('{"_class_name": "SkyReelsV2Pipeline"}')
    return folder


def files(folder):
    """All but the list by which a folder is known for one of ours."""
    found = (p for p in folder.rglob("*") if p.is_file() and p.name != ".made-by-skyreels-jax.json")
    return sorted(str(p.relative_to(folder)) for p in found)


@pytest.mark.parametrize(
    ("kind", "expected"), [("t2v", TEXT_TO_VIDEO), ("df", TEXT_TO_VIDEO), ("i2v", IMAGE_TO_VIDEO)]
)
def test_from_original_to_diffusers(
    tmp_path, capsys, checkpoints: Checkpoints, kind: Kind, expected: set[str]
):
    """All that diffusers wrote of the same checkpoint, but that tensors keep the file's dtype."""
    out = tmp_path / "out"
    assert run("convert", checkpoints(kind, "original"), out, "--layout", "diffusers") == 0
    assert set(files(out)) == expected
    printed = capsys.readouterr().out
    assert "written   text_encoder/model.safetensors" in printed
    assert "copied    tokenizer" in printed
    assert "left out" not in printed
    theirs = read_layout(checkpoints(kind, "diffusers"))
    ours = read_layout(out)
    assert ours.model_index["_class_name"] == theirs.model_index["_class_name"]
    assert ours.model_index.keys() == theirs.model_index.keys()
    for part in ("vae", "text_encoder", *(["image_encoder"] if kind == "i2v" else [])):
        written, same = (safetensors_of(layout.component(part)) for layout in (ours, theirs))
        assert written.tensors().keys() == same.tensors().keys()
        for name in same.tensors():
            np.testing.assert_array_equal(
                written.read(name).astype(np.float32), same.read(name).astype(np.float32), name
            )


@pytest.mark.parametrize("part", ["Wan2.1_VAE.pth", CLIP])
def test_a_broken_part_leaves_no_target(tmp_path, checkpoints: Checkpoints, part: str):
    source = shutil.copytree(checkpoints("i2v", "original"), tmp_path / "a")
    (source / part).write_bytes((source / part).read_bytes()[:-1000])
    with pytest.raises(WeightsError, match=re.escape(part)):
        run("convert", source, tmp_path / "b", "--layout", "diffusers")
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_a_part_that_is_missing_is_named(tmp_path, capsys, checkpoints: Checkpoints):
    source = shutil.copytree(checkpoints("i2v", "original"), tmp_path / "a")
    (source / CLIP).unlink()
    assert run("convert", source, tmp_path / "b", "--layout", "diffusers") == 0
    assert f"left out  image_encoder: {CLIP} is missing" in capsys.readouterr().out
    found = set(files(tmp_path / "b"))
    assert found == TEXT_TO_VIDEO - {"model_index.json"}


def test_a_part_that_the_pipeline_does_not_take_is_left_out(
    tmp_path, capsys, checkpoints: Checkpoints
):
    source = shutil.copytree(checkpoints("t2v", "original"), tmp_path / "a")
    shutil.copy(checkpoints("i2v", "original") / CLIP, source)
    assert run("convert", source, tmp_path / "b", "--layout", "diffusers") == 0
    assert f"left out  {CLIP}: a pipeline for this transformer" in capsys.readouterr().out
    assert set(files(tmp_path / "b")) == TEXT_TO_VIDEO


def test_from_diffusers_to_original(tmp_path, capsys):
    source = diffusers_folder(tmp_path)
    assert run("convert", source, tmp_path / "out", "--layout", "original") == 0
    assert files(tmp_path / "out") == [
        "config.json",
        "google/umt5-xxl/content",
        "model.safetensors",
    ]
    printed = capsys.readouterr().out
    assert "left out  vae: the original format has it as Wan2.1_VAE.pth" in printed
    assert "left out  scheduler: the original format has no such component" in printed
    assert Checkpoint.open(tmp_path / "out").config == DF


@pytest.mark.parametrize("make", [original_folder, diffusers_folder])
def test_in_the_same_layout_everything_follows_and_the_transformer_is_rounded(tmp_path, make):
    source = make(tmp_path)
    layout = read_layout(source).format
    out = tmp_path / "out"
    assert run("convert", source, out, "--layout", layout, "--dtype", "bfloat16") == 0
    card = ["README.md"] if layout == "diffusers" else []
    assert files(out) == card + files(source)
    before, after = (safetensors_of(read_layout(f).transformer) for f in (source, out))
    for name in before.tensors():
        expected = before.read(name).astype(ml_dtypes.bfloat16)
        np.testing.assert_array_equal(after.read(name), expected)
    for name in files(source):
        if "safetensors" not in name and not name.endswith("config.json"):
            assert (out / name).read_bytes() == (source / name).read_bytes()


def test_there_and_back_is_bit_exact(tmp_path):
    source = save(tmp_path / "a", DF)
    run("convert", source, tmp_path / "b", "--layout", "diffusers")
    run("convert", tmp_path / "b", tmp_path / "c", "--layout", "original")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "c" / name).read_bytes() == (source / name).read_bytes()


def test_a_transformer_alone_stays_alone(tmp_path):
    run("convert", save(tmp_path / "a", T2V), tmp_path / "b", "--layout", "diffusers")
    assert files(tmp_path / "b") == ["config.json", "diffusion_pytorch_model.safetensors"]


def test_a_target_that_is_there_is_replaced_only_on_request(tmp_path):
    source = save(tmp_path / "a", T2V)
    words = ("convert", source, tmp_path / "b", "--layout", "diffusers")
    run(*words)
    before = files(tmp_path / "b")
    with pytest.raises(RequestError, match="is there already"):
        run(*words)
    run(*words, "--overwrite", "--dtype", "bfloat16")
    assert files(tmp_path / "b") == before


@pytest.mark.parametrize("name", ["mine", "deep/mine", "config.json", ".hidden", "empty/", "link"])
@pytest.mark.parametrize("converted", [True, False])
def test_a_folder_that_holds_other_things_is_never_replaced(tmp_path, name, converted):
    source, target = save(tmp_path / "a", T2V), tmp_path / "b"
    words = ("convert", source, target, "--layout", "diffusers", "--overwrite")
    if converted:
        run(*words)
    (target / name).parent.mkdir(exist_ok=True, parents=True)
    if name.endswith("/"):
        (target / name).mkdir()
    elif name == "link":
        (target / name).symlink_to(source)
    else:
        (target / name).write_text("mine")
    before = files(target)
    with pytest.raises(RequestError, match=f"did not write there: .*{name.rstrip('/')}"):
        run(*words)
    assert files(target) == before
    assert name.endswith("/") or name == "link" or (target / name).read_text() == "mine"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


@pytest.mark.parametrize("target", ["a", "a/inside", "."])
def test_the_source_is_never_replaced(tmp_path, target):
    source = save(tmp_path / "a", T2V)
    before = files(tmp_path)
    with pytest.raises(RequestError, match="in or around it"):
        run("convert", source, tmp_path / target, "--layout", "original", "--overwrite")
    assert files(tmp_path) == before


def test_a_broken_source_leaves_no_target(tmp_path):
    source = save(tmp_path / "a", T2V)
    edit_tensors(source / "model.safetensors", **{"head.head.bias": np.full(64, np.nan, "f4")})
    with pytest.raises(
        WeightsError, match=r"model\.safetensors: head\.head\.bias has 64 values that are NaN"
    ):
        run("convert", source, tmp_path / "b", "--layout", "diffusers")
    edit_tensors(source / "model.safetensors", **{"head.head.bias": None})
    with pytest.raises(WeightsError, match=r"head\.head\.bias"):
        layout = read_layout(source)
        stored = stored_transformer(layout)
        convert_folder(layout, stored, tmp_path / "b", format="diffusers", about=ABOUT)
    assert [p.name for p in tmp_path.iterdir()] == ["a"]


def test_info_tells_what_a_folder_is(tmp_path, capsys):
    assert run("info", original_folder(tmp_path)) == 0
    printed = capsys.readouterr().out
    for words in (
        *("layout          original", "task            i2v", "missing         text_encoder"),
        *(
            "none (no release of SkyReels-V2 has its shape",
            "float32 (",
            "shift           5.0 (SkyReels-V2 i2v",
        ),
    ):
        assert words in printed


def test_info_as_json(tmp_path, capsys):
    folder = diffusers_folder(tmp_path)
    assert run("info", folder, "--json") == 0
    report = json.loads(capsys.readouterr().out)
    source = safetensors_of(folder / "transformer")
    infos = source.tensors().values()
    assert report["parameters"] == sum(i.size for i in infos)
    assert report["transformer_bytes"] == 4 * report["parameters"]
    assert report["tensors"] == len(infos)
    assert report["dtypes"] == {"float32": len(infos)}
    assert report["missing_parts"] == []
    assert report["parts"]["vae"] == len("vae")
    assert report["config"]["dim"] == 24
    assert report["defaults"]["shift"] == {
        "value": 3.0,
        "source": "scheduler/scheduler_config.json",
    }


def test_info_of_a_broken_folder_is_an_error(tmp_path):
    folder = save(tmp_path / "a", T2V)
    edit_tensors(folder / "model.safetensors", **{"head.head.bias": None})
    with pytest.raises(WeightsError, match=r"head\.head\.bias"):
        run("info", folder)
