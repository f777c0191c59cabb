"""Self-attention of tokens of which every device holds a slab of each frame.

Three ways for a query to meet the keys of other devices, which may be combined: the heads are
exchanged for tokens (DeepSpeed-Ulysses, arXiv 2309.14509), keys and values are gathered, or they go
round in a ring with a running softmax (ring attention, arXiv 2310.01889).
"""

from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from skyreels_jax.errors import UnsupportedError
from skyreels_jax.ops.attention import attention
from skyreels_jax.ops.kernels.chunked import (
    attend_some,
    begin_softmax,
    finish_softmax,
    target_tiling,
)
from skyreels_jax.ops.kernels.contract import PastKeyValues
from skyreels_jax.ops.masks import BlockCausal
from skyreels_jax.parallel.plan import MeshPlan

_Heads = Float[Array, "B L N K"]
_ByFrame = Float[Array, "B F P N K"]
_Pair = Float[Array, "both B F P N K"]
_PATCHES, _HEADS = 3, 4  # axes of several such arrays on top of each other


@dataclass(frozen=True)
class MeshAttention:
    """Attention in a fully manual ``shard_map``; takes what :func:`.attention` takes.

    Attributes:
        plan: of the mesh.
        slab: patches of a frame on each device.
        patches: of a frame on all devices; those that fill up the last slabs are not counted.
    """

    plan: MeshPlan
    slab: int
    patches: int

    def __call__(
        self,
        query: _Heads,
        key: _Heads,
        value: _Heads,
        *,
        mask: BlockCausal | None = None,
        past: PastKeyValues | None = None,
        implementation: str | None = None,
    ) -> _Heads:
        """Attention of this device's tokens to all devices'.

        Raises:
            UnsupportedError: a path is named that keys cannot go round with.
        """
        query, key, value = self._exchange(*map(self._by_frame, (query, key, value)))
        own = self._gather(jnp.stack([key, value]))
        before, filled = None, None
        if past is not None:
            before = self._gather(
                jnp.stack(self._exchange(*map(self._by_frame, (past.key, past.value))))
            )
            filled = past.length // self.slab
        if self.plan.ring == 1:
            out = self._at_once(query, own, mask, before, filled, implementation)
        else:
            out = self._around(query, own, mask, before, filled, implementation)
        if self.plan.ulysses > 1:
            out = jax.lax.all_to_all(out, "ulysses", _PATCHES - 1, _HEADS - 1, tiled=True)
        return _in_a_row(out)

    def _by_frame(self, states: _Heads) -> _ByFrame:
        batch, _, *heads = states.shape
        return states.reshape(batch, -1, self.slab, *heads)

    def _exchange(self, *states: _ByFrame) -> tuple[Float[Array, "B F Q M K"], ...]:
        """All of ``ulysses``'s tokens for some of the heads; in one exchange."""
        if self.plan.ulysses == 1:
            return states
        stacked = jnp.stack(states)
        return tuple(jax.lax.all_to_all(stacked, "ulysses", _HEADS, _PATCHES, tiled=True))

    def _gather(self, pair: _Pair) -> _Pair:
        """Keys and values of all devices along ``fsdp``."""
        if self.plan.fsdp == 1:
            return pair
        return jax.lax.all_gather(pair, "fsdp", axis=_PATCHES, tiled=True)

    def _at_once(
        self,
        query: _ByFrame,
        own: _Pair,
        mask: BlockCausal | None,
        before: _Pair | None,
        filled: Int[Array, ""] | None,
        implementation: str | None,
    ) -> _ByFrame:
        """All keys are here, without those of patches that fill up."""
        past = None
        if before is not None and filled is not None:
            past = PastKeyValues(*self._counted(before), filled * self.patches)
        if mask is not None:
            mask = replace(mask, tokens_per_frame=query.shape[2], keys_per_frame=self.patches)
        out = attention(
            _in_a_row(query),
            *self._counted(own),
            mask=mask,
            past=past,
            implementation=implementation,
        )
        return out.reshape(query.shape)

    def _counted(self, pair: _Pair) -> tuple[_Heads, _Heads]:
        key, value = pair[:, :, :, : self.patches]
        return _in_a_row(key), _in_a_row(value)

    def _around(
        self,
        query: _ByFrame,
        own: _Pair,
        mask: BlockCausal | None,
        before: _Pair | None,
        filled: Int[Array, ""] | None,
        implementation: str | None,
    ) -> _ByFrame:
        """A device's keys at a time, while the next are on their way."""
        if implementation not in (None, "chunked"):
            raise UnsupportedError(
                f"attention path {implementation!r} cannot go on from keys that it saw before, and "
                f"`mesh` {self.plan} brings them one device at a time: name `chunked` or none, or "
                "take `ulysses` or `fsdp` in place of `ring`"
            )
        pair = own if before is None else jnp.concatenate([before, own], axis=2)
        slots, part = (0 if before is None else before.shape[2]), pair.shape[_PATCHES]
        rows = _in_a_row(query)
        tiling, scale = target_tiling(), query.shape[-1] ** -0.5
        queries, state = begin_softmax(rows, tiling)

        def attend(turn: Int[Array, ""], state, pair: _Pair):
            source = (jax.lax.axis_index("ring") + turn) % self.plan.ring

            def visible(q: Int[Array, " L"], k: Int[Array, " S"]) -> Array:
                frame = k // part
                # Of what the last devices hold, only so many patches are the frame's.
                seen = (source * part + k % part < self.patches)[None, :]
                if mask is not None:
                    block = q // (query.shape[2] * mask.frames_per_block)
                    in_reach = block[:, None] >= ((frame - slots) // mask.frames_per_block)[None, :]
                    seen = seen & in_reach
                if filled is not None:
                    seen = seen & ((frame >= slots) | (frame < filled))[None, :]
                return seen

            key, value = map(_in_a_row, pair)
            return attend_some(
                state, queries, key, value, visible=visible, scale=scale, tiling=tiling
            )

        def turn(number: Int[Array, ""], carry):
            state, pair = carry
            ring = self.plan.ring
            following = jax.lax.ppermute(pair, "ring", [(n, (n - 1) % ring) for n in range(ring)])
            return attend(number, state, pair), following

        last = self.plan.ring - 1
        state, pair = jax.lax.fori_loop(0, last, turn, (state, pair))
        return finish_softmax(attend(jnp.int32(last), state, pair), rows).reshape(query.shape)


def _in_a_row(states: _ByFrame) -> _Heads:
    """Token by token, frame after frame."""
    return states.reshape(states.shape[0], -1, *states.shape[3:])
