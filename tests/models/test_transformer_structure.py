"""What the transformer's program looks like, whatever the numbers in it."""

import math
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core

from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import TransformerConfig

FRAMES, ROWS, COLUMNS = 3, 16, 16


def config(layers: int) -> TransformerConfig:
    return TransformerConfig(
        model_type="t2v",
        dim=24,
        ffn_dim=32,
        num_heads=2,
        num_layers=layers,
        in_dim=16,
        text_dim=8,
        text_len=7,
    )


def program(layers: int = 2) -> core.ClosedJaxpr:
    """Of one call with a timestep for every frame."""
    model = nnx.eval_shape(lambda: WanModel(config(layers), rngs=nnx.Rngs(0)))
    graph, state = nnx.split(model)
    shape = jax.ShapeDtypeStruct
    return jax.make_jaxpr(lambda state, *inputs: nnx.merge(graph, state)(*inputs))(
        state,
        shape((1, 16, FRAMES, ROWS, COLUMNS), jnp.float32),
        shape((1, FRAMES), jnp.int32),
        shape((1, 7, 8), jnp.float32),
    )


def equations(jaxpr: core.Jaxpr) -> Iterator[core.JaxprEqn]:
    """Of a program and of all programs in it."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else [value]:
                if hasattr(inner, "jaxpr"):
                    inner = inner.jaxpr
                if hasattr(inner, "eqns"):
                    yield from equations(inner)


def largest_intermediate(jaxpr: core.Jaxpr, dim: int) -> int:
    """Of arrays whose features are the model's (attention's scores are not)."""
    return max(
        math.prod(variable.aval.shape)
        for equation in equations(jaxpr)
        for variable in equation.outvars
        if variable.aval.shape and variable.aval.shape[-1] in (dim, 6 * dim)
    )


def test_modulation_stays_per_frame():
    tokens = FRAMES * (ROWS // 2) * (COLUMNS // 2)
    everything_per_token = tokens * 6 * config(2).dim
    assert largest_intermediate(program().jaxpr, config(2).dim) < everything_per_token


def test_modulation_per_token_would_be_seen():
    tokens = FRAMES * (ROWS // 2) * (COLUMNS // 2)

    def per_token(e0: jax.Array) -> jax.Array:
        return jnp.repeat(e0, tokens // FRAMES, axis=1).sum()

    shape = jax.ShapeDtypeStruct((1, FRAMES, 6, config(2).dim), jnp.float32)
    assert largest_intermediate(jax.make_jaxpr(per_token)(shape).jaxpr, 24) == tokens * 6 * 24


def test_the_program_does_not_grow_with_depth():
    assert len(list(equations(program(2).jaxpr))) == len(list(equations(program(8).jaxpr)))


def test_the_program_has_the_blocks_in_it():
    dots = [e for e in equations(program().jaxpr) if e.primitive.name == "dot_general"]
    # Of one block alone: q, k, v, o twice (k and v of the text are prepared apart), ffn, attention.
    assert len(dots) >= 12
