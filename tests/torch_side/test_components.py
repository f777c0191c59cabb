import os
import shutil
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from safetensors.torch import save_file
from tests.fabricate import Checkpoints
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionModelWithProjection,
    UMT5EncoderModel,
)

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.components.protocols import ImageCondition
from skyreels_jax.errors import RequestError, UnsupportedError, WeightsError
from skyreels_jax.torch_side.components import (
    TorchAutoencoder,
    TorchImageEncoder,
    TorchTextEncoder,
    squash_torch,
)
from skyreels_jax.torch_side.modules import to_torch, torch_device
from skyreels_jax.weights.layout import PATHS
from skyreels_jax.weights.plan import FORMATS, Format
from skyreels_jax.weights.safetensors_file import SafetensorsSource

PROMPTS = ["A cat  on the lake &amp; the sky", "你好 " * 300, ""]
VAE_FILE = PATHS["original"]["vae"]


def photo(height: int, width: int) -> ImageCondition:
    rng = np.random.default_rng(0)
    source = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
    pixels = np.moveaxis(source.astype(np.float32) / 127.5 - 1, -1, 0)
    return ImageCondition(source, pixels)


@pytest.mark.parametrize("format", FORMATS)
def test_text_states_are_those_of_transformers(checkpoints: Checkpoints, format: Format):
    encoder = TorchTextEncoder.load(Checkpoint.open(checkpoints("i2v", format)), "cpu", jnp.float32)
    states = encoder.encode(PROMPTS)

    folder = checkpoints("i2v", "diffusers")
    model = UMT5EncoderModel.from_pretrained(folder / "text_encoder").eval()
    words = AutoTokenizer.from_pretrained(folder / "tokenizer")
    cleaned = ["A cat on the lake & the sky", ("你好 " * 300).strip(), ""]
    batch = words(
        cleaned, padding="max_length", max_length=512, truncation=True, return_tensors="pt"
    )
    with torch.no_grad():
        theirs = model(batch.input_ids, batch.attention_mask).last_hidden_state
    theirs = (theirs * batch.attention_mask[..., None]).numpy()
    assert states.dtype == np.float32
    np.testing.assert_array_equal(states, theirs)  # measured 0: the same module
    assert not states[2, 1:].any()
    assert states[1].any(axis=-1).all()


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("preprocessing", ["original", "diffusers"])
def test_image_features_are_those_of_transformers(
    checkpoints: Checkpoints, format: Format, preprocessing
):
    checkpoint = Checkpoint.open(checkpoints("i2v", format))
    encoder = TorchImageEncoder.load(checkpoint, "cpu", jnp.float32, preprocessing)
    image = photo(64, 96)
    features = encoder.encode(image)

    model = CLIPVisionModelWithProjection.from_pretrained(
        checkpoints("i2v", "diffusers") / "image_encoder"
    ).eval()
    if preprocessing == "original":
        pixels = squash_torch(torch.from_numpy(image.pixels))
    else:
        pixels = CLIPImageProcessor()(Image.fromarray(image.source), return_tensors="pt")
        pixels = pixels["pixel_values"]
    with torch.no_grad():
        states = model(pixel_values=pixels, output_hidden_states=True).hidden_states
    assert features.shape == (257, 160)
    np.testing.assert_array_equal(features, states[-2][0].numpy())  # measured 0: the same module
    assert np.abs(features - states[-1][0].numpy()).max() > 0.1


