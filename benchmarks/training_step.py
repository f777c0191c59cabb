"""One step of training (loss, gradients, AdamW) beside PyTorch's through diffusers' model.

float32, diffusion forcing (a noise level for every frame), random weights of the 1.3B width and
few layers; with and without gradient checkpointing. Each side lives in a process of its own, so
that its peak memory is its own; the steps alternate.
"""

import argparse
from typing import Any

import numpy as np
from benchmarks import sides
from benchmarks.measure import middle, versions
from benchmarks.sides import Calls, Side

HEADS, WIDTH, FFN = 12, 128, 8960
FRAMES, ROWS, COLUMNS = 3, 24, 40  # latents of 9 frames 192 x 320: 720 tokens
THREADS = 2
REMAT = {"jax": False, "jax, checkpointing": "full", "jax, checkpointing dots": "dots"}
NAMES = (*REMAT, "torch", "torch, checkpointing")


def inputs(batch: int) -> dict[str, np.ndarray]:
    """The same for all sides."""
    rng = np.random.default_rng(1)
    latents = rng.standard_normal((batch, 16, FRAMES, ROWS, COLUMNS), np.float32)
    return {
        "latents": latents,
        "noise": rng.standard_normal(latents.shape, np.float32),
        "sigma": np.sort(rng.random((batch, FRAMES), np.float32)),
        "context": rng.standard_normal((batch, 512, 4096), np.float32),
    }


def jax_side(layers: int, batch: int, remat: Any) -> Calls:
    """A compiled step that keeps its state, in a process like that of ``skyreels-jax train``."""
    from skyreels_jax.training.freed_memory import keep_freed_memory

    keep_freed_memory()
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from skyreels_jax.models.transformer import WanModel
    from skyreels_jax.models.transformer_config import TransformerConfig
    from skyreels_jax.training.objective import Batch, velocity_loss
    from skyreels_jax.training.optimizer import OptimizerConfig, make_optimizer
    from skyreels_jax.training.step import init_state, make_step
    from skyreels_jax.training.task import Template

    config = TransformerConfig(
        model_type="t2v",
        dim=HEADS * WIDTH,
        ffn_dim=FFN,
        num_heads=HEADS,
        num_layers=layers,
        in_dim=16,
    )
    exact = {"dtype": jnp.float32, "param_dtype": jnp.float32}
    template, params = Template.of(WanModel(config, rngs=nnx.Rngs(0), remat=remat, **exact))

    def loss(params: Any, arrays: dict[str, jax.Array], noise: jax.Array) -> Any:
        del noise
        given = Batch(arrays["latents"], arrays["context"])
        model = template.model(params)
        return velocity_loss(model, given, arrays["noise"], arrays["sigma"]), {}

    optimizer = make_optimizer(OptimizerConfig(warmup=1), 1000, params)
    step = make_step(loss, optimizer)
    held = {"state": init_state(params, optimizer, 0.0)}
    del params
    arrays = {name: jnp.asarray(value) for name, value in inputs(batch).items()}

    def call() -> float:
        held["state"], report = step(held["state"], arrays, jax.random.key(0))
        return float(report.metrics["loss"])

    return {"step": call}


def torch_side(layers: int, batch: int, checkpointing: bool) -> Calls:
    """The same through diffusers' transformer."""
    import torch
    from diffusers import SkyReelsV2Transformer3DModel

    torch.set_num_threads(THREADS)
    model = SkyReelsV2Transformer3DModel(
        num_attention_heads=HEADS,
        attention_head_dim=WIDTH,
        in_channels=16,
        ffn_dim=FFN,
        num_layers=layers,
    ).train()
    if checkpointing:
        model.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.99), weight_decay=0.01)
    arrays = {name: torch.from_numpy(value) for name, value in inputs(batch).items()}
    share = arrays["sigma"][:, None, :, None, None]
    noised = (1 - share) * arrays["latents"] + share * arrays["noise"]
    velocity = arrays["noise"] - arrays["latents"]

    def call() -> float:
        optimizer.zero_grad(set_to_none=True)
        (prediction,) = model(
            noised,
            1000 * arrays["sigma"],
            arrays["context"],
            enable_diffusion_forcing=True,
            return_dict=False,
        )
        loss = torch.nn.functional.mse_loss(prediction, velocity)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return float(loss.detach())

    return {"step": call}


def compare(layers: int, batch: int, rounds: int) -> None:
    """Print one table."""
    command = ["benchmarks.training_step", "--layers", str(layers), "--batch", str(batch)]
    all_sides = [Side(name, [*command, "--side", name]) for name in NAMES]
    taken = sides.in_turn(all_sides, rounds)
    tokens = FRAMES * ROWS * COLUMNS // 4
    print(f"\n1.3B width, {layers} layers, {batch} x {tokens} tokens, float32, AdamW")
    print(versions())
    print("| side | seconds | least | processor s | of PyTorch's | peak GiB |")
    print("|---|---|---|---|---|---|")
    theirs = middle([one.cpu for one in taken["torch", "step"]])
    for side in all_sides:
        times = taken[side.name, "step"]
        clock, cpu = ([getattr(one, name) for one in times] for name in ("clock", "cpu"))
        print(
            f"| {side.name} | {middle(clock):.2f} | {min(clock):.2f} | {middle(cpu):.2f} "
            f"| {middle(cpu) / theirs:.2f} | {side.peak:.2f} |"
        )
        side.process.communicate()


def main() -> None:
    """Compare, or be one side."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=NAMES, help="internal: be one side")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    if options.side is None:
        compare(options.layers, options.batch, options.rounds)
        return
    if options.side in REMAT:
        calls = jax_side(options.layers, options.batch, REMAT[options.side])
    else:
        calls = torch_side(options.layers, options.batch, "checkpointing" in options.side)
    sides.serve(calls, {}, lambda loss: bool(np.isfinite(loss)))


if __name__ == "__main__":
    main()
