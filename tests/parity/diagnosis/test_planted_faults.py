"""Mistakes planted in the JAX side, one at a time: each must fail, where it is, by its name.

The finding of a fault of the transformer follows from the activations of one call. So the first of
the tests let only that call have the fault, beside the stages and frames of a sound run; the slow
ones make whole videos with it.
"""

import copy
import dataclasses
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tests.fabricate import Checkpoints

from skyreels_jax.components import encoders
from skyreels_jax.diffusion import guidance, unipc
from skyreels_jax.generation import window_generator
from skyreels_jax.models import layers, transformer, transformer_attention, transformer_layers
from skyreels_jax.ops.positions import rope_table
from skyreels_jax.parity import capture, sides
from skyreels_jax.parity.plan import ParityPlan, plan_comparison
from skyreels_jax.parity.recording import (
    arrays,
    decoded_file,
    result_file,
    side_folder,
    trace_file,
    writing,
)
from skyreels_jax.parity.sides import JaxSide, RecordingDenoiser, run_side
from skyreels_jax.parity.verdict import build_report, compare_test

SIZE = {"height": 64, "width": 96, "num_frames": 9, "steps": 3}
# Tokens of a frame, and features of a head, of the small checkpoint at that size.
PATCHES, GRID, HEAD = 24, (3, 4, 6), 16


class Case(NamedTuple):
    """A checkpoint with both sides loaded, the work of the reference and of the sound side done."""

    plan: ParityPlan
    folder: Path
    side: JaxSide


@pytest.fixture(scope="module")
def cases(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory):
    made: dict[str, Case] = {}

    def case(kind: str) -> Case:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            plan = plan_comparison(checkpoints(kind, "diffusers"), **SIZE)
            plan = dataclasses.replace(plan, traced=(0,))
            plan.save(folder / "plan.json")
            run_side("reference", folder)
            side = JaxSide(plan)
            run_side("jax", folder, lambda _: side)
            made[kind] = Case(plan, folder, side)
        return made[kind]

    return case


def report_of(case: Case, folder: Path) -> dict[str, Any]:
    return build_report(case.plan, folder, [compare_test(case.plan, folder, 0)], {})


def whole(case: Case, side: JaxSide, folder: Path) -> dict[str, Any]:
    """The report of a run with ``side``."""
    link_results(case, folder)
    run_side("jax", folder, lambda _: side)
    return report_of(case, folder)


def traced(case: Case, side: JaxSide, folder: Path) -> dict[str, Any]:
    """The report of a sound run in which one call of the transformer is that of ``side``."""
    link_results(case, folder)
    for file in (result_file(case.folder, "jax", 0), decoded_file(case.folder, 0)):
        shutil.copy(file, side_folder(folder, "jax"))
    with writing(trace_file(folder, "jax", 0, 0)) as record:
        side.trace(arrays(result_file(folder, "reference", 0)), 0, record)
    return report_of(case, folder)


def link_results(case: Case, folder: Path) -> None:
    """The plan and the reference's results in another folder."""
    side_folder(folder, "jax").mkdir(parents=True)
    for path in (Path("plan.json"), Path("raw") / "reference"):
        (folder / path).symlink_to(case.folder / path)


def with_model(side: JaxSide, model: Any, **changes: Any) -> JaxSide:
    """Another transformer; its programs are kept where the code is the same."""
    other = copy.copy(side)
    programs = changes.pop("programs", side.denoiser._executables)
    length = changes.pop("block_length", side.denoiser.block_length)
    other.denoiser = RecordingDenoiser(model, length, programs)
    return other


@pytest.mark.parametrize("kind", ["i2v", "df"])
def test_without_a_fault_it_passes(cases, tmp_path: Path, kind: str):
    report = report_of(cases(kind), cases(kind).folder)
    assert report["verdict"] == "pass", report["failures"]
    assert report["tests"][0]["finding"] is None
    report = traced(cases(kind), cases(kind).side, tmp_path)
    assert report["verdict"] == "pass", report["failures"]
    assert report["tests"][0]["finding"] is None


Edit = Callable[[dict[str, np.ndarray]], None]


