"""Training the small model's text and image encoders: to tell what a scene is.

From the mean of an encoder's states, linear heads name the things of the scene. The heads are
thrown away; what the states must hold so that a mean of them tells all this stays.
"""

import math
import string
import tempfile
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Generic, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, PyTree

from skyreels_jax.models.clip_vision import ClipVision, ClipVisionConfig
from skyreels_jax.models.umt5 import Umt5Config, Umt5Encoder
from skyreels_jax.moving_shapes.captions import caption, words
from skyreels_jax.moving_shapes.render import render
from skyreels_jax.moving_shapes.scene import (
    BACKGROUNDS,
    COLOURS,
    DIRECTIONS,
    HELD_OUT,
    MOTIONS,
    SHAPE_KINDS,
    SPEEDS,
    Scene,
    Thing,
    draw_held_out,
    draw_scene,
)
from skyreels_jax.prompts import Tokenizer, write_unigram
from skyreels_jax.training.config import check_at_least, check_heads
from skyreels_jax.training.dataset import clip_pixels
from skyreels_jax.training.step import no_draw
from skyreels_jax.training.task import LossAndMetrics, Params, Template
from skyreels_jax.training.transformer_recipe import MAX_CAPTION_TOKENS
from skyreels_jax.weights.components.clip import CLIP, image_processor_json
from skyreels_jax.weights.components.umt5 import UMT5
from skyreels_jax.weights.writer import write_config

_ModelT = TypeVar("_ModelT", bound=nnx.Module)
# Streams of random numbers that no two uses share.
_TRAINING: Final = 1
_EVALUATION: Final = 2
_EVALUATED: Final = 512
# Things that a scene may have.
_SLOTS: Final = 2
# Begins the names of the encoder's parameters.
_PREFIX: Final = "encoder."
TOKENIZER_CHARACTERS: Final = string.ascii_letters + string.digits + string.punctuation


@dataclass(frozen=True)
class EncoderData:
    """Scenes; ``seconds`` is how long things must stay inside the frame."""

    batch: int = 64
    size: int = 64
    text_length: int = 48
    seconds: float = 1.0

    def __post_init__(self):
        check_at_least(self, 1, "batch", most=10**6)
        check_at_least(self, 16, "size", most=512)
        check_at_least(self, MAX_CAPTION_TOKENS, "text_length", most=512)
        if not 0 < self.seconds <= 1:
            raise ValueError(f"seconds = {self.seconds} should be above 0 and at most 1")


@dataclass(frozen=True)
class EncoderShape:
    """The free numbers of an encoder's config."""

    dim: int = 128
    ffn_dim: int = 256
    num_heads: int = 4
    num_layers: int = 3
    image_size: int = 64
    patch_size: int = 4

    def __post_init__(self):
        check_at_least(self, 1, "dim", "ffn_dim", "num_heads", "num_layers", "patch_size")
        check_at_least(self, self.patch_size, "image_size", most=1024)
        check_heads(self, 1, 1)
        if self.image_size % self.patch_size:
            rule = f"image_size = {self.image_size} should be a multiple of patch_size"
            near = self.image_size - self.image_size % self.patch_size
            raise ValueError(f"{rule} = {self.patch_size}; nearest: {near}")


@dataclass(frozen=True)
class EncoderTraining:
    """A run's tables ``model`` and ``data``."""

    model: EncoderShape = field(default_factory=EncoderShape)
    data: EncoderData = field(default_factory=EncoderData)


# Classes of a question, and the answer about a thing.
_Questions = Mapping[str, int]
_LEGAL: Final[Mapping[str, Sequence[str]]] = {
    "kind": SHAPE_KINDS,
    "colour": COLOURS,
    "motion": MOTIONS,
    "direction": DIRECTIONS,
    "speed": SPEEDS,
}
# What is asked of every thing; one class more where there is none.
_THING: Final[_Questions] = {name: len(_LEGAL[name]) + 1 for name in ("kind", "colour")}
_MOVING: Final[_Questions] = {
    name: len(_LEGAL[name]) + 1 for name in ("motion", "direction", "speed")
}


def answers(things: Sequence[Thing], background: str, asked: Sequence[str]) -> list[int]:
    """Classes of each question about the first and the second thing, then of the background."""
    found = []
    for slot in range(_SLOTS):
        for name in asked:
            legal = _LEGAL[name]
            value = getattr(things[slot], name) if slot < len(things) else None
            found.append(len(legal) if value is None else legal.index(value))
    return [*found, BACKGROUNDS.index(background)]


