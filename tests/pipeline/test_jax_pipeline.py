"""The pipeline in JAX alone against the hybrid one and diffusers: same checkpoint, noise, sigmas.

All in float32. Frames are compared as 8-bit video, in dB of peak signal to noise.
"""

import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import diffusers
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx
from PIL import Image
from tests.fabricate import Checkpoints
from tests.hybrid import oracle

from skyreels_jax import backends
from skyreels_jax.backends import LOADERS, Backend
from skyreels_jax.checkpoints import Checkpoint, load_transformer
from skyreels_jax.components.encoders import ClipImageEncoder, Umt5TextEncoder, WanAutoencoder
from skyreels_jax.components.protocols import Components
from skyreels_jax.diffusion.unipc import flow_sigmas
from skyreels_jax.errors import RequestError, WeightsError
from skyreels_jax.generation.request.resolve import resolve
from skyreels_jax.generation.request.settings import Request
from skyreels_jax.generation.video import generate
from skyreels_jax.models.parallelism import SINGLE_DEVICE
from skyreels_jax.models.vae_layers import CausalConv
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.prompts import Tokenizer
from skyreels_jax.sampling.denoiser import Denoiser
from skyreels_jax.testing.random_checkpoint import Kind, make_checkpoint
from skyreels_jax.weights.components.clip import stored_image_encoder
from skyreels_jax.weights.components.umt5 import stored_text_encoder
from skyreels_jax.weights.components.vae import stored_vae
from skyreels_jax.weights.layout import Layout
from skyreels_jax.weights.plan import FORMATS

STEPS, SHIFT, GUIDANCE = 6, 5.0, 5.0
HEIGHT, WIDTH, FRAMES = 48, 64, 9
PROMPT, NEGATIVE = "A cat on the lake, at sun", "sky"
CLASSES = {
    "t2v": diffusers.SkyReelsV2Pipeline,
    "i2v": diffusers.SkyReelsV2ImageToVideoPipeline,
}
SMALL = {"height": HEIGHT, "width": WIDTH, "num_frames": FRAMES, "steps": 2, "seed": 1}
ENOUGH = 60.0  # dB; the values that were measured stand at each comparison

KINDS = pytest.mark.parametrize("kind", CLASSES)


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    error = np.mean(np.square(a.astype(np.float64) - b.astype(np.float64)))
    return float("inf") if error == 0 else 10 * np.log10(255**2 / error)


def noise() -> np.ndarray:
    return np.random.default_rng(7).standard_normal((1, 16, 3, 6, 8)).astype(np.float32)


def photo() -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((2 * WIDTH, 2 * HEIGHT), Image.Resampling.BICUBIC)


@cache
def denoiser(folder: Path) -> Denoiser:
    return Denoiser(load_transformer(Checkpoint.open(folder), dtype=jnp.float32))


def by_backend(folder: Path, backend: Backend) -> Components:
    """Parts as :class:`Pipeline` has them."""
    checkpoint = Checkpoint.open(folder)
    float32 = jnp.dtype(jnp.float32)
    parts = LOADERS[backend](checkpoint, float32, float32, "cpu", "off", None, SINGLE_DEVICE)
    image = parts.image_encoder() if checkpoint.config.image_dim else None
    return Components(parts.text_encoder(), parts.vae(), image)


def in_jax(folder: Path, changed: str | None = None) -> Components:
    """Parts that prepare the image as diffusers does; of ``changed``, one weight is another."""
    checkpoint = Checkpoint.open(folder)
    layout = checkpoint.layout
    vae = stored_vae(layout).load(jnp.float32)
    text = stored_text_encoder(layout).load(jnp.float32)
    if changed == "vae":
        shift_one(vae.decoder.conv_in.kernel)
    if changed == "text_encoder":
        shift_one(text.blocks.attn.v.kernel)
    image = None
    if checkpoint.config.image_dim:
        encoder = stored_image_encoder(layout).load(jnp.float32)
        if changed == "image_encoder":
            shift_one(encoder.pre_norm.bias)
        image = ClipImageEncoder(encoder, "diffusers")
    tokenizer = Tokenizer.from_folder(checkpoint.tokenizer)
    return Components(Umt5TextEncoder(text, tokenizer), WanAutoencoder(vae), image)


