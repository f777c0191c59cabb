"""Recipes that cannot be run are refused in one line, before a parameter is read."""

import tomllib
from pathlib import Path

import pytest

from skyreels_jax.errors import SkyReelsError
from skyreels_jax.mini.recipe import read_recipe
from skyreels_jax.training.sources import find_sources
from skyreels_jax.training.transformer_recipe import VideoTraining

GOOD = {
    "train": "'video'",
    "output": "'out'",
    "run.steps": "5",
    "model.model_type": "'t2v'",
    "data.vae": "'mini'",
    "data.text": "'mini'",
    "data.encoded": "'encoded'",
}
I2V = {"model.model_type": "'i2v'", "data.image": "'mini-i2v'", "model.image_dim": "160"}
# What is changed, and what the refusal says of it.
ODD: list[tuple[dict[str, str], str]] = [
    ({"data.size": "60"}, "size = 60.*nearest: 48 or 64"),
    ({"data.size": "-64"}, "size = -64.*nearest: 32"),
    ({"data.size": "0"}, "size = 0.*nearest: 32"),
    ({"data.size": "100000"}, "nearest: 512"),
    ({"data.size": "'64'"}, "data.size = '64' should be of type int"),
    ({"data.batch": "0"}, "batch = 0.*nearest: 1"),
    ({"data.batch": "-3"}, "batch = -3.*nearest: 1"),
    ({"data.clips": "0"}, "clips = 0.*nearest: 1"),
    ({"data.clips": "1e3"}, "clips = 1000.0 should be of type int"),
    ({"data.frames": "16"}, "frames = 16.*nearest: 13 or 17"),
    ({"data.frames": "0"}, "frames = 0.*nearest: 1"),
    ({"data.frames": "97"}, "nearest: 21"),
    ({"data.text_length": "4"}, "text_length = 4.*nearest: 45"),
    ({"data.text_length": "600"}, "text_length = 600.*nearest: 512"),
    ({"data.pairs": "1.5"}, "pairs = 1.5 should be a share"),
    ({"data.changes": "0.5"}, "data.changes = 0.5 is of train = 'distill'"),
    ({"data.changes": "-0.5"}, "changes = -0.5 should be a share"),
    ({"data.changes": "0.5", "data.frames": "5"}, "changes = 0.5 needs.*frames = 5; nearest: 9"),
    ({"data.pairs": "nan"}, "pairs = nan should be a finite number"),
    ({"data.vae": "3"}, "data.vae = 3 should be of type str"),
    ({"data.vae": "['mini']"}, r"data.vae = \['mini'\] should be of type str"),
    ({"data.vae": "''"}, "data.vae: no checkpoint was given"),
    ({"data.vae": "'nowhere/at/all'"}, "data.vae: nowhere/at/all is neither"),
    ({"data.text": "'no such'"}, "data.text: no such is neither"),
    ({"model.num_heads": "5"}, "num_heads = 5.*dim = 192.*nearest: 4 or 6"),
    ({"model.num_heads": "0"}, "num_heads = 0.*nearest: 1"),
    ({"model.num_heads": "192"}, "num_heads = 192.*nearest"),
    ({"model.dim": "65"}, "dim = 65 should be a multiple of 2.*nearest: 64"),
    ({"model.dim": "-8"}, "dim = -8.*nearest: 1"),
    ({"model.dim": "192.0"}, "model.dim = 192.0 should be of type int"),
    ({"model.num_layers": "0"}, "num_layers = 0.*nearest: 1"),
    ({"model.text_dim": "64"}, "text_dim = 64 does not fit data.text.*nearest: 128"),
    ({"model.dtype": "'float16'"}, "should be one of float32, bfloat16"),
    ({"model.export_dtype": "'int8'"}, "should be one of float32, bfloat16"),
    ({"model.start": "['mini']"}, "model.start = .* should be of type str"),
    ({"model.start": "'nowhere'"}, "nowhere is neither"),
    ({"model.start": "'mini-i2v'"}, "is i2v and model.model_type is 't2v'"),
    ({"model.image_dim": "160"}, "goes with model_type = 'i2v'"),
    ({**I2V, "model.image_dim": ""}, "image_dim must be given"),
    ({**I2V, "model.image_dim": "", "model.start": "'mini'"}, "image_dim must be given"),
    ({**I2V, "model.image_dim": "80"}, "image_dim = 80 does not fit.*nearest: 160"),
    ({**I2V, "data.image": ""}, "data.image must name"),
    ({"run.steps": "0"}, "steps = 0.*nearest: 1"),
    ({"run.steps": "inf"}, "steps = inf should be a finite number"),
    ({"run.seed": "-1"}, "seed = -1.*nearest: 0"),
    ({"run.accumulate": "5", "data.batch": "16"}, "accumulate = 5 should divide.*nearest: 4"),
    ({"run.ema": "1.0"}, "ema = 1.0 should be"),
    ({"run.keep": "0"}, "keep = 0.*nearest: 1"),
    ({"optimizer.learning_rate": "inf"}, "learning_rate = inf should be a finite number"),
    ({"optimizer.name": "'adam'"}, "should be one of adamw"),
    ({"objective.shift": "0"}, "shift = 0.0 should be positive"),
    ({"objective.levels": "'normal'"}, "should be one of logit_normal, uniform"),
    ({"objective.frames": "0.7", "objective.continued": "0.7"}, "should be shares of 1"),
    ({"objective.continued": "0.5", "data.frames": "1"}, "continued = 0.5.*nearest: 5"),
    ({"train": "['video']"}, r"train = \['video'\] should be one of"),
    ({"train": "'film'"}, "train = 'film' should be one of"),
    ({"output": "['out']"}, "should be a folder's name"),
    ({"output": "''"}, "should be a folder's name"),
    ({"output": f"'{__file__}'"}, "is a file; name a folder"),
    ({"output": f"'{'a' * 300}'"}, "File name too long"),
    ({"output": "'~nobody-of-this-name/out'"}, "no such home folder"),
    ({"run": "3", "run.steps": ""}, "run = 3 should be a table"),
    ({"data.vea": "'mini'"}, "vea is unknown; did you mean vae"),
    ({"data.batch": "[" * 3000 + "]" * 3000}, "nested too deeply"),
]


