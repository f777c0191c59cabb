"""Tensors in memory in the place of files, and a two-layer model with every kind of rule."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from skyreels_jax.weights.plan import CONV, LINEAR, Rule, Source, leading_ones, rule
from skyreels_jax.weights.safetensors_file import TensorInfo


class InMemory:
    """A TensorSource over a dict; remembers what was read."""

    def __init__(self, tensors: Mapping[str, np.ndarray], file: str = "a.safetensors"):
        self.arrays = dict(tensors)
        self.file = file
        self.reads: list[str] = []

    def tensors(self) -> dict[str, TensorInfo]:
        return {n: TensorInfo(a.shape, a.dtype, self.file) for n, a in self.arrays.items()}

    def read(self, name: str) -> np.ndarray:
        self.reads.append(name)
        return self.arrays[name]


DEPTH, WIDTH = 3, 4


class Layer(nnx.Module):
    def __init__(self, *, rngs: nnx.Rngs):
        self.q = nnx.Param(jax.random.normal(rngs.params(), (WIDTH, WIDTH)))
        self.k = nnx.Param(jax.random.normal(rngs.params(), (WIDTH, WIDTH)))
        self.scale = nnx.Param(jax.random.normal(rngs.params(), (WIDTH,)))
        self.modulation = nnx.Param(jax.random.normal(rngs.params(), (6, WIDTH)))


class Model(nnx.Module):
    """Stacked layers, a convolution, and a list of unstacked ones."""

    def __init__(self, *, rngs: nnx.Rngs):
        @nnx.vmap(in_axes=0, out_axes=0)
        def stack(key: jax.Array) -> Layer:
            return Layer(rngs=nnx.Rngs(key))

        self.blocks = stack(jax.random.split(rngs.params(), DEPTH))
        self.conv = nnx.Param(jnp.zeros((1, 2, 2, 3, WIDTH)))
        self.tail = nnx.List([nnx.Linear(2, 5, rngs=rngs) for _ in range(2)])


# The fused q|k of the original is two tensors in the other format.
RULES: tuple[Rule, ...] = (
    Rule("blocks.q", Source("b.{i}.qk", LINEAR, slice=(0, 2)), Source("layers.{i}.to_q", LINEAR)),
    Rule("blocks.k", Source("b.{i}.qk", LINEAR, slice=(1, 2)), Source("layers.{i}.to_k", LINEAR)),
    rule("blocks.scale", "b.{i}.norm", "layers.{i}.norm"),
    rule("blocks.modulation", "b.{i}.mod", "layers.{i}.table", leading_ones(1)),
    rule("conv", "patch.weight", "conv_in.weight", CONV),
    rule("tail.{i}.kernel", "t.{i}.w", "tail.{i}.weight", LINEAR),
    rule("tail.{i}.bias", "t.{i}.b", "tail.{i}.bias"),
)


def abstract_model() -> Model:
    return nnx.eval_shape(lambda: Model(rngs=nnx.Rngs(0)))


def original_tensors(seed: int = 0) -> dict[str, np.ndarray]:
    """Random values under the original's names and shapes."""
    rng = np.random.default_rng(seed)
    shapes = {"patch.weight": (WIDTH, 3, 1, 2, 2)}
    for i in range(DEPTH):
        shapes |= {
            f"b.{i}.qk": (2 * WIDTH, WIDTH),
            f"b.{i}.norm": (WIDTH,),
            f"b.{i}.mod": (1, 6, WIDTH),
        }
    for i in range(2):
        shapes |= {f"t.{i}.w": (5, 2), f"t.{i}.b": (5,)}
    return {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
