"""Attention masks as values: what may be attended is known from indices, never from an array."""

from dataclasses import dataclass

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

    def as_array(self, q_len: int, k_len: int) -> Bool[np.ndarray, "L S"]:
        """The whole mask drawn out, for tests and for the plain reference path."""
        blocks = np.arange(q_len) // self.tokens_per_block
        return blocks[:, None] >= (np.arange(k_len) // self.keys_per_block)[None, :]


Mask = BlockCausal
