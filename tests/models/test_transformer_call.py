"""What a call promises besides its numbers: contexts, batches, gradients, refusals."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from flax import nnx
from transformer_oracle import IMAGE_DIM, Shape, inputs, run_jax

from skyreels_jax.models.transformer import WanModel

SHAPE = Shape(frames=5, batch=2)
# Other batch or frame counts compile to other sums: measured 5e-7 of values up to 3.
TOL = 5e-6


def random_model(config, **options) -> WanModel:
    """Random in every parameter; a fresh model's head is zero, as the original's."""
    options = {"dtype": jnp.float32, "param_dtype": jnp.float32, **options}
    # Drawn by NumPy: to JAX each shape would be a program to compile.
    model = nnx.eval_shape(lambda: WanModel(config, rngs=nnx.Rngs(0), **options))
    leaves, tree = jax.tree.flatten(nnx.state(model))
    rng = np.random.default_rng(1)
    drawn = [
        jnp.asarray(rng.standard_normal(leaf.shape) / max(2, leaf.shape[-2:][0]) ** 0.5, leaf.dtype)
        for leaf in leaves
    ]
    nnx.update(model, jax.tree.unflatten(tree, drawn))
    return model


@pytest.fixture(scope="module")
def df():
    config = SHAPE.config("t2v", inject_sample_info=True)
    return random_model(config), inputs(config, SHAPE, 0, per_frame=True)


@pytest.fixture(scope="module")
def i2v():
    config = replace(SHAPE.config("i2v"), text_len=9)
    return random_model(config), inputs(config, SHAPE, 0, per_frame=True)


@pytest.mark.parametrize("kind", ["i2v", pytest.param("df", marks=pytest.mark.slow)])
def test_a_prepared_context_gives_the_same_bits(kind, request):
    model, arguments = request.getfixturevalue(kind)
    whole = run_jax(model, arguments)
    names = {"context", "clip_fea"} & arguments.keys()
    prepare = nnx.jit(lambda model, kwargs: model.prepare_context(**kwargs))
    context = prepare(model, {name: jnp.asarray(arguments[name]) for name in names})
    rest = {name: value for name, value in arguments.items() if name not in names}
    assert (run_jax(model, {**rest, "context": context}) == whole).all()
    other = jax.tree.map(lambda leaf: leaf[::-1], context)  # the layers in another order
    assert (run_jax(model, {**rest, "context": other}) != whole).any()


def test_each_video_of_a_batch_is_its_own(df):
    model, arguments = df
    together = run_jax(model, arguments)
    for i in range(SHAPE.batch):
        alone = run_jax(model, {name: value[i : i + 1] for name, value in arguments.items()})
        assert np.abs(alone[0] - together[i]).max() <= TOL
        assert np.abs(alone[0] - together[1 - i]).max() > 0.1


def test_one_timestep_is_that_timestep_for_every_frame(df):
    model, arguments = df
    t = np.array([999, 3])
    once = run_jax(model, {**arguments, "t": t})
    each = run_jax(model, {**arguments, "t": np.repeat(t[:, None], SHAPE.frames, axis=1)})
    assert np.abs(once - each).max() <= TOL
    assert np.abs(once - run_jax(model, arguments)).max() > 0.1


def test_earlier_blocks_do_not_see_later_ones(df):
    """Blocks of two, two and one frames; the last frame is changed."""
    model, arguments = df
    changed = {**arguments, "x": arguments["x"].copy()}
    changed["x"][:, :, -1] += 1
    before, after = (run_jax(model, given, block_length=2) for given in (arguments, changed))
    assert (before[:, :, :4] == after[:, :, :4]).all()
    assert np.abs(before[:, :, 4] - after[:, :, 4]).max() > 0.1
    full = [run_jax(model, given)[:, :, :4] for given in (arguments, changed)]
    assert (full[0] != full[1]).any()


@pytest.mark.slow
def test_rematerialised_gradients_are_the_same(df):
    model, arguments = df
    given = jax.tree.map(jnp.asarray, arguments)

    def gradient(remat: bool) -> nnx.State:
        copy = nnx.clone(model)
        copy.remat = remat
        return nnx.jit(nnx.grad(lambda model: jnp.mean(model(**given) ** 2)))(copy)

    saved, again = (jax.tree.leaves(gradient(remat)) for remat in (False, True))
    worst = max(
        float(jnp.abs(a - b).max() / jnp.abs(a).max()) for a, b in zip(saved, again, strict=True)
    )
    assert worst <= 2e-5  # measured 1e-6
    assert all(float(jnp.abs(leaf).max()) > 0 for leaf in saved)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_fresh_model_predicts_zero_in_float32(dtype):
    config = Shape().config("t2v")
    model = WanModel(config, rngs=nnx.Rngs(0), dtype=dtype, param_dtype=dtype)
    out = run_jax(model, inputs(config, Shape(), 0, per_frame=False))
    assert out.dtype == np.float32
    assert (out == 0).all()


def test_fresh_parameters_are_spread_as_the_originals():
    config = Shape(heads=8, head_dim=16, layers=3, ffn=256).config(
        "i2v", inject_sample_info=True, pos_embed_seq_len=514
    )
    model = WanModel(config, rngs=nnx.Rngs(0), param_dtype=jnp.float32)
    dim = config.dim

    def xavier(fan_in: int, fan_out: int) -> float:
        return (2 / (fan_in + fan_out)) ** 0.5

    spread = {
        "patch embedding": (model.patch_embedding.kernel, xavier(4 * 36, dim)),
        "text embedding": (model.text_embedding.fc2.kernel, 0.02),
        "time embedding": (model.time_embedding.fc1.kernel, 0.02),
        "time projection": (model.time_projection.kernel, xavier(dim, 6 * dim)),
        "frame rate": (model.fps_embedding.embedding, 0.02),
        "frame rate, last": (model.fps_projection.fc2.kernel, 0),
        "image": (model.img_emb.fc2.kernel, xavier(IMAGE_DIM, dim)),
        "image positions": (model.img_emb.pos_embed, 0),
        "attention": (model.blocks.self_attn.q.kernel, xavier(dim, dim)),
        "feed-forward": (model.blocks.ffn.fc1.kernel, xavier(dim, 256)),
        "modulation": (model.blocks.modulation, dim**-0.5),
        "biases": (model.blocks.ffn.fc1.bias, 0),
        "head": (model.head.linear.kernel, 0),
    }
    found = {name: float(jnp.std(parameter[...])) for name, (parameter, _) in spread.items()}
    expected = {name: value for name, (_, value) in spread.items()}
    assert found == pytest.approx(expected, rel=0.15)  # 256 to 49,152 samples each
    layers = np.asarray(model.blocks.self_attn.q.kernel[...])
    assert (layers[0] != layers[1]).mean() > 0.99


@pytest.fixture
def as_installed():
    """Without the run-time checks of this suite: what the model itself says of wrong arguments."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def x(channels: int = 16, height: int = 4, frames: int = 5) -> dict:
    return {"x": np.zeros((2, channels, frames, height, 6), np.float32)}