class EncoderTask(Generic[_ModelT]):
    """A :class:`~skyreels_jax.training.task.TrainingTask`; subclasses give inputs and questions."""

    asked: _Questions

    def __init__(self, training: EncoderTraining, seed: int):
        """``seed`` decides initial values and data."""
        self.training, self.seed = training, seed
        self.template, encoder = Template.of(self._fresh())
        self.classes = (*list(self.asked.values()) * _SLOTS, len(BACKGROUNDS))
        shape = (self._width(), sum(self.classes))
        kernel = jax.random.normal(jax.random.key(seed), shape) / math.sqrt(shape[0])
        heads = {"head.kernel": kernel, "head.bias": jnp.zeros(shape[1:])}
        self.first = {**{f"{_PREFIX}{name}": value for name, value in encoder.items()}, **heads}
        self._right = jax.jit(self._answered)

    @abstractmethod
    def _fresh(self) -> _ModelT: ...

    @abstractmethod
    def _width(self) -> int: ...

    @abstractmethod
    def _pooled(self, model: _ModelT, batch: PyTree) -> Float[Array, "B D"]: ...

    @abstractmethod
    def _example(self, scene: Scene, rng: np.random.Generator) -> tuple[PyTree, list[int]]: ...

    @abstractmethod
    def _together(self, inputs: list) -> PyTree: ...

    def init(self) -> Params:
        """Encoder and heads."""
        return self.first

    def batch(self, index: int) -> tuple[PyTree, np.ndarray]:
        """Inputs, and classes ``[B, questions]``."""
        rng = np.random.default_rng([self.seed, _TRAINING, index])
        return self._batch(rng, self.training.data.batch, held=False)

    def _batch(
        self, rng: np.random.Generator, count: int, *, held: bool
    ) -> tuple[PyTree, np.ndarray]:
        seconds, combinations = self.training.data.seconds, sorted(HELD_OUT, key=str)
        examples = []
        for number in range(count):
            combination = combinations[number % len(combinations)]
            scene = draw_held_out(rng, combination, seconds) if held else draw_scene(rng, seconds)
            examples.append(self._example(scene, rng))
        inputs, classes = zip(*examples, strict=True)
        return self._together(list(inputs)), np.array(classes, np.int32)

    def _logits(self, params: Params, batch: PyTree) -> list[Float[Array, "B classes"]]:
        pooled = self._pooled(self.encoder(params), batch)
        logits = pooled @ params["head.kernel"] + params["head.bias"][None]
        return jnp.split(logits, np.cumsum(self.classes)[:-1].tolist(), axis=1)

    draw = staticmethod(no_draw)

    def fingerprint(self) -> Mapping[str, str]:
        """Nothing: all data follows from the recipe."""
        return {}

    def loss(self, params: Params, batch: tuple[PyTree, Array], noise: PyTree) -> LossAndMetrics:
        """Mean cross-entropy of all questions, in nats."""
        del noise
        inputs, classes = batch
        losses = [
            -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), classes[:, i, None], axis=1))
            for i, logits in enumerate(self._logits(params, inputs))
        ]
        return jnp.mean(jnp.stack(losses)), {}

    def _answered(self, params: Params, batch: tuple[PyTree, Array]) -> Float[Array, " questions"]:
        inputs, classes = batch
        logits = self._logits(params, inputs)
        right = [jnp.argmax(x, axis=1) == classes[:, i] for i, x in enumerate(logits)]
        return jnp.stack([jnp.mean(x.astype(jnp.float32)) for x in right])

    def evaluate(self, params: Params) -> dict[str, float]:
        """Share of right answers, of scenes like those of training and of combinations held out."""
        found: dict[str, float] = {}
        for held in (False, True):
            rng = np.random.default_rng([self.seed, _EVALUATION, int(held)])
            parts = [self._batch(rng, 64, held=held) for _ in range(_EVALUATED // 64)]
            shares = np.mean([np.asarray(self._right(params, part)) for part in parts], axis=0)
            for i, name in enumerate(self.asked):
                label = f"held_{name}" if held else name
                found[label] = float(np.mean(shares[i : -1 : len(self.asked)]))
            found["held_background" if held else "background"] = float(shares[-1])
        return found

    def sample(self, params: Params, folder: Path) -> None:
        """There is nothing to look at."""

    def encoder(self, params: Params) -> _ModelT:
        """Without the heads."""
        values = {n.removeprefix(_PREFIX): v for n, v in params.items() if n.startswith(_PREFIX)}
        return self.template.model(values)


class TextTask(EncoderTask[Umt5Encoder]):
    """Captions; things in the order in which they are said."""

    asked = {**_THING, **_MOVING}

    def _fresh(self) -> Umt5Encoder:
        shape = self.training.model
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary) / "tokenizer"
            ids = write_mini_tokenizer(folder)
            self._tokenizer = Tokenizer.from_folder(folder)
        self.config = Umt5Config(
            vocab_size=64 * math.ceil(ids / 64),
            dim=shape.dim,
            head_dim=shape.dim // shape.num_heads,
            num_heads=shape.num_heads,
            ffn_dim=shape.ffn_dim,
            num_layers=shape.num_layers,
        )
        exact = {"dtype": jnp.float32, "param_dtype": jnp.float32}
        return Umt5Encoder(self.config, rngs=nnx.Rngs(self.seed), **exact)

    def _width(self) -> int:
        return self.config.dim

    def _example(self, scene: Scene, rng: np.random.Generator) -> tuple[str, list[int]]:
        text = caption(scene, rng)
        things = sorted(scene.things, key=lambda thing: text.index(f"{thing.colour} "))
        return text, answers(things, scene.background, tuple(self.asked))

    def _together(self, inputs: list[str]) -> tuple[np.ndarray, np.ndarray]:
        tokens = self._tokenizer.encode(inputs)
        rows = np.s_[:, : self.training.data.text_length]
        return tokens.ids[rows], tokens.mask[rows]

    def _pooled(self, model: Umt5Encoder, batch: tuple[Array, Array]) -> Float[Array, "B D"]:
        ids, mask = batch
        return jnp.sum(model(ids, mask), axis=1) / jnp.sum(
            mask, axis=1, keepdims=True, dtype=jnp.float32
        )

    def export(self, params: Params, folder: Path) -> None:
        """``tokenizer`` and ``text_encoder`` in diffusers' layout, bfloat16."""
        write_mini_tokenizer(folder / "tokenizer")
        model = self.encoder(params)
        UMT5.save(folder / "text_encoder", model, self.config, dtype=jnp.bfloat16)


class ImageTask(EncoderTask[ClipVision]):
    """First frames; things from left to right."""

    asked = _THING

    def _fresh(self) -> ClipVision:
        shape = self.training.model
        self.config = ClipVisionConfig(
            dim=shape.dim,
            ffn_dim=shape.ffn_dim,
            num_heads=shape.num_heads,
            num_layers=shape.num_layers,
            image_size=shape.image_size,
            patch_size=shape.patch_size,
        )
        exact = {"dtype": jnp.float32, "param_dtype": jnp.float32}
        return ClipVision(self.config, rngs=nnx.Rngs(self.seed), **exact)

    def _width(self) -> int:
        return self.config.dim

    def _example(self, scene: Scene, rng: np.random.Generator) -> tuple[np.ndarray, list[int]]:
        del rng
        size = self.training.data.size
        things = sorted(scene.things, key=lambda thing: thing.x)
        frame = render(scene, frames=1, fps=16.0, size=(size, size))[0]
        return frame, answers(things, scene.background, tuple(self.asked))

    def _together(self, inputs: list[np.ndarray]) -> np.ndarray:
        return clip_pixels(np.stack(inputs), self.config.image_size)

    def _pooled(self, model: ClipVision, batch: Array) -> Float[Array, "B D"]:
        return jnp.mean(model(batch), axis=1)

    def export(self, params: Params, folder: Path) -> None:
        """``image_encoder`` and ``image_processor`` in diffusers' layout, float16."""
        model = self.encoder(params)
        CLIP.save(folder / "image_encoder", model, self.config, dtype=np.float16)
        (folder / "image_processor").mkdir()
        processor = folder / "image_processor" / "preprocessor_config.json"
        write_config(processor, image_processor_json(self.config))


def write_mini_tokenizer(folder: Path) -> int:
    """A tokenizer that knows the words of captions, with and without a capital; returns its ids."""
    plain = words()
    capital = tuple(word.capitalize() for word in plain)
    return write_unigram(folder, (*plain, *capital), TOKENIZER_CHARACTERS)
