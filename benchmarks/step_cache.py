"""Step caches by threshold: calls computed, time, and distance from the run without a cache.

A transformer of 4 layers with random weights, float32, 30 steps with guidance. Which calls are left
out depends on the weights: this shows what the machinery costs, namely how near the time saved is
to the calls saved. It says nothing about a trained model.
"""

import argparse
import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks.measure import head, middle, row, versions
from flax import nnx

from skyreels_jax.diffusion.guidance import ClassifierFree
from skyreels_jax.diffusion.schedule import flow_sigmas
from skyreels_jax.generation.caching import CacheSettings, step_cache
from skyreels_jax.generation.denoise import Denoiser, Sampling
from skyreels_jax.generation.noise import draw_noise
from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import T2V_1_3B
from skyreels_jax.presets import PRESETS

STEPS, SHIFT, SCALE = 30, 8.0, 6.0
SHAPE = (1, 16, 5, 16, 24)  # 480 tokens
THRESHOLDS = (0.05, 0.1, 0.2, 0.3)
CONFIG = dataclasses.replace(
    T2V_1_3B, dim=512, ffn_dim=2048, num_heads=4, num_layers=4, text_dim=256
)


def settings() -> dict[tuple[str, float], CacheSettings]:
    """What is compared, the run without a cache first."""
    tables = PRESETS["SkyReels-V2-DF-1.3B-540P"].cache
    tea = partial(CacheSettings, "teacache", coefficients=tables.plain)
    ret = partial(CacheSettings, "teacache", coefficients=tables.retained, use_ret_steps=True)
    easy = partial(CacheSettings, "easycache")
    ways = {"teacache": tea, "teacache, ret steps": ret, "easycache": easy}
    chosen = {(name, x): way(threshold=x) for name, way in ways.items() for x in THRESHOLDS}
    return {("none", 0.0): CacheSettings()} | chosen


def denoiser() -> Denoiser:
    """Every parameter random: the head begins as zero otherwise, and nothing would be predicted."""
    model = WanModel(CONFIG, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    size = CONFIG.dim**-0.5

    def leaf(value: jax.Array) -> jax.Array:
        return jnp.asarray(size * rng.standard_normal(value.shape), value.dtype)

    nnx.update(model, jax.tree.map(leaf, nnx.state(model, nnx.Param)))
    return Denoiser(model)


def psnr(latents: np.ndarray, reference: np.ndarray) -> float:
    """Peak signal-to-noise ratio of latents, dB, by the reference's range."""
    error = np.mean((latents - reference) ** 2)
    return 10 * np.log10(np.ptp(reference) ** 2 / error) if error else np.inf


def main() -> None:
    """Print a table for docs/performance.md."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(versions())
    run = denoiser()
    guidance = ClassifierFree(jnp.float32(SCALE))
    keys = jax.random.split(jax.random.key(1))
    texts = [jax.random.normal(key, (1, CONFIG.text_len, CONFIG.text_dim)) for key in keys]
    conditioning = run.condition(guidance, texts[0], texts[1])
    noise = draw_noise(7, SHAPE)
    plain = Sampling(flow_sigmas(STEPS, SHIFT), guidance)
    samplings = {
        name: dataclasses.replace(plain, cache=step_cache(chosen, STEPS, STEPS))
        for name, chosen in settings().items()
    }
    first = {name: run.run(noise, conditioning, how) for name, how in samplings.items()}
    seconds: dict[tuple[str, float], list[float]] = {name: [] for name in samplings}
    for _ in range(options.rounds):
        for name, how in samplings.items():
            seconds[name].append(sum(run.run(noise, conditioning, how).step_seconds))
    reference = np.asarray(first["none", 0.0].latents)
    whole = seconds["none", 0.0]
    head("cache", "threshold", "calls", "of all", "time", "PSNR of latents, dB")
    for name, done in first.items():
        ratio = middle([a / b for a, b in zip(seconds[name], whole, strict=True)])
        distance = psnr(np.asarray(done.latents), reference)
        calls = f"{done.computed} of {done.calls}"
        row(*name, calls, f"{done.computed / done.calls:.2f}", f"{ratio:.2f}", f"{distance:.1f}")


if __name__ == "__main__":
    main()
