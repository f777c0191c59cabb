"""What is said about a scene: one plain wording, and many others of the same meaning.

ShapeKind, colour, motion and direction of every thing are always said; speed and background often.
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import Final, TypeVar

import numpy as np

from skyreels_jax.moving_shapes.scene import (
    COLOURS,
    DIRECTIONS,
    Background,
    Motion,
    MoveDirection,
    Scene,
    ShapeKind,
    Speed,
    Thing,
)

_Value = TypeVar("_Value")

# The first wording of each is the plain one.
_KIND: Final[dict[ShapeKind, tuple[str, ...]]] = {
    "circle": ("circle", "disc", "ball"),
    "square": ("square", "box"),
    "triangle": ("triangle",),
    "star": ("star",),
}
_DIRECTION: Final[dict[MoveDirection, tuple[str, ...]]] = {
    "right": ("to the right", "rightwards", "from left to right"),
    "down right": ("down and to the right", "to the lower right", "towards the bottom right"),
    "down": ("down", "downwards", "from top to bottom"),
    "down left": ("down and to the left", "to the lower left", "towards the bottom left"),
    "left": ("to the left", "leftwards", "from right to left"),
    "up left": ("up and to the left", "to the upper left", "towards the top left"),
    "up": ("up", "upwards", "from bottom to top"),
    "up right": ("up and to the right", "to the upper right", "towards the top right"),
}
_SPEED: Final[dict[Speed, tuple[str, ...]]] = {
    "slow": ("slowly", "gently", "without haste"),
    "fast": ("quickly", "fast", "at high speed"),
}
# With and without an "is" before them, to follow "a red circle".
_VERB: Final[dict[Motion, tuple[str, ...]]] = {
    "move": (
        "moves",
        "is moving",
        "glides",
        "drifts",
        "travels",
        "is sliding",
        "moving",
        "gliding",
    ),
    "bounce": ("bounces", "is bouncing", "bouncing"),
    "still": ("stands still", "does not move", "rests", "is standing still", "standing still"),
    "grow": ("grows", "is growing", "gets larger", "growing", "getting bigger"),
    "shrink": ("shrinks", "is shrinking", "gets smaller", "shrinking", "getting smaller"),
}
# A bouncing thing sets out in its direction.
_FIRST: Final = ("first", "setting out", "at first")
_BACKGROUND: Final[dict[Background, tuple[str, ...]]] = {
    "black": ("a black background", "black"),
    "white": ("a white background", "white"),
    "light grey": ("a light grey background", "light grey", "a light gray background"),
    "dark grey": ("a dark grey background", "dark grey", "a dark gray background"),
    "gradient": (
        "a background that fades from light to dark",
        "a gradient background",
        "a background that is light above and dark below",
    ),
}
_JOINTS: Final = (" and ", ", while ", "; ")
# Shares of the wordings that leave out the speed, or the background.
_WITHOUT_SPEED: Final = 0.25
_WITHOUT_BACKGROUND: Final = 0.15


def plain_caption(scene: Scene) -> str:
    """The one canonical wording, in which everything is said."""
    things = " and ".join(_plain(thing) for thing in scene.things)
    return f"{things} on {_BACKGROUND[scene.background][0]}"


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One of the many wordings."""
    things = [_worded(scene.things[i], rng) for i in rng.permutation(len(scene.things))]
    text = _pick(rng, _JOINTS).join(things)
    if rng.random() >= _WITHOUT_BACKGROUND:
        background = _pick(rng, _BACKGROUND[scene.background])
        form = rng.integers(3)
        if form == 0 and background.startswith("a "):
            text = f"on {background}, {text}"
        elif background.startswith("a "):
            text = f"{text} on {background}" if form == 1 else f"{text}, {background}"
        else:
            text = f"{text}, {background} background" if form else f"{text} on {background}"
    if rng.random() < 0.3:
        text = text[0].upper() + text[1:]
    return text + "." if rng.random() < 0.3 else text


def foreign_caption(scene: Scene, number: int) -> str:
    """A sentence of the same words that neither :func:`caption` nor :func:`plain_caption` builds.

    Args:
        scene: of one thing or two.
        number: decides which; there are three.
    """
    ground = _BACKGROUND[scene.background][0]
    said = " and ".join(_foreign(thing, number % 3) for thing in scene.things)
    return f"{ground}; {said}" if number % 3 == 1 else f"{said}, on {ground}"


def _foreign(thing: Thing, form: int) -> str:
    colour, kind = thing.colour, _KIND[thing.kind][0]
    how = ""
    if thing.direction is not None and thing.speed is not None:
        first = f"{_FIRST[0]} " if thing.motion == "bounce" else ""
        how = f" {first}{_DIRECTION[thing.direction][0]}, {_SPEED[thing.speed][0]}"
    if form == 0:
        return f"the {kind} is {colour} and {_VERB[thing.motion][0]}{how}"
    if form == 1:
        return f"the {colour} {kind}, {_VERB[thing.motion][-1]}{how}"
    return f"{_VERB[thing.motion][-1]}{how}: the {kind}, {colour}"


@cache
def words() -> tuple[str, ...]:
    """Every word that a caption can hold, in lower case, sorted."""
    pieces = [*_JOINTS, *_FIRST, "a", "an", "the", "on", "background"]
    for table in (_KIND, _DIRECTION, _SPEED, _VERB, _BACKGROUND):
        pieces += [wording for wordings in table.values() for wording in wordings]
    text = " ".join([*pieces, *COLOURS]).replace(",", " ").replace(";", " ")
    return tuple(sorted(set(text.split())))


def unknown_words(text: str) -> tuple[str, ...]:
    """Find the words of a text that no caption holds, whatever their case, each once, in order."""
    said = re.findall(r"""[^\s.,;:!?"'()]+""", text.lower())
    return tuple(dict.fromkeys(word for word in said if word not in words()))


def known_things() -> str:
    """List for a person what captions speak of, with every noun and the plain form of the rest."""
    kinds = ", ".join(wording for wordings in _KIND.values() for wording in wordings)
    verbs = ", ".join(wordings[0] for wordings in _VERB.values())
    grounds = ", ".join(_BACKGROUND)
    parts = (kinds, ", ".join(COLOURS), verbs, ", ".join(DIRECTIONS), "slowly, quickly")
    return f"{'; '.join(parts)}; backgrounds: {grounds}"


def _plain(thing: Thing) -> str:
    text = f"{_a(thing.colour)} {_KIND[thing.kind][0]} {_VERB[thing.motion][0]}"
    if thing.direction is None or thing.speed is None:
        return text
    first = f"{_FIRST[0]} " if thing.motion == "bounce" else ""
    return f"{text} {_SPEED[thing.speed][0]} {first}{_DIRECTION[thing.direction][0]}"


def _worded(thing: Thing, rng: np.random.Generator) -> str:
    kind, verb = _pick(rng, _KIND[thing.kind]), _pick(rng, _VERB[thing.motion])
    text = f"{_a(thing.colour)} {kind} {verb}"
    if thing.direction is None or thing.speed is None:
        return text
    where = _pick(rng, _DIRECTION[thing.direction])
    if thing.motion == "bounce":
        where = f"{_pick(rng, _FIRST)} {where}"
    if rng.random() < _WITHOUT_SPEED:
        return f"{text} {where}"
    speed = _pick(rng, _SPEED[thing.speed])
    return f"{text} {speed} {where}" if rng.random() < 0.5 else f"{text} {where} {speed}"


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _pick(rng: np.random.Generator, values: Sequence[_Value]) -> _Value:
    return values[int(rng.integers(len(values)))]
