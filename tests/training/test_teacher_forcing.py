"""Teacher forcing, and what is built on it, through transformers: against diffusers' in PyTorch.

PyTorch's side calls its model once for each block, on the clean frames before it and the noisy
block, under its own block-causal mask; ours passes all of them at once. The models are of one
block of layers, the videos of four frames in blocks of two.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from tests.models.transformer_oracle import Shape, diffusers_model, inputs, jax_model
from torch.nn.attention import SDPBackend, sdpa_kernel

from skyreels_jax.models.transformer_attention import PastFrames
from skyreels_jax.training.distillation import (
    TANGENT_FLOOR,
    VelocityFunction,
    consistency_loss,
    continuous_consistency_loss,
    denoised,
    distribution_matching_loss,
    guided,
    regression_loss,
)
from skyreels_jax.training.self_generated import generate_own
from skyreels_jax.training.task import Template
from skyreels_jax.training.teacher_forcing import (
    SeenFrames,
    block_lengths,
    teacher_forced_velocity,
)
from skyreels_jax.weights.components.transformer import transformer_rules
from skyreels_jax.weights.engine import export

SIZE = Shape(layers=1, frames=4, height=4, width=4)
CONFIG = SIZE.config("df", inject_sample_info=True)
BLOCKS = (2, 2)
SCALE, WARMTH = 3.0, 0.7
STEPS = (1.0, 0.8, 0.5)
# Relative of a loss, and of a tensor's gradient to the largest in it. Measured at most 1.5e-6
# and 3.4e-6.
LOSS_TOL = GRAD_TOL = 1e-4

_Their = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


class Given(NamedTuple):
    """Arrays that all losses are of."""

    text: np.ndarray
    empty: np.ndarray
    clean: np.ndarray
    noise: np.ndarray
    steps: np.ndarray
    sigma: np.ndarray
    below: np.ndarray


class Sides(NamedTuple):
    theirs: dict[str, Any]
    ours: dict[str, dict[str, jax.Array]]
    template: Template
    given: Given


@pytest.fixture(scope="module")
def sides() -> Sides:
    names = ("student", "teacher", "other")
    theirs = {n: diffusers_model(CONFIG, seed=k, block=2) for k, n in enumerate(names)}
    found = {n: Template.of(jax_model(CONFIG, model)) for n, model in theirs.items()}
    made, rng = inputs(CONFIG, SIZE, seed=3, per_frame=True), np.random.default_rng(4)
    shape = made["x"].shape
    normal = [rng.standard_normal(size).astype(np.float32) for size in (shape, (3, *shape))]
    sigma = np.repeat(np.array([[0.75, 0.5]], np.float32), 2, axis=1)
    empty = -made["context"]
    given = Given(made["context"], empty, made["x"], *normal, sigma, sigma - np.float32(0.125))
    ours = {name: params for name, (_, params) in found.items()}
    return Sides(theirs, ours, found["student"][0], given)


def call(model: Any, x: torch.Tensor, t: torch.Tensor, text: np.ndarray) -> torch.Tensor:
    return model(
        hidden_states=x,
        timestep=t,
        encoder_hidden_states=torch.from_numpy(text),
        enable_diffusion_forcing=True,
        fps=np.zeros(1, np.int64),
        return_dict=False,
    )[0]


def their_velocity(
    model: Any, clean: torch.Tensor, text: np.ndarray, blocks: tuple[int, ...] = BLOCKS
) -> _Their:
    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        first, out = 0, []
        model.register_to_config(num_frame_per_block=blocks[0])
        for length in blocks:
            end = first + length
            frames = torch.cat([clean[:, :, :first], x[:, :, first:end]], 2)
            t = torch.cat([torch.zeros_like(sigma[:, :first]), 1000 * sigma[:, first:end]], 1)
            out.append(call(model, frames, t, text)[:, :, first:end])
            first = end
        return torch.cat(out, 2)

    return velocity


def their_guided(model: Any, clean: torch.Tensor, given: Given, blocks=BLOCKS) -> _Their:
    def velocity(x: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        said, away = (
            their_velocity(model, clean, text, blocks)(x, sigma)
            for text in (given.text, given.empty)
        )
        return away + SCALE * (said - away)

    return velocity


def wide(sigma: torch.Tensor) -> torch.Tensor:
    return sigma[:, None, :, None, None]


def their_video(model: Any, given: Given, last: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The video and what each block's last pass was given, all earlier frames computed anew."""
    video, inputs_of = torch.zeros(given.clean.shape)[:, :, :0], []
    for first in (0, 2):
        of_block = torch.from_numpy(given.steps[..., first : first + 2, :, :])
        x = of_block[0]
        for number in range(last + 1):
            frames = torch.cat([video, x], 2)
            t = torch.tensor([[0.0] * first + [1000 * STEPS[number]] * 2])
            model.register_to_config(num_frame_per_block=2)
            done = x - STEPS[number] * call(model, frames, t, given.text)[:, :, first:]
            if number == last:
                inputs_of.append(x)
                break
            below = STEPS[number + 1]
            x = (1 - below) * done + below * of_block[number + 1]
        video = torch.cat([video, done], 2)
    return video, torch.cat(inputs_of, 2)


