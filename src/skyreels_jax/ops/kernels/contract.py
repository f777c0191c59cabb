"""What a way to compute attention is told, and what it answers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from skyreels_jax.ops.masks import Mask


@dataclass(frozen=True)
class Device:
    """Where a call will run: ``cpu``, ``cuda``, ``rocm``, ``tpu``; compute capability on CUDA."""

    platform: str
    capability: float = 0.0


def this_device() -> Device:
    """The default device of this process."""
    device = jax.devices()[0]
    if device.platform != "gpu":
        return Device(device.platform)
    capability = str(getattr(device, "compute_capability", ""))  # "9.0"; "gfx90a" on ROCm
    if not capability.replace(".", "", 1).isdigit():
        return Device("rocm")
    return Device("cuda", float(capability))


@dataclass(frozen=True)
class Call:
    """Everything a choice may depend on: ``query`` is ``[B, L, N, K]``, the keys have ``key_len``.

    ``dtype`` is the name of the operands' dtype.
    """

    device: Device
    dtype: str
    query: tuple[int, int, int, int]
    key_len: int

    @property
    def score_bytes(self) -> int:
        """Size of all scores in float32: what a path that draws them out needs."""
        batch, q_len, heads, _ = self.query
        return 4 * batch * heads * q_len * self.key_len


class Earlier(NamedTuple):
    """Keys and values of tokens before those of a call, all of which its queries see.

    Of the ``S`` places the first ``count`` are filled; how many is known when the program runs.
    """

    key: Float[Array, "B S N K"]
    value: Float[Array, "B S N K"]
    count: Int[Array, ""]


@dataclass(frozen=True)
class Path:
    """One way to compute attention.

    ``compute(query, key, value, *, mask, scale)`` has the shapes of
    :func:`skyreels_jax.ops.attention.attention`; ``refusal`` says why a call cannot be served, or
    ``None``. ``after`` takes ``earlier`` besides, an :class:`Earlier`; not every path can.
    """

    compute: Callable[..., Array]
    refusal: Callable[[Call], str | None]
    after: Callable[..., Array] | None = None


def serves_all(call: Call) -> str | None:
    """The refusal of a path that never refuses."""
    del call
    return None


def describe(query: Array, key: Array, earlier: Earlier | None = None) -> Call:
    """The call with these operands on this machine."""
    batch, length, heads, width = query.shape
    key_len = key.shape[1] + (0 if earlier is None else earlier.key.shape[1])
    return Call(this_device(), jnp.dtype(query.dtype).name, (batch, length, heads, width), key_len)


def by_prefix(
    unmasked: Callable[..., Float[Array, "B l N K"]],
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    *,
    mask: Mask | None,
) -> Float[Array, "B L N K"]:
    """Serve a mask with a kernel that has none: one call per query block, on the keys it sees.

    What a block sees is a prefix, so this is exact, and it computes no score that is masked away.
    """
    if mask is None:
        return unmasked(query, key, value)
    blocks = []
    for start in range(0, query.shape[1], mask.tokens_per_block):
        seen = mask.visible_keys(start, key.shape[1])
        rows = query[:, start : start + mask.tokens_per_block]
        blocks.append(unmasked(rows, key[:, :seen], value[:, :seen]))
    return jnp.concatenate(blocks, axis=1)


def by_length(
    unmasked: Callable[..., Float[Array, "B l N K"]],
    query: Float[Array, "B L N K"],
    key: Float[Array, "B L N K"],
    value: Float[Array, "B L N K"],
    *,
    earlier: Earlier,
    mask: Mask | None,
) -> Float[Array, "B L N K"]:
    """Serve ``earlier`` with a kernel that can be told how many of its keys count.

    The call's own keys are laid behind the filled ones; then as :func:`by_prefix`.
    ``key_value_seq_lengths`` of ``unmasked`` is that of :func:`jax.nn.dot_product_attention`.
    """
    batch, places = query.shape[0], earlier.key.shape[1]

    def laid_behind(filled: Array, own: Array) -> Array:
        room = jnp.concatenate([filled, own], axis=1)
        return jax.lax.dynamic_update_slice_in_dim(room, own, earlier.count, axis=1)

    keys, values = laid_behind(earlier.key, key), laid_behind(earlier.value, value)
    size = query.shape[1] if mask is None else mask.tokens_per_block
    blocks = []
    for start in range(0, query.shape[1], size):
        own = min(start + size, key.shape[1])
        lengths = jnp.broadcast_to(earlier.count + own, batch)
        seen = slice(0, places + own)
        rows = query[:, start : start + size]
        blocks.append(unmasked(rows, keys[:, seen], values[:, seen], key_value_seq_lengths=lengths))
    return jnp.concatenate(blocks, axis=1)
