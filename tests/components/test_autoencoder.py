"""When the VAE cuts frames into tiles, and that it is the same VAE where it does not."""

import logging
from functools import partial

import jax.numpy as jnp
import numpy as np
import pytest
from tests.fabricate import Checkpoints

from skyreels_jax.checkpoints import Checkpoint
from skyreels_jax.components import encoders
from skyreels_jax.components.encoders import RESERVE, WanAutoencoder, tiling_for
from skyreels_jax.memory import vae_work
from skyreels_jax.models import vae
from skyreels_jax.models.vae_runs import WHOLE
from skyreels_jax.models.vae_tiling import Tiles
from skyreels_jax.weights.components.vae import stored_vae

# Two tiles of 256 pixels, side by side.
LATENTS = np.random.default_rng(0).standard_normal((16, 1, 4, 40)).astype(np.float32)
PIXELS = np.random.default_rng(1).uniform(-1, 1, (3, 1, 32, 320)).astype(np.float32)


@pytest.fixture(scope="module")
def model(checkpoints: Checkpoints):
    return stored_vae(Checkpoint.open(checkpoints("t2v", "diffusers")).layout).load(jnp.float32)


def has(monkeypatch: pytest.MonkeyPatch, free: int | None) -> None:
    monkeypatch.setattr(encoders, "available_memory", lambda: free)


def decoded(vae_jax: WanAutoencoder) -> np.ndarray:
    return np.concatenate(list(vae_jax.decode_pieces([LATENTS])), axis=1)


def test_tiles_where_memory_would_not_do():
    needed = 1000
    least = needed / (1 - RESERVE)
    assert tiling_for("auto", needed, int(least) + 1) is WHOLE
    assert tiling_for("auto", needed, int(least) - 1) == Tiles()
    assert tiling_for("auto", needed, None) is WHOLE
    assert tiling_for("on", needed, 10**9) == Tiles()
    assert tiling_for("off", needed, 1) is WHOLE


def test_where_it_fits_decoding_and_encoding_are_whole_to_the_bit(model, monkeypatch, caplog):
    has(monkeypatch, vae_work(model.config, "decode", 32, 320) * 2)
    vae_jax = WanAutoencoder(model)
    np.testing.assert_array_equal(decoded(vae_jax), vae.decode_to_pixels(model, LATENTS[None])[0])
    np.testing.assert_array_equal(vae_jax.encode(PIXELS), vae.encode_pixels(model, PIXELS[None])[0])
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("direction", "free"), [("decode", None), ("encode", None), ("decode", 10**12)]
)
def test_too_little_memory_turns_tiles_on_and_says_so(
    model, monkeypatch, caplog, direction: str, free: int | None
):
    """With plenty (the last case) nothing is cut, nor said."""
    enough = free is not None
    has(monkeypatch, free or vae_work(model.config, direction, 32, 320))
    vae_jax, given = WanAutoencoder(model), {"decode": LATENTS, "encode": PIXELS}[direction]
    work = partial(
        {"decode": vae.decode_to_pixels, "encode": vae.encode_pixels}[direction], model, given[None]
    )
    with caplog.at_level(logging.WARNING):
        ours = decoded(vae_jax) if direction == "decode" else vae_jax.encode(PIXELS)
    whole, tiled = work()[0], work(tiling=Tiles())[0]
    np.testing.assert_array_equal(ours, whole if enough else tiled)
    assert (whole != tiled).any()
    said = f"the VAE {direction}s in tiles: a frame of 32 x 320 takes"
    assert (said in caplog.text) is not enough


def test_off_stays_off_and_on_is_not_a_warning(model, monkeypatch, caplog):
    has(monkeypatch, 1)
    np.testing.assert_array_equal(
        decoded(WanAutoencoder(model, "off")), vae.decode_to_pixels(model, LATENTS[None])[0]
    )
    tiled = decoded(WanAutoencoder(model, "on"))
    np.testing.assert_array_equal(
        tiled, vae.decode_to_pixels(model, LATENTS[None], tiling=Tiles())[0]
    )
    assert caplog.text == ""
