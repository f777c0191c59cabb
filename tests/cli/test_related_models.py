"""Folders of related models: Wan 2.1's are read with its settings, the others refused by name."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from tests.cli.commands import Command, linked, rewrite
from tests.fabricate import Checkpoints

Change = Callable[[Path], object]


def edit(name: str, **changes: object) -> Change:
    def change(folder: Path) -> None:
        value = json.loads((folder / name).read_text()) | changes
        rewrite(folder / name, json.dumps(value).encode())

    return change


def all_of(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


def add(name: str) -> Change:
    def change(folder: Path) -> None:
        file = next(folder.rglob("*.safetensors"), None) or folder / "model.safetensors"
        values = load_file(file) | {name: np.zeros(1, np.float32)}
        file.unlink()
        save_file(values, file)

    return change


def second(folder: Path) -> None:
    shutil.copytree(folder / "transformer", folder / "transformer_2")


WAN = edit("transformer/config.json", _class_name="WanTransformer3DModel")
INDEX = "model_index.json"
CONFIG = "transformer/config.json"
NULL = [None, None]

# By layout: what is done to a folder, and what the refusal says.
REFUSED: dict[str, tuple[str, Change, tuple[str, ...]]] = {
    "wan 2.2 of 14B": (
        "diffusers",
        all_of(
            WAN,
            second,
            edit(
                INDEX,
                _class_name="WanPipeline",
                boundary_ratio=0.875,
                transformer_2=["diffusers", "WanTransformer3DModel"],
            ),
        ),
        ("model_index.json names WanPipeline with a second transformer (transformer_2)", "Wan 2.2"),
    ),
    "second transformer without its entry": (
        "diffusers",
        all_of(WAN, second),
        ("transformer_2", "Wan 2.2"),
    ),
    "boundary alone": (
        "diffusers",
        edit(INDEX, _class_name="WanImageToVideoPipeline", boundary_ratio=0.9, transformer_2=NULL),
        ("boundary_ratio", "Wan 2.2"),
    ),
    "wan 2.2 of 5B": (
        "diffusers",
        edit(INDEX, _class_name="WanPipeline", expand_timesteps=True),
        ("expand_timesteps", "Wan 2.2 TI2V"),
    ),
    "experts": (
        "original",
        lambda folder: [(folder / f"{name}_noise_model").mkdir() for name in ("high", "low")],
        ("high_noise_model and low_noise_model", "Wan 2.2"),
    ),
    "one expert": (
        "original",
        lambda folder: (folder / "low_noise_model").mkdir(),
        ("low_noise_model", "Wan 2.2"),
    ),
    "image-to-video of wan 2.2": (
        "diffusers",
        edit(CONFIG, in_channels=36, image_dim=None),
        ("in_channels is 36", "Wan 2.2 I2V"),
    ),
    "vace pipeline": ("diffusers", edit(INDEX, _class_name="WanVACEPipeline"), ("Wan VACE",)),
    "vace transformer": (
        "diffusers",
        edit(CONFIG, _class_name="WanVACETransformer3DModel"),
        ("WanVACETransformer3DModel", "Wan VACE"),
    ),
    "vace": ("original", edit("config.json", _class_name="VaceWanModel"), ("Wan VACE",)),
    "vace by tensors": ("original", add("vace_blocks.0.norm.weight"), ("vace_blocks", "Wan VACE")),
    "animate": ("diffusers", edit(INDEX, _class_name="WanAnimatePipeline"), ("Wan Animate",)),
    "animate by tensors": ("original", add("face_adapter.x"), ("face_adapter.x", "Wan Animate")),
    "s2v": ("original", edit("config.json", _class_name="WanModel_S2V"), ("Wan S2V",)),
    "s2v by type": ("original", edit("config.json", model_type="s2v"), ("'s2v'", "Wan S2V")),
    "fun": ("original", edit("config.json", add_ref_conv=True), ("add_ref_conv", "Wan Fun")),
    "fun by tensors": ("original", add("control_adapter.conv.bias"), ("Wan Fun",)),
    "skyreels-v3": (
        "diffusers",
        edit(INDEX, _class_name="WanSkyReelsA2WanT2VPipeline"),
        ("SkyReels-A2 or SkyReels-V3",),
    ),
}


# All verbs open a checkpoint in one way; these are tried with each.
EVERY_VERB = ("wan 2.2 of 14B", "experts", "vace by tensors")


@pytest.mark.parametrize("case", REFUSED)
def test_models_that_are_not_read_are_refused_by_their_name(
    case: str, command: Command, checkpoints: Checkpoints, tmp_path: Path
):
    layout, change, says = REFUSED[case]
    folder = linked(checkpoints("t2v", layout), tmp_path / "model")
    change(folder)
    generate = ("generate", "--model", folder, "--prompt", "x", "--output", tmp_path / "x.mp4")
    target = ("--format", "diffusers" if layout == "original" else "original")
    others = (
        (generate, ("convert", folder, tmp_path / "out", *target)) if case in EVERY_VERB else ()
    )
    for words in (("info", folder), *others):
        outcome = command(*words)
        assert outcome.code == 2
        (line,) = outcome.errors
        for word in (*says, "not supported"):
            assert word in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("Wan2.2-T2V-A14B", "Wan 2.2"),
        ("wan2_2-i2v", "Wan 2.2"),
        ("Wan2.1-VACE-14B", "Wan VACE"),
        ("Wan2.1-Fun-1.3B-InP", "Wan Fun"),
        ("SkyReels-V3-R2V-14B", "SkyReels-V3"),
        ("SkyReels-A2", "SkyReels-A1 or -A2"),
        ("high_noise_model", "one expert of Wan 2.2"),
    ],
)
def test_what_only_a_name_tells_is_refused_unless_the_user_knows_better(
    name: str, says: str, command: Command, checkpoints: Checkpoints, tmp_path: Path
):
    folder = linked(checkpoints("t2v", "original"), tmp_path / name)
    outcome = command("info", folder)
    assert outcome.code == 2
    assert says in outcome.errors[0]
    assert "say which by --preset" in outcome.errors[0]
    # Negative twin: the user says what it is, and only its shape is in the way.
    outcome = command("info", folder, "--preset", "SkyReels-V2-T2V-14B-540P")
    assert "is another model" in outcome.errors[0]


@pytest.mark.parametrize("name", ["my-fun-model", "SkyReels-V2-finetune", "wan", "funny-wan2.1"])
def test_names_that_are_only_alike_are_taken(
    name: str, command: Command, checkpoints: Checkpoints, tmp_path: Path
):
    assert command("info", linked(checkpoints("t2v", "original"), tmp_path / name)).code == 0


@pytest.mark.parametrize(("kind", "pipe"), [("t2v", "WanPipeline"), ("i2v", "WanImageToVideo")])
def test_a_lone_wan_2_1_folder_is_taken_with_its_settings_and_that_is_said(
    kind: str, pipe: str, command: Command, checkpoints: Checkpoints, tmp_path: Path
):
    folder = linked(checkpoints(kind, "diffusers"), tmp_path / "model")
    pipe = pipe.removesuffix("Pipeline") + "Pipeline"
    edit(INDEX, _class_name=pipe, transformer_2=NULL)(folder)
    WAN(folder)
    (folder / "scheduler" / "scheduler_config.json").unlink()
    outcome = command("info", folder)
    assert outcome.code == 0, outcome.err
    shown = " ".join(outcome.out.split())
    assert f"settings of Wan2.1 (model_index.json names {pipe}, which is not SkyReels')" in shown
    for default in ("resolution 480x832", "fps 16", "num_frames 81", "shift 3.0"):
        assert f"default {default}" in shown
    assert f"(Wan2.1 {kind} models)" in shown
    # Converted and opened again, it is still Wan's.
    assert command("convert", folder, tmp_path / "new", "--format", "diffusers").code == 0
    assert "settings of Wan2.1" in " ".join(command("info", tmp_path / "new").out.split())
    ours = command("info", checkpoints(kind, "diffusers")).out
    assert "not SkyReels'" not in ours
    assert "default fps             24" in ours
