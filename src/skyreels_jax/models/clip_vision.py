"""The vision tower of CLIP, up to its last block but one."""

from dataclasses import dataclass
from typing import Final


@dataclass(frozen=True, kw_only=True)
class ClipVisionConfig:
    """The shape of one CLIP vision tower; :data:`CLIP_VIT_H` is the one of all I2V checkpoints.

    Attributes:
        dim: width of the states.
        ffn_dim: width inside the feed-forward.
        num_heads: heads of attention.
        num_layers: blocks in the file; the features come from the last but one.
        image_size: pixels of a side of the square input.
        patch_size: pixels of a side of a patch.
        projection_dim: width of the projection to the space shared with text; None where a file
            has none. Nothing here computes it.
        eps: of the layer norms.
    """

    dim: int
    ffn_dim: int
    num_heads: int
    num_layers: int
    image_size: int = 224
    patch_size: int = 14
    projection_dim: int | None = None
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.dim % self.num_heads:
            raise ValueError(f"{self.dim=} does not divide into {self.num_heads=}")
        if self.image_size % self.patch_size:
            raise ValueError(f"{self.image_size=} does not divide into {self.patch_size=}")
        if self.num_layers < 2:
            raise ValueError(f"{self.num_layers=}: the last block but one needs two")

    @property
    def tokens(self) -> int:
        """The class token and one a patch: 257."""
        return 1 + (self.image_size // self.patch_size) ** 2


CLIP_VIT_H: Final = ClipVisionConfig(
    dim=1280, ffn_dim=5120, num_heads=16, num_layers=32, projection_dim=1024
)
