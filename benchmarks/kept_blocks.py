"""Asynchronous runs under block-causal attention, with finished and waiting blocks left out or not.

A transformer of 4 layers with random weights, float32, 25 latent frames, 30 steps without guidance.
Both runs of a pair take the same steps and end alike; they are timed in turn.
"""

import argparse
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.measure import head, middle, row, versions
from flax import nnx

from skyreels_jax.diffusion.frame_schedule import plan_blocks, schedule_frames
from skyreels_jax.diffusion.guidance import NoGuidance
from skyreels_jax.diffusion.unipc import flow_sigmas
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import T2V_1_3B
from skyreels_jax.sampling.denoiser import Denoised, Denoiser, Sampling
from skyreels_jax.sampling.noise import draw_noise

STEPS, SHIFT, FRAMES = 30, 8.0, 25
CONFIG = dataclasses.replace(
    T2V_1_3B, dim=384, ffn_dim=1536, num_heads=3, num_layers=4, text_dim=256
)
# Latent frames in a block, and rows that each runs behind the one before.
RUNS = ((5, 5), (5, 30), (1, 5))


class Everything(Denoiser):
    """Computes all blocks in every row."""

    def _plan_reuse(self, *_: object) -> None:
        """Never fewer."""


def main() -> None:
    """Print a table for docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--size", type=int, nargs=2, default=(12, 20), help="of latents")
    options = parser.parse_args()
    print(versions())
    model = WanModel(CONFIG, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    # The head begins as zero otherwise, and nothing would be predicted.
    rng, size = np.random.default_rng(0), CONFIG.dim**-0.5
    random = jax.tree.map(
        lambda leaf: jnp.asarray(size * rng.standard_normal(leaf.shape), leaf.dtype),
        nnx.state(model, nnx.Param),
    )
    nnx.update(model, random)
    schedule, guidance = flow_sigmas(STEPS, SHIFT), NoGuidance()
    text = jax.random.normal(jax.random.key(1), (1, CONFIG.text_len, CONFIG.text_dim))
    noise = draw_noise(7, (1, 16, FRAMES, *options.size))
    head("block", "ar step", "passes of blocks", "of all", "time", "speed-up", "furthest")
    for block, ar_step in RUNS:
        timed = schedule_frames(plan_blocks(FRAMES, block), schedule.timesteps, ar_step=ar_step)

        def run(denoiser: Denoiser, timed=timed) -> Denoised:
            told = denoiser.condition(guidance, text, None)
            return denoiser.run(noise, told, Sampling(schedule, guidance), frame_schedule=timed)

        ways = [Everything(model, block_length=block), Denoiser(model, block_length=block)]
        whole, part = (run(way) for way in ways)  # compiles
        furthest = np.max(np.abs(np.asarray(whole.latents) - np.asarray(part.latents)))
        ratios = []
        for _ in range(options.rounds):
            whole, part = (sum(run(way).step_seconds) for way in ways)
            ratios.append(part / whole)
        computed, everything = run(ways[1]).block_counts
        ratio = middle(ratios)
        row(
            *(str(block), str(ar_step), f"{computed} of {everything}"),
            *(f"{computed / everything:.2f}", f"{ratio:.2f}", f"{1 / ratio:.2f}"),
            f"{furthest:.1e}",
        )


if __name__ == "__main__":
    main()
