"""One step of a 1.3B transformer beside diffusers' on the same machine, in bfloat16.

Each side lives in a process of its own, so that its peak memory is its own; the steps alternate.
Weights are random: speed does not depend on them. The JAX step takes the prompt's keys and values
as prepared once per prompt, as the sampling loop does; ``with context`` also prepares them, which
is what diffusers does at every step.
"""

import argparse
import dataclasses
import time
from typing import Any

import numpy as np
from benchmarks import sides
from benchmarks.measure import middle, versions
from benchmarks.sides import Calls, Side

FRAMES, ROWS, COLUMNS = 5, 34, 60  # latents of 17 frames 272 x 480: 2550 tokens
THREADS = 2


def random_tile(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Random numbers that repeat every million: cheap to make at any size."""
    count = int(np.prod(shape))
    return np.resize(scale * rng.standard_normal(min(count, 2**20), np.float32), shape)


def inputs(model_type: str) -> dict[str, np.ndarray]:
    """The same for both sides."""
    rng = np.random.default_rng(1)
    arrays = {
        "x": rng.standard_normal((1, 16, FRAMES, ROWS, COLUMNS), np.float32),
        "context": random_tile(rng, (1, 512, 4096), 1.0),
    }
    if model_type == "df":
        arrays["t"] = np.array([[0, 216, 470, 743, 999]], np.int32)
        arrays["fps"] = np.array([1], np.int32)
    else:
        arrays["t"] = np.array([743], np.int32)
        arrays["y"] = rng.standard_normal((1, 20, FRAMES, ROWS, COLUMNS), np.float32)
        arrays["clip_fea"] = random_tile(rng, (1, 257, 1280), 1.0)
    return arrays


def jax_side(model_type: str, layers: int) -> tuple[Calls, dict[str, float]]:
    """Callables to time, and seconds it took to get them."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from skyreels_jax.models.transformer import WanModel
    from skyreels_jax.models.transformer_config import DF_1_3B, I2V_1_3B

    config = DF_1_3B if model_type == "df" else I2V_1_3B
    config = dataclasses.replace(config, num_layers=layers)
    rng = np.random.default_rng(0)

    def leaf(abstract: jax.ShapeDtypeStruct) -> jax.Array:
        tile = jnp.asarray(0.02 * rng.standard_normal(2**16, np.float32), abstract.dtype)
        return jax.device_put(np.resize(np.asarray(tile), abstract.shape))

    graph, state = nnx.split(nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0))))
    state = jax.tree.map(leaf, state)
    arrays = {name: jnp.asarray(value) for name, value in inputs(model_type).items()}
    context = arrays.pop("context"), arrays.pop("clip_fea", None)

    def prepare(state, context):
        return nnx.merge(graph, state).prepare_context(*context)

    def step(state, context, arrays):
        return nnx.merge(graph, state)(context=context, **arrays)

    def with_context(state, context, arrays):
        return step(state, prepare(state, context), arrays)

    prepared = jax.jit(prepare)(state, context)
    start = time.perf_counter()
    compiled = jax.jit(step).lower(state, prepared, arrays).compile()
    seconds = {"compile": time.perf_counter() - start}
    whole = jax.jit(with_context).lower(state, context, arrays).compile()
    return {
        "step": lambda: compiled(state, prepared, arrays).block_until_ready(),
        "with context": lambda: whole(state, context, arrays).block_until_ready(),
    }, seconds


def torch_side(model_type: str, layers: int) -> tuple[Calls, dict[str, float]]:
    """diffusers' model with the dtypes that loading it in bfloat16 gives."""
    import torch
    from diffusers import SkyReelsV2Transformer3DModel

    torch.set_num_threads(THREADS)
    is_df = model_type == "df"
    with torch.device("meta"):
        model = SkyReelsV2Transformer3DModel(
            num_attention_heads=12,
            attention_head_dim=128,
            in_channels=16 if is_df else 36,
            ffn_dim=8960,
            num_layers=layers,
            inject_sample_info=is_df,
            image_dim=None if is_df else 1280,
            added_kv_proj_dim=None if is_df else 1536,
        )
    exact = set(model._keep_in_fp32_modules)
    for name, parameter in list(model.named_parameters()):
        dtype = torch.float32 if exact & set(name.split(".")) else torch.bfloat16
        owner = model.get_submodule(name.rpartition(".")[0])
        values = torch.empty(parameter.shape, dtype=dtype).normal_(std=0.02)
        setattr(owner, name.rpartition(".")[2], torch.nn.Parameter(values, requires_grad=False))
    rope = type(model.rope)(128, (1, 2, 2), 1024)  # its tables are buffers: made for real
    model.rope = rope
    arrays = {name: torch.from_numpy(value) for name, value in inputs(model_type).items()}
    channels = [arrays["x"], *([] if is_df else [arrays["y"]])]
    call = {
        "hidden_states": torch.cat(channels, 1).bfloat16(),
        "timestep": arrays["t"].long(),
        "encoder_hidden_states": arrays["context"].bfloat16(),
        "return_dict": False,
    }
    if is_df:
        call |= {"enable_diffusion_forcing": True, "fps": arrays["fps"].long()}
    else:
        call["encoder_hidden_states_image"] = arrays["clip_fea"].bfloat16()

    def step() -> Any:
        with torch.inference_mode():
            return model(**call)

    return {"step": step}, {}


def serve(side: str, model_type: str, layers: int) -> None:
    """In a process of its own: time one call for each name read, report as JSON lines."""

    def is_finite(result: Any) -> bool:
        return bool(np.isfinite(result if side == "jax" else result[0].float().numpy()).all())

    sides.serve(*{"jax": jax_side, "diffusers": torch_side}[side](model_type, layers), is_finite)


def compare(model_type: str, layers: int, rounds: int) -> None:
    """Print one table."""
    command = ["benchmarks.transformer_step", "--model", model_type, "--layers", str(layers)]
    both = [Side(name, [*command, "--side", name]) for name in ("jax", "diffusers")]
    taken = sides.in_turn(both, rounds)
    tokens = FRAMES * ROWS * COLUMNS // 4
    print(f"\n{model_type} at the 1.3B width, {layers} layers, {tokens} tokens, bfloat16")
    print(versions())
    print("| side | call | seconds | least | processor s | of diffusers' | peak GiB | compile s |")
    print("|---|---|---|---|---|---|---|---|")
    theirs = middle([one.clock for one in taken["diffusers", "step"]])
    for (name, call), times in taken.items():
        side = next(side for side in both if side.name == name)
        clock = [one.clock for one in times]
        print(
            f"| {name} | {call} | {middle(clock):.2f} | {min(clock):.2f} "
            f"| {middle([one.cpu for one in times]):.2f} | {middle(clock) / theirs:.2f} "
            f"| {side.peak:.2f} | {side.ready['seconds'].get('compile', 0.0):.1f} |"
        )
    for side in both:
        side.process.communicate()


def main() -> None:
    """Compare the models asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=("jax", "diffusers"), help="internal: be one side")
    parser.add_argument("--model", choices=("i2v", "df"), help="which (both)")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.side:
        serve(options.side, options.model, options.layers)
        return
    for model_type in (options.model,) if options.model else ("i2v", "df"):
        compare(model_type, options.layers, options.rounds)


if __name__ == "__main__":
    main()
