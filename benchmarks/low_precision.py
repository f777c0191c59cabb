"""Quality and memory of kernels kept as int8 and fp8, on the small model.

For each: PSNR of frames and latents to float32, what an independent judge says of held-out scenes,
and the transformer's bytes, in bfloat16 as users have it. It exits with 1 where a bound is missed.
"""

import argparse
import sys
from functools import partial
from typing import Any

import numpy as np

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
MOST_POINTS = 2.0  # of the judge, below float32


def of_latents(found: np.ndarray, exact: np.ndarray) -> float:
    """PSNR in dB, the peak being the range of the exact values."""
    error = float(np.mean((found - exact) ** 2))
    return 10 * np.log10(np.ptp(exact) ** 2 / error) if error else np.inf


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="mini")
    parser.add_argument("--count", type=int, default=100, help="scenes for the judge; 0 for none")
    args = parser.parse_args()
    enable_compilation_cache()
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
