"""Run-time checks of annotations: made late, they are those of beartype and jaxtyping."""

import importlib
import pkgutil
from dataclasses import dataclass
from typing import Literal

import beartype
import jax.numpy as jnp
import pytest
from beartype.roar import BeartypeCallHintViolation, BeartypeException
from jaxtyping import Array, Float, TypeCheckError
from tests import checked

import skyreels_jax

decorate = checked.jaxtyped(typechecker=checked.on_call)


@decorate
def sums(x: Float[Array, "rows columns"], scale: int = 1) -> Float[Array, " rows"]:
    return scale * (x if scale == 3 else x.sum(1))


def test_arguments_and_results_are_checked_at_every_call():
    x = jnp.ones((2, 5))
    for _ in range(2):
        assert sums(x).shape == (2,)
        for wrong in ((x[0],), (x, 1.5), (x.astype(jnp.int32),), (x, 3)):
            with pytest.raises(TypeCheckError):
                sums(*wrong)


@decorate
def twice(number: int) -> int | str:
    return 2 * number if number else 0.5


@decorate
def chosen(one_of: Literal["a", "b"]) -> str:
    return one_of


@decorate
@dataclass(frozen=True)
class Pair:
    number: int
    x: Float[Array, " 2"] | None = None


@decorate
@dataclass(frozen=True)
class Plain:
    number: int


def test_what_has_no_arrays_is_checked_by_beartype():
    assert twice(2) == 4
    assert Plain(1) == Plain(number=1)
    assert Pair(1, jnp.ones(2)).number == 1
    for wrong, argument in ((twice, "a"), (twice, 0), (Plain, "a"), (chosen, "c")):
        with pytest.raises(BeartypeCallHintViolation):
            wrong(argument)
    for arguments in (("a",), (1, jnp.ones(3))):
        with pytest.raises(TypeCheckError):
            Pair(*arguments)


def test_arrays_are_found_wherever_a_hint_has_them():
    x = jnp.ones(3)

    def inner(x: "Float[Array, ' 2']", of: int = 0) -> None: ...

    def deep(x: dict[str, list[Float[Array, " 2"]]]) -> None: ...

    with pytest.raises(TypeCheckError):
        decorate(inner)(x)
    with pytest.raises(TypeCheckError):
        decorate(deep)({"a": [x]})


def test_a_function_inside_another_is_checked_by_its_own_annotations(monkeypatch):
    """Made once however often the outer one runs, unless an annotation or a default is another."""
    made = []
    monkeypatch.setattr(checked, "beartype", lambda f: made.append(1) or beartype.beartype(f))

    def outer(hint, *default):
        def inner(x: hint, n: int = 0) -> None: ...

        def without(x: hint, n: int) -> None: ...

        without.__qualname__ = inner.__qualname__
        return checked.on_call(inner if default else without)

    for _ in range(3):
        outer(int, 0)(1)
    assert len(made) == 1
    outer(str, 0)("a")
    outer(int)(1, 2)
    assert len(made) == 3
    for of, wrong in (((int, 0), "a"), ((str, 0), 1), ((int,), "a")):
        with pytest.raises(BeartypeCallHintViolation):
            outer(*of)(wrong, 2)


def test_the_package_is_checked():
    assert len(checked.asked) > 800


@pytest.mark.slow
def test_every_annotation_can_be_checked():
    """Those of functions and results, too, that no test comes to."""
    for module in pkgutil.walk_packages(skyreels_jax.__path__, "skyreels_jax."):
        if not module.name.endswith("__main__"):
            importlib.import_module(module.name)
    assert len(checked.asked) > 3000
    for signature in checked.asked.values():
        beartype.beartype(signature)


def test_an_annotation_that_cannot_be_checked_is_an_error():
    """Negative twin."""

    def wrong(x: 3) -> None: ...

    with pytest.raises(BeartypeException):
        beartype.beartype(wrong)
    with pytest.raises(BeartypeException):
        checked.on_call(wrong)(1)
