"""From films to a trained model, on the parts of `mini`; killed at any moment, bit for bit."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from tests import documents
from tests.media.films import colours, write_film
from tests.training.videos.small_films import CAPTIONS, make_films, write_recipe

from skyreels_jax.cli.main import main
from skyreels_jax.components.clip_preprocessing import squash
from skyreels_jax.components.encoders import WanAutoencoder, condition_latents, prepare_image
from skyreels_jax.memory import vae_work
from skyreels_jax.mini.recipe import read_recipe
from skyreels_jax.training.dataset import FirstFrameEncoder
from skyreels_jax.training.sources import find_sources
from skyreels_jax.training.videos import encode
from skyreels_jax.training.videos.clips import Videos
from skyreels_jax.training.videos.survey import frames_of
from skyreels_jax.weights.components.clip import stored_image_encoder
from skyreels_jax.weights.components.vae import stored_vae

I2V = {"model__model_type": '"i2v"', "model__image_dim": "160", "data__image": '"mini-i2v"'}
pytestmark = pytest.mark.slow


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SKYREELS_JAX_CACHE", str(tmp_path / "caches"))
    make_films(tmp_path)
    return tmp_path


def started(*words: str | Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "skyreels_jax.cli.main", *map(str, words)]
    return subprocess.Popen(command, stderr=subprocess.DEVNULL)


def encoded(folder: Path) -> dict[str, bytes]:
    """Whole files that are encoded, by name."""
    found = (folder / "encoded").glob("*/[!.]*.safetensors")
    return {file.name: file.read_bytes() for file in found}


def lines(folder: Path) -> list[dict]:
    file = folder / "out" / "log.jsonl"
    return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []


def weights(folder: Path) -> bytes:
    (file,) = (folder / "out" / "model" / "transformer").glob("*.safetensors")
    return file.read_bytes()


def test_one_command_trains_and_goes_on_bit_for_bit(folder: Path):
    recipe = write_recipe(folder, data__validation_split="0.2", run__sample_every="4")
    assert main(["train", str(recipe)]) == 0
    whole, logged = weights(folder), lines(folder)
    losses = [line["loss"] for line in logged if "loss" in line]
    assert len(losses) == 4
    assert all(np.isfinite(losses))
    assert "held_0.5" in logged[-1]
    assert (folder / "out" / "samples" / "0000004" / "0.mp4").is_file()
    (folder / "out").rename(folder / "first")
    process = started("train", recipe)
    while not any(line["step"] >= 2 for line in lines(folder)):
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait(60)
    assert main(["train", str(recipe)]) == 0
    assert weights(folder) == whole
    assert [line["loss"] for line in lines(folder) if "loss" in line] == losses


def test_other_data_is_refused_when_a_run_goes_on(folder: Path, capsys):
    recipe = write_recipe(folder)
    assert main(["train", str(recipe)]) == 0
    (folder / "films" / "plain.txt").write_text("Another caption.")
    recipe.write_text(recipe.read_text().replace("steps = 4", "steps = 6"))
    capsys.readouterr()
    assert main(["train", str(recipe)]) == 2
    assert "data.captions digest" in capsys.readouterr().err


def test_encoding_that_is_killed_goes_on_bit_for_bit(folder: Path):
    recipe = write_recipe(folder, **I2V)
    assert main(["data", "encode", str(recipe)]) == 0
    whole = encoded(folder)
    # Six clips, six first frames, and six captions with the empty one.
    assert len(whole) == 6 + 6 + 7
    chance = random.Random(0)
    (folder / "encoded").rename(folder / "whole")
    for _ in range(4):
        process, wanted = started("data", "encode", recipe), len(encoded(folder)) + 2
        deadline = time.monotonic() + 300
        while len(encoded(folder)) < wanted and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.001)
        time.sleep(chance.random() * 0.05)
        process.send_signal(signal.SIGKILL)
        process.wait(60)
        assert encoded(folder).items() <= whole.items()
    assert main(["data", "encode", str(recipe)]) == 0
    assert encoded(folder) == whole
    # A damaged file is made anew, and nothing else is touched.
    damaged = next((folder / "encoded" / "clips").glob("*.safetensors"))
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    times = {f: f.stat().st_mtime_ns for f in (folder / "encoded").glob("*/*.safetensors")}
    assert main(["data", "encode", str(recipe)]) == 0
    assert encoded(folder) == whole
    assert [f for f, t in times.items() if f.stat().st_mtime_ns != t] == [damaged]
    # In shares.
    (folder / "encoded").rename(folder / "again")
    for share in ("0/2", "1/2"):
        before = set(encoded(folder))
        assert main(["data", "encode", str(recipe), "--shard", share]) == 0
        assert before < set(encoded(folder))
    assert encoded(folder) == whole


def test_a_terminated_encoding_leaves_no_half_file(folder: Path):
    recipe = write_recipe(folder)
    process = started("data", "encode", recipe)
    while not encoded(folder):
        assert process.poll() is None
        time.sleep(0.001)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) in (143, 0)
    assert not [f for f in os.listdir(folder / "encoded" / "clips") if f.startswith(".")]


def test_clips_are_encoded_as_generation_encodes_them(folder: Path):
    training = read_recipe(write_recipe(folder, **I2V)).tables
    sources = find_sources(training)
    videos = Videos(training.data, sources, 0, 0.0, lambda what, done, total: None)
    (tags,) = videos.tags().values()
    assert tags["and a line that moves."] == 1
    # Of "The same, held upright." alone.
    assert tags["the same"] == 1
    assert len(tags) == len(CAPTIONS) + 2
    vae = WanAutoencoder(stored_vae(sources.vae).load(jnp.float32), "off")
    for number, clip in enumerate(videos.plan.clips[:3]):
        size = (clip.bucket.height, clip.bucket.width)
        frames = list(frames_of(clip.file.path, 16, None))[:5]
        images = [prepare_image(f, *size, Image.Resampling.BICUBIC) for f in frames]
        latents = vae.encode(np.stack([image.pixels for image in images], axis=1))
        batch = videos._batch([clip], [clip.file.captions[0]])
        # Measured: no difference; the next clip is 0.5 or more away.
        np.testing.assert_allclose(batch.latents[0], latents, atol=1e-5)
        other = videos._batch([videos.plan.clips[number - 1]], [""]).latents[0]
        assert other.shape != latents.shape or np.abs(other - latents).max() > 0.05
        known = condition_latents(vae, images[0], None, 5)
        np.testing.assert_allclose(batch.y[0], known, atol=1e-5)
        side = stored_image_encoder(sources.image).config.image_size
        pixels = squash(images[0], side)
        features = FirstFrameEncoder(sources.image)._apply(pixels[None])[0]
        # Measured: 5.7e-6, of features up to 11.
        np.testing.assert_allclose(batch.clip_fea[0], features, atol=1e-4)


def test_large_frames_are_encoded_in_tiles(folder: Path, monkeypatch: pytest.MonkeyPatch):
    for file in (folder / "films").iterdir():
        file.unlink()
    write_film(folder / "films" / "large.mp4", colours(5, 272, 288))
    (folder / "films" / "large.txt").write_text("Four quarters of colour.")
    recipe = write_recipe(folder, data__resolution="[288, 272]")
    training = read_recipe(recipe).tables
    sources = find_sources(training)
    vae = stored_vae(sources.vae).load(jnp.float32)

    def latents() -> tuple[np.ndarray, str]:
        videos = Videos(training.data, sources, 0, 0.0, lambda what, done, total: None)
        return np.asarray(videos.batch(0).latents[0]), videos.fingerprint()["data.sizes in tiles"]

    whole, tiled_sizes = latents()
    assert tiled_sizes == "none"
    # Half of this would be taken by a frame that is a little smaller.
    needed = vae_work(vae.config, "encode", 272, 288)
    monkeypatch.setattr(encode, "total_memory", lambda: int(1.9 * needed))
    tiled, tiled_sizes = latents()
    assert tiled_sizes == "288 x 272"
    frames = list(frames_of(folder / "films" / "large.mp4", 16, None))[:5]
    pixels = [prepare_image(f, 272, 288, Image.Resampling.BICUBIC).pixels for f in frames]
    generated = WanAutoencoder(vae, "on").encode(np.stack(pixels, axis=1))
    np.testing.assert_array_equal(tiled, generated)
    # Each stays under its own name: nothing is encoded again when the machine is the other.
    assert np.abs(tiled - whole).max() > 1e-4
    assert len(list((folder / "encoded" / "clips").glob("*.safetensors"))) == 2


def test_a_sheet_and_images_train_too(folder: Path):
    recipe = write_recipe(folder, run__steps="2")
    (folder / "images").mkdir()
    for number in range(2):
        Image.new("RGB", (40, 40), ("red", "blue")[number]).save(folder / f"images/{number}.png")
        (folder / f"images/{number}.txt").write_text("A plain picture.")
    recipe.write_text(
        recipe.read_text().partition("[[data.datasets]]")[0]
        + f'[[data.datasets]]\nimage_directory = "{folder}/images"\n'
    )
    assert main(["data", "check", str(recipe), "--sheet", str(folder / "sheet.png")]) == 0
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.size[0] == 2 * 132
    assert main(["train", str(recipe)]) == 0
    assert len([line for line in lines(folder) if "loss" in line]) == 2


def test_the_commands_of_the_page_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("SKYREELS_JAX_CACHE", str(tmp_path / "caches"))
    monkeypatch.chdir(tmp_path)
    shutil.copytree(documents.ROOT / "examples", "examples")
    page = (documents.ROOT / "docs" / "training.md").read_text()
    section = page.partition("## Your own videos\n")[2].partition("\n## ")[0]
    commands = [words[1:] for words in documents.commands(documents.Page(section))]
    assert [words[:2] for words in commands] == [
        ["data", "shapes"],
        ["data", "check"],
        ["data", "encode"],
        ["train", "examples/videos.toml"],
    ]
    for words in commands:
        shorter = ["--steps", "2"] if words[0] == "train" else []
        assert main([*words, *shorter]) == 0
    assert (tmp_path / "out" / "videos" / "model" / "model_index.json").is_file()
