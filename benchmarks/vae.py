"""The VAE beside diffusers', its memory by length of video, and what bfloat16 costs.

``speed``: the next latent frame (four frames) encoded and decoded at the released width, 272 x 480.
Each side lives in a process of its own, so that its peak memory is its own, and chunks alternate.
``length``: whole decodings, each in a process of its own. ``quality``: bfloat16 against float32 on
the same latents. Weights are random.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from benchmarks.measure import Taken, head, middle, peak_gib, row, timed, versions

THREADS = 2
HEIGHT, WIDTH = 272, 480
RELEASED = 96  # channels at full resolution
STEADY = 4  # chunks, at the beginning and at the end of a video


def jax_vae(dtype: str, base_dim: int = RELEASED) -> Any:
    """The released shape but for its width; weights keep the variance of what passes through."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from skyreels_jax.models.vae import WanVae
    from skyreels_jax.models.vae_layers import WAN_VAE

    kinds = {"dtype": dtype, "param_dtype": dtype}
    config = dataclasses.replace(WAN_VAE, base_dim=base_dim)
    graph, state = nnx.split(nnx.eval_shape(lambda: WanVae(config, rngs=nnx.Rngs(0), **kinds)))
    rng = np.random.default_rng(0)

    def leaf(path: tuple[Any, ...], spec: jax.ShapeDtypeStruct) -> jax.Array:
        if len(spec.shape) == 1:
            return jnp.full(spec.shape, "scale" in jax.tree_util.keystr(path), spec.dtype)
        scale = np.float32(np.prod(spec.shape[:-1]) ** -0.5)
        return jnp.asarray(scale * rng.standard_normal(spec.shape, np.float32), spec.dtype)

    return nnx.merge(graph, jax.tree.map_with_path(leaf, state))