REFUSED = {
    "16 channels": (x(channels=15), "x has 15 channels; this model takes 16"),
    "even sizes": (x(height=5), "latents of 5 x 6 do not divide into patches of 2 x 2"),
    "a timestep a frame": ({"t": np.zeros((2, 4), np.int32)}, r"\(2, 4\); expected .*\(2, 5\)"),
    "all text tokens": ({"context": np.zeros((2, 10, 32), np.float32)}, r"expected \(2, 11, 32\)"),
    "a frame rate": ({"fps": None}, "takes fps"),
    "no image": ({"clip_fea": np.zeros((2, 257, 16), np.float32)}, "type t2v takes None"),
    "no image latents": ({"y": np.zeros((2, 20, 5, 4, 6), np.float32)}, "type t2v takes None"),
}


@pytest.mark.parametrize("rule", REFUSED)
def test_what_does_not_fit_is_refused_with_its_numbers(df, as_installed, rule):
    model, arguments = df
    change, message = REFUSED[rule]
    with pytest.raises(ValueError, match=message):
        model(**jax.tree.map(jnp.asarray, {**arguments, **change}))


@pytest.mark.parametrize("name", ["y", "clip_fea"])
def test_image_models_refuse_to_run_without_an_image(i2v, name):
    model, arguments = i2v
    with pytest.raises(ValueError, match=f"{name} has shape None; a model of type i2v takes"):
        model(**jax.tree.map(jnp.asarray, {**arguments, name: None}))


def test_a_prepared_context_has_its_image(i2v):
    model, arguments = i2v
    given = jax.tree.map(jnp.asarray, arguments)
    context = model.prepare_context(given["context"], given["clip_fea"])
    with pytest.raises(ValueError, match="part of a prepared context"):
        model(**{**given, "context": context})


def test_a_frame_rate_past_the_table_is_seen(df):
    model, arguments = df
    assert np.isnan(run_jax(model, {**arguments, "fps": np.array([0, 24])})[1]).all()
