"""The noise of a seed: JAX's numbers, or those that PyTorch gives for it."""

import math
from typing import Final

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from skyreels_jax.shapes import Latents

# PyTorch fills arrays in groups of this many numbers, one half from the other.
_GROUP: Final = 16
# Both generators take this much of a seed.
_SEED_BITS: Final = 2**32 - 1


def draw_noise(seed: int, shape: tuple[int, ...], window: int = 0) -> Latents:
    """Standard normal latents of one window of a video.

    Args:
        seed: 0 to 2**32 - 1.
        shape: of the latents, ``(B, C, F, H, W)``.
        window: its number; each has noise of its own.
    """
    return jax.random.normal(noise_key(seed, window), shape, jnp.float32)


def noise_key(seed: int, window: int) -> Array:
    """The generator is named so that a seed means the same everywhere."""
    key = jax.random.key(seed & _SEED_BITS, impl="threefry2x32")
    return jax.random.fold_in(key, window) if window else key


def draw_torch_noise(seed: int, shape: tuple[int, ...], skip: int = 0) -> Float[Array, "*shape"]:
    """What ``torch.randn(shape, generator=torch.Generator().manual_seed(seed))`` gives, on the CPU.

    Equal to 2e-7, the logarithms and cosines being another library's. Source: the numbers were
    found to be a Mersenne Twister's lowest 24 bits and the Box-Muller transform over groups of 16,
    the first half radii, the second angles.

    Args:
        seed: 0 to 2**64 - 1, of which PyTorch's generator takes the lower half.
        shape: of a multiple of 16 numbers.
        skip: so many numbers were drawn before, in groups of 16 too.

    Raises:
        ValueError: sizes that PyTorch fills in another way.
    """
    count = math.prod(shape)
    if count % _GROUP or skip % _GROUP:
        raise ValueError(f"{count} numbers after {skip}: multiples of {_GROUP} are needed")
    generator = np.random.RandomState(seed & _SEED_BITS)
    for some in (skip, count):
        words = generator.randint(0, 2**32, some, dtype=np.uint32)
    uniform = (words & np.uint32(2**24 - 1)).astype(np.float32) * np.float32(2**-24)
    first, second = uniform.reshape(-1, 2, _GROUP // 2).swapaxes(0, 1)
    radius = np.sqrt(np.float32(-2) * np.log(np.float32(1) - first))
    angle = np.float32(2 * np.pi) * second
    pairs = np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1)
    return jnp.asarray(pairs.reshape(shape))
