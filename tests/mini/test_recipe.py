"""A training file is read whole or refused in one line that says what would be right."""

from pathlib import Path

import pytest

from skyreels_jax.errors import RequestError
from skyreels_jax.mini.recipe import read_recipe
from skyreels_jax.mini.vae_task import VaeTraining

GOOD = """
train = "vae"
output = "out"
[run]
steps = 5
[optimizer]
learning_rate = 1
[model]
dim_mult = [1, 2, 3, 4]
[loss]
kl = 1e-3
"""
CONFIGS = Path(__file__).parents[2] / "configs"


def read(tmp_path: Path, text: str, **overrides):
    file = tmp_path / "run.toml"
    file.write_text(text)
    return read_recipe(file, overrides)


def test_a_file_becomes_what_it_says(tmp_path):
    recipe = read(tmp_path, GOOD)
    assert isinstance(recipe.tables, VaeTraining)
    assert recipe.tables.model.dim_mult == (1, 2, 3, 4)
    assert recipe.tables.loss.kl == 1e-3
    assert recipe.tables.data.batch == 16
    assert (recipe.run.steps, recipe.output) == (5, Path("out"))
    # A whole number is a legal value of a real one.
    assert recipe.optimizer.learning_rate == 1.0
    assert isinstance(recipe.optimizer.learning_rate, float)


def test_the_command_line_overrides(tmp_path):
    recipe = read(tmp_path, GOOD, output="there", steps=7)
    assert (recipe.run.steps, recipe.output) == (7, Path("there"))


@pytest.mark.parametrize("file", sorted(CONFIGS.rglob("*.toml")), ids=lambda f: f.name)
def test_every_file_of_the_repository_is_legal(file):
    assert read_recipe(file).run.steps > 0


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ('train = "vae"', "", "train = None should be one of vae, text, image, video"),
        ('train = "vae"', 'train = "vea"', "train = 'vea' should be one of vae"),
        ('output = "out"', "", "output = None should be a folder's name"),
        ("steps = 5", "", "run: steps must be given"),
        ("steps = 5", "step = 5", "step is unknown; did you mean steps?"),
        ("steps = 5", "steps = 5.0", "steps = 5.0 should be of type int"),
        ("steps = 5", "steps = true", "steps = True should be of type int"),
        ("steps = 5", "steps = 0", "at least 1"),
        ("steps = 5", "steps = 5\nema = 1.0", "ema"),
        ("learning_rate = 1", 'learning_rate = "1"', "learning_rate = '1' should be of type float"),
        ("learning_rate = 1", "learning_rate = -1", "should be positive"),
        ("learning_rate = 1", 'name = "adam"', "'adam' should be one of adamw, muon"),
        ("[1, 2, 3, 4]", "[1, 2.5, 3, 4]", r"dim_mult\[1\] = 2.5 should be of type int"),
        ("[1, 2, 3, 4]", "3", "dim_mult = 3 should be a list"),
        ("[loss]", "[losses]", "losses is unknown; did you mean loss?"),
        ("kl = 1e-3", "kl = -1", "no weight"),
        ("[loss]\nkl = 1e-3", "loss = 3", "loss = 3 should be a table"),
        ("[run]", "[run", "cannot be read as TOML"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, before, after, message):
    assert before in GOOD
    text = GOOD.replace(before, after)
    if after == "loss = 3":
        text = f"loss = 3\n{text.replace(after, '')}"
    with pytest.raises(RequestError, match=message):
        read(tmp_path, text)


def test_a_missing_file_is_said(tmp_path):
    with pytest.raises(RequestError, match="nothing.toml: there is no such file"):
        read_recipe(tmp_path / "nothing.toml")
