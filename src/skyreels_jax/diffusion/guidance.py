"""Classifier-free guidance: what the model is asked in a step, and how the answers are combined.

The formula is ``negative + scale * (positive - negative)``, always, as in SkyReels-V2's text- and
image-to-video pipelines. Diffusers (and the original's diffusion forcing) leave the negative prompt
out for every scale up to 1; here only at exactly 1, where that changes nothing.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float

from skyreels_jax.shapes import Context, Latents

# One model call's: ``rows`` is B, or 2 B with both prompts in it.
_CallContext = Float[Array, "rows S D"]
_CallLatents = Float[Array, "rows C F H W"]


@runtime_checkable
class Guidance(Protocol):
    """How many predictions a step needs, from which text, and what becomes of them."""

    @property
    def copies(self) -> int:
        """How many times every video stands in the batch of one model call."""
        ...

    def contexts(self, positive: Context, negative: Context | None) -> tuple[_CallContext, ...]:
        """The text states of each model call of a step, ``copies * B`` rows each."""
        ...

    def combine(self, predictions: tuple[_CallLatents, ...]) -> Latents:
        """One prediction a video, from those of the calls in the order of :meth:`contexts`."""
        ...


class NoGuidance(NamedTuple):
    """The positive prompt alone: one prediction a step."""

    @property
    def copies(self) -> int:
        """One."""
        return 1

    def contexts(self, positive: Context, negative: Context | None) -> tuple[_CallContext, ...]:
        """The positive text only; a negative one has no effect."""
        del negative
        return (positive,)

    def combine(self, predictions: tuple[_CallLatents, ...]) -> Latents:
        """The prediction as it is."""
        (prediction,) = predictions
        return prediction


class ClassifierFree(NamedTuple):
    """Away from the negative prompt by ``scale``; two calls, one after the other.

    ``scale`` is an array so that another value compiles nothing anew.
    """

    scale: Float[Array, ""]

    @property
    def copies(self) -> int:
        """One."""
        return 1

    def contexts(self, positive: Context, negative: Context | None) -> tuple[_CallContext, ...]:
        """Positive and negative.

        Raises:
            ValueError: if there is no negative text (that of an empty prompt is one).
        """
        return (positive, _required(negative))

    def combine(self, predictions: tuple[_CallLatents, ...]) -> Latents:
        """``negative + scale * (positive - negative)``."""
        positive, negative = predictions
        return negative + self.scale * (positive - negative)


class BatchedClassifierFree(NamedTuple):
    """The same in one call of twice the batch.

    It keeps a wide accelerator busy on short videos, for twice the memory of activations.
    """

    scale: Float[Array, ""]

    @property
    def copies(self) -> int:
        """Two."""
        return 2

    def contexts(self, positive: Context, negative: Context | None) -> tuple[_CallContext, ...]:
        """Positive and negative in one batch.

        Raises:
            ValueError: if there is no negative text (that of an empty prompt is one).
        """
        return (jnp.concatenate([positive, _required(negative)]),)

    def combine(self, predictions: tuple[_CallLatents, ...]) -> Latents:
        """``negative + scale * (positive - negative)``."""
        (both,) = predictions
        positive, negative = jnp.split(both, 2)
        return ClassifierFree(self.scale).combine((positive, negative))


def _required(negative: Context | None) -> Context:
    """``negative``, which classifier-free guidance cannot do without."""
    if negative is None:
        raise ValueError("classifier-free guidance takes the states of a negative prompt")
    return negative


def guidance_of(scale: float, *, batched: bool = False) -> Guidance:
    """Guidance of ``scale``; at exactly 1 the negative prompt cancels and is not computed."""
    if scale == 1:
        return NoGuidance()
    return (BatchedClassifierFree if batched else ClassifierFree)(jnp.float32(scale))
