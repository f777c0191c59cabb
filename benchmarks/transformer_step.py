"""One step of a 1.3B transformer beside diffusers' on the same machine, in bfloat16.

Each side lives in a process of its own, so that its peak memory is its own; the steps alternate.
Weights are random: speed does not depend on them. The JAX step takes the prompt's keys and values
as prepared once per prompt, as the sampling loop does; ``with context`` also prepares them, which
is what diffusers does at every step. ``t2v`` is a short video with guidance: two calls of a model,
in turn on both sides, and as one batch on ours.
"""

import argparse
import dataclasses
import time
from typing import Any

import numpy as np
from benchmarks import sides
from benchmarks.measure import middle, versions
from benchmarks.sides import Calls, Side

# Latents of 17 frames of 272 x 480 (2550 tokens), and of 5 for the video with guidance (1020).
FRAMES = {"i2v": 5, "df": 5, "t2v": 2}
ROWS, COLUMNS = 34, 60
THREADS = 2


def random_tile(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> np.ndarray:
    """Random numbers that repeat every million: cheap to make at any size."""
    count = int(np.prod(shape))
    return np.resize(scale * rng.standard_normal(min(count, 2**20), np.float32), shape)


def inputs(model_type: str) -> dict[str, np.ndarray]:
    """The same for both sides."""
    rng = np.random.default_rng(1)
    frames = FRAMES[model_type]
    arrays = {
        "x": rng.standard_normal((1, 16, frames, ROWS, COLUMNS), np.float32),
        "context": random_tile(rng, (1, 512, 4096), 1.0),
    }
    if model_type == "df":
        arrays["t"] = np.array([[0, 216, 470, 743, 999]], np.int32)
        arrays["fps"] = np.array([1], np.int32)
    else:
        arrays["t"] = np.array([743], np.int32)
    if model_type == "i2v":
        arrays["y"] = rng.standard_normal((1, 20, frames, ROWS, COLUMNS), np.float32)
        arrays["clip_fea"] = random_tile(rng, (1, 257, 1280), 1.0)
    return arrays


def jax_side(model_type: str, layers: int) -> tuple[Calls, dict[str, float]]:
    """Callables to time, and seconds it took to get them."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from skyreels_jax.models.transformer import WanModel
    from skyreels_jax.models.transformer_config import DF_1_3B, I2V_1_3B, T2V_1_3B

    config = {"i2v": I2V_1_3B, "df": DF_1_3B, "t2v": T2V_1_3B}[model_type]
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
        model = nnx.merge(graph, state)
        if model_type != "t2v":
            return model(context=context, **arrays)
        first = model(context=context, **arrays)
        # The second call is of another prompt: of the same one the compiler would make one call.
        other = jax.tree.map(lambda leaf: 0.5 * leaf, context)
        return first + 5.0 * (first - model(context=other, **arrays))

    def batched(state, context, arrays):
        two = jax.tree.map(lambda leaf: jnp.concatenate([leaf, 0.5 * leaf], 1), context)
        arrays = {name: jnp.concatenate([value, value]) for name, value in arrays.items()}
        both = nnx.merge(graph, state)(context=two, **arrays)
        return both[0] + 5.0 * (both[0] - both[1])

    def with_context(state, context, arrays):
        return step(state, prepare(state, context), arrays)

    prepared = jax.jit(prepare)(state, context)
    start = time.perf_counter()
    compiled = jax.jit(step).lower(state, prepared, arrays).compile()
    seconds = {"compile": time.perf_counter() - start}
    whole = jax.jit(with_context).lower(state, context, arrays).compile()
    calls = {
        "step": lambda: compiled(state, prepared, arrays).block_until_ready(),
        "with context": lambda: whole(state, context, arrays).block_until_ready(),
    }
    if model_type == "t2v":
        one_batch = jax.jit(batched).lower(state, prepared, arrays).compile()
        calls["step, guidance in one batch"] = lambda: one_batch(
            state, prepared, arrays
        ).block_until_ready()
    return calls, seconds


def torch_side(model_type: str, layers: int) -> tuple[Calls, dict[str, float]]:
    """diffusers' model with the dtypes that loading it in bfloat16 gives."""
    import torch
    from diffusers import SkyReelsV2Transformer3DModel

    torch.set_num_threads(THREADS)
    is_df, is_i2v = model_type == "df", model_type == "i2v"
    with torch.device("meta"):
        model = SkyReelsV2Transformer3DModel(
            num_attention_heads=12,
            attention_head_dim=128,
            in_channels=36 if is_i2v else 16,
            ffn_dim=8960,
            num_layers=layers,
            inject_sample_info=is_df,
            image_dim=1280 if is_i2v else None,
            added_kv_proj_dim=1536 if is_i2v else None,
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
    channels = [arrays["x"], *([arrays["y"]] if is_i2v else [])]
    call = {
        "hidden_states": torch.cat(channels, 1).bfloat16(),
        "timestep": arrays["t"].long(),
        "encoder_hidden_states": arrays["context"].bfloat16(),
        "return_dict": False,
    }
    if is_df:
        call |= {"enable_diffusion_forcing": True, "fps": arrays["fps"].long()}
    if is_i2v:
        call["encoder_hidden_states_image"] = arrays["clip_fea"].bfloat16()

    def step() -> Any:
        with torch.inference_mode():
            first = model(**call)
            if model_type != "t2v":
                return first
            other = {**call, "encoder_hidden_states": 0.5 * call["encoder_hidden_states"]}
            return (first[0] + 5.0 * (first[0] - model(**other)[0]),)

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
    tokens = FRAMES[model_type] * ROWS * COLUMNS // 4
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
    parser.add_argument("--model", choices=tuple(FRAMES), help="which (all)")
    parser.add_argument("--layers", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    if options.side:
        serve(options.side, options.model, options.layers)
        return
    for model_type in (options.model,) if options.model else FRAMES:
        compare(model_type, options.layers, options.rounds)


if __name__ == "__main__":
    main()
