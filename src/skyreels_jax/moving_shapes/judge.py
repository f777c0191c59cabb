"""The judge of moving shapes: reads colour, kind and motion of every thing off a video.

It knows no model and no renderer, only that shapes are solid and coloured and backgrounds grey. A
pixel that mixes a share ``a`` of a colour with grey has ``a`` times the colour's chroma (largest
minus smallest channel) and the colour's own proportions of channels above the smallest: so soft
outlines give exact shares of pixels, and no share changes the hue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import Float

from skyreels_jax.moving_shapes.scene import (
    COLOURS,
    DIRECTIONS,
    SPEED_PER_SECOND,
    Colour,
    Motion,
    MoveDirection,
    Scene,
    ShapeKind,
    Speed,
    Thing,
)
from skyreels_jax.shapes import Frames

# What a colour's name means, 0 to 1.
_PURE: Final[dict[Colour, tuple[float, float, float]]] = {
    "red": (0.84, 0.12, 0.14),
    "green": (0.14, 0.63, 0.24),
    "blue": (0.18, 0.29, 0.84),
    "yellow": (0.94, 0.86, 0.18),
    "purple": (0.57, 0.20, 0.69),
    "orange": (0.94, 0.51, 0.10),
}
# Chroma below which a pixel is grey, and the least area of a thing in squared sides of the frame.
_GREY: Final = 0.12
_SMALLEST: Final = 0.012
# A second thing counts from this share of the first one's area.
_SECOND: Final = 0.08
# A thing is there in a frame that has this share of its usual area, and has to be in this share of
# the frames.
_PRESENT: Final = 0.35
_STEADY: Final = 0.8
# Spread of area, `(var x + var y) / area`: 0.159 of a disc, 0.167 of a square, 0.19 of a triangle
# and a star. Two blobs of one colour have more.
_COMPACT: Final = 0.3
# Rays to the outline, and waves around it below which it is round: 0.25 of a triangle's outline are
# of wave 3, 0.1 of a square's of wave 4, 0.3 of a star's of wave 5.
_RAYS: Final = 60
_ROUND: Final = 0.045
_WAVES: Final[dict[int, ShapeKind]] = {3: "triangle", 4: "square", 5: "star"}
# Sides of the frame a second: slower stands still. And e-foldings of the radius a second.
_MOVES: Final = 0.1
_GROWS: Final = 0.14
# How much longer than its chord the path of a thing is that turns.
_TURNS: Final = 1.35


@dataclass(frozen=True)
class DetectedThing:
    """A thing that a video shows; ``None`` where the frames disagree or do not tell.

    Attributes:
        colour: of most of its pixels.
        kind: its outline, the same at the beginning and at the end.
        motion: what it does.
        direction: where it moves, or first moved.
        speed: of its motion.
        steady: whether it is there, in one piece, all the time.
        track: centre ``x``, ``y`` and area of every frame, in sides of the frame and their
            squares; NaN where it is not there.
    """

    colour: Colour
    kind: ShapeKind | None
    motion: Motion
    direction: MoveDirection | None
    speed: Speed | None
    steady: bool
    track: Float[np.ndarray, "T 3"]


@dataclass(frozen=True)
class Verdict:
    """Whether a video shows its scene: the colours, and of each thing the kind and the motion."""

    colour: bool
    kind: bool
    motion: bool

    @property
    def all(self) -> bool:
        """Whether colours, kinds and motions are right."""
        return self.colour and self.kind and self.motion


def detect_things(frames: Frames, fps: float | int) -> tuple[DetectedThing, ...]:
    """Detect the one or two things of a video, the larger first; none where nothing is coloured.

    Args:
        frames: uint8 ``[T, height, width, 3]``, at least 5 of them, square.
        fps: frames a second.
    """
    shares = _coverage(frames)
    side = frames.shape[1]
    areas = shares.sum((2, 3)) / side**2
    usual = np.median(areas, axis=1)
    order = np.argsort(-usual)[:2]
    least = max(_SMALLEST, _SECOND * usual[order[0]])
    found = [int(i) for i in order if usual[i] >= least]
    tracks = {i: _track(shares[i]) for i in found}
    return tuple(
        _describe(COLOURS[i], shares[i], tracks[i], [tracks[j] for j in found if j != i], fps)
        for i in found
    )


def judge_scene(seen: Sequence[DetectedThing], scene: Scene) -> Verdict:
    """Judge whether a video shows its scene, by the things detected in it, matched by colour.

    A single thing is matched whatever its colour. One that should bounce may be seen to move: not
    every one meets an edge in its time.
    """
    wanted = {thing.colour: thing for thing in scene.things}
    by_colour = {one.colour: one for one in seen}
    colour = set(wanted) == set(by_colour)
    if len(wanted) == len(seen) == 1:
        pairs = [(seen[0], scene.things[0])]
    else:
        pairs = [(by_colour[c], thing) for c, thing in wanted.items() if c in by_colour]
    whole = len(pairs) == len(wanted)
    kind = whole and all(one.kind == thing.kind and one.steady for one, thing in pairs)
    return Verdict(colour, kind, whole and all(_moves_as(one, thing) for one, thing in pairs))


def _coverage(frames: Frames) -> Float[np.ndarray, "colours T height width"]:
    """Return the share of each pixel that a thing of each colour covers."""
    rgb = frames.astype(np.float32) / 255
    least = rgb.min(-1, keepdims=True)
    chroma = rgb.max(-1) - least[..., 0]
    mixed = (rgb - least) / np.maximum(chroma, 1e-6)[..., None]
    pure = np.array([_PURE[colour] for colour in COLOURS], np.float32)
    strength = pure.max(1) - pure.min(1)
    signature = (pure - pure.min(1, keepdims=True)) / strength[:, None]
    distance = ((mixed[..., None, :] - signature) ** 2).sum(-1)
    nearest = distance.argmin(-1)
    coloured = chroma > _GREY
    return np.stack(
        [
            np.where(coloured & (nearest == i), np.clip(chroma / strength[i], 0, 1), 0)
            for i in range(len(COLOURS))
        ]
    )


def _track(share: Float[np.ndarray, "T height width"]) -> Float[np.ndarray, "T 3"]:
    """Return centre and area by frame; NaN where :data:`_PRESENT` of its usual area is missing."""
    side = share.shape[1]
    rows, columns = (np.mgrid[:side, :side].astype(np.float32) + 0.5) / side
    weight = share.sum((1, 2))
    safe = np.maximum(weight, 1e-6)
    x, y = ((share * grid).sum((1, 2)) / safe for grid in (columns, rows))
    found = np.stack([x, y, weight / side**2], axis=1)
    found[weight < _PRESENT * np.median(weight)] = np.nan
    return found


def _describe(
    colour: Colour,
    share: Float[np.ndarray, "T height width"],
    path: Float[np.ndarray, "T 3"],
    others: Sequence[Float[np.ndarray, "T 3"]],
    fps: float | int,
) -> DetectedThing:
    there = np.isfinite(path[:, 0])
    apart = there.copy()
    for other in others:
        reach = 0.95 * (np.sqrt(path[:, 2]) + np.sqrt(np.nan_to_num(other[:, 2])))
        gap = np.hypot(*(path[:, :2] - other[:, :2]).T)
        # One that cannot be seen is behind this one, or gone: it hides nothing.
        apart &= ~(gap < reach)
    clear = apart if apart.sum() >= 4 else there
    number = np.flatnonzero(clear)
    compact = np.median(_spread(share[number], path[number])) < _COMPACT
    half = max(2, len(number) // 2)
    kinds: list[ShapeKind] = [
        _kind(share, path, frames) for frames in (number[:half], number[-half:], number)
    ]
    # One that another covers is judged by all it shows; one alone must stay what it is.
    kind: ShapeKind | None = kinds[2] if kinds[0] == kinds[1] or others else None
    motion, direction, speed = _motion(path[number], number / fps)
    steady = bool(compact and (there.mean() >= _STEADY or bool(others)))
    return DetectedThing(colour, kind, motion, direction, speed, steady, path)


def _spread(
    share: Float[np.ndarray, "T height width"], path: Float[np.ndarray, "T 3"]
) -> Float[np.ndarray, " T"]:
    side = share.shape[1]
    rows, columns = (np.mgrid[:side, :side].astype(np.float32) + 0.5) / side
    dx = columns - path[:, 0, None, None]
    dy = rows - path[:, 1, None, None]
    moment = (share * (dx**2 + dy**2)).sum((1, 2)) / np.maximum(share.sum((1, 2)), 1e-6)
    return moment / path[:, 2]


def _kind(
    share: Float[np.ndarray, "T height width"],
    path: Float[np.ndarray, "T 3"],
    number: Sequence[int] | np.ndarray,
) -> ShapeKind:
    waves = np.median([_waves(share[t], path[t]) for t in number], axis=0)
    strongest = int(np.argmax(waves))
    return "circle" if waves[strongest] < _ROUND else list(_WAVES.values())[strongest]


def _waves(
    share: Float[np.ndarray, "height width"], centre_and_area: Float[np.ndarray, "3"]
) -> Float[np.ndarray, "3"]:
    """Return waves 3, 4 and 5 of the outline's distance from the centre, as shares of its mean."""
    side = share.shape[0]
    x, y = centre_and_area[:2] * side - 0.5
    radius = np.sqrt(centre_and_area[2] / np.pi) * side
    angle = 2 * np.pi * np.arange(_RAYS) / _RAYS
    reach = np.arange(0.25, 2.3 * radius, 0.25)
    profile = _bilinear(
        share, x + reach[None] * np.cos(angle)[:, None], y + reach[None] * np.sin(angle)[:, None]
    )
    # What is covered along the ray: the distance to the outline, unless it is crossed again.
    inside = np.minimum.accumulate(profile, axis=1)
    outline = 0.25 * inside.sum(1)
    spectrum = np.abs(np.fft.rfft(outline)) / max(outline.sum(), 1e-6)
    return spectrum[list(_WAVES)]


