"""Positions as the transformer takes them: rotary for tokens, sinusoidal for timesteps.

Rotary positions are on three axes: frames, rows and columns share the features of a head.
"""

from functools import cache
from typing import Final, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Complex, Float, Int

from skyreels_jax.shapes import ROPE_FRAMES

_THETA: Final = 10_000.0
# Timesteps are ``1000 * sigma`` with sigma in [0, 1].
_MAX_TIMESTEP: Final = 1000


class RopeTable(NamedTuple):
    """Cosine and sine of every token's angles, one column per pair of features."""

    cos: Float[Array, "L half"]
    sin: Float[Array, "L half"]


@cache
def rope_params(length: int, dim: int, theta: float = _THETA) -> Complex[np.ndarray, "length half"]:
    """Unit rotations ``exp(i * position * theta^(-2j / dim))`` of one axis, in complex128.

    Angles are exact to float64. The original rounds them to float32, which moves its tables by up
    to 4e-5 at position 1023.
    """
    frequencies = theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    table = np.exp(1j * np.outer(np.arange(length, dtype=np.float64), frequencies))
    table.flags.writeable = False  # cached, hence shared
    return table


def axis_dims(head_dim: int) -> tuple[int, int, int]:
    """Features of a head that turn with the frame, the row and the column: 44, 42, 42 of 128.

    Pairs that three does not divide go to the frames (the original's split of ``head_dim / 2``).
    """
    third = head_dim // 2 // 3
    return head_dim - 4 * third, 2 * third, 2 * third


def rope_table(
    grid: tuple[int, int, int],
    head_dim: int,
    *,
    frames: Int[Array, " F"] | None = None,
) -> RopeTable:
    """Angles of all ``L = F * H' * W'`` tokens, frame-major, then rows, then columns; float32.

    Only the three axes' own tables are constants of a compiled program; they are spread over the
    grid on the device, once for all layers.

    Args:
        grid: frames, rows and columns.
        head_dim: features of a head, even.
        frames: position of each frame, in any order, 0 to :data:`.ROPE_FRAMES` - 1 (others give
            NaN); 0, 1, 2 and so on unless given.
    """
    lengths = (grid[0] if frames is None else ROPE_FRAMES, *grid[1:])
    dims = axis_dims(head_dim)
    axes = [rope_params(length, dim) for length, dim in zip(lengths, dims, strict=True)]

    def spread(part: str) -> Float[Array, "L half"]:
        columns = []
        for axis, table in enumerate(axes):
            values = jnp.asarray(getattr(table, part), jnp.float32)
            if axis == 0 and frames is not None:
                values = values.at[frames].get(mode="fill", fill_value=jnp.nan)
            shape = [1, 1, 1, values.shape[1]]
            shape[axis] = grid[axis]
            columns.append(jnp.broadcast_to(values.reshape(shape), (*grid, values.shape[1])))
        return jnp.concatenate(columns, axis=-1).reshape(-1, head_dim // 2)

    return RopeTable(spread("real"), spread("imag"))


def rope_apply(x: Float[Array, "B L N K"], table: RopeTable) -> Float[Array, "B L N K"]:
    """Turn each pair of neighbouring features (2j, 2j + 1) by its token's angle; float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    even, odd = pairs[..., 0], pairs[..., 1]
    cos, sin = (part[None, :, None, :] for part in table)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape)


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
    table = jnp.asarray(_sinusoids(half), jnp.float32)
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
    return _THETA ** (-np.arange(half, dtype=np.float64) / half)


@cache
def _sinusoids(half: int) -> Float[np.ndarray, "rows dim"]:
    angles = np.outer(np.arange(_MAX_TIMESTEP + 1, dtype=np.float64), _frequencies(half))
    table = np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
    table.flags.writeable = False  # cached, hence shared
    return table
