"""What happens in a video of moving shapes, and which combinations are held out from training."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Final, Literal, TypeVar, get_args

import numpy as np

_Value = TypeVar("_Value")
ShapeKind = Literal["circle", "square", "triangle", "star"]
Colour = Literal["red", "green", "blue", "yellow", "purple", "orange"]
Background = Literal["black", "white", "light grey", "dark grey", "gradient"]
MoveDirection = Literal[
    "right", "down right", "down", "down left", "left", "up left", "up", "up right"
]
Motion = Literal["move", "bounce", "still", "grow", "shrink"]
Speed = Literal["slow", "fast"]

SHAPE_KINDS: Final[tuple[ShapeKind, ...]] = get_args(ShapeKind)
COLOURS: Final[tuple[Colour, ...]] = get_args(Colour)
BACKGROUNDS: Final[tuple[Background, ...]] = get_args(Background)
# Clockwise on the screen; entry `i` points to `45 * i` degrees.
DIRECTIONS: Final[tuple[MoveDirection, ...]] = get_args(MoveDirection)
MOTIONS: Final[tuple[Motion, ...]] = get_args(Motion)
SPEEDS: Final[tuple[Speed, ...]] = get_args(Speed)

# Of the shapes moved, in sides of the frame a second. A clip lasts about one second.
SPEED_PER_SECOND: Final[dict[Speed, float]] = {"slow": 0.2, "fast": 0.45}
# How many times as large a growing shape is after a second, and a shrinking one was before.
GROWTH_PER_SECOND: Final = 1.35
# Radius of a shape in sides of the frame; what grows or shrinks stays between these too.
MIN_RADIUS: Final = 0.15
MAX_RADIUS: Final = 0.3
# Seconds for which a path is planned, at most: past them nothing could grow without end.
_MAX_SECONDS: Final = 0.9 * min(
    math.log(MAX_RADIUS / MIN_RADIUS) / math.log(GROWTH_PER_SECOND),
    (1 - 2 * MIN_RADIUS) / max(SPEED_PER_SECOND.values()),
)
# How often each motion is drawn, in the order of MOTIONS, and how often there are two shapes.
_MOTION_SHARES: Final = (0.56, 0.16, 0.12, 0.08, 0.08)
_PAIR_SHARE: Final = 0.25
# Places tried for what is said about a thing.
_MAX_TRIES: Final = 2000


@dataclass(frozen=True)
class Thing:
    """A shape and its path.

    Attributes:
        kind: its outline.
        colour: its one colour.
        motion: what it does.
        direction: where it moves to; a bouncing one begins with it and turns at the frame's edges.
            ``None`` unless it moves or bounces.
        speed: of its motion; ``None`` where it has no direction.
        x: of its centre at the start, in sides of the frame from the left.
        y: the same from the top.
        radius: at the start, in sides of the frame: of the circle around its corners.
    """

    kind: ShapeKind
    colour: Colour
    motion: Motion
    direction: MoveDirection | None
    speed: Speed | None
    x: float
    y: float
    radius: float

    def __post_init__(self) -> None:
        if (self.direction is None) != (self.motion not in ("move", "bounce")):
            raise ValueError(f"{self.motion=} with {self.direction=}")
        if (self.direction is None) != (self.speed is None):
            raise ValueError(f"{self.direction=} with {self.speed=}")

    def at(self, seconds: float) -> tuple[float, float, float]:
        """Centre ``x``, ``y`` and radius after some time."""
        if self.motion == "grow":
            return self.x, self.y, self.radius * GROWTH_PER_SECOND**seconds
        if self.motion == "shrink":
            return self.x, self.y, self.radius / GROWTH_PER_SECOND**seconds
        if self.direction is None or self.speed is None:
            return self.x, self.y, self.radius
        dx, dy = (
            SPEED_PER_SECOND[self.speed] * part * seconds for part in unit_vector(self.direction)
        )
        x, y = self.x + dx, self.y + dy
        if self.motion == "bounce":
            x, y = (_reflected(value, self.radius) for value in (x, y))
        return x, y, self.radius


@dataclass(frozen=True)
class Scene:
    """One or two things before a background; a later thing hides an earlier one."""

    things: tuple[Thing, ...]
    background: Background


@dataclass(frozen=True)
class Combination:
    """What is held out: a colour, a kind and a direction of one thing."""

    colour: Colour
    kind: ShapeKind
    direction: MoveDirection


def unit_vector(direction: MoveDirection) -> tuple[float, float]:
    """``(x, y)`` of length 1; ``y`` grows downwards."""
    angle = DIRECTIONS.index(direction) * math.pi / 4
    return math.cos(angle), math.sin(angle)


def held_out() -> tuple[Combination, ...]:
    """The combinations that training never sees: one direction of each colour and kind.

    24 of 192. They are spread like a Latin square, so that every colour, kind and direction is
    seen with all others but in these.
    """
    return tuple(
        Combination(colour, kind, direction)
        for (i, colour), (j, kind), (k, direction) in product(
            enumerate(COLOURS), enumerate(SHAPE_KINDS), enumerate(DIRECTIONS)
        )
        if (i + 2 * j + k) % len(DIRECTIONS) == 0
    )


HELD_OUT: Final = frozenset(held_out())


def is_held_out(thing: Thing) -> bool:
    """Whether the thing moves as one of :func:`held_out` does; one that bounces counts too."""
    if thing.direction is None:
        return False
    return Combination(thing.colour, thing.kind, thing.direction) in HELD_OUT


def draw_scene(rng: np.random.Generator, seconds: float) -> Scene:
    """A scene of the training distribution: things stay inside the frame for so many seconds.

    Two things have two colours, and do not touch at the start.

    Raises:
        ValueError: more seconds than any shape could grow for.
    """
    if not 0 < seconds <= _MAX_SECONDS:
        raise ValueError(f"{seconds=} should be above 0 and at most {_MAX_SECONDS:.2f}")
    background = _choice(rng, BACKGROUNDS)
    first = None
    while first is None:
        first = _draw_thing(rng, COLOURS, seconds)
    if rng.random() >= _PAIR_SHARE:
        return Scene((first,), background)
    others: list[Colour] = [colour for colour in COLOURS if colour != first.colour]
    second = _draw_thing(rng, others, seconds, beside=first)
    # Rarely there is no room for it beside the first.
    return draw_scene(rng, seconds) if second is None else Scene((first, second), background)


def draw_held_out(rng: np.random.Generator, combination: Combination, seconds: float) -> Scene:
    """One thing that moves as ``combination`` says."""
    while True:
        radius = rng.uniform(MIN_RADIUS, MAX_RADIUS)
        x, y = rng.uniform(radius, 1 - radius, 2)
        thing = Thing(
            combination.kind,
            combination.colour,
            "move",
            combination.direction,
            _choice(rng, SPEEDS),
            x,
            y,
            radius,
        )
        if _stays_inside(thing, seconds):
            return Scene((thing,), _choice(rng, BACKGROUNDS))


def _draw_thing(
    rng: np.random.Generator, colours: Sequence[Colour], seconds: float, beside: Thing | None = None
) -> Thing | None:
    motion = MOTIONS[rng.choice(len(MOTIONS), p=_MOTION_SHARES)]
    kind, colour = _choice(rng, SHAPE_KINDS), _choice(rng, colours)
    moves = motion in ("move", "bounce")
    # A path that leads out of the frame, or begins on another thing, is drawn again from here, so
    # that what is said about a thing is as frequent as if none did.
    direction = _choice(rng, DIRECTIONS) if moves else None
    speed = _choice(rng, SPEEDS) if moves else None
    for _ in range(_MAX_TRIES):
        radius = rng.uniform(MIN_RADIUS, MAX_RADIUS)
        x, y = rng.uniform(radius, 1 - radius, 2)
        thing = Thing(kind, colour, motion, direction, speed, x, y, radius)
        if is_held_out(thing):
            return _draw_thing(rng, colours, seconds, beside)
        if _stays_inside(thing, seconds) and (beside is None or _apart(thing, beside)):
            return thing
    return None


def _apart(one: Thing, other: Thing) -> bool:
    return math.hypot(one.x - other.x, one.y - other.y) > one.radius + other.radius


def _stays_inside(thing: Thing, seconds: float) -> bool:
    x, y, radius = thing.at(seconds)
    return MIN_RADIUS <= radius <= MAX_RADIUS and all(radius <= v <= 1 - radius for v in (x, y))


def _reflected(value: float, radius: float) -> float:
    """``value`` folded back at the walls ``radius`` and ``1 - radius``."""
    span = 1 - 2 * radius
    folded = (value - radius) % (2 * span)
    return radius + min(folded, 2 * span - folded)


def _choice(rng: np.random.Generator, values: Sequence[_Value]) -> _Value:
    return values[int(rng.integers(len(values)))]