def _bilinear(image: Float[np.ndarray, "height width"], x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Interpolate between pixel centres; zero outside."""
    padded = np.pad(image, 1)
    x, y = (np.clip(v + 1, 0, padded.shape[0] - 1.001) for v in (x, y))
    i, j = y.astype(int), x.astype(int)
    v, u = y - i, x - j
    top = padded[i, j] * (1 - u) + padded[i, j + 1] * u
    below = padded[i + 1, j] * (1 - u) + padded[i + 1, j + 1] * u
    return top * (1 - v) + below * v


def _motion(
    path: Float[np.ndarray, "T 3"], seconds: Float[np.ndarray, " T"]
) -> tuple[Motion, MoveDirection | None, Speed | None]:
    steps = np.diff(path[:, :2], axis=0)
    gaps = np.diff(seconds)
    velocity = np.array([np.polyfit(seconds, path[:, axis], 1)[0] for axis in (0, 1)])
    # The median of single steps: noise of the centre is small beside a step that moves.
    pace = float(np.median(np.hypot(*steps.T) / gaps))
    duration = seconds[-1] - seconds[0]
    chord = float(np.hypot(*(path[-1, :2] - path[0, :2])))
    length = float(np.hypot(*steps.T).sum())
    turned = (
        pace > _MOVES and length > _TURNS * max(chord, 0.02) and length > 0.5 * _MOVES * duration
    )
    middle = 0.5 * (SPEED_PER_SECOND["slow"] + SPEED_PER_SECOND["fast"])
    if turned and pace > 1.2 * np.hypot(*velocity):
        first = path[max(2, len(path) // 4), :2] - path[0, :2]
        return "bounce", _direction(first), "fast" if pace > middle else "slow"
    if np.hypot(*velocity) > _MOVES:
        return "move", _direction(velocity), "fast" if np.hypot(*velocity) > middle else "slow"
    growth = 0.5 * float(np.polyfit(seconds, np.log(path[:, 2]), 1)[0])
    if abs(growth) > _GROWS:
        return ("grow" if growth > 0 else "shrink"), None, None
    return "still", None, None


def _direction(velocity: Float[np.ndarray, "2"]) -> MoveDirection:
    angle = np.arctan2(velocity[1], velocity[0])
    return DIRECTIONS[round(float(angle / (np.pi / 4))) % len(DIRECTIONS)]


def _moves_as(one: DetectedThing, thing: Thing) -> bool:
    if thing.motion == "bounce":
        return one.motion in ("bounce", "move")
    return one.motion == thing.motion and one.direction == thing.direction
