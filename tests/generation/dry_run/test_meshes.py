"""Forecasts of meshes: their formulas against traces, shapes and the tables of compilers."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax import ShapeDtypeStruct as Abstract

from skyreels_jax.generation.dry_run.meshes import (
    ACCELERATORS,
    Job,
    forecast,
    forecasts,
    step_operations,
    traffic_of,
    transformer_bytes,
)
from skyreels_jax.generation.dry_run.operations import operations
from skyreels_jax.models.transformer_config import DF_1_3B, I2V_14B, T2V_1_3B, T2V_14B
from skyreels_jax.parallel.plan import MeshPlan
from skyreels_jax.weights.components.transformer import TRANSFORMER

GIB = 2**30
SMALL = Job(T2V_1_3B, 97, 544, 960, 30)
DF = Job(DF_1_3B, 97, 544, 960, 30)
LARGE = Job(T2V_14B, 121, 720, 1280, 30)


@pytest.mark.parametrize("config", [T2V_1_3B, I2V_14B], ids=["t2v", "i2v"])
def test_operations_are_those_of_the_traced_model(config):
    job = Job(config, 9, 64, 64, 1)
    model = TRANSFORMER.abstract(config, "float32")
    graph, parameters = nnx.split(model)
    latents, y = Abstract((1, 16, 3, 8, 8), jnp.float32), None
    if config.in_dim > 16:
        y = Abstract((1, config.in_dim - 16, 3, 8, 8), jnp.float32)
    context = Abstract((1, config.text_len, config.text_dim), jnp.float32)
    image = None
    if config.image_dim is not None:
        image = Abstract((1, 257, config.image_dim), jnp.float32)

    def prepared(parameters, context, image):
        return nnx.merge(graph, parameters).prepare_context(context, image)

    def call(parameters, x, t, context, y):
        return nnx.merge(graph, parameters)(x, t, context, y=y)

    states = jax.eval_shape(prepared, parameters, context, image)
    t = Abstract((1, 3), jnp.float32)
    traced = operations(jax.make_jaxpr(call)(parameters, latents, t, states, y).jaxpr)
    # The embeddings and the head are beside the blocks.
    assert 0 < traced - step_operations(job) < 0.01 * traced  # measured 0.1 %


@pytest.mark.parametrize("devices", [2, 8, 16])
def test_block_weights_are_divided(devices: int):
    """Everything but heads, vectors and the patch embedding is 1/n."""
    whole = transformer_bytes(LARGE, MeshPlan())["weights"]
    part = transformer_bytes(LARGE, MeshPlan(fsdp=devices))["weights"]
    assert whole / devices < part < 1.02 * whole / devices + 0.02 * GIB


# GiB that the TPU's compiler said of a step with guidance on each device (arguments, peak): for a
# v5e, of 14B for a v5p (1) and a v6e.
COMPILED = [
    (DF, MeshPlan(), 2.886, 4.65),
    (DF, MeshPlan(fsdp=2, ulysses=4), 0.408, 0.845),
    (DF, MeshPlan(fsdp=4, ulysses=4), 0.23, 0.61),
    (DF, MeshPlan(fsdp=16, ulysses=4), 0.0988, 0.536),
    (LARGE, MeshPlan(), 27.46, 39.44),
    (LARGE, MeshPlan(ulysses=8), 3.57, 5.40),
    (LARGE, MeshPlan(fsdp=2, ulysses=8), 1.866, 3.245),
    (LARGE, MeshPlan(fsdp=8, ulysses=8), 0.59, 1.74),
]


@pytest.mark.parametrize(("job", "plan", "arguments", "peak"), COMPILED)
def test_bytes_are_near_what_a_compiler_said(job: Job, plan: MeshPlan, arguments, peak: float):
    found = forecast(job, plan, ACCELERATORS["v5e"])
    assert found.arguments / GIB == pytest.approx(arguments, rel=0.05)  # measured 0.2 to 0.9 %
    of_peak = sum(found.stages["transformer"].values()) / GIB
    assert of_peak == pytest.approx(peak, rel=0.1)  # measured 0.5 to 9.1 %


def test_one_device_exchanges_nothing():
    one = forecast(SMALL, MeshPlan(), ACCELERATORS["h100"])
    assert one.traffic == ()
    assert one.stages["transformer"]["layers put together"] == 0


def test_traffic_is_that_of_the_feasibility_study():
    """14B at 720P on 8 devices, a layer: 598 MB of weights, 4 x 143 MB exchanged, 286 by ring."""
    of = {one.kind: one for one in traffic_of(LARGE, MeshPlan(ulysses=8))}
    layers = T2V_14B.num_layers
    weights = of["all-gather of weights"].received / layers
    assert weights == pytest.approx(598e6 * 7 / 8, rel=0.02)
    tensor = LARGE.latent_frames * LARGE.patches * T2V_14B.dim * 2 / 8
    assert tensor == pytest.approx(143e6, rel=0.01)
    heads = of["all-to-all of heads"]
    assert heads.count == 2 * layers
    assert heads.received / layers == pytest.approx(4 * tensor * 7 / 8, rel=1e-6)
    ring = {one.kind: one for one in traffic_of(LARGE, MeshPlan(ring=2, ulysses=4))}
    permuted = ring["collective-permute of keys and values"]
    assert permuted.received / layers == pytest.approx(286e6, rel=0.01)


def test_slabs_that_are_filled_up_cost_what_they_compute():
    even = forecast(SMALL, MeshPlan(ulysses=4), ACCELERATORS["h100"])
    uneven = forecast(SMALL, MeshPlan(fsdp=7), ACCELERATORS["h100"])
    assert even.operations * 4 == pytest.approx(2 * step_operations(SMALL))
    assert uneven.operations * 7 > 2 * step_operations(SMALL)


def test_those_that_fit_come_first_and_the_fastest_of_them():
    found = forecasts(LARGE, 8, ACCELERATORS["v6e"])
    order = [(not one.fits, one.seconds) for one in found]
    assert order == sorted(order)
    assert found[0].fits
    assert all(T2V_14B.num_heads % one.plan.ulysses == 0 for one in found)
    assert all(one.plan.data == 1 for one in found)
    batched = Job(T2V_14B, 121, 720, 1280, 30, batched=True)
    assert {one.plan.data for one in forecasts(batched, 8, ACCELERATORS["v6e"])} == {1, 2}
    assert not any(one.fits for one in forecasts(LARGE, 1, ACCELERATORS["4090"]))


def test_eight_bits_are_half():
    kept = transformer_bytes(Job(T2V_14B, 121, 720, 1280, 30, weights="int8"), MeshPlan())
    assert kept["weights"] < 0.55 * transformer_bytes(LARGE, MeshPlan())["weights"]
