"""Quality and memory of kernels kept as int8 and fp8, on the small model.

For each: PSNR of frames and latents to float32, what an independent judge says of held-out scenes,
and the transformer's bytes, in bfloat16 as users have it. It exits with 1 where a bound is missed.
"""

import argparse
import dataclasses
import sys
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.measure import head, interleaved, row, versions
from flax import nnx

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.evaluation.scores import from_text, held_out_scenes, score
from skyreels_jax.hub import enable_compilation_cache
from skyreels_jax.memory import kernel_dtype, resident_bytes
from skyreels_jax.models.transformer_config import T2V_1_3B, T2V_14B
from skyreels_jax.parity.metrics import psnr
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.weights.components.transformer import TRANSFORMER

PROMPTS = (
    "a red star grows on a black background",
    "a blue circle moves right on a white background",
)
KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bf16": {},
    "int8": {"weights": "int8"},
    "fp8": {"weights": "fp8"},
}
LEAST_DB = {"int8": 35.0, "fp8": 28.0}
MOST_TIMES = 1.3  # of a step in bfloat16, for int8
MOST_POINTS = 2.0  # of the judge, below float32


def of_latents(found: np.ndarray, exact: np.ndarray) -> float:
    """PSNR in dB, the peak being the range of the exact values."""
    error = float(np.mean((found - exact) ** 2))
    return 10 * np.log10(np.ptp(exact) ** 2 / error) if error else np.inf


def time_step(layers: int) -> bool:
    """Print a step of the T2V-1.3B width with 2,550 tokens by kind; whether a bound is missed."""
    config = dataclasses.replace(T2V_1_3B, num_layers=layers)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 16, 5, 34, 60), np.float32))
    context = jnp.asarray(rng.standard_normal((1, config.text_len, config.text_dim), np.float32))

    def leaf(abstract: jax.ShapeDtypeStruct) -> jax.Array:
        tile = 0.02 * rng.standard_normal(2**16)
        if jnp.dtype(abstract.dtype) == jnp.int8:
            tile = rng.integers(-127, 128, 2**16)
        return jnp.asarray(np.resize(tile, abstract.shape), abstract.dtype)

    calls = {}
    for name, kind in {"bf16": None, "int8": jnp.int8, "fp8": jnp.float8_e4m3fn}.items():
        graph, state = nnx.split(TRANSFORMER.abstract(config, "bfloat16", kernel_dtype=kind))
        state = jax.tree.map(leaf, state)

        def step(state, context, graph=graph):
            return nnx.merge(graph, state)(x, jnp.full((1,), 500.0), context)

        def prepare(state, context, graph=graph):
            return nnx.merge(graph, state).prepare_context(context)

        prepared = jax.jit(prepare)(state, context)
        compiled = jax.jit(step).lower(state, prepared).compile()
        calls[name] = partial(
            lambda f, *given: f(*given).block_until_ready(), compiled, state, prepared
        )
    taken = interleaved(calls, 5)
    print(versions())
    head("weights", f"seconds of a step, {layers} layers", "of bf16")
    for name, one in taken.items():
        row(name, f"{one.clock:.2f}", f"{one.clock / taken['bf16'].clock:.2f}")
    return taken["int8"].clock > MOST_TIMES * taken["bf16"].clock


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--step", type=int, metavar="LAYERS", help="time only a step of so many")
    parser.add_argument("--count", type=int, default=100, help="scenes for the judge; 0 for none")
    args = parser.parse_args()
    enable_compilation_cache()
    if args.step:
        sys.exit(time_step(args.step))
    missed, exact, best = [], [], 0.0
    print("| weights | frames dB | latents dB | judge: all three |\n|---|---|---|---|")
    for name, options in KINDS.items():
        pipe = Pipeline.from_pretrained(args.model, keep=True, **options)
        videos = [pipe(prompt, num_frames=17, seed=3) for prompt in PROMPTS]
        exact = exact or videos
        pairs = list(zip(videos, exact, strict=True))
        frames = min(psnr(one.frames, other.frames) for one, other in pairs)
        latents = min(of_latents(one.latents, other.latents) for one, other in pairs)
        share = float("nan")
        if args.count:
            found = score(partial(from_text, pipe), held_out_scenes(args.count, seed=3))
            share = 100 * float(np.mean([verdict.all for verdict in found.verdicts]))
            best = share if name == "float32" else best
        if min(frames, latents) < LEAST_DB.get(name, 0) or best - share > MOST_POINTS:
            missed.append(name)
        print(f"| {name} | {frames:.1f} | {latents:.1f} | {share:.1f} % |", flush=True)
    configs = {
        args.model: Checkpoint.open(args.model).config,
        "T2V-1.3B": T2V_1_3B,
        "T2V-14B": T2V_14B,
    }
    print("\n| transformer | bf16 | int8, fp8 | ratio |\n|---|---|---|---|")
    for name, config in configs.items():
        whole, kept = (
            resident_bytes(
                TRANSFORMER.abstract(config, "bfloat16", kernel_dtype=kernel_dtype(weights)),
                offload=False,
            )
            for weights in (None, "int8")
        )
        print(f"| {name} | {whole / 1e6:.1f} MB | {kept / 1e6:.1f} MB | {kept / whole:.3f} |")
    sys.exit(f"missed: {', '.join(missed)}" if missed else 0)


if __name__ == "__main__":
    main()
