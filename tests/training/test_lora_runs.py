"""A LoRA trained by a recipe on the small model: resumed to the bit, used, and refused in time."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from skyreels_jax.checkpoints import Checkpoint, load_transformer
from skyreels_jax.cli.main import main
from skyreels_jax.errors import RequestError
from skyreels_jax.mini.recipe import Recipe, read_recipe
from skyreels_jax.training.footprint import footprint
from skyreels_jax.training.loop import train
from skyreels_jax.training.lora_task import COMFYUI_FILE, PEFT_FILE, LoraTask, make_video_task
from skyreels_jax.training.optimizer import make_optimizer
from skyreels_jax.training.sources import find_sources
from skyreels_jax.weights.lora.binding import Lora
from skyreels_jax.weights.lora.file import open_lora

PAGE = Path(__file__).parents[2] / "docs" / "training.md"
RECIPE = """
train = "video"
output = "OUTPUT"
[run]
steps = 3
log_every = 1
checkpoint_every = 2
export_every = 2
ema = 0.9
[optimizer]
learning_rate = 1e-2
warmup = 0
[model]
model_type = "TYPE"
start = "START"
export_dtype = "float32"
[lora]
rank = 4
alpha = 8.0
dropout = 0.1
targets = "attention"
base = "float32"
trigger = "zorp"
[objective]
frames = 0.5
continued = 0.5
[data]
vae = "mini"
text = "mini"
image = "mini-i2v"
encoded = "ENCODED"
batch = 2
clips = 2
frames = 5
size = 32
"""


def recipe(tmp_path: Path, name: str = "run", **changes: str) -> Recipe:
    text = RECIPE.replace("OUTPUT", str(tmp_path / name))
    text = text.replace("ENCODED", str(tmp_path / "encoded"))
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    text = text.replace("TYPE", "t2v").replace("START", "mini")
    file = tmp_path / f"{name}.toml"
    file.write_text(text)
    return read_recipe(file)


def trained(made: Recipe, steps: int | None = None) -> tuple[LoraTask, Path]:
    run = made.run if steps is None else replace(made.run, steps=steps)
    # As on a command line: the tests' own rules on shapes are not those of training.
    with jax.numpy_rank_promotion("allow"):
        task = make_video_task(made.tables, 0)
        assert isinstance(task, LoraTask)
        train(task, run, made.optimizer, made.output, settings=made.settings())
    return task, made.output


def weights(folder: Path) -> Mapping[str, np.ndarray]:
    return load_file(folder / PEFT_FILE)


@pytest.mark.slow
def test_a_stopped_run_goes_on_bit_for_bit_and_its_file_is_used(tmp_path: Path):
    task, output = trained(recipe(tmp_path))
    assert sorted(p.name for p in (output / "exports").iterdir()) == ["0000002"]
    # What is not trained is in no checkpoint.
    frozen = sum(value.nbytes for value in task.frozen().values())
    stored = sum(p.stat().st_size for p in (output / "checkpoints").rglob("*") if p.is_file())
    assert stored < 0.5 * frozen
    other = recipe(tmp_path, "stopped")
    # The rate is that of the whole run: it goes on from the checkpoint at 2.
    trained(replace(other, optimizer=replace(other.optimizer, schedule="constant")), steps=2)
    constant = recipe(tmp_path, "whole")
    constant = replace(constant, optimizer=replace(constant.optimizer, schedule="constant"))
    trained(constant)
    trained(replace(other, optimizer=constant.optimizer))
    for name in (PEFT_FILE, COMFYUI_FILE):
        whole, gone_on = (tmp_path / n / "model" / name for n in ("whole", "stopped"))
        assert whole.read_bytes() == gone_on.read_bytes()
    assert (output / "model" / PEFT_FILE).read_bytes() != (
        tmp_path / "whole" / "model" / PEFT_FILE
    ).read_bytes()
    _same_with_the_file(task, output / "model")
    with safe_open(output / "model" / COMFYUI_FILE, "np") as opened:
        about = opened.metadata()
    assert about["modelspec.architecture"] == "wan2.1/lora"
    assert about["modelspec.trigger_phrase"] == "zorp"
    assert (output / "samples" / "0000003" / PEFT_FILE).is_file()


def _same_with_the_file(task: LoraTask, folder: Path) -> None:
    """The model that was trained is what ``--lora`` makes of the file."""
    rng = np.random.default_rng(0)
    shapes = (1, 16, 2, 4, 4), (1, 512, task.config.text_dim)
    x, text = (jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes)

    def out(model) -> np.ndarray:
        return np.asarray(model(x, jnp.full((1, 2), 500.0), text, fps=jnp.asarray([0])))

    file = weights(folder)
    params = {}
    for target in task._lora.targets:
        for name, letter in ((target.down, "A"), (target.up, "B")):
            keys = [f"transformer.{n}.lora_{letter}.weight" for n in target.names["diffusers"]]
            params[name] = jnp.asarray(np.stack([file[key].T for key in keys]))
    beside = out(task._lora.model({**task.frozen(), **params}))
    base, *merged = (
        out(load_transformer(Checkpoint.open("mini"), dtype=jnp.float32, loras=loras))
        for loras in ((), (Lora(folder / PEFT_FILE),), (Lora(folder / COMFYUI_FILE),))
    )
    for one in merged:
        assert np.abs(one - beside).max() < 1e-5 * np.abs(beside).max()  # measured 1.1e-6
    assert np.abs(base - beside).max() > 1e-3 * np.abs(beside).max()


@pytest.mark.slow
def test_an_image_to_video_model_and_an_int8_base(tmp_path: Path):
    made = recipe(tmp_path, TYPE="i2v", START="mini-i2v", **{'base = "float32"': 'base = "int8"'})
    task, output = trained(made)
    kernels = {v.dtype for n, v in task.frozen().items() if n.endswith("attn.q.kernel")}
    assert kernels == {jnp.dtype(jnp.int8)}
    assert "transformer.blocks.0.attn2.add_k_proj.lora_A.weight" in weights(output / "model")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({'start = "START"': ""}, "model.start must name what the LoRA is of"),
        ({"rank = 4": "rank = 0"}, "rank = 0 should be at least 1"),
        ({"rank = 4": "ranks = 4"}, "run.toml.lora: ranks is unknown; did you mean rank?"),
        ({"rank = 4": "dora = true"}, "DoRA is read from files, but not trained"),
        ({"rank = 4": "rank = 'four'"}, "lora.rank = 'four' should be of type int"),
        ({"alpha = 8.0": "alpha = inf"}, "lora.alpha = inf should be a finite number"),
        ({'base = "float32"': 'base = "fp8"'}, "lora.base = 'fp8' should be one of float32, bf"),
        ({'"attention"': '["attn1.to_q", 3]'}, "lora.targets"),
    ],
)
def test_odd_tables_are_refused_before_anything_is_loaded(
    tmp_path: Path, changes: dict[str, str], message: str
):
    with pytest.raises(RequestError, match=message) as refusal:
        recipe(tmp_path, **changes)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({'"attention"': '["attn3.to_q"]'}, "no linear of this model is named 'attn3.to_q'"),
        ({"TYPE": "i2v", "frames = 5": "frames = 5"}, "a LoRA cannot make it i2v"),
    ],
)
def test_what_the_model_does_not_have_is_refused_before_clips_are_encoded(
    tmp_path: Path, changes: dict[str, str], message: str
):
    if "TYPE" in changes:
        changes = {**changes, "[lora]": "image_dim = 160\n[lora]"}
    with pytest.raises(RequestError, match=message):
        make_video_task(recipe(tmp_path, **changes).tables, 0)
    assert not (tmp_path / "encoded").exists()


@pytest.mark.slow
def test_the_recipe_of_the_documentation_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    section = PAGE.read_text().partition("## A LoRA in an evening")[2]
    text = re.search(r"```toml\n(.*?)```", section, re.DOTALL)
    assert text is not None
    monkeypatch.chdir(tmp_path)
    assert main(["data", "shapes", "clips", "--count", "3"]) == 0
    Path("cat.toml").write_text(text[1])
    with jax.numpy_rank_promotion("allow"):
        assert main(["train", "cat.toml", "--steps", "2"]) == 0
    assert weights(Path("out/cat/model"))
    words = " ".join(open_lora(Path("out/cat/model") / COMFYUI_FILE).trained_on()).split()
    assert "mycat" in words
    captions = " ".join(f.read_text() for f in Path("clips").glob("*.txt")).lower()
    assert set(captions.replace(",", " ").split()) <= {*words}


def test_a_dry_run_says_what_a_step_takes(tmp_path: Path):
    made = recipe(tmp_path)
    found = footprint(
        made.tables,
        find_sources(made.tables).config,
        lambda params: make_optimizer(made.optimizer, 3, params),
        ema=0.9,
        compiles=False,
    )
    # Four attentions' matrices of two kinds, in eight blocks of width 192, at rank 4.
    assert found.trained == 8 * 8 * 2 * 192 * 4 * 4
    assert found.optimizer == pytest.approx(2 * found.trained, rel=1e-3)
    assert (found.average, found.temporary) == (found.trained, None)
    # A float32 base has four bytes for each of the two that the file has.
    file = Checkpoint.open("mini").layout.transformer / "diffusion_pytorch_model.safetensors"
    assert found.frozen == pytest.approx(2 * file.stat().st_size, rel=0.01)
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_dry_run_is_compiled_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    recipe(tmp_path)
    assert main(["train", str(tmp_path / "run.toml"), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "a step of 2 of 32 x 32 x 5" in said
    assert "unknown" not in said
    assert not (tmp_path / "run").exists()


def test_a_dry_run_is_for_another_device_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    recipe(tmp_path)
    assert main(["train", str(tmp_path / "run.toml"), "--device", "h100"]) == 2
    assert "--device goes with --dry-run" in capsys.readouterr().err
    text = (tmp_path / "run.toml").read_text().replace('"mini"', '"SkyReels-V2-I2V-14B-540P"', 1)
    (tmp_path / "run.toml").write_text(text)
    assert main(["train", str(tmp_path / "run.toml"), "--dry-run"]) == 2
    assert "set model.model_type = 'i2v'" in capsys.readouterr().err


@pytest.mark.slow
def test_a_dry_run_of_a_released_model_needs_nothing_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    text = RECIPE.replace("OUTPUT", str(tmp_path / "run")).replace("TYPE", "t2v")
    text = text.replace("START", "SkyReels-V2-T2V-14B-540P").replace("dropout = 0.1\n", "")
    text = text.replace("rank = 4", "rank = 16").replace(
        '"float32"\n[lora]', '"float32"\nremat = true\ndtype = "bfloat16"\n[lora]'
    )
    text = text.replace('base = "float32"', 'base = "bfloat16"').replace("ema = 0.9\n", "")
    data = text.partition("[data]")[0]
    data += '[data]\nsource = "folder"\nvae = "mini"\ntext = "mini"\nencoded = "x"\n'
    data += "resolution = [960, 544]\nbatch = 1\n"
    (tmp_path / "run.toml").write_text(
        data + '[[data.datasets]]\nvideo_directory = "x"\ntarget_frames = [97]\n'
    )
    said = {}
    for device in ("h100", "4090"):
        code = main(["train", str(tmp_path / "run.toml"), "--dry-run", "--device", device])
        lines = capsys.readouterr().out.splitlines()
        assert "a step of 1 of 960 x 544 x 97" in lines[0]
        said[device] = code, lines[-1]
    # With attention's linears alone; of the feed-forward's too, 70.04 GB.
    assert said["h100"][0] == 0
    assert said["4090"][0] == 2
    assert "does not fit" in said["4090"][1]
    size = re.search(r"together +([\d.]+) GB", said["h100"][1])
    assert size is not None
    assert 60 < float(size[1]) < 70
