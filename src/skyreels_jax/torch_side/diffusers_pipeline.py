"""Diffusers' SkyReels-V2 pipelines from a checkpoint in either format: the reference of a proof.

They are given our noise and the original's sigmas; nothing else of them is changed, but for one
fault of their diffusion-forcing loop (see :func:`_with_sigmas`).
"""

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.diffusion.unipc import FlowSchedule
from skyreels_jax.presets import PIPELINE_OF_TASK
from skyreels_jax.shapes import Frames
from skyreels_jax.torch_side.hooks import TransformerCall, to_host
from skyreels_jax.torch_side.modules import (
    load_clip,
    load_umt5,
    load_vae,
    to_torch,
    torch_device,
    torch_dtype,
)
from skyreels_jax.weights.components.transformer import stored_transformer, transformer_json
from skyreels_jax.weights.tokenizer_file import open_tokenizer

if TYPE_CHECKING:
    import torch
    from diffusers import (
        DiffusionPipeline,
        SkyReelsV2Transformer3DModel,
        UniPCMultistepScheduler,
    )


def load_torch_transformer(
    checkpoint: Checkpoint, device: "torch.device", dtype: "torch.dtype"
) -> "SkyReelsV2Transformer3DModel":
    """Load the transformer; what diffusers keeps in float32 stays so.

    Raises:
        WeightsError: the component is missing, unsound or incomplete.
    """
    import torch
    from diffusers import SkyReelsV2Transformer3DModel
    from diffusers.models.transformers.transformer_skyreels_v2 import SkyReelsV2RotaryPosEmbed

    config = checkpoint.config
    settings = transformer_json(config, "diffusers")
    del settings["_class_name"]
    with torch.device("meta"):
        model = SkyReelsV2Transformer3DModel(**settings)
    exact = tuple(SkyReelsV2Transformer3DModel._keep_in_fp32_modules or ())
    named = stored_transformer(checkpoint.layout).tensors("diffusers")

    def kept(name: str) -> "torch.dtype":
        parts = name.split(".")
        return torch.float32 if any(part in parts for part in exact) else dtype

    values = {name: to_torch(value).to(device, kept(name)) for name, value in named}
    model.load_state_dict(values, strict=True, assign=True)
    # Tables are no parameters: what was built without memory has none.
    model.rope = SkyReelsV2RotaryPosEmbed(config.head_dim, config.patch_size, 1024).to(device)
    return model.eval().requires_grad_(False)


def load_pipeline(
    checkpoint: Checkpoint,
    *,
    device: str = "cpu",
    dtype: str = "float32",
    encoders: str | None = None,
) -> "DiffusionPipeline":
    """Load the pipeline of a checkpoint's task with all of its components.

    Args:
        checkpoint: in either format.
        device: ``cpu``, ``cuda`` or ``auto``.
        dtype: of transformer and encoders; the VAE is float32.
        encoders: another dtype for the encoders.

    Raises:
        WeightsError: a component is missing, unsound or incomplete.
        UnsupportedError: there is no such device here.
    """
    import diffusers
    from transformers import CLIPImageProcessor

    where, kind = torch_device(device), torch_dtype(jnp.dtype(dtype))
    encoder_kind = torch_dtype(jnp.dtype(encoders or dtype))
    components: dict[str, object] = {
        "tokenizer": _tokenizer(checkpoint.tokenizer),
        "text_encoder": load_umt5(checkpoint, where, encoder_kind),
        "transformer": load_torch_transformer(checkpoint, where, kind),
        "vae": load_vae(checkpoint, where, torch_dtype(jnp.float32)),
        "scheduler": diffusers.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=1.0
        ),
    }
    name = PIPELINE_OF_TASK[checkpoint.task]
    if checkpoint.task == "i2v":
        encoder = load_clip(checkpoint, where, encoder_kind)
        components |= {"image_encoder": encoder, "image_processor": CLIPImageProcessor()}
    pipeline = getattr(diffusers, name)(**components)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@dataclass(eq=False)
class PipelineRun:
    """What is recorded of a run of a pipeline.

    Attributes:
        kept_steps: steps at which calls of the transformer are kept.
        calls: at each of them, all arguments of the first call.
        negative: text states of the second call of a step.
        latents: after each step.
        moments: when each step began, and the last one ended; seconds of a monotonic clock.
        frames: uint8.
    """

    kept_steps: tuple[int, ...]
    calls: dict[int, TransformerCall] = field(default_factory=dict)
    negative: np.ndarray | None = None
    latents: list[np.ndarray] = field(default_factory=list)
    moments: list[float] = field(default_factory=list)
    frames: Frames | None = None

    @property
    def seconds(self) -> list[float]:
        """Seconds of each step, guidance and solver included."""
        return list(np.diff(self.moments))


def _tokenizer(path: Path) -> object:
    """transformers' own tokenizer of a folder, or of what a text encoder's file holds."""
    from transformers import AutoTokenizer

    if path.is_dir():
        return AutoTokenizer.from_pretrained(path)
    with tempfile.TemporaryDirectory() as folder:
        file = open_tokenizer(path).save(Path(folder))
        (file.parent / "tokenizer_config.json").write_text('{"tokenizer_class": "T5TokenizerFast"}')
        return AutoTokenizer.from_pretrained(folder)