def shift_one(parameter: nnx.Param) -> None:
    """Add three standard deviations to one of its numbers."""
    value = parameter.get_value()
    first = (0,) * value.ndim
    parameter.set_value(value.at[first].add(3 * value.std()))


def video(components: Components, folder: Path) -> np.ndarray:
    checkpoint = Checkpoint.open(folder)
    request = Request(
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        image=photo() if checkpoint.task == "i2v" else None,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        steps=STEPS,
        guidance_scale=GUIDANCE,
        shift=SHIFT,
        seed=0,
        dtype="float32",
    )
    resolved = resolve(request, checkpoint)
    start = jnp.asarray(noise())
    load = partial(denoiser, folder)
    return generate(components, load, resolved, noise=lambda _: start).frames


def by_diffusers(pipeline: diffusers.DiffusionPipeline, kind: Kind) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    frames = oracle.frames(
        pipeline,
        noise(),
        flow_sigmas(STEPS, SHIFT),
        photo() if kind == "i2v" else None,
        prompt=PROMPT,
        negative_prompt=NEGATIVE,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        guidance_scale=GUIDANCE,
    )
    return np.rint(frames * 255).astype(np.uint8)


@pytest.fixture(scope="module")
def theirs(checkpoints: Checkpoints) -> Callable[[Kind], np.ndarray]:
    return cache(
        lambda kind: by_diffusers(
            CLASSES[kind].from_pretrained(checkpoints(kind, "diffusers")), kind
        )
    )


@pytest.mark.parametrize("kind", ["t2v", pytest.param("i2v", marks=pytest.mark.slow)])
def test_a_video_is_that_of_the_hybrid_pipeline_from_either_layout(checkpoints, kind: Kind):
    folders = [checkpoints(kind, "diffusers"), checkpoints(kind, "original")]
    first, second = (video(by_backend(folder, "jax"), folder) for folder in folders)
    np.testing.assert_array_equal(first, second)
    hybrid = video(by_backend(folders[0], "hybrid"), folders[0])
    assert hybrid.std() > 30  # there is something to see
    assert psnr(first, hybrid) >= ENOUGH  # measured 90.3, 90.3


@KINDS
def test_a_video_is_that_of_diffusers(checkpoints, theirs, kind: Kind):
    folder = checkpoints(kind, "original")
    assert psnr(video(in_jax(folder), folder), theirs(kind)) >= ENOUGH  # measured 84.8, 88.9


@pytest.mark.parametrize(
    ("kind", "changed"),
    [
        ("t2v", "vae"),  # measured 51.4 dB
        ("t2v", "text_encoder"),  # 54.3
        ("i2v", "vae"),  # 51.0
        ("i2v", "image_encoder"),  # 38.6
    ],
)
def test_one_changed_weight_is_caught(checkpoints, theirs, kind: Kind, changed: str):
    folder = checkpoints(kind, "original")
    assert psnr(video(in_jax(folder, changed), folder), theirs(kind)) < ENOUGH


@KINDS
def test_diffusers_loads_what_is_saved_and_makes_the_same_video(
    tmp_path, checkpoints, theirs, kind: Kind
):
    saved = tmp_path / "saved"
    Pipeline.from_pretrained(checkpoints(kind, "original")).save_pretrained(saved)
    models = {
        "transformer": diffusers.SkyReelsV2Transformer3DModel,
        "vae": diffusers.AutoencoderKLWan,
        "text_encoder": transformers.UMT5EncoderModel,
    }
    if kind == "i2v":
        models["image_encoder"] = transformers.CLIPVisionModelWithProjection
    for part, model in models.items():
        _, report = model.from_pretrained(saved / part, output_loading_info=True)
        assert not any(report.values()), (part, report)
    pipeline = CLASSES[kind].from_pretrained(saved, dtype=torch.float32)
    assert pipeline.scheduler.config.flow_shift == {"t2v": 8.0, "i2v": 5.0}[kind]
    assert psnr(by_diffusers(pipeline, kind), theirs(kind)) >= ENOUGH  # measured equal
    weight = pipeline.vae.decoder.conv_in.weight
    with torch.no_grad():
        weight[0, 0, 0, 0, 0] += 3 * weight.std()
    assert psnr(by_diffusers(pipeline, kind), theirs(kind)) < ENOUGH  # measured 51.4, 51.0