# Each stage: PyTorch's loss of the student in `theirs`, and ours of its parameters.


def by_torch(stage: str, sides: Sides, **changed: Any) -> tuple[float, dict[str, np.ndarray]]:
    given, models = sides.given, sides.theirs
    blocks, scale_of = changed.get("blocks", BLOCKS), changed.get("guided", their_guided)
    clean, noise = torch.from_numpy(given.clean), torch.from_numpy(given.noise)
    sigma, below = torch.from_numpy(given.sigma), torch.from_numpy(given.below)
    x = (1 - wide(sigma)) * clean + wide(sigma) * noise
    student = their_velocity(models["student"], clean, given.text, blocks)
    with torch.no_grad():
        teacher = scale_of(models["teacher"], clean, given)(x, sigma)
    if stage == "teacher-forcing":
        loss = ((student(x, sigma) - (noise - clean)) ** 2).mean()
    elif stage == "guidance":
        loss = ((student(x, sigma) - teacher) ** 2).mean()
    elif stage == "consistency":
        with torch.no_grad():
            nearer = x + wide(below - sigma) * teacher
            average = their_velocity(models["other"], clean, given.text)
            target = nearer - wide(below) * average(nearer, below)
        loss = ((x - wide(sigma) * student(x, sigma) - target) ** 2).mean()
    elif stage == "continuous":
        with sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            tangents = (teacher, torch.ones_like(sigma))
            before, change = torch.func.jvp(student, (x, sigma), tangents)
        g = before - teacher + WARMTH * wide(sigma) * change
        g = g / ((g**2).mean((1, 3, 4), keepdim=True).sqrt() + TANGENT_FLOOR)
        loss = ((student(x, sigma) - before + g) ** 2).mean()
    else:
        loss = their_dmd(stage, sides, **changed)
    model = models["other" if stage == "critic" else "student"]
    model.zero_grad()
    loss.backward()
    named = model.named_parameters()
    return loss.item(), {n: p.grad.numpy() for n, p in named if p.grad is not None}


def their_dmd(stage: str, sides: Sides, *, attached: bool = False, **_: Any) -> torch.Tensor:
    given, models, last = sides.given, sides.theirs, 1
    noise, asked = torch.from_numpy(given.noise), torch.full((1, 4), 0.625)
    with torch.no_grad():
        video, noisy = their_video(models["student"], given, last)
    at = (1 - wide(asked)) * video + wide(asked) * noise
    whole = (4,)
    if stage == "critic":
        said = their_velocity(models["other"], video, given.text, whole)(at, asked)
        return ((said - (noise - video)) ** 2).mean()
    with torch.no_grad():
        critic = their_velocity(models["other"], video, given.text, whole)
        fake = at - wide(asked) * critic(at, asked)
        real = at - wide(asked) * their_guided(models["teacher"], video, given, whole)(at, asked)
        g = (fake - real) / (video - real).abs().mean()
    sigma = torch.full((1, 4), STEPS[last])
    student = models["student"]
    hooks = [] if attached else still_keys(student)
    made = noisy - wide(sigma) * their_velocity(student, video, given.text)(noisy, sigma)
    for hook in hooks:
        hook.remove()
    return 0.5 * ((made - (made - g).detach()) ** 2).mean()


def still_keys(model: Any) -> list[Any]:
    """Keys and values of all but the last two frames, of four tokens each, pass no gradient."""

    def detach(module: Any, args: Any, out: torch.Tensor) -> torch.Tensor:
        return torch.cat([out[:, :-8].detach(), out[:, -8:]], 1)

    attention = [block.attn1 for block in model.blocks]
    found = [part for attn in attention for part in (attn.norm_k, attn.to_v)]
    return [part.register_forward_hook(detach) for part in found]


