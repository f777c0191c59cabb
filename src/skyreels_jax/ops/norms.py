"""Normalisations and the two fused forms of modulation, always computed in float32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Float32 = Float[Array, "*batch D"]


def rms_norm(x: Float[Array, "*batch D"], scale: Float[Array, " D"], eps: float) -> Float32:
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis; float32 whatever comes in.

    The original casts "back" to an array that is float32 already, so its result stays float32 too.
    """
    x = x.astype(jnp.float32)
    inverse = jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    return x * inverse * _along(scale, x)


def layer_norm(
    x: Float[Array, "*batch D"],
    scale: Float[Array, " D"] | None = None,
    bias: Float[Array, " D"] | None = None,
    *,
    eps: float,
) -> Float32:
    """Zero mean and unit variance over the last axis, then scale and bias where given; float32."""
    x = x.astype(jnp.float32)
    x = x - jnp.mean(x, axis=-1, keepdims=True)
    x = x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + eps)
    if scale is not None:
        x = x * _along(scale, x)
    if bias is not None:
        x = x + _along(bias, x)
    return x


def mul_add(
    x: Float[Array, "*batch D"], y: Float[Array, "*batch D"], z: Float[Array, "*#batch D"]
) -> Float32:
    """``x + y * z`` in float32: a gated residual."""
    return x.astype(jnp.float32) + y.astype(jnp.float32) * z.astype(jnp.float32)


def mul_add_add(
    x: Float[Array, "*batch D"], y: Float[Array, "*#batch D"], z: Float[Array, "*#batch D"]
) -> Float32:
    """``x * (1 + y) + z`` in float32: a modulated norm, with scale ``y`` and shift ``z``."""
    return x.astype(jnp.float32) * (1 + y.astype(jnp.float32)) + z.astype(jnp.float32)


def _along(vector: Float[Array, " D"], x: Float[Array, "*batch D"]) -> Float[Array, "*ones D"]:
    """``vector`` in float32 with the rank of ``x``: rank promotion is always spelled out."""
    return vector.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + vector.shape)
