"""Rows of zeros after a prompt, computed as one, count as many."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from skyreels_jax.models.transformer import WanModel
from skyreels_jax.models.transformer_config import TransformerConfig

SHAPE = {"dim": 96, "ffn_dim": 64, "num_heads": 2, "num_layers": 2, "text_dim": 16}
TOKENS = 20


def case(kind: str):
    extra = {"in_dim": 36, "image_dim": 16} if kind == "i2v" else {"in_dim": 16}
    config = TransformerConfig(model_type=kind, **SHAPE, **extra)
    model = WanModel(config, rngs=nnx.Rngs(0), dtype=jnp.float32, param_dtype=jnp.float32)
    kernel = model.head.linear.kernel
    kernel[...] = 0.1 * jax.random.normal(jax.random.key(5), kernel.shape)
    draw = lambda i, *shape: jax.random.normal(jax.random.key(i), shape)  # noqa: E731
    x, context = draw(0, 2, 16, 3, 4, 4), draw(1, 2, TOKENS, 16)
    image = draw(2, 2, 257, 16) if kind == "i2v" else None
    y = draw(3, 2, 20, 3, 4, 4) if kind == "i2v" else None
    return model, x, context, image, y


@pytest.mark.parametrize("kind", ["i2v", pytest.param("t2v", marks=pytest.mark.slow)])
def test_the_result_is_that_of_all_rows(kind):
    model, x, context, image, y = case(kind)
    t = jnp.array([100.0, 500.0])
    rows = 512 - TOKENS
    whole = nnx.jit(lambda model, context: model(x, t, context, image, y))(
        model, jnp.pad(context, ((0, 0), (0, rows), (0, 0)))
    )

    @partial(nnx.jit, static_argnames="padding")
    def counted_by(model, context, padding):
        return model(x, t, model.prepare_context(context, image, padding=padding), None, y)

    counted = partial(counted_by, model)

    scale = float(jnp.max(jnp.abs(whole)))
    # Measured: 1.4e-7 (t2v), 2e-7 (i2v).
    assert float(jnp.max(jnp.abs(counted(context, rows) - whole))) < 1e-6 * scale
    # One token of text taken for padding: 1.1e-4.
    wrong = counted(context[:, :-1], rows + 1)
    assert float(jnp.max(jnp.abs(wrong - whole))) > 1e-5 * scale


@pytest.mark.slow
def test_the_gradient_is_that_of_all_rows():
    model, x, context, _, _ = case("t2v")
    t, rows = jnp.array([100.0, 500.0]), 512 - TOKENS
    graph, state = nnx.split(model)

    def loss(state, padding):
        model = nnx.merge(graph, state)
        given = context if padding else jnp.pad(context, ((0, 0), (0, rows), (0, 0)))
        given = model.prepare_context(given, padding=padding)
        return jnp.mean(jnp.square(model(x, t, given)))

    whole, counted = jax.grad(loss)(state, 0), jax.grad(loss)(state, rows)
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(counted), strict=True):
        # Measured: at most 3e-6 of a parameter's largest.
        np.testing.assert_allclose(a, b, atol=2e-5 * float(jnp.max(jnp.abs(a))) + 1e-12)


def test_a_wrong_number_of_rows_is_refused():
    model, _, context, _, _ = case("t2v")
    with pytest.raises(ValueError, match="padding included"):
        model.prepare_context(context, padding=512 - TOKENS - 1)
