"""The UMT5 text encoder."""

from dataclasses import dataclass
from typing import Final

# The relative position buckets of every published (u)mT5.
BUCKETS: Final = 32
MAX_DISTANCE: Final = 128


@dataclass(frozen=True, kw_only=True)
class Umt5Config:
    """The shape of one UMT5 encoder; :data:`UMT5_XXL` is the one of all released checkpoints.

    Attributes:
        vocab_size: rows of the embedding table (more than the tokenizer's ids).
        dim: width of the states.
        head_dim: width of a head; ``num_heads * head_dim`` need not be ``dim``.
        num_heads: heads of attention.
        ffn_dim: width inside the gated feed-forward.
        num_layers: blocks.
        eps: of the RMS norms.
    """

    vocab_size: int
    dim: int
    head_dim: int
    num_heads: int
    ffn_dim: int
    num_layers: int
    eps: float = 1e-6

    def __post_init__(self) -> None:
        sizes = (self.vocab_size, self.dim, self.head_dim, self.num_heads, self.ffn_dim)
        if min(*sizes, self.num_layers) < 1:
            raise ValueError(f"{self}: every size must be at least 1")

    @property
    def attention_dim(self) -> int:
        """Width of queries, keys and values over all heads."""
        return self.num_heads * self.head_dim


UMT5_XXL: Final = Umt5Config(
    vocab_size=256_384, dim=4096, head_dim=64, num_heads=64, ffn_dim=10_240, num_layers=24
)