def ours(stage: str, sides: Sides) -> tuple[float, dict[str, np.ndarray]]:
    given, template, params = Given(*map(jnp.asarray, sides.given)), sides.template, sides.ours
    fps = jnp.zeros(1, jnp.int32)

    def velocity(
        params: Any, clean: jax.Array, text: jax.Array, blocks=BLOCKS, **how
    ) -> VelocityFunction:
        model = template.model(params)
        context = model.prepare_context(text)
        return lambda x, sigma: teacher_forced_velocity(
            *(model, SeenFrames(clean), x, sigma, context, blocks), fps=fps, **how
        )

    def teacher(clean: jax.Array, blocks=BLOCKS) -> VelocityFunction:
        texts = (given.text, given.empty)
        both = (velocity(params["teacher"], clean, text, blocks) for text in texts)
        return guided(*both, SCALE)

    def loss_of(own: Any) -> jax.Array:
        clean, sigma, below = given.clean, given.sigma, given.below
        share = sigma[:, None, :, None, None]
        x = (1 - share) * clean + share * given.noise
        student = velocity(own, clean, given.text)
        if stage == "teacher-forcing":
            return jnp.mean(jnp.square(student(x, sigma) - (given.noise - clean)))
        if stage == "guidance":
            return regression_loss(student, teacher(clean), x, sigma)
        if stage == "consistency":
            average = velocity(params["other"], clean, given.text)
            return consistency_loss(student, average, teacher(clean), x, sigma, below)
        if stage == "continuous":
            warmth = jnp.float32(WARMTH)
            return continuous_consistency_loss(student, teacher(clean), x, sigma, warmth)
        still = template.model(params["student"])
        made = generate_own(
            *(still, given.steps, STEPS, jnp.int32(1), still.prepare_context(given.text), BLOCKS),
            fps=fps,
        )
        asked = jnp.full((1, 1), 0.625)
        if stage == "critic":
            at = 0.375 * made.video + 0.625 * given.noise
            said = velocity(own, made.video, given.text, (4,))(at, asked)
            return jnp.mean(jnp.square(said - (given.noise - made.video)))
        student = velocity(own, made.video, given.text, detached=True)
        fake = velocity(params["other"], made.video, given.text, (4,))
        real = teacher(made.video, (4,))
        video = denoised(student, made.noisy, made.sigma)
        return distribution_matching_loss(video, fake, real, given.noise, asked)

    name = "other" if stage == "critic" else "student"
    loss, gradients = jax.jit(jax.value_and_grad(loss_of))(params[name])
    state = nnx.state(template.model(gradients))
    return float(loss), dict(export(state, transformer_rules(CONFIG), "diffusers"))


def gaps(stage: str, sides: Sides, **changed: Any) -> tuple[float, float]:
    (loss, own), (right, expected) = ours(stage, sides), by_torch(stage, sides, **changed)
    of_each = {
        name: float(np.abs(own[name] - expected[name]).max() / np.abs(expected[name]).max())
        for name in own
    }
    return abs(loss - right) / right, max(of_each.values())


STAGES = ("teacher-forcing", "guidance", "consistency", "continuous", "dmd", "critic")


@pytest.mark.parametrize(
    "stage",
    [STAGES[0], *(pytest.param(stage, marks=pytest.mark.slow) for stage in STAGES[1:])],
)
def test_a_stages_loss_and_every_gradient_are_pytorchs(stage: str, sides: Sides):
    of_loss, of_gradients = gaps(stage, sides)
    assert of_loss < LOSS_TOL
    assert of_gradients < GRAD_TOL


@pytest.mark.slow
def test_another_mask_other_guidance_and_keys_that_pass_a_gradient_are_caught(sides: Sides):
    # All frames noisy together, no clean ones before them. Measured 0.0068 of the loss.
    of_loss, of_gradients = gaps("teacher-forcing", sides, blocks=(4,))
    assert of_loss > 50 * LOSS_TOL
    assert of_gradients > 100 * GRAD_TOL

    def unguided(model, clean, given, blocks=BLOCKS):
        return their_velocity(model, clean, given.text, blocks)

    assert gaps("guidance", sides, guided=unguided)[1] > 100 * GRAD_TOL
    # The loss is the same; the gradient through earlier frames' keys is not. Measured 0.1.
    of_loss, of_gradients = gaps("dmd", sides, attached=True)
    assert of_loss < LOSS_TOL
    assert of_gradients > 100 * GRAD_TOL


@pytest.mark.slow
def test_blocks_may_be_uneven_and_memory_grows_with_tokens_alone(sides: Sides):
    model = sides.template.model(sides.ours["student"])
    given = Given(*map(jnp.asarray, sides.given))
    context, fps = model.prepare_context(given.text), jnp.zeros(1, jnp.int32)
    blocks = (1, 3)
    forced = teacher_forced_velocity(
        *(model, SeenFrames(given.clean), given.noise, given.sigma, context, blocks), fps=fps
    )
    first = 0
    for length in blocks:
        end = first + length
        x = jnp.concatenate([given.clean[:, :, :first], given.noise[:, :, first:end]], axis=2)
        t = jnp.concatenate([jnp.zeros((1, first)), 1000 * given.sigma[:, first:end]], axis=1)
        # Clean frames see no noisy one: as in blocks of which the last is the noisy one.
        states = None
        if first:
            states = model.staged(given.clean[:, :, :1], jnp.zeros((1, 1)), context, fps=fps)
        if states is None:
            alone = model(x, t, context, fps=fps)
        else:
            past = PastFrames(*states.key_values(), jnp.int32(first))
            staged = model.staged(x[:, :, first:], t[:, first:], context, fps=fps, past=past)
            alone = staged.head(staged.blocks(staged.tokens))
        off = jnp.abs(forced[:, :, first:end] - alone).max()
        assert float(off) < 1e-5  # measured 1e-6
        first = end


def test_the_first_block_may_have_its_own_length_and_the_last_be_short():
    assert block_lengths(5, 2) == (2, 2, 1)
    assert block_lengths(7, 3, 1) == (1, 3, 3)
    assert block_lengths(5, 5) == block_lengths(5, 9) == (5,)
    assert block_lengths(2, 3, 4) == (2,)
