"""The dimension vocabulary, one spelling for the whole package.

=====  ==========================================================================
name   meaning
=====  ==========================================================================
B      batch (videos; twice that under batched guidance)
C      channels of a latent (16) or of a conditioned latent (36)
F      latent frames; pixel frames are ``T = 4 * (F - 1) + 1``
H, W   height and width of the *latent* (pixels / 8); patches are ``H / 2``, ``W / 2``
L      video tokens, ``F * (H / 2) * (W / 2)``, frame-major, then rows, then columns
S      context tokens: 512 of text, or 257 of an image
D      model width; ``N`` heads of ``K`` features, ``D = N * K``
=====  ==========================================================================

Pixels have their own axes: ``T`` frames, ``height``, ``width`` and 3 colours.
"""

from typing import Final

import numpy as np
from jaxtyping import Array, Float, Int, UInt8

# Latent frames that the models' positions end at: 4 min 16 s at 16 frames a second.
ROPE_FRAMES: Final = 1024

Latents = Float[Array, "B C F H W"]
Tokens = Float[Array, "B L D"]
Context = Float[Array, "B S D"]
Timesteps = Float[Array, " B"] | Float[Array, "B F"] | Int[Array, " B"] | Int[Array, "B F"]

HostLatents = Float[np.ndarray, "C F H W"]
Pixels = Float[np.ndarray, "3 T height width"]
Frames = UInt8[np.ndarray, "T height width 3"]
