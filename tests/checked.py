"""Annotations as run-time checks, each made when a function is first called, and once.

To make one takes beartype some thousandths of a second: as modules are imported that is a dozen
seconds of each worker, most of it for functions that it never calls; and a function inside another
would have its own made anew each time that the outer one runs.

jaxtyping binds arguments and keeps sizes at each call, some hundredths of a millisecond: it does so
for functions that have arrays. Others are checked by beartype alone, and not at all where they are
inside another function: static checks see them.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from dataclasses import is_dataclass
from types import CodeType
from typing import Any, Final, Literal, get_args, get_origin

import jaxtyping
from beartype import beartype

# What is to be checked of each function of the package: itself, or where it has arrays what
# jaxtyping asks for, functions of its signature without body, one of its arguments alone and one
# with its result. One inside another is here once.
asked: Final[dict[tuple[str, str, CodeType], Callable]] = {}
_made: Final[dict[tuple, Callable]] = {}
_jaxtyped: Final = jaxtyping.jaxtyped


def jaxtyped(*, typechecker: Callable) -> Callable:
    """What jaxtyping's import hook decorates with: its own of that name, where there are arrays."""

    def decorate(decorated: Any) -> Any:
        if _has_arrays(_hints(decorated)):
            return _jaxtyped(decorated, typechecker=typechecker)
        if not inspect.isclass(decorated):
            return _without_arrays(decorated)
        if is_dataclass(decorated) and "__init__" in vars(decorated):
            decorated.__init__ = _without_arrays(decorated.__init__)
        return decorated

    return decorate


def _hints(decorated: Any) -> Iterable[object]:
    """The annotations of a function, or of the fields of a dataclass."""
    of = decorated
    if inspect.isclass(decorated):
        of = decorated.__init__ if is_dataclass(decorated) else None
    return getattr(of, "__annotations__", {}).values()


def _has_arrays(hints: Iterable[object]) -> bool:
    """Whether one of the hints is jaxtyping's, or holds one; a string may be one."""
    return any(
        isinstance(hint, str)
        or getattr(hint, "__module__", "").startswith("jaxtyping")
        or _has_arrays(hint if isinstance(hint, list) else get_args(hint))
        for hint in hints
        if get_origin(hint) is not Literal  # Its strings are values.
    )


def _without_arrays(function: Callable) -> Callable:
    asked[function.__module__, function.__qualname__, function.__code__] = function
    if "<locals>" in function.__qualname__:
        return function
    return functools.wraps(function)(_made_when_called(lambda: beartype(function)))


def on_call(signature: Callable) -> Callable:
    """``signature``, whose arguments and result are checked as ``beartype(signature)`` does."""
    asked[signature.__module__, signature.__qualname__, signature.__code__] = signature
    return _made_when_called(lambda: _check_of(signature))


def _made_when_called(make: Callable[[], Callable]) -> Callable:
    """What ``make`` gives, made at the first call and kept."""
    made = None

    def check(*args: Any, **kwargs: Any) -> Any:
        nonlocal made
        if made is None:
            made = make()
        return made(*args, **kwargs)

    return check


def _check_of(signature: Callable) -> Callable:
    """The check of a signature, which is that of an equal one of the same name."""
    optional = (len(signature.__defaults__ or ()), *(signature.__kwdefaults__ or ()))
    names = (signature.__module__, signature.__qualname__, signature.__code__, optional)
    key = (*names, *signature.__annotations__.items())
    try:
        if key not in _made:
            _made[key] = beartype(signature)
    except TypeError:  # An annotation that has no hash.
        return beartype(signature)
    return _made[key]
