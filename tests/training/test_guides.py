"""Every recipe and command of the guides runs, on the small model and for two steps."""

import re
import shutil
from pathlib import Path

import jax
import pytest
from tests import documents

from skyreels_jax.cli.main import main
from skyreels_jax.mini.recipe import read_recipe

PAGE = (documents.ROOT / "docs" / "training_guides.md").read_text()
FILES = re.compile(r"```(?:toml|text)\n# (\S+)\n(.*?)```", re.DOTALL)
_TITLE = re.compile(r"^## (.*)$", re.MULTILINE)
# Titles and sections take turns after what is before the first.
GUIDES = dict(zip(_TITLE.split(PAGE)[1::2], _TITLE.split(PAGE)[2::2], strict=True))


def test_every_guide_has_a_recipe_that_is_sound(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert len(GUIDES) == 4
    monkeypatch.chdir(tmp_path)
    for section in GUIDES.values():
        written = write_files(section)
        recipe = read_recipe(written[0])
        assert recipe.kind == "video"
        ran = [words[-1] for words in commands(section) if words[:2] == ["train", str(written[0])]]
        assert ran


def write_files(section: str) -> list[Path]:
    """The files that a guide has one save."""
    found = []
    for name, text in FILES.findall(section):
        Path(name).write_text(text)
        found.append(Path(name))
    return found


def commands(section: str) -> list[list[str]]:
    return [words[1:] for words in documents.commands(documents.Page(section))]


@pytest.mark.slow
@pytest.mark.parametrize("title", GUIDES)
def test_the_commands_of_a_guide_run(title: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SKYREELS_JAX_CACHE", str(tmp_path / "caches"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(documents.ROOT / "examples", "examples")
    (first,) = commands(PAGE.partition("\n## ")[0])
    with jax.numpy_rank_promotion("allow"), jax.numpy_dtype_promotion("standard"):
        assert main(first) == 0
        write_files(GUIDES[title])
        for words in commands(GUIDES[title]):
            if words[0] == "plan":
                continue
            shorter = {"train": ["--steps", "2"], "generate": ["--steps", "2"]}.get(words[0], [])
            output = ["--output", "made.mp4"] if words[0] == "generate" else []
            assert main([*words, *shorter, *output]) == 0, words
    assert Path("made.mp4").is_file()