def edited(model: Any, edit: Edit) -> Any:
    """The model with parameters changed, which are named as in ``blocks.self_attn.q.bias``."""
    graph, state = nnx.split(model)
    flat = nnx.to_flat_state(state)
    values = {".".join(map(str, path)): np.array(leaf[...]) for path, leaf in flat}
    edit(values)
    new = [
        (path, leaf.replace(jnp.asarray(values[".".join(map(str, path))]))) for path, leaf in flat
    ]
    return nnx.merge(graph, nnx.from_flat_state(new))


SELF, CROSS, FFN = "blocks.self_attn", "blocks.cross_attn", "blocks.ffn"


def exchange(a: str, b: str) -> Edit:
    def edit(values):
        for part in ("kernel", "bias"):
            one, other = values[f"{a}.{part}"], values[f"{b}.{part}"]
            one[1], other[1] = other[1].copy(), one[1].copy()

    return edit


def permute_heads(values):
    for part in ("kernel", "bias"):
        leaf = values[f"{SELF}.q.{part}"][1]
        leaf[..., :HEAD], leaf[..., HEAD:] = leaf[..., HEAD:].copy(), leaf[..., :HEAD].copy()


def drop(name: str, at: int | None = 1) -> Edit:
    def edit(values):
        values[name][() if at is None else at] = 0

    return edit


def multiply(name: str, factor: float, at: int | None = 1) -> Edit:
    def edit(values):
        values[name][() if at is None else at] *= factor

    return edit


def transpose(name: str) -> Edit:
    def edit(values):
        values[name][1] = values[name][1].T.copy()

    return edit


def repeat_block(values):
    for name, leaf in values.items():
        if name.startswith("blocks."):
            leaf[1] = leaf[0]


def roll(name: str, by: int, axis: int = -1) -> Edit:
    def edit(values):
        values[name][...] = np.roll(values[name], by, axis)

    return edit


def round_kernel(values):
    leaf = values[f"{FFN}.fc1.kernel"]
    leaf[1] = leaf[1].astype(jnp.bfloat16).astype(np.float32)


def negate_head(values):
    for part in ("kernel", "bias"):
        values[f"head.linear.{part}"] *= -1


