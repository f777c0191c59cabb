"""README and docs are true where a machine can tell, and a planted lie of each kind is caught."""

import contextlib
import shutil
from pathlib import Path

import pytest
from tests import documents
from tests.documents import Page

from skyreels_jax.cli.main import main

PAGES = documents.pages()


@pytest.mark.parametrize("name", PAGES)
@pytest.mark.parametrize("check", documents.CHECKS)
def test_what_a_page_names_is_there(name: str, check: str):
    if not documents.is_decision(name) or check in documents.OF_DECISIONS:
        assert list(documents.CHECKS[check](PAGES[name])) == []


def fenced(language: str, code: str) -> str:
    return f"```{language}\n{code}\n```\n"


LIES = {
    "a link": ("links", "[x](docs/nowhere.md)"),
    "a picture": ("links", "![x](docs/images/nothing.png)"),
    "a heading": ("links", "[x](docs/performance.md#no-such-heading)"),
    "a heading of its own": ("links", "[x](#nowhere)"),
    "a test file": ("paths", "see `tests/training/test_nothing.py`"),
    "a module's file": ("paths", "see `diffusion/nothing.py`"),
    "a folder": ("paths", "`docs/nothing/` holds"),
    "a folder of the package": ("paths", "`nothing/` holds"),
    "a room": ("paths", "`nothing/x.py` holds"),
    "a module": ("names", "`skyreels_jax.parity.nothing`"),
    "a function": ("names", "`skyreels_jax.parity.compare.nothing`"),
    "a function named from its room": ("names", "`parity.compare.nothing`"),
    "a target": ("commands", "`make coffee`"),
    "a verb": ("commands", "`skyreels-jax invent`"),
    "a verb in a block": ("commands", fenced("sh", "skyreels-jax invent")),
    "a flag": ("commands", "`skyreels-jax generate --nothing 3`"),
    "a flag by itself": ("commands", "with `--nothing-at-all 5`"),
    "an argument": ("commands", fenced("sh", "skyreels-jax generate --prompt x --steps many")),
    "what is needed": ("commands", fenced("sh", "skyreels-jax convert SRC")),
    "a continued line": ("commands", fenced("sh", "skyreels-jax info X \\\n  --nothing")),
    "a benchmark": ("commands", "`python -m benchmarks.nothing`"),
    "a benchmark's flag": ("commands", "`python -m benchmarks.journey --nothing`"),
    "a script": ("commands", "`python nothing.py`"),
    "a script's flag": ("commands", fenced("sh", "python test_jax_port.py --nothing 1")),
    "an import": ("snippets", fenced("python", "from skyreels_jax import Nothing")),
    "a module to import": ("snippets", fenced("python", "import skyreels_jax.nothing")),
    "syntax": ("snippets", fenced("python", "x = = 1")),
}


@pytest.mark.parametrize(("check", "text"), LIES.values(), ids=list(LIES))
def test_a_lie_is_caught(check: str, text: str):
    assert list(documents.CHECKS[check](Page(text))) != []


TRUTHS = """[x](docs/performance.md) `tests/test_documentation.py` `docs/` `models/` `report.json`
`skyreels_jax.parity.compare` `make test` `--steps 5` `skyreels-jax generate`
`python test_jax_port.py`

```sh
skyreels-jax info DIR_OR_ID    # a comment
skyreels-jax generate --prompt "a fox" --output x.mp4 …
```

```python
from skyreels_jax import Pipeline
```
"""


@pytest.mark.parametrize("check", documents.CHECKS)
def test_the_truth_is_left_alone(check: str):
    assert list(documents.CHECKS[check](Page(TRUTHS))) == []


SNIPPETS = [
    pytest.param(snippet.code, id=f"{name}-{number}")
    for name, page in PAGES.items()
    for number, snippet in enumerate(documents.snippets(page, "python"))
    if snippet.runs and not documents.is_decision(name)
]


@pytest.mark.parametrize("code", SNIPPETS)
def test_a_snippet_runs(code: str, tmp_path: Path):
    with contextlib.chdir(tmp_path):
        exec(compile(code, "snippet", "exec"), {})


def test_only_a_snippet_that_is_marked_is_not_run():
    block = fenced("python", "1 / 0")
    marked, plain = Page(f"<!-- needs released weights -->\n{block}"), Page(f"Look:\n\n{block}")
    assert [s.runs for s in documents.snippets(marked, "python")] == [False]
    assert [s.runs for s in documents.snippets(plain, "python")] == [True]


def is_cheap(words: list[str]) -> bool:
    """Whether a command needs nothing but what the package ships."""
    given = dict(zip(words, words[1:], strict=False))
    if words[:2] == ["skyreels-jax", "generate"]:
        # A LoRA is what the command before it has trained.
        return given.get("--model", "mini") in ("mini", "mini-i2v") and "--lora" not in given
    if words[:2] == ["skyreels-jax", "live"]:
        return given.keys() >= {"--seconds"} and not given.keys() & {"--prompts", "--model"}
    if words[:2] == ["skyreels-jax", "data"]:
        return words[2] == "shapes"
    return words[:2] in ([["skyreels-jax", verb] for verb in ("doctor", "batch")])


SLOW = pytest.mark.slow


def is_slow(words: list[str]) -> bool:
    """A stream compiles what no other command does; a batch has the same few steps in any case."""
    return words[1] == "live" or (words[1] == "batch" and "--steps" in words)


CHECKED_PAGES = ("batch", "live", "long_video", "quality", "training")
COMMANDS = [
    pytest.param(words, id=" ".join(words[:6]), marks=SLOW if is_slow(words) else ())
    for name in ("README.md", *(f"docs/{page}.md" for page in CHECKED_PAGES))
    for words in documents.commands(PAGES[name])
    if is_cheap(words)
]


def test_the_readme_has_commands_that_anybody_can_run():
    assert len(COMMANDS) >= 4


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_runs(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SKYREELS_JAX_CACHE", str(tmp_path / "caches"))
    shutil.copytree(documents.ROOT / "examples", tmp_path / "examples")
    # Shorter than on the page: what is looked at is that it goes through.
    shorter = ["--steps", "1"] if words[1] in ("generate", "batch", "live") else []
    shorter += ["--count", "2"] if words[1] == "data" else []
    with contextlib.chdir(tmp_path):
        assert main([*words[1:], *shorter]) == 0
