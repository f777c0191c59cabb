"""Which clips of moving shapes are trained on, by a number: scenes, what is before them, frames."""

from dataclasses import dataclass
from typing import Final

import numpy as np
from jaxtyping import UInt8

from skyreels_jax.geometry import latent_frames
from skyreels_jax.models.vae_layers import FRAME_STRIDE
from skyreels_jax.moving_shapes.changes import SceneChange, draw_change, faded
from skyreels_jax.moving_shapes.clips import FRAME_RATES
from skyreels_jax.moving_shapes.render import render
from skyreels_jax.moving_shapes.scene import HELD_OUT, Scene, draw_held_out, draw_scene

# A stream of random numbers of its own, so that scenes stay what they are without changes.
_CHANGE_STREAM: Final = 5


@dataclass(frozen=True)
class ClipSource:
    """Which clips: the training distribution or, ``held``, the combinations held out from it.

    A share ``changes`` of the former begins with another scene.
    """

    seed: int
    frames: int
    size: int
    held: bool = False
    changes: float = 0.0

    def scene(self, index: int) -> tuple[Scene, int, np.random.Generator]:
        """A clip's scene, frames a second, and what draws its wordings."""
        rng = np.random.default_rng([self.seed, int(self.held), index])
        fps = FRAME_RATES[rng.integers(len(FRAME_RATES))]
        seconds = self.frames / fps
        if not self.held:
            return draw_scene(rng, seconds), fps, rng
        combinations = sorted(HELD_OUT, key=str)
        return draw_held_out(rng, combinations[index % len(combinations)], seconds), fps, rng

    def change(self, index: int, scene: Scene, fps: int) -> SceneChange | None:
        """What a clip shows before its scene, if anything."""
        rng = np.random.default_rng([self.seed, int(self.held), index, _CHANGE_STREAM])
        if self.held or rng.random() >= self.changes:
            return None
        return draw_change(rng, scene, self.frames / fps, latent_frames(self.frames))

    def render(self, scene: Scene, frames: int, fps: int) -> UInt8[np.ndarray, "T size size 3"]:
        """The frames of a scene in this source's size."""
        return render(scene, frames=frames, fps=float(fps), size=(self.size, self.size))

    def video(
        self, scene: Scene, fps: int, change: SceneChange | None
    ) -> UInt8[np.ndarray, "T size size 3"]:
        """The frames of a clip, which fade from what is before its scene."""
        frames = self.render(scene, self.frames, fps)
        if change is None or change.at is None:
            return frames
        before = self.render(change.before, self.frames, fps)
        # The pixel frames of that latent one.
        return faded(before, frames, FRAME_STRIDE * (change.at - 1) + 1, FRAME_STRIDE)
