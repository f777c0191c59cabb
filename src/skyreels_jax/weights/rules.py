"""What one line of a weight table says.

A table is a tuple of :class:`Rule`. Each rule names one parameter of the JAX model and where it is
found in the two published formats: ``original`` (Skywork's and Wan's own files) and ``diffusers``.
``{i}`` in a source name is the layer index; when the target has none, the layers are stacked along
a new leading axis. Names are matched whole, never by prefix. The engine that reads the tables, and
proves them complete, is :mod:`skyreels_jax.weights.engine`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np

Format = Literal["original", "diffusers"]
FORMATS: Final[tuple[Format, ...]] = ("original", "diffusers")


@dataclass(frozen=True)
class Transform:
    """A named, invertible rearrangement of one tensor; both directions return views.

    ``apply`` goes from the source's layout to ours, ``invert`` back. Values are never changed, so a
    round trip is bit-exact.
    """

    name: str
    apply: Callable[[np.ndarray], np.ndarray]
    invert: Callable[[np.ndarray], np.ndarray]


COPY: Final = Transform("copy", lambda x: x, lambda x: x)
# PyTorch's linear weight is [out, in]; ours [in, out].
LINEAR: Final = Transform("linear", lambda x: x.T, lambda x: x.T)
# PyTorch's convolution weight is [out, in, *kernel]; ours [*kernel, in, out].
CONV: Final = Transform(
    "conv",
    lambda x: np.moveaxis(x, (0, 1), (-1, -2)),
    lambda x: np.moveaxis(x, (-1, -2), (0, 1)),
)


def trailing_ones(count: int) -> Transform:
    """``[c, 1, ..., 1]`` with ``count`` ones (a broadcastable scale) to ``[c]``."""
    return Transform(
        f"trailing_ones_{count}",
        lambda x: x.reshape(x.shape[: x.ndim - count]),
        lambda x: x.reshape(x.shape + (1,) * count),
    )


def leading_ones(count: int) -> Transform:
    """``[1, ..., 1, *rest]`` with ``count`` ones to ``[*rest]``."""
    return Transform(
        f"leading_ones_{count}",
        lambda x: x.reshape(x.shape[count:]),
        lambda x: x.reshape((1,) * count + x.shape),
    )


@dataclass(frozen=True)
class Source:
    """One tensor of a format: its name, its shape there, and which slice of it is meant.

    ``slice = (k, n)`` selects the k-th of n equal slices along the tensor's first axis (a fused
    q|k|v); it is cut before ``transform`` is applied.
    """

    name: str
    transform: Transform = COPY
    slice: tuple[int, int] = (0, 1)


@dataclass(frozen=True)
class Rule:
    """One parameter: ``target`` is its dotted path in the NNX state; a format may lack it."""

    target: str
    original: Source | None
    diffusers: Source | None

    def source(self, format: Format) -> Source | None:
        """The tensor that holds this parameter in ``format``."""
        return self.original if format == "original" else self.diffusers


def rule(target: str, original: str, diffusers: str, transform: Transform = COPY) -> Rule:
    """The common case: the same transform in both formats."""
    return Rule(target, Source(original, transform), Source(diffusers, transform))