def read(folder: Path, changes: dict[str, str]):
    values = {name: value for name, value in {**GOOD, **changes}.items() if value}
    flat = dict(sorted(values.items(), key=lambda pair: "." in pair[0]))
    file = folder / "run.toml"
    file.write_text("\n".join(f"{name} = {value}" for name, value in flat.items()), "utf-8")
    recipe = read_recipe(file)
    assert isinstance(recipe.tables, VideoTraining)
    find_sources(recipe.tables)
    return recipe


@pytest.mark.parametrize(("changes", "says"), ODD, ids=lambda value: str(value)[:40])
def test_an_odd_recipe_is_refused_in_a_line(tmp_path, changes, says):
    with pytest.raises(SkyReelsError, match=says) as refusal:
        read(tmp_path, changes)
    assert "\n" not in str(refusal.value)
    assert len(str(refusal.value)) < 400


@pytest.mark.parametrize(
    "changes",
    [
        {},
        I2V,
        {"model.start": "'mini'"},
        {**I2V, "model.start": "'mini'"},
        {"objective.levels": "'uniform'"},
        {"objective.sigmas": "'uniform'"},
        {"run.accumulate": "4", "data.batch": "16"},
    ],
    ids=str,
)
def test_what_is_legal_is_taken(tmp_path, changes):
    recipe = read(tmp_path, changes)
    assert recipe.settings()["data.vae"] == "mini"
    assert tomllib.loads((tmp_path / "run.toml").read_text())["train"] == "video"
