"""Annotations as run-time checks, each made when a function is first called, and once.

To make one takes beartype some thousandths of a second: as modules are imported that is a dozen
seconds of each worker, most of it for functions that it never calls; and a function inside another
would have its own made anew each time that the outer one runs.
"""

from collections.abc import Callable
from types import CodeType
from typing import Any, Final

from beartype import beartype

# What jaxtyping asks to be checked of each function of the package, its arguments alone and with
# its result: functions of its signature, without body. One inside another is here once.
asked: Final[dict[tuple[str, str, CodeType], Callable]] = {}
_made: Final[dict[tuple, Callable]] = {}


def on_call(signature: Callable) -> Callable:
    """``signature``, whose arguments and result are checked as ``beartype(signature)`` does."""
    asked[signature.__module__, signature.__qualname__, signature.__code__] = signature
    checked = None

    def check(*args: Any, **kwargs: Any) -> Any:
        nonlocal checked
        if checked is None:
            checked = _check_of(signature)
        return checked(*args, **kwargs)

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
