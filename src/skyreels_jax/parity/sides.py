"""Both sides of a comparison: each makes the videos of a plan and shows how."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from PIL import Image

from skyreels_jax.components.conditioning import prepare_image
from skyreels_jax.diffusion.guidance import guidance_of
from skyreels_jax.diffusion.sigmas import flow_sigmas
from skyreels_jax.generation import api
from skyreels_jax.generation.rollout import encode
from skyreels_jax.geometry import LATENT_CHANNELS, latent_shape
from skyreels_jax.media import RgbImage
from skyreels_jax.parity.capture import Note, call_of, walk
from skyreels_jax.parity.diagnosis.places import AROUND, HEAD, block_sites
from skyreels_jax.parity.plan import Plan, synthetic_image
from skyreels_jax.parity.recording import load_call
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.sampling.denoiser import Denoised, Denoiser
from skyreels_jax.sampling.noise import draw_noise
from skyreels_jax.sampling.progress import Clock
from skyreels_jax.shapes import Frames, Latents
from skyreels_jax.torch_side import diffusers_pipeline as torch_pipeline
from skyreels_jax.torch_side import hooks as torch_observe
from skyreels_jax.torch_side.components import TorchImageEncoder

# Of y: four channels of mask, then latents.
MASK_CHANNELS = 4


@dataclass(eq=False)
class Made:
    """A video and how it came about.

    Attributes:
        frames: uint8.
        stages: values by name, of which both sides have the same.
        calls: what the transformer was given at the traced steps (PyTorch only).
        seconds: ``compile``, ``steps`` (a list) and the other stages.
    """

    frames: Frames
    stages: dict[str, np.ndarray]
    seconds: dict[str, Any]
    calls: dict[int, dict[str, Any]] = field(default_factory=dict)


@runtime_checkable
class Side(Protocol):
    """One implementation with its weights loaded."""

    def generate(self, test: int, image: RgbImage | None) -> Made:
        """The video of a test."""
        ...

    def trace(self, results: Mapping[str, np.ndarray], step: int, note: Note) -> None:
        """The transformer on what the reference's was given in a step."""
        ...

    def decode(self, latents: np.ndarray) -> Frames:
        """Frames from latents ``[1, 16, F, H, W]``."""
        ...


