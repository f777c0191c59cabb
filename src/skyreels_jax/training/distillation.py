"""What distillation minimises: losses of a student, given what teachers say, as pure functions.

A *velocity* is a model with all its conditions: from noisy latents and their shares of noise to
``noise - data``. With ``x = (1 - sigma) data + sigma noise``, ``x - sigma v`` is the data that a
velocity says. Nothing here knows of text, keys or masks, so that a student may be causal and its
teacher not. What a teacher says passes no gradient.
"""

from collections.abc import Callable
from typing import Final

import jax
import jax.numpy as jnp
from jax.lax import stop_gradient
from jaxtyping import Array, Bool, Float

from skyreels_jax.shapes import Latents
from skyreels_jax.training.objective import add_noise, beside_latents, mean_error
from skyreels_jax.training.sigma_distributions import Sigmas, shifted

VelocityFunction = Callable[[Latents, Sigmas], Latents]
GivenFrames = Bool[Array, "B F"] | None
# What keeps a small tangent from being blown up: c of Lu and Song, arXiv 2410.11081, section 4.1.
TANGENT_FLOOR: Final = 0.1
_EACH_FRAME: Final = (1, 3, 4)
_EACH_VIDEO: Final = (1, 2, 3, 4)


def guided(
    positive: VelocityFunction, negative: VelocityFunction, scale: float | Sigmas
) -> VelocityFunction:
    """``negative + scale * (positive - negative)``; at exactly 1 the positive one alone.

    A ``scale`` may be of each frame, ``[B, F]``.
    """
    if not isinstance(scale, Array) and scale == 1:
        return positive
    share = beside_latents(scale) if isinstance(scale, Array) else scale

    def velocity(x: Latents, sigma: Sigmas) -> Latents:
        away = negative(x, sigma)
        return away + share * (positive(x, sigma) - away)

    return velocity


def guidance_scales(given: GivenFrames, scale: float) -> float | Float[Array, "B F"]:
    """The teacher's scale; of each frame where videos begin with ``given`` ones.

    In the frame after those one scene fades into another. Guided away from no text, with which
    nothing would change, the fade would be over at once: there it is what the text says alone.
    """
    if given is None:
        return scale
    first = jnp.sum(given, axis=1, keepdims=True)
    fades = (first > 0) & (jnp.arange(given.shape[1])[None] == first)
    return jnp.where(fades, jnp.float32(1), jnp.float32(scale))


def denoised(velocity: VelocityFunction, x: Latents, sigma: Sigmas) -> Latents:
    """The data that a velocity says: ``x - sigma v``."""
    return x - beside_latents(sigma) * velocity(x, sigma)


def regression_loss(
    student: VelocityFunction,
    teacher: VelocityFunction,
    x: Latents,
    sigma: Sigmas,
    given: GivenFrames = None,
) -> Float[Array, ""]:
    """Mean squared difference of two velocities of ``x``, of frames that are not given.

    With a guided teacher this is guidance distillation, the first stage of Meng et al., "On
    Distillation of Guided Diffusion Models" (arXiv 2210.03142): the student, asked once, says what
    the teacher says of both prompts.
    """
    return mean_error(jnp.square(student(x, sigma) - stop_gradient(teacher(x, sigma))), given)


def consistency_sigmas(count: int, shift: float) -> Float[Array, " N"]:
    """``count`` sigmas and zero, the noisiest first: even steps, moved towards noise."""
    return shifted(jnp.linspace(1.0, 0.0, count + 1)[None], shift)[0]


def consistency_loss(
    student: VelocityFunction,
    average: VelocityFunction,
    teacher: VelocityFunction,
    x: Latents,
    sigma: Sigmas,
    below: Sigmas,
    given: GivenFrames = None,
) -> Float[Array, ""]:
    """Discrete consistency distillation: ``|f(x, sigma) - sg f_average(x', sigma')|^2``.

    ``x'`` is one Euler step of the teacher's (guided) flow away, ``x + (sigma' - sigma) v``, and
    ``f`` is :func:`denoised`, which at sigma 0 gives ``x`` itself. Song et al., "Consistency
    Models" (arXiv 2303.01469), algorithm 2, with the squared distance.

    Args:
        student: learns.
        average: the moving average of its parameters.
        teacher: guided.
        x: noised at ``sigma``.
        sigma: shares of noise.
        below: those of one step less noise.
        given: frames that are not learned.
    """
    step = beside_latents(below - sigma)
    nearer = stop_gradient(x + step * teacher(x, sigma))
    target = stop_gradient(denoised(average, nearer, below))
    return mean_error(jnp.square(denoised(student, x, sigma) - target), given)


def continuous_consistency_loss(
    student: VelocityFunction,
    teacher: VelocityFunction,
    x: Latents,
    sigma: Sigmas,
    warmth: Float[Array, ""],
    given: GivenFrames = None,
) -> Float[Array, ""]:
    """Continuous-time consistency distillation: a step of no length, by a forward derivative.

    Along the teacher's flow ``dx/dsigma = v`` the student's ``f = x - sigma u`` should not change:
    ``df/dsigma = v - u - sigma du/dsigma = 0``. As in Lu and Song, "Simplifying, Stabilizing and
    Scaling Continuous-Time Consistency Models" (arXiv 2410.11081, section 4) and rCM (arXiv
    2510.08431), whose angles are sigmas here, the student regresses ``sg(u - g / (|g| + c))`` with
    ``g = u - v + warmth * sigma * du/dsigma``, ``|g|`` being a frame's norm over the root of how
    many numbers it has.

    Args:
        student: learns.
        teacher: guided.
        x: noised at ``sigma``.
        sigma: shares of noise.
        warmth: of the derivative, rising from 0 to 1 in the first steps.
        given: frames that are not learned.
    """
    flow = stop_gradient(teacher(x, sigma))
    said, change = jax.jvp(student, (x, sigma), (flow, jnp.ones_like(sigma)))
    before = stop_gradient(said)
    tangent = before - flow + warmth * beside_latents(sigma) * stop_gradient(change)
    size = jnp.sqrt(jnp.mean(jnp.square(tangent), axis=_EACH_FRAME, keepdims=True))
    return mean_error(jnp.square(said - before + tangent / (size + TANGENT_FLOOR)), given)


def distribution_matching_loss(
    video: Latents, fake: VelocityFunction, real: VelocityFunction, noise: Latents, sigma: Sigmas
) -> Float[Array, ""]:
    """Distribution matching distillation (DMD): ``1/2 |video - sg(video - g)|^2``.

    ``g = (d_fake - d_real) / mean|video - d_real|`` by video, where ``d`` is what a critic of the
    student's videos (``fake``) and the guided teacher (``real``) say is under ``noise``. Yin et
    al., arXiv 2405.14867; its gradient with respect to ``video`` is ``g`` over how many numbers
    there are.

    Args:
        video: what the student made; gradients pass through it.
        fake: the critic's velocity.
        real: the teacher's.
        noise: standard normal.
        sigma: shares of noise at which both are asked.
    """
    still = stop_gradient(video)
    x = add_noise(still, noise, sigma)
    right = denoised(real, x, sigma)
    scale = jnp.mean(jnp.abs(still - right), axis=_EACH_VIDEO, keepdims=True)
    gradient = stop_gradient((denoised(fake, x, sigma) - right) / scale)
    return 0.5 * jnp.mean(jnp.square(video - stop_gradient(video - gradient)))
