"""Weights kept in int8 and fp8, from the checkpoint to the video."""

from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from skyreels_jax.checkpoints import Checkpoint, load_transformer
from skyreels_jax.errors import RequestError, UnsupportedError, WeightsError
from skyreels_jax.generation.video import Video
from skyreels_jax.memory import component_sizes, estimate, resident_bytes
from skyreels_jax.models.transformer_config import QUANTIZED_DTYPES, T2V_14B
from skyreels_jax.parity.metrics import psnr
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.sampling.denoiser import Denoiser
from skyreels_jax.weights.components.transformer import TRANSFORMER
from skyreels_jax.weights.components.umt5 import stored_text_encoder
from skyreels_jax.weights.engine import parameters
from skyreels_jax.weights.offload import abstract_on_host, on_host, stays_on_host
from skyreels_jax.weights.quantize import quantize

KINDS = pytest.mark.parametrize("weights", QUANTIZED_DTYPES)
PROMPT = "a red star grows on a black background"
SHORT = {"num_frames": 9, "steps": 6, "seed": 3}


@cache
def video(weights: str | None = None, dtype: str = "bfloat16") -> Video:
    return Pipeline.from_pretrained("mini", dtype=dtype, weights=weights)(PROMPT, **SHORT)


def distance(one: Video, other: Video) -> float:
    """The smaller of the PSNR of frames and of latents, the peak being their range."""
    error = float(np.mean(np.square(one.latents - other.latents)))
    of_latents = 10 * np.log10(np.ptp(other.latents) ** 2 / error)
    return min(psnr(one.frames, other.frames), float(of_latents))


@pytest.mark.slow
@pytest.mark.parametrize(("weights", "least"), [("int8", 35.0), ("fp8", 28.0)])
def test_the_small_model_draws_the_same(weights: str, least: float):
    # Measured 42.5 and 40.1 dB.
    assert distance(video(weights), video(dtype="float32")) > least
    assert video(weights).settings["weights"] == weights


@pytest.mark.slow
@KINDS
def test_a_dropped_scale_is_caught(weights: str, monkeypatch: pytest.MonkeyPatch):
    def without(checkpoint: Checkpoint, **options):
        model = load_transformer(checkpoint, **options)
        for path, variable in parameters(model).items():
            if path == "blocks.ffn.fc2.kernel_scale":
                variable.set_value(jnp.full_like(variable.get_value(), jnp.mean(variable[...])))
        return model

    monkeypatch.setattr("skyreels_jax.pipeline.load_transformer", without)
    pipe = Pipeline.from_pretrained("mini", weights=weights)
    # Measured 19.9 dB for both, with one mean instead of the scales of one kind of kernel.
    assert distance(pipe(PROMPT, **SHORT), video(dtype="float32")) < 25


@KINDS
def test_kernels_are_quantised_as_they_are_loaded(weights: str):
    checkpoint, kind = Checkpoint.open("mini"), QUANTIZED_DTYPES[weights]
    encoder = stored_text_encoder(checkpoint.layout)
    for plain, kept in (
        (
            load_transformer(checkpoint, dtype=jnp.float32),
            load_transformer(checkpoint, dtype=jnp.bfloat16, kernel_dtype=kind),
        ),
        (encoder.load(jnp.float32), encoder.load(jnp.bfloat16, kernel_dtype=kind)),
    ):
        exact, found = parameters(plain), parameters(kept)
        quantised = {path for path, leaf in found.items() if leaf.dtype == kind}
        assert len(quantised) >= 7
        assert found.keys() - exact.keys() == {f"{path}_scale" for path in quantised}
        for path in exact:
            given = np.asarray(exact[path].get_value())
            loaded = np.asarray(found[path].get_value())
            if path not in quantised:
                np.testing.assert_array_equal(loaded, given.astype(jnp.bfloat16))
                continue
            values, scale = quantize(given, kind)
            np.testing.assert_array_equal(loaded, values)
            np.testing.assert_array_equal(found[f"{path}_scale"].get_value(), scale)


