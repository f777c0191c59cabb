"""Noise: PyTorch's numbers, from PyTorch."""

import numpy as np
import pytest
import torch

from skyreels_jax.sampling.noise import draw_torch_noise

TOL = 1e-6  # of normal numbers up to 5; measured 2.4e-7


def by_torch(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).numpy() for shape in shapes]


@pytest.mark.parametrize("seed", [0, 7, 2**31, 2**32 - 1, 804822466654819, 2**64 - 1])
@pytest.mark.parametrize("shape", [(16,), (1, 16, 3, 4, 6), (1, 16, 25, 60, 104)])
def test_a_seed_means_what_it_means_to_pytorch(seed: int, shape: tuple[int, ...]):
    (theirs,) = by_torch(seed, shape)
    assert np.max(np.abs(np.asarray(draw_torch_noise(seed, shape)) - theirs)) < TOL


def test_a_second_draw_goes_on_where_the_first_ended():
    first, second = (1, 16, 3, 4, 6), (1, 16, 2, 4, 6)
    _, theirs = by_torch(3, first, second)
    ours = np.asarray(draw_torch_noise(3, second, skip=16 * 3 * 4 * 6))
    assert np.max(np.abs(ours - theirs)) < TOL
    assert np.max(np.abs(np.asarray(draw_torch_noise(3, second)) - theirs)) > 1


def test_bfloat16_draws_are_the_same_numbers_rounded():
    """The original draws the latents of diffusion forcing in bfloat16."""
    generator = torch.Generator().manual_seed(5)
    theirs = torch.randn((16, 9), generator=generator, dtype=torch.bfloat16)
    ours = torch.from_numpy(np.array(draw_torch_noise(5, (16, 9)))).bfloat16()
    assert torch.mean((ours != theirs).float()) < 0.01  # on a boundary now and then


@pytest.mark.parametrize(("shape", "skip"), [((17,), 0), ((16,), 8), ((3, 5), 0)])
def test_sizes_that_pytorch_fills_otherwise_are_refused(shape, skip):
    with pytest.raises(ValueError, match="multiples of 16"):
        draw_torch_noise(1, shape, skip)
