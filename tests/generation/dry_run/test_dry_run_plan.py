"""What a plan says, against calculations of its own, the compiler, and a running process."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from flax import nnx
from PIL import Image
from safetensors import safe_open
from tests.fabricate import Checkpoints

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.generation.dry_run.plan import Memory, StagePlan, plan, plan_vae
from skyreels_jax.generation.request.resolve import resolve
from skyreels_jax.generation.request.resolved import ResolvedRequest
from skyreels_jax.generation.request.settings import Request
from skyreels_jax.memory import Direction, bytes_of, vae_work
from skyreels_jax.models.vae import WanVae
from skyreels_jax.models.vae_layers import WAN_VAE, Residual, VaeConfig
from skyreels_jax.testing.random_checkpoint import (
    SMALL_CLIP,
    SMALL_VAE,
    TEXT_DIM,
    Kind,
    transformer_of,
)
from skyreels_jax.weights.plan import Format

PLENTY = Memory(2**50)
STEPS = 3


def request_for(checkpoint: Checkpoint, **changes) -> ResolvedRequest:
    photo = Image.fromarray(np.zeros((32, 48, 3), np.uint8))
    settings = {"height": 32, "width": 48, "num_frames": 9, "steps": STEPS, "dtype": "float32"}
    settings["image"] = photo if checkpoint.task == "i2v" else None
    return resolve(Request(**({"prompt": "a fox"} | settings | changes)), checkpoint)


def stages(folder: Path, *, hybrid=False, memory=PLENTY, **changes) -> dict[str, StagePlan]:
    checkpoint = Checkpoint.open(folder)
    request = request_for(checkpoint, **changes)
    return {s.stage: s for s in plan(checkpoint, request, hybrid=hybrid, memory=memory)}


@pytest.fixture(scope="module")
def i2v(checkpoints: Checkpoints) -> dict[str, StagePlan]:
    return stages(checkpoints("i2v", "diffusers"))


@pytest.mark.parametrize(
    ("kind", "layout", "names"),
    [
        ("t2v", "original", ["text", "denoise", "decode"]),
        ("df", "diffusers", ["text", "denoise", "decode"]),
        ("i2v", "original", ["text", "image", "condition", "denoise", "decode"]),
    ],
)
def test_stages_come_in_the_order_they_run(checkpoints, kind: Kind, layout: Format, names):
    assert list(stages(checkpoints(kind, layout), hybrid=True)) == names


def test_a_first_frame_of_diffusion_forcing_is_encoded(checkpoints):
    photo = Image.fromarray(np.zeros((32, 48, 3), np.uint8))
    planned = stages(checkpoints("df", "diffusers"), image=photo)
    assert list(planned) == ["text", "condition", "denoise", "decode"]
    one, whole = (conv_operations(SMALL_VAE, "encode", (32, 48), n) for n in (1, 3))
    assert planned["condition"].operations == one
    assert whole > 2 * one


def test_weights_are_the_bytes_of_every_tensor(checkpoints, i2v):
    """In the dtype that they are loaded in: float32, four bytes a number."""
    folder = checkpoints("i2v", "diffusers")
    for stage, part in (
        ("text", "text_encoder"),
        ("condition", "vae"),
        ("denoise", "transformer"),
        ("decode", "vae"),
    ):
        numbers = sum(tensor.size for tensor in tensors_of(folder / part))
        assert i2v[stage].weights == 4 * numbers
    half = stages(folder, hybrid=True, dtype="bfloat16")
    assert 2 * half["denoise"].weights == i2v["denoise"].weights
    assert 2 * half["text"].weights == i2v["text"].weights
    assert half["decode"].weights == i2v["decode"].weights  # the VAE stays in float32


def tensors_of(folder: Path) -> Iterator[np.ndarray]:
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="np") as opened:
            for name in opened.keys():  # noqa: SIM118
                yield np.empty(opened.get_slice(name).get_shape(), np.int8)


def test_text_operations_are_those_of_two_prompts_of_full_length(checkpoints, i2v):
    tokens, inner, ffn, layers = 512, 32, 48, 2
    attention = 4 * tokens * TEXT_DIM * inner + 2 * tokens * tokens * inner
    once = 2 * layers * (attention + 3 * tokens * TEXT_DIM * ffn)
    assert i2v["text"].operations == 2 * once
    unguided = stages(checkpoints("t2v", "diffusers"), guidance_scale=1.0)
    assert unguided["text"].operations == once


def test_image_operations_are_those_of_the_tower_but_its_last_block(i2v):
    tokens, dim, layers = 257, SMALL_CLIP.dim, SMALL_CLIP.num_layers - 1
    patches = 256 * 14 * 14 * 3 * dim
    block = (
        4 * tokens * dim * dim + 2 * tokens * tokens * dim + 2 * tokens * dim * SMALL_CLIP.ffn_dim
    )
    assert i2v["image"].operations == 2 * (patches + layers * block)


@pytest.mark.parametrize("scale", [5.0, 1.0])
def test_denoising_operations_are_those_of_all_steps(checkpoints, scale: float):
    planned = stages(checkpoints("t2v", "diffusers"), guidance_scale=scale)["denoise"]
    config = transformer_of("t2v")
    tokens, dim, text = 3 * 2 * 3, config.dim, config.text_len
    layer = 4 * tokens * dim * dim + 2 * tokens * tokens * dim
    layer += 2 * tokens * dim * dim + 2 * tokens * text * dim + 2 * tokens * dim * config.ffn_dim
    ends = 2 * tokens * dim * 16 * 4
    time = config.freq_dim * dim + 7 * dim * dim
    calls = 1 if scale == 1 else 2
    expected = STEPS * calls * 2 * (config.num_layers * layer + ends + time)
    assert planned.operations == expected
    # Keys and values of texts, made once, are not in it.
    assert expected != expected + STEPS * calls * 4 * config.num_layers * text * dim * dim


def conv_operations(
    config: VaeConfig, direction: Direction, size: tuple[int, int], chunks: int
) -> int:
    """Of the VAE over a video, layer by layer, from its configuration alone."""
    (height, width), frames = size, 4 * chunks - 3
    if direction == "decode":
        height, width, frames = height // 8, width // 8, chunks
    total = 0

    def conv(taps: int, before: int, dim: int) -> None:
        """Of 27 taps, 18 look before the video at its first frame, and are left out."""
        nonlocal total
        products = frames * taps - (18 if taps == 27 else 0)
        total += 2 * products * height * width * before * dim

    def residual(before: int, dim: int) -> None:
        conv(27, before, dim)
        conv(27, dim, dim)
        if before != dim:
            conv(1, before, dim)

    def middle() -> None:
        nonlocal total
        top = config.top_dim
        residual(top, top)
        conv(1, top, 3 * top)
        total += 4 * frames * (height * width) ** 2 * top
        conv(1, top, top)
        residual(top, top)

    if direction == "decode":
        conv(1, config.z_dim, config.z_dim)
        conv(27, config.z_dim, config.top_dim)
        middle()
        for place in config.decoder_layers():
            if isinstance(place, Residual):
                residual(place.in_dim, place.out_dim)
                continue
            if place.temporal:
                frames -= 1  # the first is not convolved in time
                conv(3, place.in_dim, 2 * place.in_dim)
                frames = 2 * frames + 1
            height, width = 2 * height, 2 * width
            conv(9, place.in_dim, place.out_dim)
        conv(27, config.base_dim, 3)
        return total
    conv(27, 3, config.base_dim)
    for place in config.encoder_layers():
        if isinstance(place, Residual):
            residual(place.in_dim, place.out_dim)
            continue
        height, width = height // 2, width // 2
        conv(9, place.in_dim, place.out_dim)
        if place.temporal:
            frames = (frames - 1) // 2
            conv(3, place.out_dim, place.out_dim)
            frames += 1
    middle()
    conv(27, config.top_dim, 2 * config.z_dim)
    conv(1, 2 * config.z_dim, 2 * config.z_dim)
    return total


def test_the_vae_operations_are_those_of_its_layers(i2v):
    for stage, direction in (("condition", "encode"), ("decode", "decode")):
        assert i2v[stage].operations == conv_operations(SMALL_VAE, direction, (32, 48), 3)
        assert i2v[stage].operations != conv_operations(SMALL_VAE, direction, (32, 48), 4)


def kept_by_convolutions(config: VaeConfig, height: int, width: int) -> int:
    """Bytes of the two frames that each causal convolution of the decoder keeps, in float32."""
    height, width = height // 8, width // 8
    numbers = 2 * height * width * (config.z_dim + 4 * config.top_dim)
    for place in config.decoder_layers():
        if isinstance(place, Residual):
            numbers += 2 * height * width * (place.in_dim + place.out_dim)
            continue
        numbers += 2 * height * width * place.in_dim * place.temporal
        height, width = 2 * height, 2 * width
    return 4 * (numbers + 2 * height * width * config.base_dim)


def test_the_state_of_decoding_is_a_latent_and_what_the_convolutions_keep(i2v):
    latent = 4 * 16 * 4 * 6
    work = i2v["decode"].work
    assert work is not None
    assert work.state == kept_by_convolutions(SMALL_VAE, 32, 48) + latent
    assert work.state != kept_by_convolutions(SMALL_VAE, 32, 64) + latent


def test_the_state_of_denoising_is_its_latents_solver_and_texts(checkpoints):
    def state(**changes) -> int:
        work = stages(checkpoints("t2v", "diffusers"), hybrid=True, **changes)["denoise"].work
        assert work is not None
        return work.state

    config = transformer_of("t2v")
    texts = 2 * 2 * config.num_layers * config.text_len * config.dim * 4
    latents = 4 * 16 * 3 * 4 * 6
    # The latents and three of the solver's (docs/numerics.md); little numbers besides.
    assert texts + 4 * latents <= state() < texts + 4 * latents + 400
    assert state(guidance_scale=1.0) < texts < state()


@pytest.mark.parametrize(
    "size",
    [
        (544, 960),
        pytest.param((256, 256), marks=pytest.mark.slow),
        pytest.param((720, 1280), marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("direction", ["encode", "decode"])
def test_the_estimate_of_the_vae_is_what_the_compiler_counts(direction: Direction, size):
    """Of the released shape; never less, or tiles would come too late."""
    model = nnx.eval_shape(lambda: WanVae(WAN_VAE, rngs=nnx.Rngs(0)))
    planned = plan_vae(direction, model, direction, (size, 3), Memory(None))
    assert planned.work is not None
    # Measured 0.92 to 0.999.
    assert 0.85 < planned.work.total / vae_work(WAN_VAE, direction, *size) <= 1
    assert planned.work.total / vae_work(WAN_VAE, direction, size[0], size[1] // 2) > 1.5


@pytest.mark.slow
def test_a_plan_in_tiles_is_that_of_its_tiles():
    model = nnx.eval_shape(lambda: WanVae(SMALL_VAE, rngs=nnx.Rngs(0)))
    weights = bytes_of(nnx.state(model, nnx.Param))

    def planned(height: int, width: int, free: float | None = None) -> StagePlan:
        memory = Memory(None if free is None else int(free))
        return plan_vae("decode", model, "decode", ((height, width), 2), memory)

    needed = vae_work(SMALL_VAE, "decode", 320, 448)
    tiled, whole = (planned(320, 448, weights + share * needed) for share in (0.9, 1.1))
    upper, lower = (planned(height, 256) for height in (256, 128))
    assert (tiled.tiles, whole.tiles) == (4, 1)
    assert tiled.operations == 2 * (upper.operations + lower.operations)
    assert tiled.work and whole.work and upper.work and lower.work
    # On the CPU, all tiles' caches wait in the memory that one is computed in.
    assert tiled.work.state == 2 * (upper.work.state + lower.work.state)
    assert tiled.work.temporary == upper.work.temporary
    assert whole.work.state < tiled.work.state
    assert tiled.total < whole.total


LONG = {"num_frames": 21, "base_num_frames": 9, "overlap_history": 1, "continuation": "latents"}


def test_a_long_video_is_planned_by_its_windows(checkpoints):
    """Six latent frames in windows of 3, 3 and 2, each but the first with one that is given."""
    folder = checkpoints("df", "diffusers")
    prompts = ["a fox", "a crow"]
    planned = stages(folder, hybrid=True, prompt=prompts, **LONG)
    request = request_for(Checkpoint.open(folder), prompt=prompts, **LONG)
    assert [window.columns for window in request.windows] == [3, 3, 2]
    one, shorter = (stages(folder, hybrid=True, num_frames=frames)["denoise"] for frames in (9, 5))
    # Each window's frames have timesteps of their own, where all frames together have one.
    dim, frequencies = transformer_of("df").dim, transformer_of("df").freq_dim
    times = STEPS * 2 * (2 + 2 + 1) * 2 * (frequencies * dim + 7 * dim * dim)
    assert planned["denoise"].operations == 2 * one.operations + shorter.operations + times
    assert planned["denoise"].work and one.work and shorter.work
    assert shorter.work.total < one.work.total <= planned["denoise"].work.total
    # Both models are there until the last window is decoded.
    alone = stages(folder, hybrid=True)
    both = alone["denoise"].weights + alone["decode"].weights
    assert planned["denoise"].weights == planned["decode"].weights == both


def test_pytorch_is_not_asked_for_its_work(checkpoints):
    planned = stages(checkpoints("i2v", "diffusers"), hybrid=True)
    assert [stage for stage, of in planned.items() if of.work] == ["denoise"]
    for of in planned.values():
        assert (of.operations > 0) is (of.work is not None)
        assert of.total == of.weights + (of.work.total if of.work else 0)


PEAK = """
import jax, numpy as np
from flax import nnx
from skyreels_jax.models.vae import WanVae, decode_chunks
from skyreels_jax.models.vae_layers import VaeConfig