def run_pipeline(
    pipeline: Any,
    noise: np.ndarray,
    schedule: FlowSchedule,
    *,
    guidance_scale: float,
    kept_steps: tuple[int, ...] = (),
    numerics: str = "diffusers",
    **settings: object,
) -> PipelineRun:
    """Make a video of one window.

    Args:
        pipeline: from :func:`load_pipeline`.
        noise: latents ``[1, 16, F, H, W]``.
        schedule: the sigmas.
        guidance_scale: up to 1 there is one call a step, else two.
        kept_steps: steps whose transformer inputs are kept.
        numerics: ``diffusers``, or ``original-numerics`` with a pipeline of float32.
        **settings: of the pipeline's call.
    """
    import torch

    run = PipelineRun(kept_steps)
    pipeline.scheduler = _with_sigmas(pipeline.scheduler, schedule)
    latents = torch.tensor(noise, device=pipeline.transformer.device)
    if hasattr(pipeline, "generate_timestep_matrix"):
        real = type(pipeline).prepare_latents

        # Diffusion forcing unpacks four values that its own `latents=` path does not return.
        def given(*args: object, **kwargs: object) -> tuple[object, ...]:
            return latents.clone(), *real(pipeline, *args, **kwargs)[1:]

        pipeline.prepare_latents = given
    else:
        settings["latents"] = latents
    settings |= {"num_inference_steps": schedule.num_steps, "guidance_scale": guidance_scale}
    calls = 2 if guidance_scale > 1 else 1
    with _recorded(pipeline, run, calls), original_numerics(pipeline, numerics):
        frames = pipeline(output_type="np", **settings).frames[0]
    run.frames = np.rint(frames * 255).astype(np.uint8)
    return run


def _with_sigmas(scheduler: "UniPCMultistepScheduler", schedule: FlowSchedule) -> Any:
    """Return UniPC on the original's sigmas in place of diffusers' own grid."""
    import torch
    from diffusers import UniPCMultistepScheduler

    class FixedSigmas(UniPCMultistepScheduler):
        def set_timesteps(
            self, num_inference_steps: int, device: "str | torch.device", **_: object
        ) -> None:
            super().set_timesteps(num_inference_steps, device=device)
            assert num_inference_steps == schedule.num_steps
            self.sigmas = torch.tensor(schedule.sigmas, dtype=torch.float32)
            self.timesteps = torch.tensor(schedule.timesteps)
            # By position: truncated timesteps need not be unique.
            self.set_begin_index(0)

        def step(self, model_output, timestep, sample: "torch.Tensor", return_dict: bool = True):
            # A copy: the loop of diffusion forcing passes a view and overwrites it, after which the
            # corrector of the second step starts from the wrong sample.
            return super().step(model_output, timestep, sample.clone(), return_dict)

    return FixedSigmas.from_config(scheduler.config)


@contextmanager
def _recorded(pipeline: Any, run: PipelineRun, calls: int) -> Iterator[None]:
    """Record the transformer's calls, of which a step has ``calls``, up to the decoding."""
    model, decode = pipeline.transformer, pipeline.vae.decode
    number = 0

    def before_call(_: "torch.nn.Module", args: object, kwargs: TransformerCall) -> None:
        nonlocal number
        (step, call), number = divmod(number, calls), number + 1
        if call:
            run.negative = to_host(kwargs["encoder_hidden_states"])
            return
        run.moments.append(time.perf_counter())
        if step:
            channels = pipeline.vae.config.z_dim
            run.latents.append(to_host(kwargs["hidden_states"][:, :channels]))
        if step in run.kept_steps:
            run.calls[step] = {
                name: to_host(value) if hasattr(value, "detach") else value
                for name, value in kwargs.items()
                if value is not None
            }

    def before_decoding(z: "torch.Tensor", *args: object, **kwargs: object) -> object:
        run.moments.append(time.perf_counter())
        mean, std = (
            np.asarray(pipeline.vae.config[name], np.float32).reshape(1, -1, 1, 1, 1)
            for name in ("latents_mean", "latents_std")
        )
        run.latents.append((to_host(z) - mean) / std)
        return decode(z, *args, **kwargs)

    handle = model.register_forward_pre_hook(before_call, with_kwargs=True)
    pipeline.vae.decode = before_decoding
    try:
        yield
    finally:
        del pipeline.vae.decode
        handle.remove()


@contextmanager
def original_numerics(pipeline: Any, numerics: str) -> Iterator[None]:
    """Compute as ``numerics`` says: as diffusers does, or as the original's scripts do.

    There weights and matrix products are bfloat16 (autocast around the transformer), the residual
    is rounded once a block, and all else is float32.
    """
    import torch

    if numerics == "diffusers":
        yield
        return
    model = pipeline.transformer
    handles = [
        block.register_forward_hook(lambda _, __, output: output.to(torch.bfloat16))
        for block in model.blocks
    ]
    true = model.forward

    def forward(*args: object, **kwargs: object) -> object:
        with torch.autocast(model.device.type, torch.bfloat16):
            return true(*args, **kwargs)

    model.forward = forward
    try:
        yield
    finally:
        del model.forward
        for handle in handles:
            handle.remove()


def as_tensor(values: np.ndarray, pipeline: Any) -> "torch.Tensor":
    """Return a tensor on the device and in the dtype of a pipeline's transformer."""
    import torch

    weight = pipeline.transformer.patch_embedding.weight
    return torch.from_numpy(values).to(weight.device, weight.dtype)
