"""The JAX text and image encoders behind generation's interfaces, from the prompt or image on."""

from dataclasses import replace

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
import torch
from PIL import Image
from tests.models.encoder_oracles import (
    CLIP,
    UMT5,
    clip_from,
    clip_oracle,
    relative,
    run_clip_oracle,
    run_umt5_oracle,
    tensors_of,
    umt5_from,
    umt5_oracle,
)
from tokenizers import models, pre_tokenizers
from transformers import CLIPImageProcessorPil

from skyreels_jax.components import encoders
from skyreels_jax.components.clip_preprocessing import centre_crop, squash
from skyreels_jax.components.encoders import ClipImageEncoder, Umt5TextEncoder, padding_rows
from skyreels_jax.components.protocols import ImageCondition
from skyreels_jax.errors import WeightsError
from skyreels_jax.prompts import Tokenizer

SIZES = [(301, 437), (437, 301), (224, 224), (100, 90), (225, 640), (1080, 1920), (223, 224)]
PROMPTS = ["ab ba", "", "a " * 200, "b " * 700]


def condition(height: int, width: int, video: tuple[int, int] = (48, 80)) -> ImageCondition:
    rng = np.random.default_rng(height)
    coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
    picture = Image.fromarray(coarse).resize((width, height))
    pixels = rng.uniform(-1, 1, (3, *video)).astype(np.float32)
    return ImageCondition(np.asarray(picture), pixels)


def tokenizer() -> Tokenizer:
    pieces = ["<pad>", "</s>", "<unk>", "▁", "a", "b", "▁a", "▁b"]
    backend = tokenizers.Tokenizer(models.Unigram([(p, -1.0) for p in pieces], 2, False))
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    return Tokenizer(backend, pad=0, eos=1)


def torch_squash(pixels: np.ndarray, **resize: object) -> np.ndarray:
    """The original's preprocessing in its own words, in float32."""
    x = torch.from_numpy(pixels)[None]
    x = torch.nn.functional.interpolate(x, size=(224, 224), **resize)[0]
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])[:, None, None]
    return ((x.mul(0.5).add(0.5) - mean) / std).numpy()


@pytest.mark.parametrize("video", [(544, 960), (960, 544), (48, 80), (720, 1280)], ids=str)
def test_original_preprocessing_is_that_of_torch(video: tuple[int, int]):
    image = condition(64, 64, video)
    expected = torch_squash(image.pixels, mode="bicubic", align_corners=False)
    assert np.abs(squash(image) - expected).max() <= 4e-6  # measured 2.1e-6; values reach 2.7
    wrong = torch_squash(image.pixels, mode="bicubic", antialias=True, align_corners=False)
    assert np.abs(squash(image) - wrong).max() > 1e-1


@pytest.mark.parametrize("size", SIZES, ids=str)
def test_diffusers_preprocessing_is_that_of_transformers(size: tuple[int, int]):
    image = condition(*size)
    theirs = CLIPImageProcessorPil()(Image.fromarray(image.source), return_tensors="np")
    expected = np.asarray(theirs["pixel_values"])[0]
    assert centre_crop(image).dtype == np.float32
    np.testing.assert_array_equal(centre_crop(image), expected)
    assert np.abs(centre_crop(image)[::-1] - expected).max() > 1e-1


def test_the_two_preprocessings_differ():
    image = condition(96, 160)
    same = ImageCondition(image.source, np.moveaxis(image.source / np.float32(127.5) - 1, 2, 0))
    assert np.abs(squash(same) - centre_crop(same)).max() > 1e-1


def test_image_features_are_those_of_transformers():
    oracle, image = clip_oracle(CLIP), condition(100, 150)
    model = clip_from(CLIP, tensors_of(oracle))
    for name, prepare in (("original", squash), ("diffusers", centre_crop)):
        encoder = ClipImageEncoder(model, name)
        features = encoder.encode(image)
        assert features.shape == (CLIP.tokens, CLIP.dim)
        expected = run_clip_oracle(oracle, prepare(image, side=CLIP.image_size)[None])[0]
        assert relative(features, expected) <= 2e-6  # measured 2.0e-7


def test_text_states_are_those_of_transformers():
    oracle, text = umt5_oracle(UMT5), tokenizer()
    encoder = Umt5TextEncoder(umt5_from(UMT5, tensors_of(oracle)), text)
    states = encoder.encode(PROMPTS)
    batch = text.encode(PROMPTS)
    assert states.shape == (4, 512, UMT5.dim) and states.dtype == np.float32
    assert not states[~batch.mask].any()
    assert batch.lengths == (5, 1, 201, 701)
    expected = run_umt5_oracle(oracle, batch.ids, batch.mask)
    assert relative(states, expected) <= 2e-5  # measured 5.2e-6
    assert relative(states[[0]], expected[[1]]) > 1e-1


def test_a_prompt_does_not_depend_on_its_company():
    encoder = Umt5TextEncoder(umt5_from(UMT5, tensors_of(umt5_oracle(UMT5))), tokenizer())
    together = encoder.encode(PROMPTS[:3])
    for prompt, states in zip(PROMPTS[:3], together, strict=True):
        np.testing.assert_array_equal(encoder.encode([prompt])[0], states)


def test_new_prompts_do_not_recompile():
    encoder = Umt5TextEncoder(umt5_from(UMT5, tensors_of(umt5_oracle(UMT5))), tokenizer())
    encoder.encode(["a", "a " * 150, "a " * 300])
    compiled = encoders.encode_here._cache_size()
    encoder.encode(["b b", "ab " * 20, "b " * 200, "a " * 490, "b " * 2000, ""])
    assert encoders.encode_here._cache_size() == compiled


def test_a_tokenizer_of_another_checkpoint_is_refused():
    config = replace(UMT5, vocab_size=7)
    model = umt5_from(config, tensors_of(umt5_oracle(config)))
    with pytest.raises(WeightsError, match="8 ids and the text encoder 7 rows"):
        Umt5TextEncoder(model, tokenizer())


def test_bfloat16_encoders_return_float32():
    model = umt5_from(UMT5, tensors_of(umt5_oracle(UMT5)), "bfloat16")
    assert Umt5TextEncoder(model, tokenizer()).encode(["a"]).dtype == jnp.float32
    tower = clip_from(CLIP, tensors_of(clip_oracle(CLIP)), "bfloat16")
    assert ClipImageEncoder(tower).encode(condition(64, 64)).dtype == jnp.float32


@pytest.mark.parametrize(
    ("used", "kept"), [(0, 64), (1, 64), (64, 64), (65, 128), (256, 256), (257, 512), (512, 512)]
)
def test_rows_of_zeros_are_left_to_one_where_tokens_are_few(used: int, kept: int):
    states = np.zeros((1, 512, 8), np.float32)
    states[0, :used, 3] = 1
    states[0, used // 2] = 0  # Zeros before the last word are none of the end.
    states[0, max(used - 1, 0), 3] = used > 0
    text, empty = jnp.asarray(states), jnp.zeros(states.shape)
    assert padding_rows([text, None], 511) == 512 - kept
    assert padding_rows([empty, text], 511) == 512 - kept
    assert padding_rows([text], 512) == 0