def peak():
    # Not of getrusage: that begins with the peak of the process that started this one.
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))

vae = nnx.eval_shape(lambda: WanVae(VaeConfig({config}), rngs=nnx.Rngs(0)))
nnx.update(vae, jax.tree.map(lambda p: np.zeros(p.shape, p.dtype), nnx.state(vae)))
z = lambda side: np.zeros((1, 16, 3, side, side), np.float32)
list(decode_chunks(vae, z(2)))
before = peak()
list(decode_chunks(vae, z({side} // 8)))
print(peak() - before)
"""


@pytest.mark.slow
def test_a_process_takes_what_was_planned():
    """Peak of a process that decodes, beside its peak before, when the weights were there."""
    side, config = 384, {"base_dim": 16, "z_dim": 16, "dim_mult": (1, 2, 4, 4), "num_res_blocks": 1}
    model = nnx.eval_shape(lambda: WanVae(VaeConfig(**config), rngs=nnx.Rngs(0)))
    planned = plan_vae("decode", model, "decode", ((side, side), 3), Memory(None)).work
    assert planned is not None
    spelled = ", ".join(f"{name}={value}" for name, value in config.items())
    code = PEAK.format(config=spelled, side=side)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    # Measured 1.23: the compiler's own memory, some 60 MB, is in it.
    assert 0.8 < int(done.stdout) / planned.total < 1.6
