"""UMT5 and CLIP beside transformers on the same machine.

Slices at the released widths: two of UMT5-XXL's 24 blocks at 512 tokens, and three computed blocks
of ViT-H's 31. Both sides do the same work in the same dtype; each lives in a process of its own, so
that its peak memory is its own, and the calls alternate. Weights are random: speed does not depend
on them. ``short`` is a prompt of 100 tokens, which the JAX encoder runs at 128; the reference
pipelines run every prompt at 512.
"""

import argparse
import dataclasses
import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
from benchmarks.measure import Taken, middle, peak_gib, timed, versions

THREADS = 2
UMT5_BLOCKS = 2
CLIP_BLOCKS = 3
VOCABULARY = 1024
SHORT, PADDED = 100, 128
CALLS = {"umt5": ("full", "short"), "clip": ("image",)}
Calls = dict[str, Callable[[], Any]]


def token_ids() -> np.ndarray:
    """A prompt that fills all 512 tokens."""
    return np.random.default_rng(1).integers(2, VOCABULARY, (1, 512)).astype(np.int32)


def image() -> np.ndarray:
    """One, preprocessed."""
    return np.random.default_rng(1).standard_normal((1, 3, 224, 224), np.float32)


def jax_side(model: str, dtype: str) -> Calls:
    """Compiled calls of the JAX encoder."""
    import jax
    import jax.numpy as jnp
    from flax import nnx

    from skyreels_jax.models.clip_vision import CLIP_VIT_H, ClipVision
    from skyreels_jax.models.umt5 import UMT5_XXL, Umt5Encoder

    kwargs = {"dtype": dtype, "param_dtype": dtype}
    if model == "umt5":
        config = dataclasses.replace(UMT5_XXL, num_layers=UMT5_BLOCKS, vocab_size=VOCABULARY)
        abstract = nnx.eval_shape(lambda: Umt5Encoder(config, rngs=nnx.Rngs(0), **kwargs))
        ids, ones = jnp.asarray(token_ids()), jnp.ones((1, 512), bool)
        mask = jnp.arange(PADDED)[None] < SHORT
        inputs = {"full": (ids, ones), "short": (ids[:, :PADDED], mask)}
    else:
        config = dataclasses.replace(CLIP_VIT_H, num_layers=CLIP_BLOCKS + 1)
        abstract = nnx.eval_shape(lambda: ClipVision(config, rngs=nnx.Rngs(0), **kwargs))
        inputs = {"image": (jnp.asarray(image()),)}
    graph, state = nnx.split(abstract)
    rng = np.random.default_rng(0)

    def leaf(spec: jax.ShapeDtypeStruct) -> jax.Array:
        tile = jnp.asarray(0.02 * rng.standard_normal(2**16, np.float32), spec.dtype)
        return jax.device_put(np.resize(np.asarray(tile), spec.shape))

    state = jax.tree.map(leaf, state)
    call = jax.jit(lambda state, *args: nnx.merge(graph, state)(*args))
    return {name: lambda a=args: np.asarray(call(state, *a)) for name, args in inputs.items()}


def torch_side(model: str, dtype: str) -> Calls:
    """The same encoders of transformers, all of their parameters in ``dtype``."""
    import torch
    import transformers

    torch.set_num_threads(THREADS)
    kind = getattr(torch, dtype)
    with torch.device("meta"):
        if model == "umt5":
            config = transformers.UMT5Config(
                vocab_size=VOCABULARY,
                d_model=4096,
                d_kv=64,
                d_ff=10_240,
                num_layers=UMT5_BLOCKS,
                num_heads=64,
            )
            module = transformers.UMT5EncoderModel(config)
        else:
            config = transformers.CLIPVisionConfig(
                hidden_size=1280,
                intermediate_size=5120,
                num_hidden_layers=CLIP_BLOCKS,
                num_attention_heads=16,
                image_size=224,
                patch_size=14,
                hidden_act="gelu",
            )
            module = transformers.CLIPVisionModel(config)
    module = module.to(kind).to_empty(device="cpu").eval().requires_grad_(False)
    for parameter in module.parameters():
        parameter.normal_(std=0.02)
    if model == "clip":
        module.embeddings.position_ids = torch.arange(257)[None]
        pixels = torch.from_numpy(image()).to(kind)
        return {"image": torch.inference_mode()(lambda: module(pixels)[0].float().numpy())}
    ids = torch.from_numpy(token_ids()).long()
    mask = {"full": torch.ones_like(ids), "short": (torch.arange(512) < SHORT)[None].long()}

    @torch.inference_mode()
    def encode(name: str) -> np.ndarray:
        return module(ids, mask[name]).last_hidden_state.float().numpy()

    return {name: lambda n=name: encode(n) for name in mask}


