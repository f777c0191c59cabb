"""`lora info|convert|merge|extract`, and `--lora` of a generation and of what goes on with it."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from tests.cli.commands import Command, rewrite
from tests.fabricate import Checkpoints
from tests.weights.lora.files import (
    distance,
    linears,
    low_rank,
    names_in,
    random,
    stored,
    weights,
    with_file,
    write,
)
from tests.weights.lora.rows import ROWS
from tests.weights.lora.test_rows import by_original, forward, loaded_by_diffusers, torch_model

from skyreels_jax.cli.flags import lora_of
from skyreels_jax.cli.lora import LORA_FORM_NAMES
from skyreels_jax.weights.lora.writing import LORA_FORMS
from skyreels_jax.weights.plan import Format

BY_NAME = {row.name: row for row in ROWS}
SMALL = ("--height", "32", "--width", "32", "--num-frames", "5", "--steps", "2", "--seed", "7")


@pytest.fixture
def folder(checkpoints: Checkpoints) -> Path:
    return checkpoints("t2v", "original")


@pytest.fixture
def lora(folder: Path, tmp_path: Path) -> Path:
    shapes = weights(folder)
    modules = {name.removesuffix(".weight"): shapes[name].shape for name in linears(folder)}
    file = tmp_path / "style.safetensors"
    return write(file, low_rank(modules, prefix="diffusion_model.", alpha=2.0, pair="kohya"))


def test_names_of_forms_are_those_that_are_written():
    assert LORA_FORM_NAMES == LORA_FORMS


def test_a_file_and_its_scale_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a:0.5").touch()
    base = str(tmp_path)
    for text, path, scale in (
        ("x.safetensors", "x.safetensors", 1.0),
        ("x.safetensors:0.7", "x.safetensors", 0.7),
        ("x.safetensors:-1", "x.safetensors", -1.0),
        ("a:0.5", "a:0.5", 1.0),
        ("a:0.5:2", "a:0.5", 2.0),
        ("b:c", "b:c", 1.0),
    ):
        assert lora_of(text) == [f"{base}/{path}", scale], text


def test_info_says_what_a_file_is(command: Command, lora: Path, folder: Path):
    outcome = command("lora", "info", lora)
    assert outcome.code == 0, outcome.err
    lines = dict(line.split(maxsplit=1) for line in outcome.out.splitlines())
    assert lines["prefixes"] == "diffusion_model. (81)"
    assert lines["kinds"] == "LoRA (27)"
    assert (lines["ranks"], lines["alphas"]) == ("4", "2.0")
    report = json.loads(command("lora", "info", lora, "--model", folder, "--json").out)
    assert (report["keys"], report["used"], report["tensors"]) == (81, 81, 27)
    assert report["without_place"] == []


def test_info_of_what_is_no_lora_of_the_model(command: Command, tmp_path: Path, folder: Path):
    wide = write(tmp_path / "x.safetensors", low_rank({"blocks.0.self_attn.q": (64, 64)}))
    assert command("lora", "info", wide).code == 0
    outcome = command("lora", "info", wide, "--model", folder)
    assert (outcome.code, "do not fit" in outcome.err) == (2, True)


@pytest.mark.slow
@pytest.mark.parametrize("row", [r for r in ROWS if r.kind == "df"], ids=lambda row: row.name)
def test_every_kind_survives_comfyuis_form(
    command: Command, checkpoints: Checkpoints, tmp_path: Path, row: object
):
    folder = checkpoints("df", "original")
    file = write(tmp_path / "a.safetensors", row.tensors(weights(folder)), row.metadata)
    made = tmp_path / "b.safetensors"
    for model in ((), ("--model", folder)):
        outcome = command("lora", "convert", file, made, "--to", "comfyui", "--overwrite", *model)
        assert outcome.code == 0, outcome.err
        with safe_open(made, "np") as opened:
            assert all(key.startswith("diffusion_model.") for key in opened.keys())  # noqa: SIM118
        # measured below 2e-7: alpha is a float32
        assert distance(with_file(folder, made), with_file(folder, file)) < 1e-5


def rows_for_peft() -> list:
    fast = ("PEFT, DoRA", "with `diff_b` of linears", "`fps_projection`, SkyReels' own")
    slow = (
        "PEFT, an alpha by pattern",
        "`diffusion_model.` with alpha",
        "LoRA of the patch embedding",
        "embeddings, head and time projection with alpha",
        "`lora_unet_`, attention alone",
        "queries, keys and values fused",
    )
    return [*fast, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)]


@pytest.mark.parametrize("name", rows_for_peft())
def test_what_is_written_for_peft_loads_in_diffusers_with_the_same_output(
    command: Command, checkpoints: Checkpoints, tmp_path: Path, name: str
):
    import torch

    folder, row = checkpoints("df", "diffusers"), BY_NAME[name]
    file = write(tmp_path / "a.safetensors", row.tensors(by_original(folder)), row.metadata)
    made = tmp_path / "b.safetensors"
    outcome = command("lora", "convert", file, made, "--to", "peft")
    assert outcome.code == 0, outcome.err
    theirs, ours = loaded_by_diffusers(folder, made), torch_model(folder)
    ours.load_state_dict({k: torch.tensor(v) for k, v in with_file(folder, file).items()})
    expected = forward(ours)
    # measured 8e-7
    assert np.abs(forward(theirs) - expected).max() < 1e-5 * np.abs(expected).max()
    assert distance(with_file(folder, made), with_file(folder, file)) < 1e-5


def test_what_peft_cannot_hold_is_named(command: Command, tmp_path: Path):
    q = "diffusion_model.blocks.0.self_attn.q"
    file = write(tmp_path / "a.safetensors", {f"{q}.diff": random(32, 32)})
    made = tmp_path / "b.safetensors"
    outcome = command("lora", "convert", file, made, "--to", "peft")
    assert outcome.code == 2
    assert "adapters of the kind diff" in outcome.err
    assert "write comfyui" in outcome.err
    assert not made.exists()
    made.write_bytes(b"mine")
    outcome = command("lora", "convert", file, made, "--to", "comfyui")
    assert (outcome.code, made.read_bytes()) == (2, b"mine")
    assert "--overwrite" in outcome.err


@pytest.mark.parametrize("format", ["original", "diffusers"])
def test_a_merged_checkpoint_is_the_model_with_the_lora(
    command: Command, checkpoints: Checkpoints, lora: Path, tmp_path: Path, format: Format
):
    folder, made = checkpoints("t2v", format), tmp_path / "merged"
    outcome = command("lora", "merge", made, "--model", folder, "--lora", f"{lora}:0.7")
    assert outcome.code == 0, outcome.err
    merged, expected = weights(made), with_file(folder, lora, 0.7)
    for name, info in stored(folder).source.tensors().items():
        assert merged[name].dtype == info.dtype
        np.testing.assert_array_equal(merged[name], expected[name].astype(info.dtype))
    assert names_in(made, "original").keys() == names_in(folder, "original").keys()
    assert command("info", made).code == 0
    again = command("lora", "merge", made, "--model", folder, "--lora", lora)
    assert (again.code, "is there already" in again.err) == (2, True)


@pytest.mark.slow
def test_what_is_extracted_of_a_merged_model_is_the_lora(
    command: Command, folder: Path, lora: Path, tmp_path: Path
):
    tuned, made = tmp_path / "tuned", tmp_path / "back.safetensors"
    assert command("lora", "merge", tuned, "--model", folder, "--lora", lora).code == 0
    words = ("lora", "extract", made, "--model", tuned, "--base", folder, "--rank")
    outcome = command(*words, 4)
    assert outcome.code == 0, outcome.err
    assert "27 tensors differ; of their difference 0.00% is lost at rank 4" in outcome.out
    ours, expected = with_file(folder, made), with_file(folder, lora)
    assert distance(ours, expected) < 1e-5  # measured 1e-6
    less = command(*words, 2, "--overwrite")
    assert less.code == 0
    lost = float(less.out.partition("difference ")[2].partition("%")[0])
    assert 20 < lost < 80  # measured 59: half of four equal directions
    for rank, base, says in ((0, folder, "at least 1"), (4, tuned, "do not differ")):
        outcome = command(*words[:-2], base, "--rank", rank, "--overwrite")
        assert (outcome.code, says in outcome.err) == (2, True), outcome.err


@pytest.mark.slow
def test_a_generation_says_remembers_and_checks_its_loras(
    command: Command, folder: Path, lora: Path, out: Path, monkeypatch: pytest.MonkeyPatch
):
    film = out / "film.mp4"
    words = ["generate", "--model", folder, "--prompt", "a fox", *SMALL, "--output", film]
    monkeypatch.chdir(lora.parent)
    outcome = command(*words, "--lora", "style.safetensors:0.5", "--sidecar", "--keep-job")
    assert outcome.code == 0, outcome.err
    assert f"LoRA {lora}, scale 0.5: 81 of 81 keys used, on 27 tensors" in outcome.out
    about = json.loads(film.with_suffix(".json").read_text())
    assert about["loras"] == [{"file": "style.safetensors", "scale": 0.5}]
    job = film.with_suffix(".job")
    record = json.loads((job / "job.json").read_text())
    assert record["how"]["lora"] == [[str(lora), 0.5]]
    assert record["request"]["loras"] == [["style.safetensors", 0.5]]
    film.unlink()
    monkeypatch.chdir(out)
    assert command("resume", job).code == 0
    for left in job.glob("*window*"):
        left.unlink()
    content = bytearray(lora.read_bytes())
    content[-1] ^= 1
    rewrite(lora, bytes(content))
    outcome = command("resume", job, "--overwrite")
    assert (outcome.code, "start anew" in outcome.err) == (2, True), outcome.out + outcome.err


def test_a_lora_that_does_not_fit_ends_a_generation_at_once(
    command: Command, folder: Path, out: Path, tmp_path: Path
):
    wide = write(tmp_path / "x.safetensors", low_rank({"blocks.0.self_attn.q": (64, 64)}))
    words = ["generate", "--model", folder, "--prompt", "a fox", *SMALL]
    for given, says in ((wide, "do not fit"), (tmp_path / "none", "there is no such file")):
        outcome = command(*words, "--output", out / "film.mp4", "--lora", given)
        assert (outcome.code, says in outcome.err) == (2, True), outcome.err
    assert list(out.iterdir()) == []
