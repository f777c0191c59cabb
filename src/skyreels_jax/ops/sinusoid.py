"""The sinusoidal embedding of timesteps."""

from functools import cache
from typing import Final

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

THETA: Final = 10_000.0
# Timesteps are ``1000 * sigma`` with sigma in [0, 1].
MAX_POSITION: Final = 1000


def sinusoidal_embedding_1d(
    dim: int, position: Float[Array, " M"] | Int[Array, " M"]
) -> Float[Array, "M dim"]:
    """``[cos(p w_k) | sin(p w_k)]`` with ``w_k = 10000^(-2k / dim)``, cosines first, in float32.

    Float32 cannot hold the angle of ``p = 1000`` to better than 6e-5, so the whole part of the
    position is looked up in a table made in float64, and the fraction is added by the angle-sum
    formula; integers come out as the float64 values rounded once. Positions outside
    [0, 1000] give NaN.
    """
    half = dim // 2
    table = jnp.asarray(_table(half), jnp.float32)
    exact = position.astype(jnp.float32)
    whole = jnp.floor(exact)
    row = table.at[whole.astype(jnp.int32)].get(
        mode="fill", fill_value=jnp.nan, wrap_negative_indices=False
    )
    cos, sin = row[:, :half], row[:, half:]
    angle = (exact - whole)[:, None] * jnp.asarray(_frequencies(half), jnp.float32)[None, :]
    turn_cos, turn_sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate(
        [cos * turn_cos - sin * turn_sin, sin * turn_cos + cos * turn_sin], axis=-1
    )


def _frequencies(half: int) -> Float[np.ndarray, " half"]:
    return THETA ** (-np.arange(half, dtype=np.float64) / half)


@cache
def _table(half: int) -> Float[np.ndarray, "rows dim"]:
    angles = np.outer(np.arange(MAX_POSITION + 1, dtype=np.float64), _frequencies(half))
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    table.flags.writeable = False  # cached, hence shared
    return table
