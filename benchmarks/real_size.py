"""A whole video at the released sizes beside diffusers: wall time and peak memory of a process.

Makes a folder in diffusers' layout with random weights of the released shapes (UMT5-XXL in
bfloat16, T2V-1.3B and the VAE in float32: 18 GB), runs both sides on it in turn, each in a process
of its own from start to finished video, and removes it. The first round of ours compiles; later
ones find the compiled programs.
"""

import argparse
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from benchmarks.measure import head, middle, row, versions
from jax.typing import DTypeLike

from skyreels_jax.media import write_video
from skyreels_jax.models.transformer_config import T2V_1_3B
from skyreels_jax.models.umt5 import UMT5_XXL
from skyreels_jax.models.vae_layers import WAN_VAE
from skyreels_jax.presets import PIPELINE_OF_TASK
from skyreels_jax.testing.random_checkpoint import write_tokenizer
from skyreels_jax.weights.components.stored import ComponentSpec
from skyreels_jax.weights.components.transformer import TRANSFORMER
from skyreels_jax.weights.components.umt5 import UMT5
from skyreels_jax.weights.components.vae import VAE
from skyreels_jax.weights.engine import TensorStream, export
from skyreels_jax.weights.filling import usable_cores
from skyreels_jax.weights.pipeline_folder import write_pipeline_files
from skyreels_jax.weights.safetensors_file import TensorSpec

PROMPT = "a cat sits on a lake in the sun"
HEIGHT, WIDTH, FRAMES, STEPS, GUIDANCE = 272, 480, 5, 2, 6.0


def tensors(specs: Mapping[str, TensorSpec]) -> Iterator[tuple[str, np.ndarray]]:
    """Random numbers that repeat every million, at which nothing vanishes or explodes."""
    tile = np.random.default_rng(0).standard_normal(1 << 20, np.float32)
    for name, spec in specs.items():
        is_vector = spec.shape[0] == spec.size
        scale = 0.02 if is_vector else 1 / math.sqrt(max(1, spec.size // spec.shape[0]))
        values = (scale * tile).astype(spec.dtype)
        if is_vector and name.endswith(("weight", "gamma")):
            values = (1 + scale * tile).astype(spec.dtype)
        yield name, np.resize(values, spec.shape)


def write(folder: Path, spec: ComponentSpec, config: object, dtype: DTypeLike) -> None:
    """A component of random weights, one tensor in memory at a time."""
    specs = export(spec.abstract(config, dtype), spec.rules(config), "diffusers").specs
    spec.write(folder, config, TensorStream(specs, tensors(specs)))


def make(folder: Path) -> None:
    """The whole checkpoint."""
    write_tokenizer(folder / "tokenizer")
    write(folder / "text_encoder", UMT5, UMT5_XXL, jnp.bfloat16)
    write(folder / "transformer", TRANSFORMER, T2V_1_3B, np.float32)
    write(folder / "vae", VAE, WAN_VAE, np.float32)
    names = ("tokenizer", "text_encoder", "vae")
    write_pipeline_files(folder, PIPELINE_OF_TASK["t2v"], list(names), 8.0, None)


def ours(folder: Path, output: Path) -> list[str]:
    """The command of our side."""
    size = ["--height", HEIGHT, "--width", WIDTH, "--num-frames", FRAMES, "--steps", STEPS]
    words = ["generate", "--model", folder, "--prompt", PROMPT, "--guidance-scale", GUIDANCE, *size]
    words += ["--output", output / f"{time.time_ns()}.mp4", "--no-prompt-cache"]
    return [sys.executable, "-m", "skyreels_jax", *map(str, words)]


def theirs(folder: Path, output: Path) -> list[str]:
    """The command of diffusers' side: this module, as :func:`run_diffusers`."""
    words = ["--diffusers", folder, "--output", output / f"{time.time_ns()}.mp4"]
    return [sys.executable, "-m", "benchmarks.real_size", *map(str, words)]


def run_diffusers(folder: Path, output: Path) -> None:
    """The same video by diffusers, as its documentation says: VAE in float32, rest in bfloat16."""
    import torch
    from diffusers import AutoencoderKLWan, SkyReelsV2Pipeline

    torch.set_num_threads(usable_cores())
    vae = AutoencoderKLWan.from_pretrained(folder / "vae", torch_dtype=torch.float32)
    pipe = SkyReelsV2Pipeline.from_pretrained(folder, vae=vae, torch_dtype=torch.bfloat16)
    video = pipe(
        prompt=PROMPT,
        height=HEIGHT,
        width=WIDTH,
        num_frames=FRAMES,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
    )
    # By our writer: diffusers' needs a package that nothing here installs.
    write_video(output, np.rint(video.frames[0] * 255).astype(np.uint8), fps=24)


def taken(command: list[str], cache: Path) -> tuple[float, float]:
    """Seconds on the clock and GiB at the peak of a process.

    Raises:
        SystemExit: it failed.
    """
    environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)}
    start = time.perf_counter()
    process = subprocess.Popen(command, env=environment)
    _, status, usage = os.wait4(process.pid, 0)
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"failed: {command}")
    return time.perf_counter() - start, usage.ru_maxrss / 2**20


def compare(folder: Path, rounds: int) -> None:
    """Run both sides in turn and print a table."""
    sides = {"JAX": ours, "diffusers": theirs}
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, command in sides.items():
            found[name].append(taken(command(folder, folder / "out"), folder / "cache"))
            print(name, *(f"{value:.2f}" for value in found[name][-1]), flush=True)
    print(versions())
    head("side", "seconds, first", "seconds, median", "of diffusers'", "peak GiB", "of diffusers'")
    clock = {name: middle([one[0] for one in times]) for name, times in found.items()}
    peak = {name: max(one[1] for one in times) for name, times in found.items()}
    for name, times in found.items():
        ratios = clock[name] / clock["diffusers"], peak[name] / peak["diffusers"]
        cells = (f"{value:.2f}" for value in (clock[name], ratios[0], peak[name], ratios[1]))
        row(name, f"{times[0][0]:.1f}", *cells)


def main() -> None:
    """Make the folder, compare, remove it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to make it (a temporary place)")
    parser.add_argument("--diffusers", type=Path, help="internal: be that side")
    parser.add_argument("--output", type=Path, help="internal: of that side")
    options = parser.parse_args()
    if options.diffusers:
        run_diffusers(options.diffusers, options.output)
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        start = time.perf_counter()
        make(Path(folder))
        (Path(folder) / "out").mkdir()
        print(f"made in {time.perf_counter() - start:.0f} s", flush=True)
        compare(Path(folder), options.rounds)


if __name__ == "__main__":
    main()
