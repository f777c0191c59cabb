"""The described API, as written in the description, and what it refuses."""

import re
from pathlib import Path
from typing import Any

import av
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from PIL import Image
from tests.fabricate import Checkpoints

from jax_implementation import modules
from jax_implementation.modules import WanModel
from jax_implementation.utils import HybridPipeline
from jax_implementation.utils.weight_converter import (
    create_jax_model_from_config,
    load_torch_weights,
)
from skyreels_jax.errors import RequestError, UnsupportedError, WeightsError
from skyreels_jax.testing.random_checkpoint import make_checkpoint
from skyreels_jax.weights.plan import FORMATS

ROOT = Path(__file__).parents[2]

# Word for word, but for the folder, the device, and a size that a test can wait for.
SNIPPET = """
from jax_implementation.utils import HybridPipeline
from jax_implementation.modules import WanModel
from jax_implementation.utils.weight_converter import (
    load_torch_weights, create_jax_model_from_config)

jax_weights, config = load_torch_weights(folder)
jax_model = create_jax_model_from_config(config)
pipeline = HybridPipeline(model_path=folder, jax_model=jax_model, device="cpu")
video = pipeline.generate(prompt="a cat on the lake", image=input_image, height=32, width=48,
                          num_frames=5, num_inference_steps=3, guidance_scale=6.0, seed=11)
"""
SMALL = {"height": 32, "width": 48, "num_frames": 5, "num_inference_steps": 2, "seed": 11}


def photo() -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (40, 60, 3), dtype=np.uint8))


def test_the_snippet_gives_the_same_video_from_both_layouts(
    checkpoints: Checkpoints, tmp_path: Path
):
    videos = []
    for dialect in FORMATS:
        names = {"folder": str(checkpoints("i2v", dialect)), "input_image": photo()}
        exec(SNIPPET, names)
        assert isinstance(names["jax_model"], WanModel)
        videos.append(names["video"])
    first, second = videos
    assert first.frames.dtype == np.uint8
    assert first.frames.shape == (5, 32, 48, 3)
    assert first.frames.std() > 20  # there is something to see
    assert first.fps == 24
    np.testing.assert_array_equal(first.frames, second.frames)
    first.save(tmp_path / "out.mp4")
    with av.open(tmp_path / "out.mp4") as container:
        assert sum(1 for _ in container.decode(video=0)) == 5


def test_a_model_without_weights_is_given_those_of_the_folder(checkpoints: Checkpoints):
    folder = checkpoints("t2v", "original")
    weights, config = load_torch_weights(folder)
    empty = create_jax_model_from_config(config)
    bound = create_jax_model_from_config(config, weights)
    of_empty = HybridPipeline(folder, empty, "cpu").generate("a cat", **SMALL)
    of_bound = HybridPipeline(folder, bound, "cpu").generate("a cat", **SMALL)
    of_none = HybridPipeline(folder, device="cpu").generate("a cat", **SMALL)
    np.testing.assert_array_equal(of_empty.frames, of_bound.frames)
    np.testing.assert_array_equal(of_empty.frames, of_none.frames)


def test_a_model_with_weights_keeps_them(checkpoints: Checkpoints):
    folder = checkpoints("t2v", "original")
    weights, config = load_torch_weights(folder)
    model = create_jax_model_from_config(config, weights, dtype=jnp.float32)
    before = HybridPipeline(folder, model, "cpu").generate("a cat", **SMALL)
    kernel = model.head.linear.kernel
    kernel.set_value(kernel.get_value() * 2)
    after = HybridPipeline(folder, model, "cpu").generate("a cat", **SMALL)
    assert np.mean(before.frames != after.frames) > 0.5


def test_a_diffusion_forcing_checkpoint_makes_videos_from_text_and_from_an_image(
    checkpoints: Checkpoints,
):
    pipeline = HybridPipeline(checkpoints("df", "diffusers"), device="cpu")
    text = pipeline.generate("a cat", **SMALL)
    image = pipeline.generate("a cat", image=photo(), **SMALL)
    assert text.frames.shape == image.frames.shape == (5, 32, 48, 3)
    assert np.mean(text.frames[0] != image.frames[0]) > 0.5