def test_saving_refuses_what_would_not_be_a_pipeline(tmp_path, checkpoints):
    folder = make_checkpoint(tmp_path / "checkpoint", "t2v", "original")
    with pytest.raises(RequestError, match="in or around it"):
        Pipeline.from_pretrained(folder).save_pretrained(folder / "inside")
    (folder / "Wan2.1_VAE.pth").unlink()
    with pytest.raises(WeightsError, match=r"Wan2\.1_VAE\.pth is missing"):
        Pipeline.from_pretrained(folder).save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


WITHOUT_TORCH = """
import sys
sys.modules.update(dict.fromkeys(("torch", "diffusers", "transformers", "accelerate")))
import numpy as np
from skyreels_jax import Pipeline
image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
small = {small}
videos = [
    Pipeline.from_pretrained(folder)("a cat", image=image, **small).frames
    for folder in sys.argv[1:]
]
assert videos[0].shape == (9, 48, 64, 3) and videos[0].std() > 20
assert (videos[0] == videos[1]).all()
"""


def test_both_layouts_make_a_video_where_torch_cannot_be_imported(checkpoints):
    folders = [str(checkpoints("i2v", layout)) for layout in FORMATS]
    code = WITHOUT_TORCH.format(small=SMALL)
    subprocess.run([sys.executable, "-c", code, *folders], check=True)


def test_the_hybrid_backend_does_need_torch(checkpoints):
    """The same program fails when it asks for PyTorch: the test above can fail."""
    code = WITHOUT_TORCH.format(small=SMALL).replace("(folder)", "(folder, backend='hybrid')")
    folder = str(checkpoints("i2v", "diffusers"))
    done = subprocess.run([sys.executable, "-c", code, folder], capture_output=True, text=True)
    assert done.returncode
    assert "needs torch, diffusers, transformers, which" in done.stderr.splitlines()[-1]


def test_a_prompt_seen_before_does_not_load_the_text_encoder(
    tmp_path, checkpoints, monkeypatch: pytest.MonkeyPatch
):
    checkpoint = Checkpoint.open(checkpoints("t2v", "original"))

    def encode(prompt: str, **options: str) -> np.ndarray:
        pipeline = Pipeline(checkpoint, prompt_cache=tmp_path, **options)
        return pipeline.components.text_encoder.encode([prompt])

    first = encode("a cat")
    assert len(list(tmp_path.glob("*.safetensors"))) == 1

    def refuse(layout: Layout) -> None:
        raise RuntimeError("the text encoder was loaded")

    monkeypatch.setattr(backends, "stored_text_encoder", refuse)
    np.testing.assert_array_equal(encode("a cat"), first)
    for options, prompt in (({}, "a dog"), ({"dtype": "float32"}, "a cat")):
        with pytest.raises(RuntimeError, match="was loaded"):
            encode(prompt, **options)


def test_the_vae_has_a_dtype_of_its_own(checkpoints):
    folder = checkpoints("t2v", "original")

    def first(**options: str) -> CausalConv:
        vae = Pipeline.from_pretrained(folder, **options).components.vae
        return vae.load().model.decoder.conv_in

    for options, dtype in (
        ({}, "float32"),
        ({"dtype": "float32", "vae_dtype": "bfloat16"}, "bfloat16"),
    ):
        layer = first(**options)
        assert (layer.dtype, layer.kernel.dtype) == (dtype, dtype)
    for options, says in (
        ({"vae_dtype": "float16"}, "`vae_dtype` 'float16' is unknown; there are"),
        ({"vae_dtype": "bfloat16", "backend": "hybrid"}, "leave `vae_dtype` out"),
    ):
        with pytest.raises(RequestError, match=says):
            Pipeline.from_pretrained(folder, **options)


@pytest.mark.parametrize("part", ["Wan2.1_VAE.pth", "models_t5_umt5-xxl-enc-bf16.pth"])
def test_a_part_that_is_missing_is_named(tmp_path, part: str):
    folder = make_checkpoint(tmp_path / "checkpoint", "t2v", "original")
    (folder / part).unlink()
    with pytest.raises(WeightsError, match=re.escape(f"{part} is missing")):
        Pipeline.from_pretrained(folder)("a cat", **SMALL)
