"""Linear products and attention at the 1.3B shapes, ways to compute them side by side with PyTorch.

2550 tokens are 17 frames of 272 x 480. The ratio is of processor seconds to PyTorch's in bfloat16.
"""

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from benchmarks.measure import interleaved, versions

from skyreels_jax.ops.attention import attention
from skyreels_jax.ops.linear import linear
from skyreels_jax.ops.masks import BlockCausal

THREADS = 2
TOKENS, HEADS, HEAD_DIM = 2550, 12, 128
LINEAR = ((1536, 1536), (1536, 8960), (8960, 1536))
CONTEXTS = (2550, 512, 257)
BASE = "PyTorch bfloat16"
Ways = dict[str, Callable[[], Any]]


def compiled(function: Callable[..., jax.Array], *arrays: jax.Array) -> Callable[[], Any]:
    """A call that waits for its result."""
    run = jax.jit(function).lower(*arrays).compile()
    return lambda: run(*arrays).block_until_ready()


def linear_ways(shape: tuple[int, int]) -> Ways:
    """``[2550, in] @ [in, out]``."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((TOKENS, shape[0]), np.float32)
    kernel = rng.standard_normal(shape, np.float32)
    exact = jnp.asarray(x), jnp.asarray(kernel)
    half = tuple(array.astype(jnp.bfloat16) for array in exact)
    t_exact = torch.from_numpy(x), torch.from_numpy(np.ascontiguousarray(kernel.T))
    t_half = tuple(array.bfloat16() for array in t_exact)
    return {
        BASE: partial(torch.nn.functional.linear, *t_half),
        "PyTorch float32": partial(torch.nn.functional.linear, *t_exact),
        "ops.linear bfloat16": compiled(partial(linear, dtype=jnp.bfloat16), *half),
        "ops.linear float32": compiled(partial(linear, dtype=jnp.float32), *exact),
        "bfloat16 without float32 sums": compiled(jnp.matmul, *half),
    }


def attention_ways(keys: int) -> Ways:
    """``[1, 2550, 12, 128]`` against ``keys`` keys."""
    rng = np.random.default_rng(0)
    shapes = [(1, tokens, HEADS, HEAD_DIM) for tokens in (TOKENS, keys, keys)]
    arrays = [rng.standard_normal(shape, np.float32) for shape in shapes]
    exact = [jnp.asarray(array) for array in arrays]
    half = [array.astype(jnp.bfloat16) for array in exact]
    t_exact = [torch.from_numpy(array).transpose(1, 2).contiguous() for array in arrays]
    t_half = [array.bfloat16() for array in t_exact]
    fused = torch.nn.functional.scaled_dot_product_attention
    ways: Ways = {BASE: partial(fused, *t_half), "PyTorch float32": partial(fused, *t_exact)}
    for path in ("chunked", "xla"):
        way = partial(attention, implementation=path)
        ways[f"{path} bfloat16"] = compiled(way, *half)
        ways[f"{path} float32"] = compiled(way, *exact)
    if keys == TOKENS:
        mask = BlockCausal(TOKENS // 5, 1)
        way = partial(attention, mask=mask, implementation="chunked")
        ways["chunked bfloat16, block-causal"] = compiled(way, *half)
    return ways


def table(what: str, operations: float, ways: Ways, rounds: int) -> None:
    """One line for each way."""
    taken = interleaved(ways, rounds)
    for name, times in taken.items():
        print(
            f"| {what} | {name} | {1e3 * times.clock:.0f} | {1e3 * times.cpu:.0f} "
            f"| {operations / times.clock / 1e9:.0f} | {times.cpu / taken[BASE].cpu:.2f} |"
        )


def main() -> None:
    """All shapes."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    rounds = parser.parse_args().rounds
    torch.set_num_threads(THREADS)
    print(f"{versions()}, {THREADS} threads")
    print("| what | way | ms | processor ms | GFLOP/s | of PyTorch's |")
    print("|---|---|---|---|---|---|")
    for shape in LINEAR:
        what = f"linear {shape[0]} to {shape[1]}"
        table(what, 2.0 * TOKENS * shape[0] * shape[1], linear_ways(shape), rounds)
    for keys in CONTEXTS:
        operations = 4.0 * TOKENS * keys * HEADS * HEAD_DIM
        table(f"attention to {keys}", operations, attention_ways(keys), rounds)


if __name__ == "__main__":
    main()
