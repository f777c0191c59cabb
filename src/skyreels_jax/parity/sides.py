"""The two sides of a comparison: each makes the videos of a plan and records how.

``python -m skyreels_jax.parity.sides SIDE FOLDER`` does the work of one side in a process of its
own: it reads ``FOLDER/plan.json`` and writes to ``FOLDER/raw/SIDE``. The reference comes first,
since the other sides' activations are captured on its inputs.
"""

import argparse
import json
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import ArrayLike
from PIL import Image

from skyreels_jax.components.encoders import prepare_image
from skyreels_jax.diffusion.guidance import guidance_of
from skyreels_jax.diffusion.unipc import flow_sigmas
from skyreels_jax.generation.video import generate
from skyreels_jax.generation.window_generator import encode_inputs
from skyreels_jax.geometry import LATENT_CHANNELS, latent_shape
from skyreels_jax.media import RgbImage
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.parity.activation_sites import ENTRY_SITES, HEAD_SITES, block_sites
from skyreels_jax.parity.capture import capture_activations, model_inputs
from skyreels_jax.parity.plan import ParityPlan, synthetic_image
from skyreels_jax.parity.recording import (
    Arrays,
    Record,
    arrays,
    decoded_file,
    load_call,
    result_file,
    save_call,
    side_folder,
    trace_file,
    writing,
)
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.sampling.denoiser import Denoised, Denoiser
from skyreels_jax.sampling.noise import draw_noise
from skyreels_jax.sampling.progress import Clock
from skyreels_jax.shapes import Frames, Latents
from skyreels_jax.torch_side.components import TorchImageEncoder
from skyreels_jax.torch_side.diffusers_pipeline import (
    PipelineRun,
    as_tensor,
    load_pipeline,
    original_numerics,
    run_pipeline,
)
from skyreels_jax.torch_side.hooks import TransformerCall, capture_torch_activations

# Channels of the condition ``y`` that are a mask; the others are latents.
_MASK_CHANNELS: Final = 4


@dataclass(eq=False)
class SideResult:
    """A video and how it came about.

    Attributes:
        frames: uint8.
        stages: values by name, of which both sides have the same.
        calls: what the transformer was given at the traced steps (PyTorch only).
        seconds: ``compile``, ``encode``, ``decode``, and ``steps`` (a list).
    """

    frames: Frames
    stages: dict[str, np.ndarray]
    seconds: dict[str, float | list[float]]
    calls: dict[int, TransformerCall] = field(default_factory=dict)


@runtime_checkable
class Side(Protocol):
    """One implementation with its weights loaded."""

    def generate(self, test: int, image: RgbImage | None) -> SideResult:
        """Make the video of a test."""
        ...

    def trace(self, results: Arrays, step: int, record: Record) -> None:
        """Record the transformer's activations on the reference's inputs of a step."""
        ...

    def decode(self, latents: np.ndarray) -> Frames:
        """Decode latents ``[1, 16, F, H, W]``."""
        ...


