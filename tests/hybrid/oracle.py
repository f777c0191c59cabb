"""Diffusers' SkyReels-V2 pipelines on a small checkpoint, given our noise and our noise levels."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, UniPCMultistepScheduler
from PIL import Image

from skyreels_jax.diffusion.unipc import FlowSchedule


class GivenLevels(UniPCMultistepScheduler):
    """The scheduler with the original's sigmas in place of diffusers' own grid."""

    schedule: FlowSchedule

    def set_timesteps(self, num_inference_steps: int, device: Any = None, **_: Any) -> None:
        super().set_timesteps(num_inference_steps, device=device)
        assert num_inference_steps == self.schedule.num_steps
        self.sigmas = torch.tensor(self.schedule.sigmas, dtype=torch.float32)
        self.timesteps = torch.tensor(self.schedule.timesteps)
        # By position, as ours: truncated timesteps need not be unique.
        self.set_begin_index(0)

    def step(self, model_output: Any, timestep: Any, sample: torch.Tensor, **kwargs: Any) -> Any:
        """A step that owns the sample it remembers.

        The diffusion-forcing pipelines (the original's too) pass a view of the latents and then
        overwrite it, so that the corrector of the second step starts from the wrong sample. With
        that, these checkpoints' videos are at 47.9 dB from ours; without, at 86.
        """
        return super().step(model_output, timestep, sample.clone(), **kwargs)


def load(folder: Path) -> DiffusionPipeline:
    """The pipeline that ``model_index.json`` names, in float32."""
    pipeline = DiffusionPipeline.from_pretrained(folder)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def frames(
    pipeline: DiffusionPipeline,
    noise: np.ndarray,
    schedule: FlowSchedule,
    image: Image.Image | None = None,
    **settings: Any,
) -> np.ndarray:
    """Float frames ``[F, height, width, 3]`` in [0, 1] from latents ``[1, 16, F, H, W]``."""
    scheduler = GivenLevels.from_config(pipeline.scheduler.config)
    scheduler.schedule = schedule
    pipeline.scheduler = scheduler
    latents = torch.tensor(noise)
    if hasattr(pipeline, "generate_timestep_matrix"):
        # Diffusion forcing unpacks four values that its own `latents=` path does not return.
        pipeline.prepare_latents = lambda *_, **__: (latents.clone(), latents.shape[2], None, 0)
    else:
        settings["latents"] = latents
    if image is not None:
        settings["image"] = image
    settings["num_inference_steps"] = schedule.num_steps
    return pipeline(output_type="np", **settings).frames[0]
