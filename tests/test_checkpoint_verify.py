"""Checkpoint folders are proved complete, and their parts to belong together, by headers alone."""

import dataclasses
import shutil
from pathlib import Path

import pytest
from tests.fabricate import Checkpoints
from tests.weights.tiny import I2V, T2V, save

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.errors import WeightsError
from skyreels_jax.models.transformer_config import TransformerConfig
from skyreels_jax.weights.safetensors_file import TensorSource

# Of the random checkpoints' encoders.
TEXT_DIM, IMAGE_DIM = 32, 160


def verify(folder: Path) -> None:
    Checkpoint.open(folder).verify()


def with_transformer(parts: Path, folder: Path, config: TransformerConfig) -> Path:
    """A transformer of ``config`` among the other parts of a checkpoint."""
    save(folder, config)
    for path in parts.iterdir():
        if path.suffix == ".pth":
            (folder / path.name).symlink_to(path)
    shutil.copytree(parts / "google", folder / "google")
    return folder


@pytest.mark.parametrize("layout", ["original", "diffusers"])
@pytest.mark.parametrize("kind", ["i2v", "df"])
def test_whole_checkpoints_pass(checkpoints: Checkpoints, kind, layout):
    verify(checkpoints(kind, layout))


def test_no_tensor_is_read(checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch):
    def refuse(self: TensorSource, name: str) -> None:
        raise AssertionError(f"{name} was read")

    monkeypatch.setattr("skyreels_jax.weights.torch_file.PthSource.read", refuse)
    monkeypatch.setattr("skyreels_jax.weights.safetensors_file.SafetensorsSource.read", refuse)
    verify(checkpoints("i2v", "original"))


def test_encoders_of_another_checkpoint_are_refused(checkpoints: Checkpoints, tmp_path: Path):
    parts = checkpoints("i2v", "original")
    fits = dataclasses.replace(I2V, text_dim=TEXT_DIM, image_dim=IMAGE_DIM)
    verify(with_transformer(parts, tmp_path / "fits", fits))
    with pytest.raises(WeightsError, match=r"umt5.* gives 32 features and .*config.json takes 20"):
        verify(with_transformer(parts, tmp_path / "text", T2V))
    other_image = dataclasses.replace(fits, image_dim=12)
    with pytest.raises(WeightsError, match=r"clip.* gives 160 features and .*config.json takes 12"):
        verify(with_transformer(parts, tmp_path / "image", other_image))