class TorchSide:
    """Diffusers' pipeline."""

    def __init__(
        self,
        plan: ParityPlan,
        dtype: str = "float32",
        *,
        encoders: str | None = None,
        numerics: str = "diffusers",
    ):
        self.plan, self.numerics = plan, numerics
        self.checkpoint = plan.checkpoint()
        self.pipeline: Any = load_pipeline(
            self.checkpoint, device=plan.device, dtype=dtype, encoders=encoders
        )

    def generate(self, test: int, image: RgbImage | None) -> SideResult:
        """Make the video of a test."""
        plan = self.plan
        settings: dict[str, object] = {
            "prompt": plan.prompts[test],
            "negative_prompt": plan.negative_prompt,
            "height": plan.height,
            "width": plan.width,
            "num_frames": plan.num_frames,
        }
        if plan.task == "df":
            settings |= {"fps": plan.fps, "base_num_frames": plan.num_frames, "ar_step": 0}
        start = time.perf_counter()
        if image is not None:
            # As the original prepares it; diffusers would cut its centre out.
            encoder = TorchImageEncoder(self.pipeline.image_encoder, None)
            features = encoder.encode(prepare_image(image, plan.height, plan.width))
            states = as_tensor(features[None], self.pipeline)
            self.pipeline.encode_image = lambda *_: states
            size, kind = (plan.width, plan.height), Image.Resampling.LANCZOS
            settings["image"] = Image.fromarray(image).resize(size, kind)
        done = run_pipeline(
            self.pipeline,
            _noise(plan, test),
            flow_sigmas(plan.steps, plan.shift),
            guidance_scale=plan.guidance_scale,
            kept_steps=tuple({0, *plan.traced}),
            numerics=self.numerics,
            **settings,
        )
        seconds: dict[str, float | list[float]] = {
            "compile": 0.0,
            "steps": done.seconds,
            "encode": done.moments[0] - start,
            "decode": time.perf_counter() - done.moments[-1],
        }
        assert done.frames is not None
        return SideResult(done.frames, self._stages(done), seconds, done.calls)

    def _stages(self, done: PipelineRun) -> dict[str, np.ndarray]:
        first = done.calls[0]
        stages = {"text": np.asarray(first["encoder_hidden_states"])}
        if done.negative is not None:
            stages["text.negative"] = done.negative
        if "encoder_hidden_states_image" in first:
            y = np.asarray(first["hidden_states"])[:, LATENT_CHANNELS:]
            stages |= _image_stages(first["encoder_hidden_states_image"], y)
        for name in ("timesteps", "sigmas"):
            values = getattr(self.pipeline.scheduler, name)
            stages[name] = values.cpu().numpy().astype(np.float32)
        return stages | {f"latents.{n}": x for n, x in enumerate(done.latents, 1)}

    def trace(self, results: Arrays, step: int, record: Record) -> None:
        """Record the transformer's activations on its inputs of a step."""
        image = self.checkpoint.config.model_type == "i2v"
        inside = block_sites(image=image) if self.plan.layers == "all" else ()
        around, within = (
            [(site.torch_module, site.input_name, site.output_name) for site in sites]
            for sites in ((*ENTRY_SITES, *HEAD_SITES), inside)
        )
        with original_numerics(self.pipeline, self.numerics):
            call = load_call(results, step)
            capture_torch_activations(self.pipeline.transformer, call, around, within, record)

    def decode(self, latents: np.ndarray) -> Frames:
        """Refuse: the reference's frames are those of its latents already."""
        raise NotImplementedError


@dataclass(frozen=True, eq=False)
class RecordingDenoiser(Denoiser):
    """A denoiser that keeps the latents after each step, as the other side does."""

    latents: list[np.ndarray] = field(default_factory=list)

    def run(self, noise: Latents, *arguments: Any, **more: Any) -> Denoised:
        """Denoise as a :class:`Denoiser`, at the cost of a copy a step."""
        self.latents.clear()

        def keep(x: jax.Array) -> None:
            self.latents.append(np.moveaxis(np.asarray(x, np.float32), 0, 2))

        return super().run(noise, *arguments, **more, observe=keep)


class JaxSide:
    """Our pipeline, with encoders and VAE in JAX or (``hybrid``) in PyTorch."""

    def __init__(self, plan: ParityPlan, *, hybrid: bool = False):
        self.plan = plan
        backend = "hybrid" if hybrid else "jax"
        device = plan.device if hybrid else "auto"
        self.pipeline = Pipeline(
            plan.checkpoint(), dtype=plan.dtype, backend=backend, device=device, keep=True
        )
        loaded = self.pipeline.load_denoiser()
        self.denoiser = RecordingDenoiser(loaded.model, loaded.block_length)

    def generate(self, test: int, image: RgbImage | None) -> SideResult:
        """Make the video of a test."""
        request = self.plan.request(test, image)
        components = self.pipeline.components
        noise = jnp.asarray(_noise(self.plan, test))
        schedule = flow_sigmas(request.steps, request.shift)
        video = generate(
            components,
            lambda: self.denoiser,
            request,
            noise=lambda _: noise,
            schedule=schedule,
        )
        times = video.timings.stages
        seconds: dict[str, float | list[float]] = {
            "compile": times.get("compile", 0.0),
            "steps": list(video.timings.steps),
            "encode": sum(times.get(name, 0.0) for name in ("text", "image", "condition")),
            "decode": times.get("decode", 0.0),
        }
        encoded = encode_inputs(components, request, guidance_of(request.guidance_scale), Clock())
        stages = {"text": np.asarray(encoded.positive[request.prompt], np.float32)}
        if encoded.negative is not None:
            stages["text.negative"] = np.asarray(encoded.negative, np.float32)
        if encoded.clip_fea is not None and encoded.y is not None:
            stages |= _image_stages(encoded.clip_fea, np.asarray(encoded.y, np.float32))
        stages["timesteps"] = np.asarray(schedule.timesteps, np.float32)
        stages["sigmas"] = np.asarray(schedule.sigmas, np.float32)
        stages |= {f"latents.{n}": x for n, x in enumerate(self.denoiser.latents, 1)}
        return SideResult(video.frames, stages, seconds)

    def trace(self, results: Arrays, step: int, record: Record) -> None:
        """Record the transformer's activations on the reference's inputs of a step."""
        model = self.denoiser.model
        assert isinstance(model, WanModel)
        capture_activations(
            model,
            model_inputs(load_call(results, step), LATENT_CHANNELS),
            record,
            block_length=self.denoiser.block_length,
            layers=self.plan.layers,
        )

    def decode(self, latents: np.ndarray) -> Frames:
        """Decode latents ``[1, 16, F, H, W]``."""
        return np.concatenate(list(self.pipeline.decode(latents[0])))


