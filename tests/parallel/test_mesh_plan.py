"""What a mesh is: how it is spelt, which are legal, and what is said of one that is not."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from tests import standins

from skyreels_jax.errors import RequestError
from skyreels_jax.models import transformer_attention
from skyreels_jax.models.transformer_config import T2V_1_3B, T2V_14B
from skyreels_jax.ops.target import Device, target_device
from skyreels_jax.parallel.plan import MeshPlan, all_plans, choose_plan
from skyreels_jax.parallel.rules import Rules, weight_axis
from skyreels_jax.parallel.transformer import MeshTransformer
from skyreels_jax.weights.components.transformer import TRANSFORMER

TWELVE, FORTY = T2V_1_3B, T2V_14B


@pytest.mark.parametrize(
    "plan", [MeshPlan(), MeshPlan(fsdp=4, ulysses=2), MeshPlan(2, 3, 4, 5), MeshPlan(data=2)]
)
def test_a_plan_is_what_it_spells(plan: MeshPlan):
    assert MeshPlan.parse(str(plan)) == plan


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("tensor=2", "the axis tensor is not supported.*cut patches by `ulysses`"),
        ("fdsp=2", "there is no axis 'fdsp', only data, fsdp, ring, ulysses"),
        ("", "there is no axis ''"),
        ("ring", "'ring' has no size; a mesh is `auto`, or axes and sizes such as `fsdp=4"),
        ("ring=two", "'ring=two' has no size"),
        ("ring=-2", "'ring=-2' has no size"),
        ("ring=²", "has no size"),
        ("ring=0", "an axis has at least one device"),
        ("ring=2,ring=4", "ring stands there twice"),
    ],
)
def test_what_is_no_plan_is_refused(text: str, says: str):
    with pytest.raises(RequestError, match=says):
        MeshPlan.parse(text)


def test_there_are_twenty_plans_of_eight_devices():
    plans = all_plans(8)
    assert len(plans) == len(set(plans)) == 20
    assert all(plan.devices == 8 for plan in plans)


def test_heads_that_do_not_divide_are_refused_with_the_nearest_plans():
    with pytest.raises(RequestError) as refused:
        MeshPlan(ulysses=8).require(TWELVE, devices=8)
    said = str(refused.value)
    assert "`mesh` ulysses=8: ulysses=8 cuts the heads of attention, and 12 heads do not" in said
    assert "legal with as many devices are fsdp=2,ulysses=4, ring=2,ulysses=4" in said
    MeshPlan(ulysses=8).require(FORTY, devices=8)


def test_rows_that_do_not_divide_and_devices_that_are_not_there_are_refused():
    with pytest.raises(RequestError, match="this one has 1: one a video, two with `batched_g"):
        MeshPlan(data=2, ulysses=4).require(FORTY, rows=1)
    MeshPlan(data=2, ulysses=4).require(FORTY, rows=2)
    with pytest.raises(RequestError, match=r"has 8 devices, and JAX finds 4 devices; legal are ul"):
        MeshPlan(ulysses=8).require(FORTY, devices=4)


@pytest.mark.parametrize(
    ("devices", "config", "plan"),
    [
        (8, FORTY, MeshPlan(ulysses=8)),
        (8, TWELVE, MeshPlan(fsdp=2, ulysses=4)),
        (64, FORTY, MeshPlan(fsdp=8, ulysses=8)),
        (7, TWELVE, MeshPlan(fsdp=7)),
        (1, TWELVE, MeshPlan()),
    ],
)
def test_the_plan_that_is_chosen_is_legal_and_says_why(devices, config, plan):
    chosen, reason = choose_plan(devices, config)
    assert chosen == plan
    chosen.require(config, devices=devices, rows=1)
    assert f"auto: {devices} devices, of which {config.num_heads} heads" in reason


def test_every_matrix_of_a_block_is_cut_and_vectors_are_not():
    assert weight_axis("blocks.ffn.fc1.kernel", (40, 5120, 13824), 64) == 1
    assert weight_axis("blocks.modulation", (40, 6, 5120), 64) == 2
    assert weight_axis("blocks.ffn.fc1.bias", (40, 13824), 8) is None
    assert weight_axis("blocks.ffn.fc1.kernel", (2, 12, 18), 8) is None
    assert weight_axis("time_projection.kernel", (5120, 30720), 8) == 1
    assert weight_axis("head.linear.kernel", (5120, 64), 8) is None


def test_a_rule_names_only_axes_that_the_mesh_has_devices_along():
    plan = MeshPlan(fsdp=2, ulysses=4)
    assert tuple(Rules().spec(plan, "rows", None, "patches")) == (None, None, ("fsdp", "ulysses"))
    assert Rules().parts("weights", plan) == 8


def test_nearest_plans_are_legal():
    config = standins.config(dim=60, num_heads=6)
    for plan in all_plans(8):
        for near in plan.nearest(config, rows=2):
            near.require(config, devices=8, rows=2)


def test_attention_is_that_for_the_devices_of_the_mesh(monkeypatch: pytest.MonkeyPatch):
    """A program is chosen for where it will run, which need not be this process's device."""
    config, seen = standins.config(), []
    true = transformer_attention.attention

    def noticed(*given, **more):
        seen.append(target_device())
        return true(*given, **more)

    monkeypatch.setattr(transformer_attention, "attention", noticed)
    monkeypatch.setattr(MeshTransformer, "device", Device("rocm"))
    placed = MeshTransformer.of("data=1", config)
    model = TRANSFORMER.abstract(config, jnp.float32)
    text = jax.ShapeDtypeStruct((1, config.text_len, config.text_dim), jnp.float32)
    latents = jax.ShapeDtypeStruct((1, 16, 1, 4, 4), jnp.float32)
    t = jax.ShapeDtypeStruct((1,), jnp.float32)
    jax.clear_caches()  # What was traced before is not asked again.
    graph, state = nnx.split(model)

    def call(state, x, t, text):
        model = nnx.merge(graph, state)
        model.parallelism = placed
        return model(x, t, text)

    jax.eval_shape(call, state, latents, t, text)
    assert set(seen) == {Device("rocm")}
    assert target_device() == Device("cpu")
