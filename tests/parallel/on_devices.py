"""Runs of a small transformer on 8 virtual devices, each against the same run on one.

A program of its own, because JAX is told how many devices a CPU is before it starts, by
``XLA_FLAGS=--xla_force_host_platform_device_count=8``. Each ``CASE MESH FAULT`` of its command line
(``-`` for no fault) is answered by a line of JSON.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tests import standins
from tests.parallel.parts_on_devices import PARTS, answer

from skyreels_jax.diffusion.easycache import EasyCache
from skyreels_jax.diffusion.few_steps import CausalSchedule, CausalWindow
from skyreels_jax.diffusion.frame_schedule import plan_blocks, schedule_frames
from skyreels_jax.diffusion.guidance import Guidance, guidance_of
from skyreels_jax.diffusion.teacache import TeaCache
from skyreels_jax.diffusion.unipc import flow_sigmas
from skyreels_jax.models.parallelism import SINGLE_DEVICE
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.parallel import attention as mesh_attention
from skyreels_jax.parallel.transformer import MeshTransformer
from skyreels_jax.sampling.causal import CausalSampler
from skyreels_jax.sampling.denoiser import Denoiser, Sampling
from skyreels_jax.sampling.noise import draw_noise
from skyreels_jax.sampling.step import Conditioning
from skyreels_jax.weights.components.transformer import TRANSFORMER
from skyreels_jax.weights.engine import parameters
from skyreels_jax.weights.quantize import quantize

HEADS, STEPS = 8, 3
SHAPE = {"dim": 80, "ffn_dim": 96, "num_heads": HEADS, "text_len": 16}


@dataclasses.dataclass(frozen=True)
class Case:
    """A run: what of the transformer's ways it takes.

    Attributes:
        kind: ``t2v``, ``i2v``, ``df`` (asynchronous, block-causal, with kept keys and values), or
            ``causal`` (block by block, each seeing a window).
        videos: at once; with both prompts in a batch these are twice as many rows.
        size: rows and columns of latents; the patches of a frame are a quarter of their product.
        cached: what leaves calls out, if anything.
        kernels: what the blocks' kernels are quantised to.
        path: of attention.
        lora: whether LoRAs stand beside some kernels.
        dtype: of parameters and products.
    """

    kind: str = "t2v"
    videos: int = 4
    size: tuple[int, int] = (8, 8)
    cached: str | None = None
    kernels: str | None = None
    path: str | None = None
    lora: bool = False
    dtype: str = "float32"


CASES = {
    "t2v": Case(),
    "uneven": Case(size=(6, 10)),
    "fewer patches than devices": Case(size=(4, 4)),
    "i2v": Case("i2v", size=(6, 6)),
    "df": Case("df", size=(6, 6)),
    "df in tiles": Case("df", size=(6, 6), path="chunked"),
    "teacache": Case(size=(6, 6), cached="teacache"),
    "easycache": Case(size=(6, 6), cached="easycache"),
    "int8": Case(size=(6, 6), kernels="int8"),
    "lora beside int8": Case(size=(6, 6), kernels="int8", lora=True),
    "bf16": Case(size=(6, 6), dtype="bfloat16"),
    "causal": Case("causal", size=(6, 6)),
    "causal int8": Case("causal", size=(6, 6), kernels="int8"),
    "causal bf16": Case("causal", size=(6, 6), dtype="bfloat16"),
}


def config_of(case: Case) -> TransformerConfig:
    changes = SHAPE | {"inject_sample_info": case.kind == "df"}
    if case.kind == "i2v":
        return standins.image_config(**changes)
    return standins.config(**changes)


def model_of(case: Case) -> WanModel:
    """The stand-in, of a size of values at which no layer dominates; perhaps quantised."""
    rng = np.random.default_rng(5)
    config = config_of(case)
    model = standins.transformer(config)
    for path, leaf in parameters(model).items():
        value = leaf.get_value()
        if path.endswith(".kernel") and path.startswith("blocks."):
            leaf.set_value(value / (0.3 * value.shape[-2] ** 0.5))
    if (case.kernels, case.dtype) == (None, "float32"):
        return model
    plain = {path: leaf.get_value() for path, leaf in parameters(model).items()}
    kernels = None if case.kernels is None else jnp.dtype(case.kernels)
    model = TRANSFORMER.abstract(config, case.dtype, kernel_dtype=kernels)
    for path, leaf in parameters(model).items():
        if path.endswith("_scale"):
            continue
        value = np.asarray(plain[path])
        if kernels is not None and path + "_scale" in parameters(model):
            value, scale = quantize(value, case.kernels)
            parameters(model)[path + "_scale"].set_value(jnp.asarray(scale))
        leaf.set_value(jnp.asarray(value, leaf.dtype))
    if case.lora:
        for linear in (model.blocks.self_attn.q, model.blocks.ffn.fc1, model.blocks.cross_attn.o):
            layers, before, after = linear.kernel.shape
            sizes = (layers, before, 4), (layers, 4, after)
            down, up = (jnp.asarray(0.3 * rng.standard_normal(size), jnp.float32) for size in sizes)
            linear.lora_down, linear.lora_up = (nnx.data(nnx.Param(part)) for part in (down, up))
    return model


def on_mesh(model: WanModel, placed: MeshTransformer) -> WanModel:
    """The model with every parameter where the mesh has it."""
    graph, state = nnx.split(model)
    leaves = [
        (
            path,
            leaf.replace(placed.placement(".".join(map(str, path)), np.asarray(leaf.get_value()))),
        )
        for path, leaf in nnx.to_flat_state(state)
    ]
    return nnx.merge(graph, nnx.from_flat_state(leaves))


def run(case: Case, denoiser: Denoiser) -> list[np.ndarray]:
    """The latents after every step, as far as the observer sees them."""
    rng = np.random.default_rng(1)
    config = config_of(case)
    rows, columns = case.size
    frames = 5 if case.kind == "df" else 3
    texts = rng.standard_normal((2, case.videos, config.text_len, config.text_dim))
    positive, negative = (jnp.asarray(text, jnp.float32) for text in texts)
    given = {}
    if case.kind == "i2v":
        y = rng.standard_normal((case.videos, 20, frames, rows, columns))
        clip = rng.standard_normal((case.videos, config.image_tokens, config.image_dim))
        given = {"y": jnp.asarray(y, jnp.float32), "clip_fea": jnp.asarray(clip, jnp.float32)}
    if case.kind == "df":
        given["fps"] = jnp.ones(case.videos, jnp.int32)
    schedule, guidance = flow_sigmas(STEPS, 5.0), guidance_of(3.0, batched=True)
    if case.kind == "causal":
        return blocks(case, denoiser, denoiser.condition(guidance, positive, negative), guidance)
    timed = None
    if case.kind == "df":
        timed = schedule_frames(plan_blocks(frames, 2), schedule.timesteps, ar_step=2)
        denoiser = dataclasses.replace(denoiser, block_length=2)
    sampling = Sampling(schedule, guidance, case.path)
    if case.cached:
        kept = np.array(1, np.int32)
        cache = TeaCache(np.float32(50), np.array([1.0, 0.0], np.float32), kept, kept, False)
        if case.cached == "easycache":
            cache = EasyCache(np.float32(50), np.array(2, np.int32), np.array(0, np.int32))
        sampling = dataclasses.replace(sampling, cache=cache)
    seen: list[np.ndarray] = []
    noise = draw_noise(3, (case.videos, 16, frames, rows, columns))
    denoised = denoiser.run(
        noise,
        denoiser.condition(guidance, positive, negative, **given),
        sampling,
        frame_schedule=timed,
        observe=lambda x: seen.append(np.array(x)),
    )
    if case.kind == "df":
        assert denoised.reuse is not None and denoised.reuse.cached
    if case.cached:
        assert denoised.computed < denoised.calls
    return seen


def blocks(
    case: Case, denoiser: Denoiser, conditioning: Conditioning, guidance: Guidance
) -> list[np.ndarray]:
    """Blocks that see a window, past the end of its ring, at positions within it."""
    window = CausalWindow(4, 1, "relative", recompute="prompt")
    schedule = CausalSchedule((1000, 500), 1)
    sampler = CausalSampler(
        denoiser, schedule, window, guidance, case.size, seed=3, batch=case.videos
    )
    sampler.change(conditioning)
    made = [np.asarray(sampler.next()) for _ in range(5)]
    sampler.change(conditioning)
    return [*made, np.asarray(sampler.next())]


def furthest(found: list[np.ndarray], expected: list[np.ndarray]) -> float:
    """The largest difference over all steps, of the largest latent."""
    pairs = zip(found, expected, strict=True)
    return float(max(np.abs(a - b).max() / np.abs(b).max() for a, b in pairs))


def without_mask(placed: MeshTransformer) -> None:
    """Patches that fill up are seen as keys."""
    true = mesh_attention.MeshAttention

    def counts_all(plan, slab, patches):
        del patches
        return true(plan, slab, slab * plan.sequence)

    from skyreels_jax.parallel import transformer

    transformer.MeshAttention = counts_all


def without_turning(placed: MeshTransformer) -> None:
    """Keys do not go round: each device sees its own again and again."""
    jax.lax.ppermute = lambda x, *_: x


FAULTS = {"without mask": without_mask, "without turning": without_turning}


def main(words: list[str]) -> None:
    expected: dict[str, list[np.ndarray]] = {}
    for name, mesh, fault in zip(words[::3], words[1::3], words[2::3], strict=True):
        if name in PARTS:
            print(json.dumps(answer(name, mesh, fault)), flush=True)
            continue
        case = CASES[name]
        model = model_of(case)
        if name not in expected:
            expected[name] = run(case, Denoiser(model, parallelism=SINGLE_DEVICE))
        placed = MeshTransformer.of(mesh, config_of(case))
        if fault != "-":
            jax.clear_caches()  # The same step may have been traced without the fault.
            FAULTS[fault](placed)
        found = run(case, Denoiser(on_mesh(model, placed), parallelism=placed))
        difference = furthest(found, expected[name])
        print(json.dumps([name, mesh, fault, difference, None]), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
