"""Fit TeaCache's coefficients to a checkpoint.

``python -m skyreels_jax.evaluation.fit_teacache --model DIR_OR_ID --prompt ...`` runs the model in
full, records by how much the time embedding and the blocks' residual change from step to step, and
fits a polynomial of degree 4 from the one to the other.

Source: Liu et al., "Timestep Embedding Tells" (arXiv 2411.19108), section 3.3. They look at the
output of the whole model; here it is the residual, since that is what the cache gives back.
"""

import argparse
import dataclasses
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Final, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import io_callback
from jaxtyping import Array, Bool, Float

from skyreels_jax.diffusion.step_cache import Position, StagedForward, Velocity
from skyreels_jax.evaluation.scores import MINI_CLIP, first_frame, held_out_scenes
from skyreels_jax.generation.request.resolve import resolve
from skyreels_jax.generation.request.settings import Request
from skyreels_jax.generation.window_generator import WindowGenerator
from skyreels_jax.hub import enable_compilation_cache
from skyreels_jax.moving_shapes.captions import plain_caption
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.presets import CacheCoefficients
from skyreels_jax.sampling.denoiser import Denoised, Denoiser, Sampling

_DEGREE: Final = 4
# Takes a step, and the relative changes of embedding, projection and residual.
_RecordChanges = Callable[[Array, Array, Array, Array], None]


class _PreviousStep(NamedTuple):
    """What one model call of a step remembers of the step before."""

    e: Array
    e0: Array
    residual: Float[Array, "rows F P D"]


@partial(jax.tree_util.register_dataclass, data_fields=(), meta_fields=("record",))
@dataclass(frozen=True)
class _ChangeRecorder:
    """A :class:`~skyreels_jax.diffusion.step_cache.StepCache` that reuses nothing."""

    record: _RecordChanges

    def init(self, staged: StagedForward) -> _PreviousStep:
        """Begin with zeros."""
        tokens = jnp.zeros_like(staged.tokens)
        return _PreviousStep(jnp.zeros_like(staged.e), jnp.zeros_like(staged.e0), tokens)

    def call(
        self, state: _PreviousStep, position: Position, staged: StagedForward
    ) -> tuple[Velocity, _PreviousStep, Bool[Array, ""]]:
        """Predict in full; what changed is recorded on the host."""
        tokens = staged.blocks(staged.tokens)
        now = _PreviousStep(staged.e, staged.e0, tokens - staged.tokens)
        changes = [relative_change(new, old) for new, old in zip(now, state, strict=True)]
        io_callback(self.record, None, position.step, *changes)
        return staged.head(tokens), now, jnp.bool_(True)


def relative_change(new: Array, old: Array) -> Float[Array, ""]:
    """Return the mean absolute change over the mean absolute value before, as TeaCache has it."""
    return jnp.mean(jnp.abs(new - old)) / jnp.mean(jnp.abs(old))


@dataclass(frozen=True, eq=False, kw_only=True)
class _RecordingDenoiser(Denoiser):
    """A denoiser with a recorder in place of any cache."""

    record: _RecordChanges

    def run(self, noise: Any, conditioning: Any, sampling: Sampling, **rest: Any) -> Denoised:
        sampling = dataclasses.replace(sampling, cache=_ChangeRecorder(self.record))
        return super().run(noise, conditioning, sampling, **rest)


@dataclass(frozen=True, eq=False)
class Changes:
    """Relative changes from step to step, in all model calls after the first step.

    Attributes:
        embedding: of the time embedding.
        projected: of its projection.
        residual: of what the blocks add to the tokens.
    """

    embedding: Float[np.ndarray, " N"]
    projected: Float[np.ndarray, " N"]
    residual: Float[np.ndarray, " N"]


class PolynomialFit(NamedTuple):
    """A polynomial, highest power first, and the share of the variance that it explains."""

    coefficients: tuple[float, float, float, float, float]
    explained: float


def record_changes(pipeline: Pipeline, requests: Iterable[Mapping[str, Any]]) -> Changes:
    """Run the model in full and record what changes.

    Args:
        pipeline: of the model.
        requests: settings of each video, ``prompt`` among them.

    Raises:
        RequestError: with everything about a request that is wrong.
    """
    found: list[tuple[float, float, float]] = []

    def append(step: Array, *changes: Array) -> None:
        if step > 0:
            e, e0, residual = (float(change) for change in changes)
            found.append((e, e0, residual))

    plain = pipeline.load_denoiser()
    recording = _RecordingDenoiser(plain.model, plain.block_length, record=append)
    for given in requests:
        request = resolve(Request(dtype=pipeline.dtype, **given), pipeline.checkpoint)
        generator = WindowGenerator(pipeline.components, lambda: recording, request)
        generator.make(request.windows[0])
        jax.effects_barrier()
    return Changes(*np.array(found).T)


def fit_polynomial(
    change: Float[np.ndarray, " N"], residual: Float[np.ndarray, " N"]
) -> PolynomialFit:
    """Fit the polynomial from the change of an embedding to that of the residual, least squares.

    Raises:
        ValueError: fewer different changes than coefficients.
    """
    different = len(np.unique(np.round(change, 6)))
    if different <= _DEGREE:
        raise ValueError(f"{different} different changes do not tell {_DEGREE + 1} coefficients")
    a, b, c, d, e = (float(value) for value in np.polyfit(change, residual, _DEGREE))
    error = residual - np.polyval((a, b, c, d, e), change)
    return PolynomialFit((a, b, c, d, e), float(1 - np.var(error) / np.var(residual)))


def main() -> None:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(description="Fit TeaCache's coefficients to a checkpoint.")
    parser.add_argument("--model", default="mini")
    parser.add_argument("--prompt", action="append", help="captions of moving shapes otherwise")
    parser.add_argument("--image", help="the first frame, for all prompts")
    parser.add_argument("--count", type=int, default=12, help="of captions of moving shapes")
    parser.add_argument(
        "--ar-step",
        type=int,
        nargs="+",
        help="of diffusion forcing, each in turn: the polynomial serves all; the model's otherwise",
    )
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    enable_compilation_cache()
    pipeline = Pipeline.from_pretrained(args.model, dtype=args.dtype, keep=True)
    if args.prompt:
        given = [{"prompt": prompt, "image": args.image} for prompt in args.prompt]
    else:
        image = pipeline.checkpoint.task == "i2v"
        given = [
            {
                **MINI_CLIP,
                "prompt": plain_caption(scene),
                "image": first_frame(scene) if image else None,
            }
            for scene in held_out_scenes(args.count, seed=4)
        ]
    modes = [{"ar_step": step} for step in args.ar_step] if args.ar_step else [{}]
    requests = [{**one, **mode, "seed": n} for mode in modes for n, one in enumerate(given)]
    changes = record_changes(pipeline, requests)
    fits = {
        "retained": fit_polynomial(changes.projected, changes.residual),
        "plain": fit_polynomial(changes.embedding, changes.residual),
    }
    print(CacheCoefficients(**{name: fit.coefficients for name, fit in fits.items()}))
    for name, fit in fits.items():
        print(f"{name}: explains {fit.explained:.1%} of {len(changes.residual)} changes")


if __name__ == "__main__":
    main()
