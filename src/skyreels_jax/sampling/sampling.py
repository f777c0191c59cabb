"""How a run of the transformer is taken, and what comes of it."""

from dataclasses import dataclass
from typing import Any, NamedTuple

from skyreels_jax.diffusion import unipc
from skyreels_jax.diffusion.block_reuse import Passes
from skyreels_jax.diffusion.guidance import Guidance
from skyreels_jax.diffusion.sigmas import FlowSchedule
from skyreels_jax.diffusion.step_cache import NoCache, StepCache
from skyreels_jax.shapes import Latents


@dataclass(frozen=True)
class Sampling:
    """How a run is taken: the same for all windows of a video.

    Attributes:
        schedule: the noise levels.
        guidance: how a step's predictions are combined.
        attention: name of an attention path; ``None`` chooses by platform and shape.
        cache: which model calls are left out.
        latents: dtype they have between steps; bfloat16 is the original's diffusion forcing.
    """

    schedule: FlowSchedule
    guidance: Guidance
    attention: str | None = None
    cache: StepCache = NoCache()
    latents: str = "float32"

    @property
    def coefficients(self) -> unipc.Coefficients:
        """The solver's table, for latents of this dtype."""
        return unipc.tabulate(self.schedule, rounded=self.latents != "float32")


class Told(NamedTuple):
    """What :meth:`Denoiser.condition` is given for one video: ``jax.ShapeDtypeStruct`` each."""

    text: Any
    clip_fea: Any
    y: Any
    fps: Any


@dataclass(frozen=True, eq=False)
class Denoised:
    """Finished latents, float32.

    Attributes:
        latents: of all frames.
        step_seconds: of each step; compilation is not in them.
        computed: model calls that ran.
        calls: model calls that a run without a cache makes.
        passes: blocks of frames that were computed, where not all were in every row.
    """

    latents: Latents
    step_seconds: tuple[float, ...]
    computed: int
    calls: int
    passes: Passes | None = None

    @property
    def block_passes(self) -> tuple[int, int]:
        """Blocks computed, and how many all of them in every row would have been; or zeros."""
        if self.passes is None:
            return 0, 0
        return self.passes.computed, len(self.passes.rows) * self.passes.blocks


class Job(NamedTuple):
    """What decides a compiled program: columns of the row, and whether it keeps or moves them."""

    columns: int
    keeps: bool