@pytest.mark.slow
def test_a_long_video_with_the_settings_of_diffusion_forcing(checkpoints: Checkpoints):
    pipeline = HybridPipeline(checkpoints("df", "original"), None, "cpu", jnp.float32)
    wishes: dict[str, Any] = {"height": 32, "width": 48, "seed": 1, "num_frames": 21}
    wishes |= {"num_inference_steps": 2, "base_num_frames": 13, "overlap_history": 5}
    long = pipeline.generate("a fox", **wishes)
    assert long.frames.shape == (21, 32, 48, 3)
    behind = pipeline.generate("a fox", **wishes, ar_step=1, causal_block_size=2)
    assert np.any(behind.frames != long.frames)


@pytest.mark.parametrize("bound", [False, True])
def test_a_model_of_another_configuration_is_refused(checkpoints: Checkpoints, bound: bool):
    weights, config = load_torch_weights(checkpoints("t2v", "diffusers"))
    model = create_jax_model_from_config(config, weights if bound else None)
    with pytest.raises(WeightsError, match="another transformer"):
        HybridPipeline(checkpoints("i2v", "diffusers"), model, "cpu")
    with pytest.raises(WeightsError, match="another transformer"):
        i2v = load_torch_weights(checkpoints("i2v", "diffusers"))[1]
        create_jax_model_from_config(i2v, weights)


def test_weights_that_are_incomplete_are_refused_when_they_are_named(tmp_path: Path):
    folder = make_checkpoint(tmp_path / "checkpoint", "t2v", "original")
    config = (folder / "config.json").read_text()
    (folder / "config.json").write_text(config.replace('"num_layers": 2', '"num_layers": 3'))
    with pytest.raises(WeightsError, match="num_layers"):
        load_torch_weights(folder)


def test_a_missing_part_is_named(tmp_path: Path):
    folder = make_checkpoint(tmp_path / "checkpoint", "t2v", "original")
    (folder / "Wan2.1_VAE.pth").unlink()
    with pytest.raises(WeightsError, match=r"Wan2\.1_VAE\.pth is missing"):
        HybridPipeline(folder, device="cpu")


def test_a_gpu_that_is_not_there_is_refused(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match='give device "cpu"'):
        HybridPipeline(checkpoints("t2v", "diffusers"), device="cuda")


def test_illegal_requests_are_refused_in_the_words_of_the_request(checkpoints: Checkpoints):
    pipeline = HybridPipeline(checkpoints("i2v", "diffusers"), device="cpu")
    with pytest.raises(RequestError, match="need one"):
        pipeline.generate("a cat", **SMALL)
    with pytest.raises(RequestError, match="4 k"):
        pipeline.generate("a cat", image=photo(), **{**SMALL, "num_frames": 6})
    with pytest.raises(RequestError, match="`tempo` does not exist"):
        pipeline.generate("a cat", image=photo(), tempo=3, **SMALL)


def test_the_described_names_are_there():
    for name in modules.__all__:
        assert callable(getattr(modules, name))
    described = {
        *("WanModel", "WanSelfAttention", "WanI2VCrossAttention", "WanT2VCrossAttention"),
        *("WanRMSNorm", "WanLayerNorm", "sinusoidal_embedding_1d", "rope_params", "rope_apply"),
        *("mul_add", "mul_add_add"),
    }
    assert described <= set(modules.__all__)
    assert issubclass(modules.WanSelfAttention, nnx.Module)


def test_the_described_requirements_name_this_package_and_what_exists():
    file = ROOT / "jax_implementation" / "requirements.txt"
    lines = [line for line in file.read_text().splitlines() if not line.startswith("#")]
    constraints, package = lines
    assert (file.parent / constraints.removeprefix("-c ")).is_file()
    extra = re.fullmatch(r"\.\[(\w+)\]", package)
    assert extra and f"\n{extra[1]} = [" in (ROOT / "pyproject.toml").read_text()
    # The folder at the root must not stand in for the installed package.
    assert Path(modules.__file__).is_relative_to(ROOT / "src")


def test_the_number_of_steps_has_one_name_in_a_call(checkpoints: Checkpoints):
    pipeline = HybridPipeline(checkpoints("t2v", "original"), device="cpu")
    with pytest.raises(RequestError, match="`steps` and `num_inference_steps` are the same"):
        pipeline.generate("a cat", steps=1, num_inference_steps=2)