def test_the_squash_has_the_side_of_the_model():
    # The small model of the package has a tower for 64 x 64 pixels.
    encoder = TorchImageEncoder.load(Checkpoint.open("mini-i2v"), "cpu", jnp.float32, "original")
    side = encoder.model.config.image_size
    patches = (side // encoder.model.config.patch_size) ** 2
    assert side == 64
    assert encoder.encode(photo(64, 96)).shape == (1 + patches, 160)
    assert squash_torch(torch.zeros(3, 30, 50), side).shape == (1, 3, side, side)


def test_the_squash_keeps_the_whole_frame_and_the_crop_does_not(checkpoints: Checkpoints):
    checkpoint = Checkpoint.open(checkpoints("i2v", "diffusers"))
    image = photo(64, 96)
    source = image.source.copy()
    source[:, :8] = 0  # outside the centre square
    changed = ImageCondition(source, np.moveaxis(source.astype(np.float32) / 127.5 - 1, -1, 0))
    squashed = TorchImageEncoder.load(checkpoint, "cpu", jnp.float32, "original")
    crop = TorchImageEncoder.load(checkpoint, "cpu", jnp.float32, "diffusers")
    assert np.abs(squashed.encode(image) - squashed.encode(changed)).max() > 0.01
    np.testing.assert_array_equal(crop.encode(image), crop.encode(changed))


def test_a_grey_frame_squashes_to_the_same_grey():
    grey = squash_torch(torch.zeros(3, 30, 50))[0]
    expected = (0.5 - np.array([0.48145466, 0.4578275, 0.40821073])) / np.array(
        [0.26862954, 0.26130258, 0.27577711]
    )
    np.testing.assert_allclose(grey.mean((1, 2)), expected, atol=1e-6)  # measured 6e-8
    assert grey.shape == (3, 224, 224)


@pytest.mark.parametrize("format", FORMATS)
def test_latents_and_frames_are_those_of_diffusers(checkpoints: Checkpoints, format: Format):
    autoencoder = TorchAutoencoder.load(Checkpoint.open(checkpoints("t2v", format)), "cpu")
    vae = AutoencoderKLWan.from_pretrained(
        checkpoints("t2v", "diffusers") / "vae", low_cpu_mem_usage=False
    ).eval()
    generator = torch.Generator().manual_seed(0)
    video = randn_tensor((1, 3, 5, 32, 48), generator).clamp(-1, 1)
    mean, std = (
        torch.tensor(v).reshape(1, 16, 1, 1, 1)
        for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    with torch.no_grad():
        latents = (vae.encode(video).latent_dist.mean - mean) / std
        frames = vae.decode(latents * std + mean).sample
    ours = autoencoder.encode(video[0].numpy())
    assert ours.shape == (16, 2, 4, 6)
    np.testing.assert_allclose(ours, latents[0].numpy(), atol=2e-6)  # measured 0
    decoded = np.concatenate(list(autoencoder.decode_pieces([latents[0].numpy()])), axis=1)
    np.testing.assert_allclose(decoded, frames[0].numpy(), atol=2e-5)  # measured 0
    assert np.abs(decoded - video[0].numpy()).max() > 0.1


def test_frames_come_one_by_one_and_are_those_of_diffusers(checkpoints: Checkpoints):
    vae = TorchAutoencoder.load(Checkpoint.open(checkpoints("t2v", "diffusers")), "cpu")
    latents = np.random.default_rng(0).standard_normal((16, 5, 4, 6)).astype(np.float32)
    mean, std = vae._statistics()
    z = torch.from_numpy(latents * std + mean)[None]
    with torch.inference_mode():
        expected = vae.model.decode(z).sample[0].numpy()
    chunks = list(vae.decode_pieces([latents]))
    assert [chunk.shape for chunk in chunks] == [(3, 1, 32, 48)] + 4 * [(3, 4, 32, 48)]
    np.testing.assert_array_equal(np.concatenate(chunks, axis=1), expected)
    # Each of them depends on those before; what was kept of another video would show.
    later = np.concatenate(list(vae.decode_pieces([latents[:, 1:]])), axis=1)
    assert np.abs(later[:, 1:] - expected[:, 5:]).max() > 0.01


def test_two_videos_can_be_decoded_in_turn(checkpoints: Checkpoints):
    """Nothing of a decode under way is kept in the model."""
    vae = TorchAutoencoder.load(Checkpoint.open(checkpoints("t2v", "diffusers")), "cpu")
    rng = np.random.default_rng(1)
    one, two = rng.standard_normal((2, 16, 3, 4, 4)).astype(np.float32)
    in_turn = zip(vae.decode_pieces([one]), vae.decode_pieces([two]), strict=True)
    alone = zip(list(vae.decode_pieces([one])), list(vae.decode_pieces([two])), strict=True)
    for (a, b), (c, d) in zip(in_turn, alone, strict=True):
        np.testing.assert_array_equal(a, c)
        np.testing.assert_array_equal(b, d)
        assert np.abs(a - b).max() > 0.1


def test_consumers_of_frames_are_not_in_inference_mode(checkpoints: Checkpoints):
    vae = TorchAutoencoder.load(Checkpoint.open(checkpoints("t2v", "diffusers")), "cpu")
    for _ in vae.decode_pieces([np.zeros((16, 2, 4, 4), np.float32)]):
        assert not torch.is_inference_mode_enabled()


def broken(checkpoints: Checkpoints, tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    """A copy of an original-layout folder, and the tensors of its VAE to spoil."""
    folder = tmp_path / "checkpoint"
    shutil.copytree(checkpoints("t2v", "original"), folder)
    return folder, torch.load(folder / VAE_FILE, weights_only=True)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda t: t.pop("conv1.bias"), "conv1.bias"),
        (lambda t: t.update({"conv9.bias": torch.ones(3)}), "conv9.bias"),
        (lambda t: t.update({"conv1.bias": torch.ones(31)}), "31"),
        (lambda t: t.update({"conv1.bias": [1, 2]}), "is a list, not a tensor"),
        (lambda t: t["conv1.bias"].fill_(float("nan")), "NaN or infinite"),
    ],
    ids=["missing", "unexpected", "misshapen", "no tensor", "not finite"],
)
def test_a_file_that_does_not_fit_is_refused(
    checkpoints: Checkpoints, tmp_path: Path, spoil, message: str
):
    folder, tensors = broken(checkpoints, tmp_path)
    spoil(tensors)
    torch.save(tensors, folder / VAE_FILE)
    with pytest.raises(WeightsError, match=message) as error:
        TorchAutoencoder.load(Checkpoint.open(folder), "cpu")
    assert VAE_FILE in str(error.value)