def test_a_quantised_model_is_not_written(tmp_path: Path):
    checkpoint = Checkpoint.open("mini")
    model = load_transformer(checkpoint, kernel_dtype=jnp.int8)
    with pytest.raises(WeightsError, match="kernels are quantised: write the checkpoint"):
        TRANSFORMER.save(tmp_path / "new", model, checkpoint.config)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_memory_is_counted():
    checkpoint = Checkpoint.open("mini")

    def bytes_of_14b(**how) -> int:
        return estimate(T2V_14B, (1, 2, 2), dtype="bfloat16", **how).weights

    whole, kept = bytes_of_14b(), bytes_of_14b(weights="int8")
    assert 0.5 < kept / whole < 0.55  # measured 0.508
    # A layer at work and the next on its way, of 40, and what is outside the blocks.
    assert bytes_of_14b(weights="int8", offload=True) < 0.06 * whole
    sizes = component_sizes(checkpoint.layout, checkpoint.config, "bfloat16", "float32")
    small = component_sizes(
        checkpoint.layout, checkpoint.config, "bfloat16", "float32", weights="fp8"
    )
    for name in ("transformer", "text_encoder"):
        model = {
            "transformer": lambda: load_transformer(checkpoint, kernel_dtype=jnp.int8),
            "text_encoder": lambda: stored_text_encoder(checkpoint.layout).load(
                jnp.bfloat16, kernel_dtype=jnp.int8
            ),
        }[name]()
        loaded = sum(leaf.get_value().nbytes for leaf in parameters(model).values())
        assert small[name] == loaded < sizes[name]
    assert small["vae"] == sizes["vae"]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"weights": "int4"}, "`weights` 'int4' is unknown; there are bf16, int8, fp8"),
        ({"weights": "bf16", "dtype": "float32"}, "leave one out"),
        ({"weights": "int8", "backend": "hybrid"}, "leave `weights` out"),
        ({"offload": "yes"}, "`offload` 'yes' is unknown"),
    ],
)
def test_what_does_not_go_together_is_refused(options, says: str):
    with pytest.raises(RequestError, match=says):
        Pipeline.from_pretrained("mini", **options)


def test_offload_is_refused_where_there_is_no_other_memory():
    with pytest.raises(UnsupportedError, match="JAX computes on the CPU here: leave it out"):
        Pipeline.from_pretrained("mini", offload=True)


@pytest.mark.slow
def test_weights_are_part_of_what_made_a_video():
    plain, bf16, int8, fp8 = (
        Pipeline.from_pretrained("mini", weights=weights)
        for weights in (None, "bf16", "int8", "fp8")
    )
    assert plain.fingerprint() == bf16.fingerprint()
    assert len({pipe.fingerprint() for pipe in (plain, int8, fp8)}) == 3
    assert "weights int8" in repr(int8)
    with pytest.raises(RequestError, match="it is the pipeline's"):
        int8(PROMPT, weights="int8")


@pytest.mark.slow
def test_a_model_in_the_memory_of_the_host_computes_the_same():
    """The CPU has memory of that kind too, if no use for it."""
    checkpoint = Checkpoint.open("mini")
    options = {"dtype": jnp.bfloat16, "kernel_dtype": jnp.int8}
    here = load_transformer(checkpoint, **options)
    there = load_transformer(checkpoint, **options, placement=on_host)
    kinds = {
        path: leaf.get_value().sharding.memory_kind for path, leaf in parameters(there).items()
    }
    assert {path for path, kind in kinds.items() if kind == "pinned_host"} == {
        path for path in kinds if stays_on_host(path)
    }
    # Measured 0.45; what is outside the blocks weighs more than in a large model.
    assert resident_bytes(there, offload=True) < 0.5 * resident_bytes(there, offload=False)
    text = jnp.asarray(np.random.default_rng(0).normal(size=(1, 512, 128)), jnp.float32)
    prepared = [Denoiser(model).model.prepare_context(text) for model in (here, there)]
    for one, other in zip(*map(jax.tree.leaves, prepared), strict=True):
        np.testing.assert_array_equal(one, other)
    abstract = parameters(abstract_on_host(TRANSFORMER.abstract(checkpoint.config)))
    assert abstract["blocks.ffn.fc1.kernel"].get_value().sharding.memory_kind == "pinned_host"