# Name: checkpoint, what is changed, the place that is at fault, the kind it is.
WEIGHTS: dict[str, tuple[str, Edit, str, str]] = {
    "q and k exchanged": (
        *("df", exchange(f"{SELF}.q", f"{SELF}.k")),
        *("blocks.1.self_attn.q", "exchanged"),
    ),
    "one head permuted": ("df", permute_heads, "blocks.1.self_attn.q", "permuted heads"),
    "a bias of v dropped": (
        *("df", drop(f"{SELF}.v.bias")),
        *("blocks.1.self_attn.v", "missing bias"),
    ),
    "a bias of the ffn dropped": (
        *("df", drop(f"{FFN}.fc1.bias")),
        *("blocks.1.ffn.fc1", "missing bias"),
    ),
    "o transposed": (
        *("df", transpose(f"{SELF}.o.kernel")),
        *("blocks.1.self_attn.o", "transposition"),
    ),
    "q transposed": (
        *("i2v", transpose(f"{SELF}.q.kernel")),
        *("blocks.1.self_attn.q", "transposition"),
    ),
    "q of cross-attention transposed": (
        *("i2v", transpose(f"{CROSS}.q.kernel")),
        *("blocks.1.cross_attn.q", "transposition"),
    ),
    "a kernel scaled": ("df", multiply(f"{FFN}.fc2.kernel", 1.02), "blocks.1.ffn.fc2", "scale"),
    "a norm's scale doubled": (
        *("df", multiply(f"{SELF}.norm_k.scale", 2.0)),
        *("blocks.1.self_attn.norm_k", "scale"),
    ),
    "one block repeated": ("df", repeat_block, "blocks.1.norm1", "repeated block"),
    "a kernel rounded to bfloat16": ("df", round_kernel, "blocks.1.ffn.fc1", "dtype"),
    "image keys and values exchanged": (
        *("i2v", exchange(f"{CROSS}.k_img", f"{CROSS}.v_img")),
        *("blocks.1.cross_attn.k_img", "exchanged"),
    ),
    "modulation rows of the time projection moved": (
        *("df", roll("time_projection.kernel", 32)),
        *("time_projection", "unknown"),  # the bias has stayed
    ),
    "the text embedder's bias dropped": (
        *("df", drop("text_embedding.fc2.bias", None)),
        *("text_embedding", "missing bias"),
    ),
    "the head's patches in another order": (
        *("df", roll("head.linear.kernel", 16)),
        *("head", "unknown"),  # the bias has stayed
    ),
    "the sign of the prediction": ("df", negate_head, "head", "sign"),
    "the frame-rate table's bias dropped": (
        *("df", drop("fps_projection.fc2.bias", None)),
        *("fps_projection", "unknown"),  # one token: nothing to tell a vector by
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_a_fault_of_weights_is_found(cases, tmp_path: Path, name: str):
    kind, edit, place, nature = WEIGHTS[name]
    case = cases(kind)
    side = with_model(case.side, edited(case.side.denoiser.model, edit))
    assert_found(traced(case, side, tmp_path), place, nature)


@pytest.mark.slow
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_fault_of_weights_is_found_in_a_whole_run(cases, tmp_path: Path, name: str):
    kind, edit, place, nature = WEIGHTS[name]
    case = cases(kind)
    side = with_model(case.side, edited(case.side.denoiser.model, edit))
    assert_found(whole(case, side, tmp_path), place, nature)


def assert_found(report: dict[str, Any], place: str, nature: str) -> None:
    assert report["verdict"] == "fail"
    finding = report["tests"][0]["finding"]
    assert (finding["name"], finding["kind"]) == (place, nature), finding["detail"]


Plant = Callable[[pytest.MonkeyPatch, Case], JaxSide]


def anew(case: Case) -> JaxSide:
    """The same transformer, its programs compiled from the code as it is now."""
    return with_model(case.side, case.side.denoiser.model, programs={})


def rope_axes(patch, case):
    def swapped(grid, dim, **more):
        table = rope_table((grid[0], grid[2], grid[1]), dim, **more)
        order = np.arange(np.prod(grid)).reshape(grid[0], grid[2], grid[1]).swapaxes(1, 2).ravel()
        return type(table)(*(part[order] for part in table))

    patch.setattr(transformer, "rope_table", swapped)
    return anew(case)


def rope_offset(patch, case):
    true, calls = transformer_attention.rope_apply, []

    def off(x, table):
        calls.append(1)
        if len(calls) % 2 == 1:  # keys come first
            table = rope_table(GRID, HEAD, frames=1 + jnp.arange(GRID[0]))
        return true(x, table)

    patch.setattr(transformer_attention, "rope_apply", off)
    return anew(case)


def no_rope(patch, case):
    patch.setattr(transformer_attention, "rope_apply", lambda x, _: x.astype(jnp.float32))
    return anew(case)


def rope_halves(patch, case):
    def halves(x, table):
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        cos, sin = (part[None, :, None, :] for part in table)
        return jnp.concatenate([first * cos - second * sin, first * sin + second * cos], axis=-1)

    patch.setattr(transformer_attention, "rope_apply", halves)
    return anew(case)


def causal(patch, case):
    return with_model(case.side, case.side.denoiser.model, block_length=1, programs={})


def other_epsilon(patch, case):
    model = nnx.merge(*nnx.split(case.side.denoiser.model))
    for norm in (model.blocks.self_attn.norm_q, model.blocks.self_attn.norm_k):
        norm.eps = 1e-5
    return with_model(case.side, model, programs={})


def layer_epsilon(patch, case):
    true = transformer_layers.layer_norm
    patch.setattr(transformer_layers, "layer_norm", lambda x, eps: true(x, eps=1e-5))
    return anew(case)


def shift_and_scale(patch, case):
    patch.setattr(
        transformer_layers, "mul_add_add", lambda x, scale, shift: x * (1 + shift) + scale
    )
    return anew(case)


def scale_without_one(patch, case):
    patch.setattr(transformer_layers, "mul_add_add", lambda x, scale, shift: x * scale + shift)
    return anew(case)


def no_gate(patch, case):
    patch.setattr(transformer_layers, "mul_add", lambda x, y, gate: x.astype(jnp.float32) + y)
    return anew(case)


def no_residual(patch, case):
    patch.setattr(transformer_layers, "mul_add", lambda x, y, gate: y.astype(jnp.float32) * gate)
    return anew(case)


def other_activation(activation):
    def plant(patch, case):
        model = nnx.merge(*nnx.split(case.side.denoiser.model))
        model.blocks.ffn.activation = activation
        return with_model(case.side, model, programs={})

    return plant


def text_mask(patch, case):
    true = transformer_attention.attention
    words = case.side.pipeline.components.text_encoder.encode([case.plan.prompts[0]])[0]
    length = int(np.any(words != 0, axis=-1).sum())

    def masked(query, key, value, **more):
        if key.shape[1] == 512:
            key, value = key[:, :length], value[:, :length]
        return true(query, key, value, **more)

    patch.setattr(transformer_attention, "attention", masked)
    return anew(case)


def no_image_term(patch, case):
    true = transformer_attention.attention

    def without(query, key, value, **more):
        out = true(query, key, value, **more)
        return 0 * out if key.shape[1] == 257 else out

    patch.setattr(transformer_attention, "attention", without)
    return anew(case)


def sines_first(patch, case):
    true = transformer.sinusoidal_embedding_1d

    def swapped(dim, t):
        return jnp.roll(true(dim, t), dim // 2, axis=-1)

    patch.setattr(transformer, "sinusoidal_embedding_1d", swapped)
    return anew(case)


def patch_order(patch, case):
    true = transformer.unpatchify

    def swapped(patches, grid, size):
        batch, frames, count, width = patches.shape
        mixed = patches.reshape(batch, frames, count, 2, 2, -1).swapaxes(3, 4)
        return true(mixed.reshape(batch, frames, count, width), grid, size)

    patch.setattr(transformer, "unpatchify", swapped)
    patch.setattr(capture, "unpatchify", swapped)
    return anew(case)


class Encoder:
    """An image encoder whose tokens are one place off."""

    def __init__(self, true):
        self.true = true

    def encode(self, image):
        return np.roll(self.true.encode(image), 1, axis=0)


def with_parts(case: Case, **parts: Any) -> JaxSide:
    side = copy.copy(case.side)
    side.pipeline = copy.copy(side.pipeline)
    side.pipeline.components = dataclasses.replace(side.pipeline.components, **parts)
    return side


def clip_tokens(patch, case):
    encoder = Encoder(case.side.pipeline.components.image_encoder)
    return with_parts(case, image_encoder=encoder)


def inverted_mask(patch, case):
    true = encoders.condition_latents

    def inverted(*arguments):
        y = np.array(true(*arguments))
        y[:4] = 1 - y[:4]
        return y

    patch.setattr(window_generator, "condition_latents", inverted)
    return case.side


class Unnormalised:
    """An autoencoder that has the VAE's mean and standard deviation exchanged."""

    def __init__(self, true, mean, std):
        self.true, self.mean, self.std = true, mean, std

    def encode(self, pixels):
        return (self.true.encode(pixels) * self.std + self.mean - self.std) / self.mean

    def decode_pieces(self, pieces):
        return self.true.decode_pieces(
            ((piece * self.mean + self.std) - self.mean) / self.std for piece in pieces
        )


def statistics(patch, case):
    from skyreels_jax.models.vae_layers import WAN_VAE

    mean, std = (
        np.asarray(values, np.float32).reshape(-1, 1, 1, 1)
        for values in (WAN_VAE.latents_mean, WAN_VAE.latents_std)
    )
    vae = case.side.pipeline.components.vae
    return with_parts(case, vae=Unnormalised(vae, mean, std))


def other_shift(patch, case):
    true = sides.flow_sigmas
    patch.setattr(sides, "flow_sigmas", lambda steps, shift: true(steps, 3.0))
    return case.side


def one_step_fewer(patch, case):
    true = sides.flow_sigmas
    patch.setattr(sides, "flow_sigmas", lambda steps, shift: true(steps - 1, shift))
    return case.side


def other_guidance(patch, case):
    def combine(self, predictions):
        positive, negative = predictions
        return positive + self.scale * (positive - negative)

    patch.setattr(guidance.ClassifierFree, "combine", combine)
    return anew(case)


def no_corrector(patch, case):
    true = unipc.tabulate

    def without(schedule, **more):
        table = true(schedule, **more)
        zero = np.zeros_like(table.keep)
        rest = ("from_start", "from_current", "from_previous", "from_older")
        return table._replace(from_sample=zero + 1, **dict.fromkeys(rest, zero))

    patch.setattr(unipc, "tabulate", without)
    return case.side


CODE: dict[str, tuple[str, Plant, str, str]] = {
    "rope axes swapped": ("df", rope_axes, "blocks.0.self_attn.heads", "rope axes"),
    "rope off by one frame": ("df", rope_offset, "blocks.0.self_attn.heads", "rope offset"),
    "no rope": ("df", no_rope, "blocks.0.self_attn.heads", "no rope"),
    "rope across halves": ("df", rope_halves, "blocks.0.self_attn.heads", "rope pairing"),
    "a mask between frames": ("df", causal, "blocks.0.self_attn.heads", "mask"),
    "epsilon of the RMS norms": (
        *("df", other_epsilon, "blocks.0.self_attn.norm_q"),
        "norm epsilon",
    ),
    "epsilon of the layer norms": ("df", layer_epsilon, "blocks.0.norm1", "norm epsilon"),
    "shift taken for scale": ("df", shift_and_scale, "blocks.0.norm1", "modulation"),
    "scale without one": ("df", scale_without_one, "blocks.0.norm1", "modulation"),
    "no gate": ("df", no_gate, "blocks.0.after_self_attn", "missing gate"),
    "no residual": ("df", no_residual, "blocks.0.after_self_attn", "missing term"),
    "the other GELU": (
        *("df", other_activation(layers.gelu_exact), "blocks.0.ffn.activation"),
        "activation",
    ),
    "SiLU": ("df", other_activation(layers.silu), "blocks.0.ffn.activation", "activation"),
    "text padding masked": ("df", text_mask, "blocks.0.cross_attn.heads", "mask"),
    "image not attended to": ("i2v", no_image_term, "blocks.0.cross_attn.heads", "missing term"),
    "sines before cosines": ("df", sines_first, "sinusoid", "order of elements"),
    "rows and columns of patches": ("df", patch_order, "velocity", "order of elements"),
    "CLIP tokens misplaced": ("i2v", clip_tokens, "image", "order of elements"),
    "image mask inverted": ("i2v", inverted_mask, "mask", "inverted"),
    "VAE mean and std exchanged": ("i2v", statistics, "condition", "normalisation"),
    "wrong shift": ("df", other_shift, "timesteps", "shift"),
    "last step missing": ("df", one_step_fewer, "timesteps", "steps"),
    "wrong guidance": ("df", other_guidance, "latents.1", "solver"),
    "no corrector": ("df", no_corrector, "latents.2", "solver"),
}


def forget_programs(*, whole_step: bool = False):
    """Compile anew: the code of the running process has changed."""
    if whole_step:
        jax.clear_caches()  # JAX remembers what it has traced of a function, whatever that calls.
    for compiled in (capture._entry, capture._block, capture._head):
        compiled.cache_clear()


# Faults of what a call of the transformer is given, and of what is made of its output.
OUTSIDE = (
    *("CLIP tokens misplaced", "image mask inverted", "VAE mean and std exchanged", "wrong shift"),
    *("last step missing", "wrong guidance", "no corrector"),
)


def code_fault_is_found(cases, monkeypatch: pytest.MonkeyPatch, folder: Path, name: str, report_of):
    kind, plant, place, nature = CODE[name]
    case = cases(kind)
    forget_programs(whole_step=name in OUTSIDE)
    with monkeypatch.context() as patch:
        report = report_of(case, plant(patch, case), folder)
    forget_programs(whole_step=name in OUTSIDE)
    assert_found(report, place, nature)


# One or two of a nature; all others are in `make test-all`.
IN_EVERY_RUN = (
    *("rope axes swapped", "a mask between frames", "epsilon of the layer norms", "no gate"),
    *("scale without one", "the other GELU", "text padding masked", "image not attended to"),
    *("rows and columns of patches", "VAE mean and std exchanged", "wrong guidance"),
)


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in IN_EVERY_RUN else pytest.mark.slow) for name in CODE],
)
def test_a_fault_of_code_is_found(cases, monkeypatch, tmp_path: Path, name: str):
    run = whole if name in OUTSIDE else traced
    code_fault_is_found(cases, monkeypatch, tmp_path, name, run)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in CODE if name not in OUTSIDE])
def test_a_fault_of_code_is_found_in_a_whole_run(cases, monkeypatch, tmp_path: Path, name: str):
    code_fault_is_found(cases, monkeypatch, tmp_path, name, whole)


def test_enough_kinds_of_faults_are_named():
    """At least 25 are planted, and at least four fifths of them have a name other than unknown."""
    natures = [nature for *_, nature in (*WEIGHTS.values(), *CODE.values())]
    assert len(natures) >= 25
    assert sum(nature != "unknown" for nature in natures) >= 0.8 * len(natures)
