"""Changed recipes: one error of ours within two seconds, or a recipe; nothing is loaded for it."""

import random
import re
import time
from pathlib import Path

import pytest
from tests.bounded import MOST, memory_below

from skyreels_jax.errors import RequestError
from skyreels_jax.mini.recipe import read_recipe

ROOT = Path(__file__).parents[2]
CONFIGS = [*sorted((ROOT / "configs" / "mini").glob("*.toml")), ROOT / "examples" / "videos.toml"]
# What stands where a value belongs.
VALUES = (
    *("0", "-1", "1e400", "nan", "inf", "9223372036854775808", "1_0", "true", '""', '"a"', "'\\'"),
    *("[]", "[[[]]]", "{}", "{a = 1}", "1979-05-27", "2.5", '"' + "a" * 300 + '"', "["),
)
LONGEST = 2.0  # seconds; measured 0.005
LONGEST_LINE = 1000  # characters of a message; measured 359


def changed(text: str, chance: random.Random) -> str:
    """A value, a line or some characters are others, missing or there twice."""
    lines = text.splitlines()
    for _ in range(chance.choice((1, 1, 2, 5))):
        at = chance.randrange(len(lines))
        kind = chance.randrange(5)
        if kind == 0:
            lines[at] = re.sub("=.*", lambda _: "= " + chance.choice(VALUES), lines[at])
        elif kind == 1:
            lines[at:at] = [chance.choice(lines)]
        elif kind == 2 and len(lines) > 1:
            del lines[at]
        elif kind == 3:
            lines[at] = lines[at].replace(" = ", chance.choice("x_.-\0é") + " = ")
        elif lines[at]:
            place = chance.randrange(len(lines[at]))
            lines[at] = (
                lines[at][:place] + chance.choice("[]{}=\"'#,.0\x7f") + lines[at][place + 1 :]
            )
    return "\n".join(lines)


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_changed_recipes_are_refused_or_understood(tmp_path: Path, count: int):
    file, chance = tmp_path / "recipe.toml", random.Random(1)
    refused = 0
    for number in range(count):
        text = changed(CONFIGS[number % len(CONFIGS)].read_text("utf-8"), chance)
        file.write_text(text, "utf-8")
        begin = time.monotonic()
        try:
            with memory_below(4 * len(text) + MOST):
                read_recipe(file, {})
        except RequestError as error:
            refused += 1
            assert len(str(error)) < LONGEST_LINE, text
        assert time.monotonic() - begin < LONGEST
    assert refused > count / 2  # measured: 756 of 1000
    assert [path.name for path in tmp_path.iterdir()] == ["recipe.toml"]
