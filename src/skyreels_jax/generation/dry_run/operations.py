"""Floating-point operations of a traced function, counted where the model's formulas still stand.

A compiler's own count is of what it made of them: it takes the body of a loop once, and knows
nothing of the kernels that it calls.
"""

import math
from collections.abc import Iterator
from typing import Any

from jax.extend.core import Jaxpr, JaxprEqn


def operations(jaxpr: Jaxpr) -> int:
    """Multiplications and additions of matrix products and convolutions; the rest is not counted.

    Loops count with their length, one of several branches as the dearest of them. What a kernel
    outside XLA computes is not seen, nor how often a loop of open end turns.
    """
    return sum(map(_of_equation, jaxpr.eqns))


def _of_equation(equation: JaxprEqn) -> int:
    name, parameters = equation.primitive.name, equation.params
    if name in ("dot_general", "conv_general_dilated"):
        out = math.prod(_shape(equation.outvars[0]))
        return 2 * out * _terms(name, parameters, *map(_shape, equation.invars[:2]))
    inner = [operations(body) for body in bodies(parameters)]
    if name == "cond":
        return max(inner)
    return parameters.get("length", 1) * sum(inner) if name == "scan" else sum(inner)


def _shape(variable: Any) -> tuple[int, ...]:
    return variable.aval.shape


def _terms(name: str, parameters: Any, left: tuple[int, ...], right: tuple[int, ...]) -> int:
    """How many products are summed into one element of the result."""
    if name == "dot_general":
        (contracted, _), _ = parameters["dimension_numbers"]
        return math.prod(left[axis] for axis in contracted)
    # Of a kernel, the first number of its specification is the axis of output channels.
    return math.prod(right) // right[parameters["dimension_numbers"].rhs_spec[0]]


def bodies(parameters: Any) -> Iterator[Jaxpr]:
    """The functions that an equation calls."""
    for value in parameters.values():
        for entry in value if isinstance(value, tuple | list) else (value,):
            body = getattr(entry, "jaxpr", entry)
            if isinstance(body, Jaxpr):
                yield body
