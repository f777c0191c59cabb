"""The house rules that can be counted (tests/house.py), and a planted offender of each."""

import pytest
from tests import house

FILES = house.sources()
# What the whole package keeps already; `python -m tests.house` lists who breaks the other rules.
HELD: tuple[str, ...] = ("defined twice", "old words", "docstrings", "lengths")


def test_the_house_keeps_its_rules():
    assert [str(offence) for rule in HELD for offence in house.RULES[rule](FILES)] == []


def test_the_list_of_names_that_stand_twice_is_short_and_true():
    assert len(house.TWICE) <= 5
    defined = [
        {name for name, _ in house.public_names(house.ast.parse(source))}
        for source in FILES.values()
    ]
    for name in house.TWICE:
        assert sum(name in names for names in defined) > 1, f"{name} stands twice no longer"


def test_any_is_said_seldom():
    assert sum(house.anys(FILES).values()) <= house.ANYS


LONG = "def f():\n" + "    x = 1\n" * 60
PLANTED = {
    "a function twice": ("defined twice", {"a.py": "def f(): ...", "b.py": "def f(): ..."}),
    "a constant twice": ("defined twice", {"a.py": "X: int = 1", "b/c.py": "X = Y = 2"}),
    "behind an if": ("defined twice", {"a.py": "X = 1", "b.py": "if True:\n    X = 2"}),
    "an old class": ("old words", {"a.py": "class Timetable: ..."}),
    "an old word in a comment": ("old words", {"a.py": "# the yardstick's rows"}),
    "an old word in a message": ("old words", {"a.py": "raise E('no such dialect')"}),
    "a video codec of a model": ("old words", {"models/vae.py": "codec = 1"}),
    "a docstring": ("docstrings", {"a.py": 'def f():\n    """Of a frame."""'}),
    "a class's docstring": ("docstrings", {"a.py": 'class A:\n    """Of a frame."""'}),
    "a long file": ("lengths", {"a.py": "x = 1\n" * 351}),
    "a long function of a model": ("lengths", {"models/a.py": LONG}),
    "nine arguments": ("lengths", {"a.py": "def f(a, b, c, d, *, e, f, g, h, i): ..."}),
}


@pytest.mark.parametrize(("rule", "files"), PLANTED.values(), ids=list(PLANTED))
def test_an_offender_is_caught(rule: str, files: dict[str, str]):
    assert list(house.RULES[rule](files)) != []


CLEAN = {
    "private names": {"a.py": "_x = 1", "b.py": "_x = 1"},
    "imported names": {"a.py": "def f(): ...", "b.py": "from a import f"},
    "methods and locals": {"a.py": "class A:\n    x = 1", "b.py": "class B:\n    x = 1"},
    "a name in __all__ only": {"a.py": "__all__ = ['f']", "b.py": "def f(): ..."},
    "plain English": {"a.py": "# kept as it was told; a pass over earlier frames at this level"},
    "a video codec of a file": {"media/mp4.py": "codec = 1"},
    "an alias": {"a.py": '"--hand-over",  # alias of --window-continuation'},
    "a long function elsewhere": {"a.py": LONG},
    "a method's eight": {"a.py": "class A:\n    def f(self, a, b, c, d, e, f, g, h): ..."},
}


@pytest.mark.parametrize("files", CLEAN.values(), ids=list(CLEAN))
def test_what_is_right_is_left_alone(files: dict[str, str]):
    assert [offence for rule in house.RULES.values() for offence in rule(files)] == []


def test_any_is_counted_in_annotations_and_imports():
    source = "from typing import Any\ndef f(x: Any) -> 'Any': ...\nAnything = 1"
    assert house.anys({"a.py": source}) == {"a.py": 3}
