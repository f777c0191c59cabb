"""Small things that stand in for the transformer and the other components in tests."""

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from skyreels_jax.checkpoints import Checkpoint, Default, Defaults, Guess
from skyreels_jax.components.protocols import ImageCondition
from skyreels_jax.diffusion.step_cache import StagedForward
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.weights.components.transformer import TRANSFORMER
from skyreels_jax.weights.layout import Layout

TEXT_DIM = 8
CHANNELS = 16


def config(**changes) -> TransformerConfig:
    settings = {"model_type": "t2v", "dim": 12, "ffn_dim": 16, "num_heads": 1, "num_layers": 2}
    settings |= {"in_dim": CHANNELS, "text_dim": TEXT_DIM, "text_len": 6, "freq_dim": 8}
    return TransformerConfig(**(settings | changes))


def image_config(**changes) -> TransformerConfig:
    return config(model_type="i2v", in_dim=36, image_dim=4, **changes)


def transformer(of: TransformerConfig, seed: int = 0) -> WanModel:
    """A float32 model with every parameter random, so that nothing passes by being zero."""
    model = TRANSFORMER.abstract(of, jnp.float32)
    state = nnx.state(model, nnx.Param)
    leaves, structure = jax.tree.flatten(state)
    rng = np.random.default_rng(seed)
    random = [jnp.asarray(0.3 * rng.standard_normal(x.shape), jnp.float32) for x in leaves]
    nnx.update(model, jax.tree.unflatten(structure, random))
    return model


class Linear(nnx.Module):
    """A velocity that can be worked out by hand: of latents, timestep, text, ``y`` and fps."""

    def __init__(self):
        self.gain = nnx.Param(jnp.float32(0.5))

    def prepare_context(self, context, clip_fea=None):
        image = 0.0 if clip_fea is None else jnp.mean(clip_fea, (1, 2))
        return jnp.mean(context, (1, 2)) + image

    def __call__(self, x, t, context, **given):
        staged = self.staged(x, t, context, **given)
        return staged.head(staged.blocks(staged.tokens))

    def staged(
        self, x, t, context, *, y=None, fps=None, block_length=None, attention=None, past=None
    ):
        del attention
        assert past is None
        level = t.reshape(t.shape[0], 1, -1, 1, 1).astype(jnp.float32) / 1000
        told = context.reshape(-1, 1, 1, 1, 1)
        if y is not None:
            told = told + jnp.mean(y, (1, 2, 3, 4), keepdims=True)
        if fps is not None:
            told = told + fps.reshape(-1, 1, 1, 1, 1).astype(jnp.float32)
        if block_length is not None:
            told = told * block_length
        shape = x.shape
        told, level = (jnp.broadcast_to(value, shape) for value in (told, level))
        none = jnp.zeros(())
        return StagedForward(
            latents=x,
            e=none,
            e0=none,
            tokens=x,
            blocks=lambda x: self.gain[...] * x + level * told,
            head=lambda x: x,
            key_values=lambda: (none, none),
        )


class Words:
    """A text encoder: each prompt's letters decide its states."""

    def __init__(self, length: int = 6, text_dim: int = TEXT_DIM):
        self.length, self.text_dim = length, text_dim

    def encode(self, prompts: Sequence[str]) -> np.ndarray:
        states = np.zeros((len(prompts), self.length, self.text_dim), np.float32)
        for row, prompt in zip(states, prompts, strict=True):
            rng = np.random.default_rng(list(prompt.encode()))
            row[:3] = rng.standard_normal((3, self.text_dim))
        return states


class Glance:
    """An image encoder: the image's colours decide the tokens."""

    def encode(self, image: ImageCondition) -> np.ndarray:
        rng = np.random.default_rng(int(image.source.sum()))
        return rng.standard_normal((257, 4)).astype(np.float32)


class Blocks:
    """A VAE: a latent is the mean of 8 x 8 pixels (of the first frame of four)."""

    def encode(self, pixels: np.ndarray) -> np.ndarray:
        _, frames, height, width = pixels.shape
        keep = pixels[:, ::4].reshape(3, -1, height // 8, 8, width // 8, 8).mean((3, 5))
        return np.repeat(keep, 6, axis=0)[:CHANNELS].astype(np.float32)

    def decode_pieces(self, pieces: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        frames = (piece[:3, i] for piece in pieces for i in range(piece.shape[1]))
        for number, frame in enumerate(frames):
            big = np.tanh(frame).repeat(8, axis=1).repeat(8, axis=2)
            yield np.repeat(big[:, None], 1 if number == 0 else 4, axis=1).astype(np.float32)


def checkpoint(task: str = "t2v", folder: Path = Path("model"), **changes) -> Checkpoint:
    """A checkpoint of a tiny transformer whose folder is never looked at."""
    shape = image_config() if task in ("i2v", "flf2v") else config()
    defaults = {
        "resolution": Default((32, 48), "preset tiny"),
        "num_frames": Default(9, "preset tiny"),
        "fps": Default(24, "preset tiny"),
        "shift": Default(8.0, "preset tiny"),
        "guidance_scale": Default(6.0, "preset tiny"),
        "steps": Default(3, "preset tiny"),
        "ar_step": Default(0, "all frames together"),
    }
    return Checkpoint(
        layout=Layout(folder=folder, format="original", transformer=folder, config={}),
        config=shape,
        task=task,
        guess=Guess(None, "made for a test"),
        defaults=Defaults(**(defaults | changes)),
    )