def serve(side: str, model: str, dtype: str) -> None:
    """In a process of its own: time one call for each name read, answer in JSON lines."""
    calls = {"jax": jax_side, "transformers": torch_side}[side](model, dtype)
    for line in sys.stdin:
        result, taken = timed(calls[line.strip()])
        finite = bool(np.isfinite(result).all())
        print(json.dumps({"taken": taken, "peak": peak_gib(), "finite": finite}), flush=True)


class Side:
    """The parent's end of one process."""

    def __init__(self, name: str, model: str, dtype: str):
        command = [sys.executable, "-m", "benchmarks.encoders", "--side", name]
        self.process = subprocess.Popen(
            [*command, "--model", model, "--dtype", dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.name = name
        self.peak = 0.0

    def time(self, call: str) -> Taken:
        """What one call took."""
        assert self.process.stdin is not None and self.process.stdout is not None
        print(call, file=self.process.stdin, flush=True)
        answer = json.loads(self.process.stdout.readline())
        assert answer["finite"], f"{self.name}: {call} is not finite"
        self.peak = max(self.peak, answer["peak"])
        return Taken(*answer["taken"])


def compare(model: str, dtype: str, rounds: int) -> None:
    """Print the rows of one model in one dtype."""
    ours, theirs = sides = [Side(name, model, dtype) for name in ("jax", "transformers")]
    for call in CALLS[model]:
        first = ours.time(call)  # compiles
        theirs.time(call)
        pairs = [(ours.time(call), theirs.time(call)) for _ in range(rounds)]
        row = [f"{model} {call}", dtype]
        for kind in Taken._fields:
            mine, other = (
                [getattr(taken, kind) for taken in side] for side in zip(*pairs, strict=True)
            )
            ratio = middle([b / a for a, b in zip(mine, other, strict=True)])
            row += [f"{middle(mine):.3f}", f"{middle(other):.3f}", f"{ratio:.2f}"]
            compiled = first.cpu - middle(mine)
        row += [f"{ours.peak:.2f}", f"{theirs.peak:.2f}", f"{max(compiled, 0):.1f}"]
        print(f"| {' | '.join(row)} |", flush=True)
    for side in sides:
        side.process.communicate()


def main(arguments: list[str]) -> None:
    """Compare the models and dtypes asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--side", choices=("jax", "transformers"), help="internal: be one side")
    parser.add_argument("--model", choices=tuple(CALLS), help="which (both)")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), help="which (both)")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    if options.side:
        serve(options.side, options.model, options.dtype)
        return
    print(f"\n{versions()}, {THREADS} threads")
    print(
        "| call | dtype | JAX s | transformers s | times as fast | JAX cpu s | transformers cpu s ",
        end="",
    )
    print("| times as little | JAX peak GiB | transformers peak GiB | compile cpu s |")
    print("|" + 11 * "---|")
    for model in (options.model,) if options.model else CALLS:
        for dtype in (options.dtype,) if options.dtype else ("bfloat16", "float32"):
            compare(model, dtype, options.rounds)


if __name__ == "__main__":
    main(sys.argv[1:])
