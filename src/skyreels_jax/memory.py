"""What a generation takes at the very least, and what there is."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

import jax
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import PyTree

from skyreels_jax.errors import MemoryExhausted, is_out_of_memory, out_of_memory
from skyreels_jax.models.layers import TILE_ROWS
from skyreels_jax.models.transformer_config import QUANTIZED_DTYPES, TransformerConfig
from skyreels_jax.models.vae_layers import VaeConfig
from skyreels_jax.weights.components.clip import stored_image_encoder
from skyreels_jax.weights.components.transformer import TRANSFORMER
from skyreels_jax.weights.components.umt5 import stored_text_encoder
from skyreels_jax.weights.components.vae import stored_vae
from skyreels_jax.weights.engine import parameters
from skyreels_jax.weights.layout import Layout
from skyreels_jax.weights.offload import stays_on_host

Direction = Literal["encode", "decode"]

# Of one block at work, by token: bytes per feature of the model and of its feed-forward. Fitted to
# the compiler's own analysis of the 1.3B and 14B shapes in float32 (2,550 and 4,590 tokens).
BYTES_PER_FEATURE: Final = 20
BYTES_PER_HIDDEN: Final = 4
# Float32 copies of the latents: sample, three of solver state, prediction.
LATENT_COPIES: Final = 5
# Of the VAE at work on one chunk, by pixel of a frame and channel of its first level, in float32:
# what it keeps of frames before, intermediate values and result. From the compiler's own analysis
# of the released shape, which is 220, 216 and 216 (decode) and 177, 164 and 163 (encode) at 256 x
# 256, 544 x 960 and 720 x 1280.
VAE_BYTES: Final[Mapping[Direction, int]] = {"encode": 177, "decode": 220}


@dataclass(frozen=True)
class Estimate:
    """A lower bound of the transformer's stage, in bytes; nothing else is resident during it."""

    weights: int
    context: int
    activations: int

    @property
    def total(self) -> int:
        """The sum."""
        return self.weights + self.context + self.activations


def estimate(
    config: TransformerConfig,
    latents: tuple[int, int, int],
    *,
    dtype: str,
    weights: str | None = None,
    offload: bool = False,
    copies: int = 1,
) -> Estimate:
    """What denoising takes at least, from the configuration alone.

    Args:
        config: of the transformer.
        latents: frames, rows and columns.
        dtype: of weights and matrix products.
        weights: what the blocks' kernels are kept in; ``None`` is ``dtype``.
        offload: whether the device holds one layer of them at a time.
        copies: videos in a batch (two under batched guidance).
    """
    model = TRANSFORMER.abstract(config, dtype, kernel_dtype=kernel_dtype(weights))
    size = 4 if dtype == "float32" else 2
    frames, rows, columns = latents
    tokens = frames * config.patches(rows, columns)
    # On CPUs the feed-forward has a tile of rows between its products at a time.
    hidden = copies * tokens
    hidden = min(hidden, TILE_ROWS) if jax.default_backend() == "cpu" else hidden
    positions = config.text_len + config.image_tokens
    return Estimate(
        weights=resident_bytes(model, offload=offload),
        context=2 * 2 * config.num_layers * positions * config.dim * size,
        activations=copies * tokens * BYTES_PER_FEATURE * config.dim
        + hidden * BYTES_PER_HIDDEN * config.ffn_dim
        + LATENT_COPIES * 4 * config.in_dim * frames * rows * columns,
    )


def cache_bytes(config: TransformerConfig, latents: tuple[int, int, int], dtype: str) -> int:
    """What the keys and values of so many latent frames, rows and columns take, of all blocks."""
    frames, rows, columns = latents
    tokens = frames * config.patches(rows, columns)
    return 2 * config.num_layers * tokens * config.dim * (4 if dtype == "float32" else 2)


