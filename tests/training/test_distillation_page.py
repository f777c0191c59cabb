"""What docs/training.md says of distillation: its recipe, its table and what is refused."""

import dataclasses
import re
from pathlib import Path

import jax
import pytest
from tests import documents

from skyreels_jax.cli.main import main
from skyreels_jax.errors import RequestError
from skyreels_jax.mini.recipe import read_recipe
from skyreels_jax.training.distillation_recipe import STAGES_OF, Distillation

PAGE = (documents.ROOT / "docs" / "training.md").read_text()
SECTION = PAGE.partition("## A student of few steps\n")[2].partition("\n## ")[0]
KEYS = SECTION.partition("\n| key | of stages |")[2].partition("\n\n")[0]
# Key -> stages and default.
ROWS = {
    key: (stages, default)
    for key, stages, default in re.findall(
        r"^\| `(\w+)` \| ([^|]*) \| ([^|]*) \| [^|]* \|$", KEYS, re.MULTILINE
    )
}
STAGES = re.findall(r"^\| `([\w-]+)` \| [^|]* \| [^|]* \|$", SECTION, re.MULTILINE)
EVERY = {"guidance", "teacher-forcing", "consistency", "continuous", "dmd"}


def recipe_of_the_page() -> str:
    found = re.search(r"```toml\n(.*?)```", SECTION, re.DOTALL)
    assert found is not None
    return found[1]


def test_the_recipe_is_sound_and_what_is_refused_is(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
):
    file, text = tmp_path / "student.toml", recipe_of_the_page()
    file.write_text(text)
    recipe = read_recipe(file)
    assert (recipe.kind, recipe.tables.distill.stage) == ("distill", "guidance")
    for before, after in (
        ("[distill]", "[lora]\n[distill]"),
        ("steps = 200", 'steps = 200\nmesh = "auto"'),
        ("remat = true", 'remat = true\nmodel_type = "i2v"'),
        ("block = 1", "block = 1\nsigmas = 12"),
    ):
        file.write_text(text.replace(before, after))
        with pytest.raises(RequestError):
            read_recipe(file)
    file.write_text(text)
    assert main(["train", str(file), "--dry-run"]) == 2
    file.write_text(text.replace("steps = 200", 'steps = 200\nsample_prompts = "a.txt"'))
    assert main(["train", str(file)]) == 2
    assert "run.sample_prompts is of train = 'video'" in capfd.readouterr().err


def test_the_table_has_every_key_with_its_stages_and_default():
    assert set(STAGES) == EVERY
    fields = {field.name: field for field in dataclasses.fields(Distillation)}
    assert list(ROWS) == list(fields)
    for name, (said, unless_given) in ROWS.items():
        named = set(re.findall(r"`([\w-]+)`", said))
        stages = EVERY - named if said.startswith("all") else named
        if name == "shift":  # Where it is of no use it is no error.
            continue
        assert stages == set(STAGES_OF.get(name, EVERY)), name
        default = fields[name].default
        if isinstance(default, int | float):
            assert unless_given == str(default).lower()  # As TOML has it.


@pytest.mark.slow
def test_the_recipe_and_its_streams_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SKYREELS_JAX_CACHE", str(tmp_path / "caches"))
    Path("student.toml").write_text(recipe_of_the_page())
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        assert main(["data", "shapes", "clips", "--count", "3"]) == 0
        train, *streams = documents.commands(documents.Page(SECTION))
        assert main([*train[1:], "--steps", "2"]) == 0
        assert len(streams) == 1
        for words in streams:
            shorter = ["--seconds", "0.3", "--overwrite"]
            assert main([*words[1:], *shorter]) == 0
    assert list(Path("out/student/samples").rglob("0.mp4"))
