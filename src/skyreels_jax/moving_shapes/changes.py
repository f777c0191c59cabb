"""Scenes before a video's scene: what a stream shows until its caption is changed."""

from dataclasses import dataclass, replace
from typing import Final

import numpy as np

from skyreels_jax.moving_shapes.scene import (
    COLOURS,
    SHAPE_KINDS,
    Scene,
    draw_scene,
    is_held_out,
)
from skyreels_jax.shapes import Frames

# How often the scene before is the same but for the first thing's colour, shape or both.
_SAME_SHARE: Final = 0.6
# How often the change is past, and of the scene before only the first frame is left: as in a window
# that keeps a stream's first frame.
_PAST_SHARE: Final = 0.25


@dataclass(frozen=True)
class SceneChange:
    """What a video shows before its scene.

    Attributes:
        before: the scene until then.
        at: the latent frame in which one fades into the other; None where it happened long ago,
            and the first frame alone is of the scene before.
    """

    before: Scene
    at: int | None

    @property
    def first_learned(self) -> int:
        """The first latent frame that the video's caption tells of."""
        # What follows a lone old frame at once would be another fade.
        return 2 if self.at is None else self.at


def draw_change(
    rng: np.random.Generator, scene: Scene, seconds: float, latent_frames: int
) -> SceneChange:
    """Draw what a video shows before ``scene``; no held-out combination is among it.

    Args:
        rng: draws.
        scene: of the video's caption.
        seconds: for which things stay inside the frame.
        latent_frames: of the video, 3 or more.
    """
    before = _other(rng, scene) if rng.random() < _SAME_SHARE else draw_scene(rng, seconds)
    past = rng.random() < _PAST_SHARE
    return SceneChange(before, None if past else int(rng.integers(1, latent_frames)))


def _other(rng: np.random.Generator, scene: Scene) -> Scene:
    """The scene with another colour, shape or both of its first thing."""
    first, *rest = scene.things
    while True:
        what = rng.integers(3)
        taken = {thing.colour for thing in scene.things}
        colours = [colour for colour in COLOURS if colour not in taken]
        kinds = [kind for kind in SHAPE_KINDS if kind != first.kind]
        colour = colours[rng.integers(len(colours))] if what != 1 else first.colour
        kind = kinds[rng.integers(len(kinds))] if what != 0 else first.kind
        thing = replace(first, colour=colour, kind=kind)
        if not is_held_out(thing):
            return Scene((thing, *rest), scene.background)


def faded(before: Frames, after: Frames, start: int, count: int) -> Frames:
    """Frames of ``before``, from ``start`` on within ``count`` even steps those of ``after``.

    Args:
        before: ``[T, height, width, 3]``.
        after: as many.
        start: the first frame that is neither wholly.
        count: frames of the fade, the last of which is wholly ``after``.
    """
    share = np.clip((np.arange(len(after)) - start + 1) / count, 0, 1).astype(np.float32)
    mixed = before + share[:, None, None, None] * (after.astype(np.float32) - before)
    return np.round(mixed).astype(np.uint8)