class Malice:
    def __reduce__(self):
        return os.mkdir, ("owned",)


def test_a_file_with_code_in_it_is_refused_and_not_run(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, tensors = broken(checkpoints, tmp_path)
    torch.save({**tensors, "conv1.bias": Malice()}, folder / VAE_FILE)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(WeightsError, match=VAE_FILE):
        TorchAutoencoder.load(Checkpoint.open(folder), "cpu")
    assert not (tmp_path / "owned").exists()


def test_a_truncated_file_is_refused(checkpoints: Checkpoints, tmp_path: Path):
    folder, _ = broken(checkpoints, tmp_path)
    data = (folder / VAE_FILE).read_bytes()
    (folder / VAE_FILE).write_bytes(data[: len(data) // 2])
    with pytest.raises(WeightsError, match=VAE_FILE):
        TorchAutoencoder.load(Checkpoint.open(folder), "cpu")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_arrays_cross_to_torch_bit_for_bit(tmp_path: Path, dtype: torch.dtype):
    tensor = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"x": tensor, "transposed": tensor.T.contiguous()}, tmp_path / "x.safetensors")
    source = SafetensorsSource([tmp_path / "x.safetensors"])
    assert torch.equal(to_torch(source.read("x")), tensor)
    assert torch.equal(to_torch(source.read("transposed").T), tensor)


def test_half_precision_is_kept_on_request(checkpoints: Checkpoints):
    checkpoint = Checkpoint.open(checkpoints("t2v", "original"))
    exact = TorchTextEncoder.load(checkpoint, "cpu", jnp.float32).encode(PROMPTS[:1])
    half = TorchTextEncoder.load(checkpoint, "cpu", jnp.bfloat16).encode(PROMPTS[:1])
    error = np.abs(half - exact).max()
    assert 1e-3 < error < 0.2  # measured 0.068; states are of size 3


def test_a_gpu_that_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match='"cpu"'):
        torch_device("cuda")
    assert torch_device("auto").type == "cpu"
    with pytest.raises(RequestError, match="abacus"):
        torch_device("abacus")