def component_sizes(
    layout: Layout,
    config: TransformerConfig,
    dtype: DTypeLike,
    vae_dtype: DTypeLike,
    *,
    weights: str | None = None,
    offload: bool = False,
    devices: int = 1,
) -> dict[str, int]:
    """Bytes of the parameters of each component of a checkpoint, from headers alone.

    Of a mesh they are those of all devices together, which share transformer and encoders.

    Args:
        layout: of the checkpoint.
        config: of the transformer.
        dtype: of the transformer and the encoders.
        vae_dtype: of the VAE.
        weights: what the kernels of the blocks of transformer and text encoder are kept in.
        offload: whether the transformer's stay in the host's memory; they are not counted then.
        devices: of the mesh; each has a VAE of its own.
    """
    kernels = kernel_dtype(weights)
    transformer = TRANSFORMER.abstract(config, dtype, kernel_dtype=kernels)
    models: dict[str, nnx.Module] = {
        "text_encoder": stored_text_encoder(layout).abstract(dtype, kernel_dtype=kernels),
        "vae": stored_vae(layout).abstract(vae_dtype),
    }
    if config.image_dim is not None:
        models["image_encoder"] = stored_image_encoder(layout).abstract(dtype)
    sizes = {name: bytes_of(nnx.state(model, nnx.Param)) for name, model in models.items()}
    sizes["vae"] *= devices
    return {"transformer": resident_bytes(transformer, offload=offload), **sizes}


def kernel_dtype(weights: str | None) -> DTypeLike | None:
    """What the setting ``weights`` means to a model; ``None`` where kernels are as all else."""
    return QUANTIZED_DTYPES.get(weights or "")


def resident_bytes(transformer: nnx.Module, *, offload: bool) -> int:
    """Bytes of its parameters in the device's memory: of what streams through it, two layers."""
    total = 0
    for path, variable in parameters(transformer).items():
        size = variable.size * variable.dtype.itemsize
        total += 2 * size // variable.shape[0] if offload and stays_on_host(path) else size
    return total


def bytes_of(tree: PyTree) -> int:
    """Bytes of all arrays in ``tree``, which may be abstract."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def vae_work(config: VaeConfig, direction: Direction, height: int, width: int) -> int:
    """Bytes that the VAE takes besides its weights to work on frames of this size, whole.

    Args:
        config: of the VAE; the number is calibrated on the multiples and depth of the released one.
        direction: of the work.
        height: in pixels.
        width: in pixels.
    """
    return VAE_BYTES[direction] * config.base_dim * height * width


def available_memory() -> int | None:
    """Bytes free where JAX computes: of the first device, or of the host if that is the CPU.

    ``None`` if it cannot be found out.
    """
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"] - statistics.get("bytes_in_use", 0)
    return min(_host_memory(), default=None)


def total_memory() -> int | None:
    """Bytes that there are in all where JAX computes, used or not; the same from start to start.

    ``None`` if it cannot be found out.
    """
    statistics = jax.local_devices()[0].memory_stats()
    if statistics and "bytes_limit" in statistics:
        return statistics["bytes_limit"]
    whole = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"), *_container_limit()]
    return min(whole, default=None)


@contextmanager
def refused_in_words(advice: str) -> Iterator[None]:
    """A device's refusal to allot memory as one line instead of the compiler's report.

    Raises:
        MemoryExhausted: memory ran out in the body, JAX's, PyTorch's or the host's; says how much
            was asked for, and ``advice``.
    """
    try:
        yield
    except (MemoryError, RuntimeError, ValueError, OSError) as error:
        if not is_out_of_memory(error):
            raise
        raise MemoryExhausted(out_of_memory(error, advice)) from error


def _host_memory() -> list[int]:
    """The host's free memory and the container's limit; those that can be read."""
    free = []
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                free.append(int(line.split()[1]) * 1024)
    except OSError:
        free.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    return [*free, *_container_limit()]


def _container_limit() -> list[int]:
    """What a container may have, if this is one that says so."""
    try:
        # Not less what is used: that counts the file cache, which gives way.
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
    except OSError:
        return []
    return [int(limit)] if limit.isdecimal() else []
