"""Attention masks as values: what may be attended is known from indices, never from an array."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from jaxtyping import Array, Bool, Int


@dataclass(frozen=True)
class BlockCausal:
    """Tokens see their own block of frames and all earlier blocks.

    Inside a block attention is bidirectional. Query token ``i`` may attend key token ``j`` iff
    ``frame(i) // frames_per_block >= frame(j) // frames_per_block`` with
    ``frame(i) = i // tokens_per_frame``. The last block may be short. Where keys are those of more
    patches than queries are, a frame has ``keys_per_frame`` of them.
    """

    tokens_per_frame: int
    frames_per_block: int
    keys_per_frame: int | None = None

    def __post_init__(self):
        if self.tokens_per_frame < 1 or self.frames_per_block < 1:
            raise ValueError(
                f"{self}: a block needs at least one frame, and a frame at least one token"
            )

    @property
    def tokens_per_block(self) -> int:
        """Tokens of a full block."""
        return self.tokens_per_frame * self.frames_per_block

    @property
    def keys_per_block(self) -> int:
        """Keys of a full block."""
        return (self.keys_per_frame or self.tokens_per_frame) * self.frames_per_block

    def visible_keys(self, query: int, key_len: int) -> int:
        """How many of ``key_len`` keys the query token ``query`` sees: always a prefix."""
        return min((query // self.tokens_per_block + 1) * self.keys_per_block, key_len)

    def allowed(self, queries: Int[Array, " L"], keys: Int[Array, " S"]) -> Bool[Array, "L S"]:
        """The rule for a tile, from the token indices of its rows and of its columns."""
        blocks = queries // self.tokens_per_block
        return blocks[:, None] >= (keys // self.keys_per_block)[None, :]

    def any_allowed(self, queries: Int[Array, " L"], keys: Int[Array, " S"]) -> Bool[Array, ""]:
        """Whether a tile of neighbouring rows and columns is seen at all."""
        return self.allowed(queries[-1:], keys[:1])[0, 0]

    def as_array(self, q_len: int, k_len: int) -> Bool[np.ndarray, "L S"]:
        """The whole mask drawn out, for tests and for the plain reference path."""
        blocks = np.arange(q_len) // self.tokens_per_block
        return blocks[:, None] >= (np.arange(k_len) // self.keys_per_block)[None, :]


@dataclass(frozen=True)
class CleanAndNoisy:
    """Teacher forcing: a video's clean frames, and behind them the same frames noisy.

    A clean token sees the clean tokens of its own and of earlier blocks; a noisy one the clean
    tokens of earlier blocks and the noisy ones of its own, as where a video is made block by block.
    Tokens are ``2 * tokens_per_frame * sum(blocks)``, of queries and of keys.

    Attributes:
        tokens_per_frame: of one frame.
        blocks: frames of each block.
    """

    tokens_per_frame: int
    blocks: tuple[int, ...]

    def __post_init__(self):
        if self.tokens_per_frame < 1 or not self.blocks or min(self.blocks) < 1:
            raise ValueError(
                f"{self}: a block needs at least one frame, and a frame at least one token"
            )

    @property
    def half(self) -> int:
        """Tokens of the clean frames, and of the noisy ones."""
        return self.tokens_per_frame * sum(self.blocks)

    @property
    def _ends(self) -> Int[np.ndarray, " blocks"]:
        return self.tokens_per_frame * np.cumsum(self.blocks)

    def allowed(self, queries: Int[Array, " L"], keys: Int[Array, " S"]) -> Bool[Array, "L S"]:
        """The rule for a tile, from the token indices of its rows and of its columns."""

        def block(tokens: Int[Array, " n"]) -> Int[Array, " n"]:
            within = tokens % self.half
            return (within[:, None] >= self._ends[None, :]).sum(axis=1)

        own, other = block(queries)[:, None], block(keys)[None, :]
        is_clean = (queries < self.half)[:, None]
        sees_clean = (other < own) | (is_clean & (other == own))
        return ((keys < self.half)[None, :] & sees_clean) | (
            (keys >= self.half)[None, :] & ~is_clean & (other == own)
        )

    def any_allowed(self, queries: Int[Array, " L"], keys: Int[Array, " S"]) -> Bool[Array, ""]:
        """Whether a tile of neighbouring rows and columns is seen at all."""
        return self.allowed(queries, keys).any()

    def as_array(self, q_len: int, k_len: int) -> Bool[np.ndarray, "L S"]:
        """The whole mask drawn out, for tests and for the plain reference path."""
        mask = np.zeros((q_len, k_len), bool)
        for rows, seen in self.tiles():
            for columns in seen:
                mask[rows, columns] = True
        return mask

    def tiles(self) -> Iterator[tuple[slice, tuple[slice, ...]]]:
        """Each block's queries, clean ones first, and the keys that they see."""
        starts = [0, *self._ends.tolist()]
        for noisy in (0, self.half):
            for start, end in pairwise(starts):
                own = slice(noisy + start, noisy + end)
                yield own, (slice(0, start), own) if start else (own,)


Mask = BlockCausal | CleanAndNoisy
