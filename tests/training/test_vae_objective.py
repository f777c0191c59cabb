"""The VAE's training pass is the VAE of inference; its terms are what their names say."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from skyreels_jax.mini.vae_task import holding_still
from skyreels_jax.models.vae import WanVae, decode_to_pixels, encode_pixels
from skyreels_jax.models.vae_layers import VaeConfig
from skyreels_jax.training.task import Template
from skyreels_jax.training.vae_objective import (
    Moments,
    VaeLoss,
    divergence,
    frames,
    moments,
    vae_loss,
)

CONFIG = VaeConfig(
    # A norm over fewer channels amplifies rounding: with 4, errors are ten times as large.
    base_dim=8,
    z_dim=4,
    dim_mult=(1, 1, 2, 2),
    num_res_blocks=1,
    latents_mean=(0.0,) * 4,
    latents_std=(1.0,) * 4,
)


@pytest.fixture(scope="module")
def vae() -> WanVae:
    return nnx.jit(lambda: WanVae(CONFIG, rngs=nnx.Rngs(0)))()


def clips(seed: int, length: int) -> jax.Array:
    return jax.random.uniform(jax.random.key(seed), (2, 3, length, 16, 16)) * 2 - 1


@pytest.mark.slow
def test_all_frames_at_once_are_chunk_by_chunk(vae):
    pixels = clips(0, 13)
    found = moments(vae, pixels).mean
    chunked = encode_pixels(vae, pixels)
    # Measured: 5e-7 of values around 1.
    np.testing.assert_allclose(jnp.moveaxis(found, -1, 1), chunked, atol=5e-6)
    given = np.clip(frames(vae, found), -1, 1)
    # Measured: 8e-6, and 1.4e-6 in the mean square.
    np.testing.assert_allclose(given, decode_to_pixels(vae, chunked), atol=5e-5)
    other = moments(vae, pixels.at[:, :, 4].add(0.01)).mean
    assert np.max(np.abs(other - found)) > 1e-4


@pytest.mark.slow
def test_a_fresh_vae_holds_still(vae):
    template, params = Template.of(vae)
    still = template.model(holding_still(params))
    pixels = clips(1, 9)
    out = frames(still, moments(still, pixels).mean)
    single = [
        frames(still, moments(still, pixels[:, :, i : i + 1]).mean)[:, :, 0] for i in (0, 4, 8)
    ]
    for t, expected in enumerate([single[0]] + [single[1]] * 4 + [single[2]] * 4):
        # Measured: 3e-6.
        np.testing.assert_allclose(out[:, :, t], expected, atol=5e-5)
    moving = frames(vae, moments(vae, pixels).mean)
    assert np.max(np.abs(moving[:, :, 1] - moving[:, :, 2])) > 1e-3


def test_the_divergence_is_that_of_normal_distributions():
    mean, deviation = 0.7, 1.6
    found = Moments(
        jnp.full((1, 1, 1, 1, 1), mean), jnp.full((1, 1, 1, 1, 1), 2 * np.log(deviation))
    )
    x = np.linspace(-12, 12, 200_001)
    density = np.exp(-0.5 * ((x - mean) / deviation) ** 2) / (deviation * np.sqrt(2 * np.pi))
    log_ratio = -0.5 * ((x - mean) / deviation) ** 2 - np.log(deviation) + 0.5 * x**2
    expected = np.sum(density * log_ratio) * (x[1] - x[0])
    # Measured: 3e-8 apart, of 0.55.
    assert float(divergence(found)[0, 0, 0, 0, 0]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.slow
def test_the_loss_is_the_weighted_sum(vae):
    pixels = clips(2, 5)
    noise = jnp.zeros((2, 2, 2, 2, 4))
    weights = VaeLoss(absolute=2.0, squared=3.0, kl=0.5, temporal=0.25)
    total, terms = vae_loss(vae, pixels, noise, weights)
    found = moments(vae, pixels)
    error = np.asarray(frames(vae, found.mean) - pixels, np.float64)
    expected = {
        "absolute": np.abs(error).mean(),
        "squared": (error**2).mean(),
        "kl": float(np.mean(divergence(found))),
        "temporal": np.abs(np.diff(error, axis=2)).sum() / error.size,
    }
    for name, value in expected.items():
        assert float(terms[name]) == pytest.approx(value, rel=1e-5)
    summed = sum(getattr(weights, name) * value for name, value in expected.items())
    assert float(total) == pytest.approx(summed, rel=1e-5)
    noisy, _ = vae_loss(vae, pixels, noise + 1, weights)
    assert abs(float(noisy) - summed) > 1e-3


@pytest.mark.parametrize("wrong", [{"kl": -1.0}, {"absolute": 0.0}])
def test_illegal_weights_are_refused(wrong):
    with pytest.raises(ValueError, match="weight|compares"):
        VaeLoss(**wrong)