class TorchSide:
    """Diffusers' pipeline."""

    def __init__(
        self,
        plan: Plan,
        dtype: str = "float32",
        *,
        encoders: str | None = None,
        numerics: str = "diffusers",
    ):
        self.plan, self.numerics = plan, numerics
        self.checkpoint = plan.checkpoint()
        self.pipeline: Any = torch_pipeline.load_pipeline(
            self.checkpoint, device=plan.device, dtype=dtype, encoders=encoders
        )

    def generate(self, test: int, image: RgbImage | None) -> Made:
        """The video of a test."""
        plan = self.plan
        settings: dict[str, Any] = {"prompt": plan.prompts[test], "height": plan.height}
        settings |= {"negative_prompt": plan.negative_prompt, "width": plan.width}
        settings |= {"num_frames": plan.num_frames}
        if plan.task == "df":
            settings |= {"fps": plan.fps, "base_num_frames": plan.num_frames, "ar_step": 0}
        start = time.perf_counter()
        picture = None
        if image is not None:
            # As the original prepares it; diffusers would cut its centre out.
            encoder = TorchImageEncoder(self.pipeline.image_encoder, None)
            features = encoder.encode(prepare_image(image, plan.height, plan.width))
            states = torch_pipeline.as_tensor(features[None], self.pipeline)
            self.pipeline.encode_image = lambda *_: states
            size, kind = (plan.width, plan.height), Image.Resampling.LANCZOS
            picture = Image.fromarray(image).resize(size, kind)
        seen = torch_pipeline.run(
            self.pipeline,
            noise_of(plan, test),
            flow_sigmas(plan.steps, plan.shift),
            guidance_scale=plan.guidance_scale,
            image=picture,
            keep=tuple({0, *plan.traced}),
            numerics=self.numerics,
            **settings,
        )
        end = time.perf_counter()
        assert seen.frames is not None
        seconds = {
            "compile": 0.0,
            "steps": seen.seconds,
            "encode": seen.moments[0] - start,
            "decode": end - seen.moments[-1],
        }
        return Made(seen.frames, self._stages(seen), seconds, seen.calls)

    def _stages(self, seen: torch_pipeline.Observed) -> dict[str, np.ndarray]:
        first = seen.calls[0]
        stages = {"text": np.asarray(first["encoder_hidden_states"])}
        if seen.negative is not None:
            stages["text.negative"] = seen.negative
        if "encoder_hidden_states_image" in first:
            y = np.asarray(first["hidden_states"])[:, LATENT_CHANNELS:]
            stages["image"] = np.asarray(first["encoder_hidden_states_image"])
            stages |= {"mask": y[:, :MASK_CHANNELS], "condition": y[:, MASK_CHANNELS:]}
        scheduler = self.pipeline.scheduler
        stages["timesteps"] = scheduler.timesteps.cpu().numpy().astype(np.float32)
        stages["sigmas"] = scheduler.sigmas.cpu().numpy().astype(np.float32)
        return stages | {f"latents.{n}": x for n, x in enumerate(seen.latents, 1)}

    def trace(self, results: Mapping[str, np.ndarray], step: int, note: Note) -> None:
        """The transformer on what it was given in a step."""
        image = self.checkpoint.config.model_type == "i2v"
        inside = block_sites(image=image) if self.plan.layers == "all" else ()
        with torch_pipeline.as_the_original(self.pipeline, self.numerics):
            torch_observe.observed_call(
                self.pipeline.transformer,
                load_call(results, step),
                [(site.theirs, site.before, site.after) for site in (*AROUND, *HEAD)],
                [(site.theirs, site.before, site.after) for site in inside],
                note,
            )

    def decode(self, latents: np.ndarray) -> Frames:
        """Not asked for: the reference's frames are those of its latents."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class Watched(Denoiser):
    """Keeps the latents after each step, as the other side does: at the cost of a copy."""

    latents: list[np.ndarray] = field(default_factory=list)

    def run(self, noise: Latents, *arguments: Any, **more: Any) -> Denoised:
        """As of a :class:`Denoiser`."""
        self.latents.clear()

        def keep(x: Any) -> None:
            self.latents.append(np.moveaxis(np.asarray(x, np.float32), 0, 2))

        return super().run(noise, *arguments, **more, observe=keep)


class JaxSide:
    """Our pipeline, with encoders and VAE in JAX or (``hybrid``) in PyTorch."""

    def __init__(self, plan: Plan, *, hybrid: bool = False):
        self.plan = plan
        self.checkpoint = plan.checkpoint()
        backend = "hybrid" if hybrid else "jax"
        self.pipeline = Pipeline(
            self.checkpoint, dtype=plan.dtype, backend=backend, device=plan.device, keep=True
        )
        loaded = self.pipeline.load_denoiser()
        self.denoiser = Watched(loaded.model, loaded.block_length)

    def generate(self, test: int, image: RgbImage | None) -> Made:
        """The video of a test."""
        request = self.plan.request(test, image)
        parts = self.pipeline.components
        noise = jnp.asarray(noise_of(self.plan, test))
        schedule = flow_sigmas(request.steps, request.shift)
        video = api.generate(parts, self.denoiser, request, noise=noise, schedule=schedule)
        stages = video.timings.stages
        seconds = {
            "compile": stages.get("compile", 0.0),
            "steps": list(video.timings.steps),
            "encode": sum(stages.get(name, 0.0) for name in ("text", "image", "condition")),
            "decode": stages.get("decode", 0.0),
        }
        guidance = guidance_of(request.guidance_scale)
        encoded = encode(parts, request, guidance, Clock())
        shown = {"text": np.asarray(encoded.positive[request.prompt], np.float32)}
        if encoded.negative is not None:
            shown["text.negative"] = np.asarray(encoded.negative, np.float32)
        if encoded.clip_fea is not None and encoded.y is not None:
            y = np.asarray(encoded.y, np.float32)
            shown["image"] = np.asarray(encoded.clip_fea, np.float32)
            shown |= {"mask": y[:, :MASK_CHANNELS], "condition": y[:, MASK_CHANNELS:]}
        shown["timesteps"] = np.asarray(schedule.timesteps, np.float32)
        shown["sigmas"] = np.asarray(schedule.sigmas, np.float32)
        shown |= {f"latents.{n}": x for n, x in enumerate(self.denoiser.latents, 1)}
        return Made(video.frames, shown, seconds)

    def trace(self, results: Mapping[str, np.ndarray], step: int, note: Note) -> None:
        """The transformer on what the reference's was given in a step."""
        given = call_of(load_call(results, step), LATENT_CHANNELS)
        model: Any = self.denoiser.model
        block_length = self.denoiser.block_length
        walk(model, **given, note=note, block_length=block_length, layers=self.plan.layers)

    def decode(self, latents: np.ndarray) -> Frames:
        """Frames from latents ``[1, 16, F, H, W]``."""
        sampled = api.Sample(latents[0], {}, self.plan.fps, Clock())
        return np.concatenate(list(api.decode(self.pipeline.components.codec, sampled)))


def noise_of(plan: Plan, test: int) -> np.ndarray:
    """What both sides start a test from."""
    shape = latent_shape(plan.num_frames, plan.height, plan.width)
    return np.asarray(draw_noise(plan.seeds[test], (1, LATENT_CHANNELS, *shape)))


def image_of(plan: Plan, test: int, folder: Path) -> RgbImage | None:
    """The image of a test: the one laid down in ``folder``, or one of its seed."""
    if plan.task != "i2v":
        return None
    given = folder / "image.npy"
    if given.is_file():
        return np.load(given, allow_pickle=False)
    return synthetic_image(plan.seeds[test], plan.height, plan.width)
