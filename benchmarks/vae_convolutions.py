"""Formulations of the VAE's causal convolution, in units of the speed of PyTorch's 3-D convolution.

float32, at the shapes that decoding 272 x 480 spends most on.
"""

import argparse
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from benchmarks.measure import head, interleaved, row, versions

THREADS = 2
# Channels in and out, frames, rows and columns.
SHAPES = (
    (96, 96, 1, 272, 480),
    (192, 192, 1, 136, 240),
    (384, 384, 2, 68, 120),
    (384, 384, 1, 34, 60),
)


def formulations() -> dict[str, Callable[[Any, Any], Any]]:
    """Ways to convolve frames [1, 2 + T, height, width, I] with a kernel [3, 3, 3, I, O]."""
    import jax.numpy as jnp
    from jax import lax

    from skyreels_jax.ops.linear import causal_conv, conv2d

    def taps(x: Any, kernel: Any) -> Any:
        bias = jnp.zeros(kernel.shape[-1])
        return causal_conv(x[:, 2:], kernel, bias, x[:, :2], dtype=jnp.float32)[0]

    def channels(x: Any, kernel: Any) -> Any:
        frames = jnp.concatenate([x[0, k : x.shape[1] - 2 + k] for k in range(3)], axis=-1)
        flat = jnp.moveaxis(kernel, 0, 2).reshape(3, 3, -1, kernel.shape[-1])
        return conv2d(frames, flat, padding=(1, 1))[None]

    def conv3d(x: Any, kernel: Any) -> Any:
        names = ("NDHWC", "DHWIO", "NDHWC")
        pads = ((0, 0), (1, 1), (1, 1))
        return lax.conv_general_dilated(x, kernel, (1, 1, 1), pads, dimension_numbers=names)

    def channels_first(x: Any, kernel: Any) -> Any:
        x, names = jnp.moveaxis(x[0], -1, 1), ("NCHW", "HWIO", "NCHW")
        frames = [x[k : x.shape[0] - 2 + k] for k in range(3)]
        parts = [
            lax.conv_general_dilated(f, k, (1, 1), ((1, 1), (1, 1)), dimension_numbers=names)
            for f, k in zip(frames, kernel, strict=True)
        ]
        return jnp.moveaxis(parts[0] + parts[1] + parts[2], 1, -1)[None]

    def products(x: Any, kernel: Any) -> Any:
        x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
        frames, height, width = x.shape[1] - 2, x.shape[2] - 2, x.shape[3] - 2
        parts = [
            x[:, t : t + frames, i : i + height, j : j + width] @ kernel[t, i, j]
            for t, i, j in np.ndindex(3, 3, 3)
        ]
        return sum(parts[1:], start=parts[0])

    def patches(x: Any, kernel: Any) -> Any:
        # Two rows at a time, so that what is multiplied stays in cache.
        x = jnp.pad(x, ((0, 0), (0, 0), (1, 1), (1, 1), (0, 0)))
        frames, height, width = x.shape[1] - 2, x.shape[2] - 2, x.shape[3] - 2
        flat = kernel.reshape(-1, kernel.shape[-1])

        def rows(k: Any) -> Any:
            seen = lax.dynamic_slice_in_dim(x[0], 2 * k, 4, axis=1)
            parts = [
                seen[t : t + frames, i : i + 2, j : j + width] for t, i, j in np.ndindex(3, 3, 3)
            ]
            return jnp.concatenate(parts, axis=-1) @ flat

        out = lax.map(rows, jnp.arange(height // 2))
        return jnp.moveaxis(out, 0, 1).reshape(1, frames, height, width, -1)

    return {
        "a 2-D convolution a tap": taps,
        "taps as channels": channels,
        "3-D": conv3d,
        "channels first": channels_first,
        "27 products": products,
        "patches and a product": patches,
    }


def compare(rounds: int) -> None:
    """Print a row for each shape."""
    import jax
    import torch

    torch.set_num_threads(THREADS)
    ways = {name: jax.jit(way) for name, way in formulations().items()}
    head("channels, frames, size", "PyTorch s", *ways)
    for before, after, frames, height, width in SHAPES:
        rng = np.random.default_rng(0)
        x = rng.standard_normal((1, frames + 2, height, width, before), np.float32)
        kernel = rng.standard_normal((3, 3, 3, before, after), np.float32) / np.float32(50)
        theirs = torch.from_numpy(np.moveaxis(x, -1, 1).copy())
        weights = torch.from_numpy(np.moveaxis(kernel, (4, 3), (0, 1)).copy())
        ours = jax.device_put((x, kernel))

        @torch.inference_mode()
        def reference(x: Any = theirs, weights: Any = weights) -> Any:
            return torch.nn.functional.conv3d(x, weights, padding=(0, 1, 1))

        expected = np.moveaxis(reference().numpy(), 1, -1)
        sides: dict[str, Callable[[], Any]] = {"PyTorch": reference}
        for name, way in ways.items():
            np.testing.assert_allclose(way(*ours), expected, atol=1e-4, rtol=1e-4)
            sides[name] = partial(lambda way, ours: way(*ours).block_until_ready(), way, ours)
        taken = interleaved(sides, rounds)
        clock = taken["PyTorch"].clock
        ratios = (f"{clock / taken[name].clock:.2f}" for name in ways)
        row(f"{before}, {frames}, {height} x {width}", f"{clock:.3f}", *ratios)


def main(arguments: list[str]) -> None:
    """Compare all formulations."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    print(f"\n{versions()}, {THREADS} threads\n")
    compare(options.rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
