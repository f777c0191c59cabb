"""What the pipeline refuses: incomplete folders before any work, and more than there is memory."""

from pathlib import Path

import jax
import jax.numpy as jnp
import jaxtyping
import pytest
from tests.fabricate import Checkpoints

from skyreels_jax import backends
from skyreels_jax import pipeline as pipeline_module
from skyreels_jax.errors import RequestError, UnsupportedError, WeightsError
from skyreels_jax.memory import refused_in_words
from skyreels_jax.pipeline import Pipeline
from skyreels_jax.testing.random_checkpoint import make_checkpoint

SMALL = {"height": 32, "width": 48, "num_frames": 5, "steps": 2, "seed": 1}
TOO_MUCH = 2**46


@pytest.mark.slow
def test_a_folder_without_its_last_part_is_refused_before_the_first_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """The VAE decodes, when all else is done; and a folder that is mended works at once."""
    folder = make_checkpoint(tmp_path / "checkpoint", "t2v", "original")
    vae = folder / "Wan2.1_VAE.pth"
    vae.rename(tmp_path / "away")
    pipe = Pipeline.from_pretrained(folder)
    loaded: list[str] = []
    encoder = backends.Umt5TextEncoder
    monkeypatch.setattr(
        backends, "Umt5TextEncoder", lambda **given: loaded.append("text") or encoder(**given)
    )
    with pytest.raises(WeightsError, match=r"Wan2\.1_VAE\.pth is missing"):
        pipe("a fox", **SMALL)
    assert loaded == []
    (tmp_path / "away").rename(vae)
    assert Pipeline.from_pretrained(folder)("a fox", **SMALL).frames.shape == (5, 32, 48, 3)
    assert loaded == ["text"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"vae_tiling": "some"}, "`vae_tiling` 'some' is unknown; there are auto, on, off"),
        ({"vae_tiling": "on", "backend": "hybrid"}, "has no tiles"),
    ],
)
def test_tilings_that_there_are_not(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, options: dict, message: str
):
    # Outside of this suite, nobody checks the type.
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
    with pytest.raises(RequestError, match=message):
        Pipeline.from_pretrained(checkpoints("t2v", "original"), **options)


def test_memory_that_runs_out_is_one_line():
    """A real refusal of XLA's, of more than any machine has."""
    with pytest.raises(UnsupportedError) as caught, refused_in_words("use a smaller size"):
        jnp.zeros(TOO_MUCH).block_until_ready()
    (line,) = str(caught.value).splitlines()
    assert f"{4 * TOO_MUCH} bytes" in line
    assert line.endswith("use a smaller size")
    assert "RESOURCE_EXHAUSTED" not in line


def test_other_errors_of_the_compiler_stay_what_they_are():
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"), refused_in_words("-"):
        raise jax.errors.JaxRuntimeError("INTERNAL: a bug")


@pytest.mark.parametrize("stage", ["sample", "decode"])
def test_memory_that_runs_out_in_any_stage_is_an_error_of_ours(
    checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch, stage: str
):
    def refuse(*given: object, **settings: object) -> None:
        jnp.zeros(TOO_MUCH).block_until_ready()

    pipe = Pipeline.from_pretrained(checkpoints("t2v", "original"))
    if stage == "sample":
        monkeypatch.setattr(pipeline_module, "load_transformer", refuse)
        advice = "loading the transformer: use `dtype` bfloat16"
    else:
        monkeypatch.setattr(backends, "WanAutoencoder", refuse)
        advice = "`vae_tiling` on"
    with pytest.raises(UnsupportedError, match=advice):
        pipe("a fox", **SMALL)