def _image_stages(features: ArrayLike, y: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "image": np.asarray(features, np.float32),
        "mask": y[:, :_MASK_CHANNELS],
        "condition": y[:, _MASK_CHANNELS:],
    }


def _noise(plan: ParityPlan, test: int) -> np.ndarray:
    """Draw the noise that both sides start a test from."""
    shape = latent_shape(plan.num_frames, plan.height, plan.width)
    return np.asarray(draw_noise(plan.seeds[test], (1, LATENT_CHANNELS, *shape)))


def _image(plan: ParityPlan, test: int, folder: Path) -> RgbImage | None:
    """Return the image of a test: the one given in ``folder``, or one drawn by its seed."""
    if plan.task != "i2v":
        return None
    given = folder / "image.npy"
    if given.is_file():
        return np.load(given, allow_pickle=False)
    return synthetic_image(plan.seeds[test], plan.height, plan.width)


def _reference(plan: ParityPlan) -> Side:
    return JaxSide(plan, hybrid=True) if plan.reference == "hybrid" else TorchSide(plan)


def _bf16_baseline(plan: ParityPlan) -> Side:
    if plan.reference == "original-numerics":
        return TorchSide(plan, encoders="bfloat16", numerics="original-numerics")
    return TorchSide(plan, "bfloat16")


# How each side is loaded.
_LOADERS: Final[Mapping[str, Callable[[ParityPlan], Side]]] = {
    "reference": _reference,
    "bf16_baseline": _bf16_baseline,
    "jax": JaxSide,
}


def run_side(side: str, folder: Path, load: Callable[[ParityPlan], Side] | None = None) -> None:
    """Do all of a side's work: videos first, then activations.

    Args:
        side: ``reference``, ``bf16_baseline`` or ``jax``.
        folder: with the plan, and the reference's results where the side is another.
        load: makes the side; by default it is chosen by its name.
    """
    plan = ParityPlan.load(folder / "plan.json")
    side_folder(folder, side).mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    implementation = (load or _LOADERS[side])(plan)
    timings: dict[str, Any] = {"load": time.perf_counter() - start, "tests": []}
    for test in plan.tests:
        result = implementation.generate(test, _image(plan, test, folder))
        with writing(result_file(folder, side, test)) as record:
            for name, values in ({"frames": result.frames} | result.stages).items():
                record(name, np.asarray(values))
            for step, call in result.calls.items():
                save_call(record, step, call)
        timings["tests"].append(result.seconds)
    timings["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    (side_folder(folder, side) / "timings.json").write_text(json.dumps(timings), "utf-8")
    if plan.reference == "hybrid" or not result_file(folder, "reference", 0).is_file():
        return
    for test in plan.tests:
        results = arrays(result_file(folder, "reference", test))
        if side == "jax":
            with writing(decoded_file(folder, test)) as record:
                record("frames", implementation.decode(results[f"latents.{plan.steps}"]))
        for step in plan.traced if plan.layers != "none" else ():
            with writing(trace_file(folder, side, test, step)) as record:
                implementation.trace(results, step, record)


if __name__ == "__main__":
    _parser = argparse.ArgumentParser(description=__doc__)
    _parser.add_argument("side", choices=_LOADERS)
    _parser.add_argument("folder", type=Path)
    run_side(**vars(_parser.parse_args()))
