"""Operations as counted from a trace, against formulas written out by hand."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import ShapeDtypeStruct as Abstract

from skyreels_jax.generation.dry_run.operations import operations
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.models.umt5 import Umt5Config, Umt5Encoder
from skyreels_jax.weights.components.transformer import TRANSFORMER


def count(function, *shapes: tuple[int, ...]) -> int:
    arguments = (Abstract(shape, jnp.float32) for shape in shapes)
    return operations(jax.make_jaxpr(function)(*arguments).jaxpr)


def of_model(model: nnx.Module, *arguments: Abstract) -> int:
    graph, parameters = nnx.split(model)
    traced = jax.make_jaxpr(lambda p, *given: nnx.merge(graph, p)(*given))(parameters, *arguments)
    return operations(traced.jaxpr)


def conv(dimensions: tuple[str, str, str], **options):
    def function(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (1, 1), "SAME", dimension_numbers=dimensions, **options
        )

    return function


LAST, FIRST = ("NHWC", "HWIO", "NHWC"), ("NCHW", "OIHW", "NCHW")


@pytest.mark.parametrize(
    ("function", "shapes", "expected"),
    [
        (jnp.matmul, [(3, 5), (5, 7)], 2 * 3 * 5 * 7),
        (lambda a, b: jnp.einsum("bij,bkj->bik", a, b), [(2, 3, 5), (2, 7, 5)], 2 * 2 * 3 * 7 * 5),
        (lambda a, b: jnp.einsum("ij,ij->", a, b), [(3, 5), (3, 5)], 2 * 3 * 5),
        (conv(LAST), [(2, 4, 6, 3), (3, 3, 3, 8)], 2 * (2 * 4 * 6 * 8) * (3 * 3 * 3)),
        (conv(FIRST), [(2, 3, 4, 6), (8, 3, 3, 3)], 2 * (2 * 4 * 6 * 8) * (3 * 3 * 3)),
        # Of two groups, each sees half of the channels.
        (
            conv(LAST, feature_group_count=2),
            [(2, 4, 6, 6), (3, 3, 3, 8)],
            2 * (2 * 4 * 6 * 8) * (3 * 3 * 3),
        ),
        (lambda a: jnp.sin(a) + a, [(3, 5)], 0),
    ],
    ids=["product", "batch", "sum", "channels last", "channels first", "groups", "by element"],
)
def test_products_and_convolutions(function, shapes, expected: int):
    assert count(function, *shapes) == expected


def test_a_loop_counts_with_its_length():
    def loop(length: int):
        return lambda a: jax.lax.scan(lambda x, _: (x @ a, None), a, length=length)[0]

    once = 2 * 4**3
    assert count(loop(7), (4, 4)) == 7 * once
    assert count(loop(8), (4, 4)) == 8 * once
    nested = lambda a: jax.lax.scan(lambda x, _: (loop(3)(x), None), a, length=5)[0]  # noqa: E731
    assert count(nested, (4, 4)) == 15 * once


def test_of_branches_the_dearest_counts():
    def either(a):
        return jax.lax.cond(a[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, a)

    assert count(either, (4, 4)) == 2 * 2 * 4**3


def test_called_functions_are_looked_into():
    """Compiled, checkpointed, and with a derivative of their own."""
    own = jax.custom_jvp(lambda a: a @ a)
    own.defjvp(lambda primals, tangents: (own(*primals), own(*tangents)))
    for function in (jax.jit(lambda a: a @ a), jax.checkpoint(lambda a: a @ a), own):
        assert count(function, (4, 4)) == 2 * 4**3


CONFIG = TransformerConfig(
    model_type="t2v",
    dim=24,
    ffn_dim=40,
    num_heads=2,
    num_layers=3,
    in_dim=16,
    text_dim=8,
    text_len=10,
)


def by_hand(config: TransformerConfig, latents: tuple[int, int, int]) -> int:
    """One call of a text-to-video transformer, with the text's part, written out."""
    frames, rows, columns = latents
    tokens, dim, text = frames * (rows // 2) * (columns // 2), config.dim, config.text_len
    patches = tokens * dim * config.in_dim * 4
    time = config.freq_dim * dim + dim * dim + dim * 6 * dim
    words = text * (config.text_dim * dim + dim * dim)
    self_attention = 4 * tokens * dim * dim + 2 * tokens * tokens * dim
    cross_attention = 2 * tokens * dim * dim + 2 * text * dim * dim + 2 * tokens * text * dim
    feed_forward = 2 * tokens * dim * config.ffn_dim
    head = tokens * dim * config.out_dim * 4
    layer = self_attention + cross_attention + feed_forward
    return 2 * (patches + time + words + config.num_layers * layer + head)


@pytest.mark.parametrize("latents", [(1, 4, 6), (3, 4, 4)])
def test_a_transformer_counts_as_by_hand(latents: tuple[int, int, int]):
    model = TRANSFORMER.abstract(CONFIG, jnp.float32)
    given = (
        Abstract((1, 16, *latents), jnp.float32),
        Abstract((1,), jnp.int32),
        Abstract((1, CONFIG.text_len, CONFIG.text_dim), jnp.float32),
    )
    expected = by_hand(CONFIG, latents)
    assert of_model(model, *given) == expected
    assert by_hand(CONFIG, (latents[0] + 1, *latents[1:])) != expected


def test_a_text_encoder_counts_as_by_hand():
    tokens, dim, inner, ffn, layers = 12, 16, 4 * 8, 24, 3
    config = Umt5Config(
        vocab_size=50, dim=dim, head_dim=8, num_heads=4, ffn_dim=ffn, num_layers=layers
    )
    model = nnx.eval_shape(lambda: Umt5Encoder(config, rngs=nnx.Rngs(0)))
    ids, mask = (Abstract((1, tokens), kind) for kind in (jnp.int32, jnp.bool_))
    attention = 4 * tokens * dim * inner + 2 * tokens * tokens * inner
    gated = 3 * tokens * dim * ffn
    assert of_model(model, ids, mask) == 2 * layers * (attention + gated)