def latents(frames: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Normalised ones."""
    shape = (1, 16, frames, height // 8, width // 8)
    return np.random.default_rng(1).standard_normal(shape, np.float32)


def pixels(frames: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """In [-1, 1]."""
    shape = (1, 3, frames, height, width)
    return np.random.default_rng(1).uniform(-1, 1, shape).astype(np.float32)


def jax_chunks(dtype: str, what: str) -> Iterator[np.ndarray]:
    """Each the next chunk's result, without end."""
    import jax
    from flax import nnx

    from skyreels_jax.models.vae import WanVae, decode_chunks

    vae = jax_vae(dtype)
    if what == "decode":
        return decode_chunks(vae, latents(256))
    graph, parameters = nnx.split(vae)
    step = jax.jit(
        lambda parameters, chunk, cache: WanVae.encode_chunk(
            nnx.merge(graph, parameters), chunk, cache
        ),
        donate_argnums=2,
    )

    def encoded() -> Iterator[np.ndarray]:
        video, cache = pixels(5), None
        while True:
            chunk = video[:, :, :1] if cache is None else video[:, :, 1:]
            out, cache = step(parameters, chunk, cache)
            yield np.asarray(out)

    return encoded()


def torch_chunks(what: str) -> Iterator[np.ndarray]:
    """The same of diffusers: its own loop, taken apart."""
    import diffusers
    import torch

    torch.set_num_threads(THREADS)
    vae = diffusers.AutoencoderKLWan().eval().requires_grad_(False)
    vae.clear_cache()
    z, video = torch.from_numpy(latents(1)), torch.from_numpy(pixels(5))

    @torch.inference_mode()
    def step(first: bool) -> np.ndarray:
        if what == "decode":
            arguments = {"feat_cache": vae._feat_map, "feat_idx": [0], "first_chunk": first}
            return vae.decoder(vae.post_quant_conv(z), **arguments).numpy()
        chunk = video[:, :, :1] if first else video[:, :, 1:]
        return vae.quant_conv(
            vae.encoder(chunk, feat_cache=vae._enc_feat_map, feat_idx=[0])
        ).numpy()

    yield step(first=True)
    while True:
        yield step(first=False)


SIDES: dict[str, Callable[[str], Iterator[np.ndarray]]] = {
    "JAX": partial(jax_chunks, "float32"),
    "JAX bfloat16": partial(jax_chunks, "bfloat16"),
    "diffusers": torch_chunks,
}


def serve(side: str, what: str) -> None:
    """Time one chunk for each line on standard input: the process of one side."""
    chunks = SIDES[side](what)
    for _ in sys.stdin:
        chunk, taken = timed(lambda: next(chunks))
        answer = {"taken": taken, "peak": peak_gib(), "frames": chunk.shape[2]}
        print(json.dumps(answer), flush=True)


class Side:
    """The parent's end of one process."""

    def __init__(self, name: str, what: str):
        self.process = subprocess.Popen(
            command("--side", name, "--what", what),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.name = name
        self.peak = 0.0
        # The first chunk and the two after it are compiled, or find the caches without pages.
        for _ in range(3):
            self.next_chunk()

    def next_chunk(self) -> Taken:
        """What it took."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print("next", file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        self.peak = answer["peak"]
        return Taken(*answer["taken"])


def command(*arguments: str) -> list[str]:
    """This module again."""
    return [sys.executable, "-m", "benchmarks.vae", *arguments]


def speed(rounds: int) -> None:
    """Print a row for each direction and side."""
    head("four frames", "side", "s", "times as fast", "processor s", "times as little", "peak GiB")
    for what in ("encode", "decode"):
        sides = [Side(name, what) for name in SIDES]
        taken = [[side.next_chunk() for side in sides] for _ in range(rounds)]
        for k, side in enumerate(sides):
            cells = []
            for kind in Taken._fields:
                mine, theirs = ([getattr(each[j], kind) for each in taken] for j in (k, -1))
                ratio = middle([b / a for a, b in zip(mine, theirs, strict=True)])
                cells += [f"{middle(mine):.1f}", f"{ratio:.2f}"]
            row(what, side.name, *cells, f"{side.peak:.2f}")
        for side in sides:
            side.process.communicate()


def decode_one(frames: int, base_dim: int) -> None:
    """Decode a video as the writer does, keeping nothing: the process of one length."""
    from skyreels_jax.models.vae import decode_chunks

    chunks = decode_chunks(jax_vae("float32", base_dim), latents((frames + 3) // 4))
    steps = [timed(lambda: next(chunks).shape[2]) for _ in range((frames + 3) // 4)]
    assert sum(count for count, _ in steps) == frames
    # The first three are compiled, or find the caches without pages.
    ends = steps[3 : 3 + STEADY], steps[-STEADY:]
    each = [middle([seconds[k] / count for count, seconds in end]) for k in (0, 1) for end in ends]
    row(frames, f"{peak_gib():.3f}", *(f"{seconds:.2f}" for seconds in each))


def length(frames: list[int], base_dim: int) -> None:
    """Print a row for each."""
    frame = "s a frame at the beginning"
    head("frames", "peak GiB", frame, "at the end", f"processor {frame}", "at the end")
    for count in frames:
        width = ("--base-dim", str(base_dim))
        subprocess.run(command("--decode-one", str(count), *width), check=True)


def quality() -> None:
    """Print what bfloat16 costs, in dB, on two sizes."""
    from skyreels_jax.models.vae import decode_to_pixels, encode_pixels

    exact, half = jax_vae("float32"), jax_vae("bfloat16")

    def decibels(a: np.ndarray, b: np.ndarray, peak: float) -> str:
        return f"{10 * np.log10(peak**2 / np.mean((a - b) ** 2)):.1f}"

    head("frames", "decode, PSNR dB", "pixels' standard deviation", "encode, dB below the latents")
    for frames, height, width in ((1, 128, 128), (9, 64, 64)):
        z, video = latents((frames + 3) // 4, height, width), pixels(frames, height, width)
        a, b = decode_to_pixels(exact, z), encode_pixels(exact, video)
        psnr = decibels(a, decode_to_pixels(half, z), 2)
        below = decibels(b, encode_pixels(half, video), float(b.std()))
        row(f"{frames} of {height} x {width}", psnr, f"{a.std():.2f}", below)


def main(arguments: list[str]) -> None:
    """Run the parts asked for."""
    parts = ("speed", "length", "quality")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=parts, help="which (all)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--frames", type=int, nargs="+", default=[33], help="of length (default: 33)"
    )
    parser.add_argument("--base-dim", type=int, default=RELEASED, help="of length's VAE")
    parser.add_argument("--side", choices=SIDES, help="internal: be one side")
    parser.add_argument("--what", choices=("encode", "decode"), help="internal: of that side")
    parser.add_argument("--decode-one", type=int, help="internal: decode that many frames")
    options = parser.parse_args(arguments)
    if options.side:
        return serve(options.side, options.what)
    if options.decode_one:
        return decode_one(options.decode_one, options.base_dim)
    runs: dict[str, Callable[[], None]] = {
        "speed": lambda: speed(options.rounds),
        "length": lambda: length(options.frames, options.base_dim),
        "quality": quality,
    }
    print(f"\n{versions()}, {THREADS} threads, {HEIGHT} x {WIDTH}")
    for part in (options.part,) if options.part else parts:
        print(f"\n{part}\n", flush=True)
        runs[part]()
    return None


if __name__ == "__main__":
    main(sys.argv[1:])
