"""The text and image encoders in JAX, as generation takes them."""

from collections.abc import Sequence
from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Float

from skyreels_jax.components.clip_preprocessing import PREPROCESSING, ClipPreprocessing
from skyreels_jax.components.protocols import ImageCondition
from skyreels_jax.errors import WeightsError
from skyreels_jax.models.clip_vision import ClipVision
from skyreels_jax.models.umt5 import Umt5Encoder
from skyreels_jax.prompts import TEXT_LEN, Tokenizer

# Prompts are encoded at the least of these that holds them. A prompt's states do not depend on its
# padding, so this only saves time; that there are three bounds how often anything is compiled.
LENGTHS: Final = (128, 256, TEXT_LEN)


_apply = jax.jit(lambda graph, state, *inputs: nnx.merge(graph, state)(*inputs), static_argnums=0)


class Umt5TextEncoder:
    """Prompts to UMT5's states: a :class:`~skyreels_jax.components.protocols.TextEncoder`."""

    def __init__(self, model: Umt5Encoder, tokenizer: Tokenizer):
        """Raises WeightsError where the tokenizer has ids that the model has no row for."""
        rows = model.config.vocab_size
        if tokenizer.vocab_size > rows:
            raise WeightsError(
                f"the tokenizer has {tokenizer.vocab_size} ids and the text encoder {rows} rows: "
                "they are not of the same checkpoint"
            )
        self._tokenizer = tokenizer
        self._graph, self._state = nnx.split(model)

    def encode(self, prompts: Sequence[str]) -> Float[np.ndarray, "B S text_dim"]:
        """Clean, tokenize and encode to 512 rows; rows past a prompt's end are exactly zero.

        One prompt at a time: a batch would pad the short ones to the longest, and no prompt's
        states may depend on its company.
        """
        batch = self._tokenizer.encode(prompts)
        encoded = []
        for ids, mask in zip(batch.ids, batch.mask, strict=True):
            length = next(n for n in LENGTHS if mask.sum() <= n)
            inputs = (jnp.asarray(row[None, :length]) for row in (ids, mask))
            states = np.asarray(_apply(self._graph, self._state, *inputs))[0]
            encoded.append(np.pad(states, ((0, TEXT_LEN - length), (0, 0))))
        return np.stack(encoded)


class ClipImageEncoder:
    """An image to CLIP's features: a :class:`~skyreels_jax.components.protocols.ImageEncoder`."""

    def __init__(self, model: ClipVision, preprocessing: ClipPreprocessing = "original"):
        """``preprocessing`` chooses between the two ways of :mod:`.clip_preprocessing`."""
        self._prepare = partial(PREPROCESSING[preprocessing], side=model.config.image_size)
        self._graph, self._state = nnx.split(model)

    def encode(self, image: ImageCondition) -> Float[np.ndarray, "S image_dim"]:
        """States of all 257 tokens after the last block but one, float32."""
        pixels = jnp.asarray(self._prepare(image))[None]
        return np.asarray(_apply(self._graph, self._state, pixels))[0]
