"""The causal convolution against PyTorch's, in one piece and in chunks."""

import jax.numpy as jnp
import numpy as np
import pytest
import torch

from skyreels_jax.ops.linear import causal_conv
from skyreels_jax.ops.target import Device, compiled_for

TOL = 2e-6  # measured 1.9e-7 to 5.0e-7
WRONG = 1e-2  # the least that a mistake changes; measured 0.3 and more

# As computed here, and as computed for TPUs.
each_target = pytest.mark.parametrize("target", ["cpu", "tpu"])
KERNELS = {"space": (3, 3, 3), "time": (3, 1, 1), "point": (1, 1, 1), "longer": (5, 3, 3)}


def case(size: tuple[int, ...], frames: int = 7) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, frames, 5, 6, 4))
    kernel = rng.normal(size=(*size, 4, 3)) / np.sqrt(4 * np.prod(size))
    return tuple(a.astype(np.float32) for a in (x, kernel, rng.normal(size=3)))


def oracle(x, kernel, bias, *, stride: int = 1, past: int | None = None) -> np.ndarray:
    """PyTorch's 3-D convolution, with ``past`` zero frames in front and none behind."""
    past = kernel.shape[0] - stride if past is None else past
    side = kernel.shape[1] // 2
    x = torch.nn.functional.pad(
        torch.from_numpy(x).permute(0, 4, 1, 2, 3), (side, side, side, side, past, 0)
    )
    weights = torch.from_numpy(kernel).permute(4, 3, 0, 1, 2)
    out = torch.nn.functional.conv3d(x, weights, torch.from_numpy(bias), (stride, 1, 1))
    return out.permute(0, 2, 3, 4, 1).numpy()


def run(x, kernel, bias, chunks, *, stride: int = 1, carry: bool = True):
    """In chunks of these lengths; without ``carry`` each begins anew."""
    outs, history, done = [], None, 0
    for length in chunks:
        out, history = causal_conv(
            jnp.asarray(x[:, done : done + length]),
            jnp.asarray(kernel),
            jnp.asarray(bias),
            history if carry else None,
            stride=stride,
            dtype=jnp.float32,
        )
        outs.append(np.asarray(out))
        done += length
    return np.concatenate(outs, axis=1)


def error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("chunks", [(7,), (1, 4, 2), (2, 2, 3), (1,) * 7], ids=str)
@each_target
def test_equals_pytorch_however_it_is_cut(kernel: str, chunks: tuple[int, ...], target: str):
    arguments = case(KERNELS[kernel])
    with compiled_for(Device(target)):
        assert error(run(*arguments, chunks), oracle(*arguments)) <= TOL


@pytest.mark.parametrize("chunks", [(8,), (2, 4, 2)], ids=str)
@each_target
def test_equals_pytorch_at_every_second_frame(chunks: tuple[int, ...], target: str):
    arguments = case(KERNELS["time"], frames=8)
    with compiled_for(Device(target)):
        ours = run(*arguments, chunks, stride=2)
    assert error(ours, oracle(*arguments, stride=2)) <= TOL


@each_target
def test_mistakes_are_caught(target: str):
    x, kernel, bias = case(KERNELS["space"])
    with compiled_for(Device(target)):
        ours = run(x, kernel, bias, (1, 4, 2))
        assert error(run(x, kernel, bias, (1, 4, 2), carry=False), ours) > WRONG
    assert error(ours, oracle(x, kernel[::-1].copy(), bias)) > WRONG
    assert error(ours, oracle(x, kernel.swapaxes(1, 2), bias)) > WRONG
    assert error(ours, oracle(x, kernel, bias * 0)) > WRONG
    # A frame late: as if padded on the wrong side.
    assert error(ours[:, 1:], oracle(x, kernel, bias)[:, :-1]) > WRONG


def test_a_frame_does_not_depend_on_later_ones():
    x, kernel, bias = case(KERNELS["space"])
    later = x.copy()
    later[:, 4:] = 100
    before, after = (run(frames, kernel, bias, (7,)) for frames in (x, later))
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert error(before[:, 4:], after[:, 4:]) > WRONG


def test_bfloat16_rounds_operands_and_result_only():
    rounded = [np.asarray(jnp.asarray(a, jnp.bfloat16), np.float32) for a in case(KERNELS["space"])]
    half = [jnp.asarray(a, jnp.bfloat16) for a in rounded]
    out, history = causal_conv(*half, dtype=jnp.bfloat16)
    assert (out.dtype, history.dtype) == (jnp.bfloat16, jnp.bfloat16)
    expected = np.asarray(jnp.asarray(oracle(*rounded), jnp.bfloat16), np.float32)
    # Of two float32 sums in another order a few round to the next bfloat16, 2**-8 away.
    different = np.asarray(out, np.float32) != expected
    assert different.mean() <= 0.01  # measured 0 to 0.002
    assert error(np.asarray(out, np.float32), expected) <= 2**-8
