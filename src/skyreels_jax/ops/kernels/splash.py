"""The TPU kernel that ships with JAX ("splash"), made to take any length."""

from functools import partial
from typing import Final

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from skyreels_jax.ops.kernels.contract import AttentionCall, PastKeyValues, by_query_block
from skyreels_jax.ops.masks import Mask

_LANES: Final = 128
# Tiles of 2048 do not fit a v5e's vector memory.
_LARGEST_TILE: Final = 1024
_WIDTH_UNIT: Final = 8
_WIDEST: Final = 256


def splash_refusal(call: AttentionCall) -> str | None:
    """A TPU, and heads of at most two registers, whose lanes need not all be used."""
    width = call.query[-1]
    if call.device.platform != "tpu":
        return f"it needs a TPU, and this is {call.device.platform}"
    if width % _WIDTH_UNIT or width > _WIDEST:
        return (
            f"heads must have a multiple of {_WIDTH_UNIT} features, at most {_WIDEST}; "
            f"these have {width}"
        )
    return None


def splash_attention(
    query: Float[Array, "B L N K"],
    key: Float[Array, "B S N K"],
    value: Float[Array, "B S N K"],
    *,
    mask: Mask | None,
    scale: float,
    past: PastKeyValues | None = None,
    interpret: bool = False,
) -> Float[Array, "B L N K"]:
    """``interpret`` runs the kernel without a TPU, slowly, for tests.

    Empty slots of ``past`` are hidden, and take as long as filled ones.
    """
    fused = partial(_unmasked, scale=scale, interpret=interpret)
    return by_query_block(fused, query, key, value, mask=mask, past=past)


def _unmasked(
    query: Array,
    key: Array,
    value: Array,
    *,
    scale: float,
    interpret: bool,
    key_value_seq_lengths: Int[Array, " B"] | None = None,
) -> Array:
    """Fill both lengths up to whole tiles; a segment of their own hides keys that do not count."""
    # Here, because importing the kernels takes longer than the rest of the package.
    from jax.experimental.pallas.ops.tpu import splash_attention as tpu

    q_len, key_len = query.shape[1], key.shape[1]
    q_tile, key_tile = (min(_LARGEST_TILE, _round_up(n, _LANES)) for n in (q_len, key_len))
    # The kernel does not scale. Scaled queries are rounded once more than in the other paths.
    query = (query.astype(jnp.float32) * scale).astype(query.dtype)
    query = _fill_up(query, q_tile)
    key, value = _fill_up(key, key_tile), _fill_up(value, key_tile)
    rows, columns = query.shape[2], key.shape[2]
    full = tpu.FullMask((rows, columns))
    kernel = tpu.make_splash_mha_single_device(
        tpu.MultiHeadMask([full] * query.shape[1]),
        block_sizes=tpu.BlockSizes(
            **dict.fromkeys(("block_q", "block_q_dkv", "block_q_dq"), q_tile),
            **dict.fromkeys(("block_kv", "block_kv_compute", "block_kv_dq"), key_tile),
            **dict.fromkeys(("block_kv_dkv", "block_kv_dkv_compute"), key_tile),
        ),
        interpret=interpret,
    )

    def one_video(query: Array, key: Array, value: Array, count: Array | int) -> Array:
        hidden = (jnp.arange(columns) >= count).astype(jnp.int32)
        segments = tpu.SegmentIds(q=jnp.zeros(rows, jnp.int32), kv=hidden)
        return jnp.asarray(kernel(query, key, value, segment_ids=segments))

    if key_value_seq_lengths is None:
        out = jax.vmap(partial(one_video, count=key_len))(query, key, value)
    else:
        out = jax.vmap(one_video)(query, key, value, key_value_seq_lengths)  # [B, N, rows, K]
    return out[:, :, :q_len].swapaxes(1, 2)


def _fill_up(x: Float[Array, "B L N K"], tile: int) -> Float[Array, "B N l K"]:
    """Heads first, tokens filled up with zeros to whole tiles."""
    missing = _round_up(x.shape[1], tile) - x.shape[1]
    return jnp.pad(x.swapaxes(1, 2), ((0, 0), (0, 0), (0, missing), (0, 0)))


def _round_up(length: int, size: int) -> int:
    return -(-length // size) * size
