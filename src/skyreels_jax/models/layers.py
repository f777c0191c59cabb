"""Layers that the models share: linears, norms, embeddings and activations.

Every layer takes a :class:`Numerics` and follows one rule: what enters a matrix product is rounded
to ``numerics.compute``, everything else happens in float32. Parameter names are the original's,
with its numbered ``Sequential`` entries named ``fc1`` and ``fc2``.
"""

from collections.abc import Callable
from typing import Final

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from skyreels_jax.models.transformer_config import Numerics
from skyreels_jax.ops.linear import linear
from skyreels_jax.ops.norms import layer_norm, rms_norm

XAVIER: Final = nnx.initializers.xavier_uniform()
NORMAL: Final = nnx.initializers.normal(0.02)
ZEROS: Final = nnx.initializers.zeros_init()


def silu(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """``x * sigmoid(x)`` in float32."""
    return jax.nn.silu(x.astype(jnp.float32))


def gelu_tanh(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """GELU by its tanh approximation, in float32: text embedder and feed-forwards."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=True)


def gelu_exact(x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
    """GELU by the error function, in float32: the image embedder."""
    return jax.nn.gelu(x.astype(jnp.float32), approximate=False)


class Linear(nnx.Module):
    """``x @ kernel + bias`` with ``kernel [in, out]``; the result is in the compute dtype."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        numerics: Numerics,
        rngs: nnx.Rngs,
        init: nnx.Initializer = XAVIER,
    ):
        shape = (in_features, out_features)
        self.kernel = nnx.Param(init(rngs.params(), shape, numerics.params))
        self.bias = nnx.Param(jnp.zeros((out_features,), numerics.params))
        self.dtype = numerics.compute

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """Along the last axis of ``x``."""
        return linear(x, self.kernel[...], self.bias[...], dtype=self.dtype)


class Mlp(nnx.Module):
    """Two linears with an activation between them; ``init`` is that of both kernels."""

    def __init__(
        self,
        widths: tuple[int, int, int],
        activation: Callable[[Array], Array],
        *,
        numerics: Numerics,
        rngs: nnx.Rngs,
        init: tuple[nnx.Initializer, nnx.Initializer] = (XAVIER, XAVIER),
    ):
        first, hidden, last = widths
        self.fc1 = Linear(first, hidden, numerics=numerics, rngs=rngs, init=init[0])
        self.fc2 = Linear(hidden, last, numerics=numerics, rngs=rngs, init=init[1])
        self.activation = activation

    def __call__(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch O"]:
        """Along the last axis of ``x``; the activation is computed in float32."""
        return self.fc2(self.activation(self.fc1(x)))


class WanRMSNorm(nnx.Module):
    """RMS norm over the last axis with a scale; float32 out."""

    def __init__(self, dim: int, eps: float = 1e-5, *, numerics: Numerics):
        self.scale = nnx.Param(jnp.ones((dim,), numerics.params))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Along the last axis of ``x``."""
        return rms_norm(x, self.scale[...], self.eps)


class WanLayerNorm(nnx.Module):
    """Layer norm over the last axis with scale and bias; float32 out.

    The norms before modulation have no parameters: they are ``ops.norms.layer_norm``.
    """

    def __init__(self, dim: int, eps: float = 1e-6, *, numerics: Numerics):
        self.scale = nnx.Param(jnp.ones((dim,), numerics.params))
        self.bias = nnx.Param(jnp.zeros((dim,), numerics.params))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch D"]) -> Float[Array, "*batch D"]:
        """Along the last axis of ``x``."""
        return layer_norm(x, self.scale[...], self.bias[...], eps=self.eps)


class Embedding(nnx.Module):
    """A row of a table for each id; ids past the table give NaN rather than another row."""

    def __init__(self, rows: int, dim: int, *, numerics: Numerics, rngs: nnx.Rngs):
        self.embedding = nnx.Param(NORMAL(rngs.params(), (rows, dim), numerics.params))

    def __call__(self, ids: Int[Array, " B"]) -> Float[Array, "B D"]:
        """Rows of the table, as stored."""
        return (
            self.embedding[...]
            .at[ids]
            .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False)
        )
