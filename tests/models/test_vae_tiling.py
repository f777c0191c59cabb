"""Tiles against diffusers' tiling, and how little they change."""

import numpy as np
import pytest
import torch
from encoder_oracles import relative, tensors_of
from vae_oracle import TINY, latents, oracle, ours, pixels, psnr

from skyreels_jax.errors import RequestError
from skyreels_jax.models.vae import decode_to_pixels, encode_pixels
from skyreels_jax.models.vae_runs import WHOLE
from skyreels_jax.models.vae_tiling import Tiles

TOL = 1e-6  # measured 1.2e-7
WRONG = 1e-2  # the least that a mistake changes; measured 0.1 and more
SMALL = Tiles(size=64, stride=48)


def of_tile(tile: np.ndarray) -> np.ndarray:
    """Stands for the decoder: eight times as large, and dependent on the whole tile."""
    large = tile[:, :3].repeat(8, axis=-1).repeat(8, axis=-2)
    return large - large.mean(axis=(-1, -2), keepdims=True)


def tiled_by_diffusers(z: np.ndarray) -> np.ndarray:
    vae = oracle(TINY)
    vae.enable_tiling(64, 64, 48, 48)
    vae.post_quant_conv = torch.nn.Identity()
    vae.decoder.forward = lambda x, **_: torch.from_numpy(of_tile(x.numpy()))
    return vae.decode(torch.from_numpy(z)).sample.numpy()


def tiled(z: np.ndarray, tiles: Tiles = SMALL) -> np.ndarray:
    rows = [[of_tile(tile) for tile in row] for row in tiles.cut(z, unit=8)]
    return np.clip(tiles.join(rows, unit=1), -1, 1)


@pytest.mark.parametrize(("height", "width"), [(11, 5), (5, 17), (16, 10), (11, 22)])
def test_tiles_and_seams_equal_those_of_diffusers(height: int, width: int):
    z = 0.3 * latents(1, height, width)
    expected = tiled_by_diffusers(z)
    assert expected.shape == (1, 3, 1, 8 * height, 8 * width)
    assert relative(tiled(z), expected) <= TOL
    assert relative(tiled(z, Tiles(size=64, stride=64)), expected) > WRONG


def test_tiles_as_counted():
    """8 latents a tile, 6 from one to the next; what would be all overlap is no tile."""
    for length, sizes in {5: [5], 8: [8], 9: [8, 3], 14: [8, 8], 15: [8, 8, 3]}.items():
        (row,) = SMALL.cut(latents(1, 3, length), unit=8)
        assert [tile.shape[-1] for tile in row] == sizes


def test_what_every_tile_agrees_on_is_unchanged():
    z = latents(2, 13, 21)
    np.testing.assert_allclose(SMALL.join(SMALL.cut(z, unit=8), unit=8), z, atol=1e-6)
    assert WHOLE.join(WHOLE.cut(z, unit=8), unit=8) is z


@pytest.fixture(scope="module")
def smooth():
    """A VAE as trained ones are: each block changes its input a little, positions agree nearby."""
    tensors = tensors_of(oracle(TINY))
    for name, value in tensors.items():
        if ".conv2.weight" in name or ".proj.weight" in name:
            value *= 0.1
    return ours(TINY, tensors)


def soft(noise: np.ndarray) -> np.ndarray:
    """Without detail: a mean over three neighbours, twice, along both sides."""
    for axis in (-1, -1, -2, -2):
        noise = (np.roll(noise, 1, axis) + noise + np.roll(noise, -1, axis)) / 3
    return noise


def test_a_tiled_decode_is_close_to_the_whole(smooth):
    z = soft(latents(2, 5, 14))
    whole, in_tiles = decode_to_pixels(smooth, z), decode_to_pixels(smooth, z, tiling=SMALL)
    assert psnr(in_tiles, whole) >= 40  # measured 51; 64 with tiles of 256 pixels
    assert relative(in_tiles, whole) > 1e-4  # and it was in tiles


@pytest.mark.slow
def test_a_tiled_encode_is_close_to_the_whole(smooth):
    video = soft(soft(pixels(1, 40, 112)))
    whole, in_tiles = encode_pixels(smooth, video), encode_pixels(smooth, video, tiling=SMALL)
    ratio = np.var(whole) / np.mean((in_tiles - whole) ** 2)
    assert 100 <= ratio < 1e6  # measured 470: 27 dB, of the variance of the latents


@pytest.mark.parametrize(
    "sizes", [{"size": 60}, {"stride": 100}, {"size": 64, "stride": 24}, {"size": 64, "stride": 72}]
)
def test_sizes_that_do_not_tile_are_refused(sizes):
    with pytest.raises(RequestError, match="Tiles"):
        Tiles(**sizes)
