"""What people write for a number or a text, as one plain value; a ValueError where it is none."""

import operator
import re
import sys
import unicodedata
from fractions import Fraction
from typing import Any, Final

# Of floats; a fraction of any other would have that many digits.
_MAX_EXPONENT: Final = 400


def whole_number(value: object) -> int:
    """An integer, exactly: floats and fractions only where they are whole."""
    refuse_truth(value)
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        pass
    try:
        number = exact_fraction(value)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        number = None
    if number is None or number.denominator != 1:
        raise ValueError("must be a whole number")
    return int(number)


def exact_fraction(value: Any) -> Fraction:
    """A number exactly; scalars of other libraries by way of ``float``."""
    if isinstance(value, str):
        _, _, exponent = value.lower().partition("e")
        if exponent and abs(int(exponent)) > _MAX_EXPONENT:
            raise ValueError("is out of range")
        return Fraction(value.strip())
    ratio = getattr(value, "as_integer_ratio", float(value).as_integer_ratio)
    return Fraction(*ratio())


class NoUtf8Error(ValueError):
    """What Python makes of bytes of the command line that are no text in UTF-8."""


def text_of(value: object) -> str:
    """Text as a plain ``str``; of a kind of error of its own where UTF-8 cannot encode it."""
    if not isinstance(value, str):
        raise ValueError("must be text")
    if odd := re.search("[\ud800-\udfff]", value):
        raise NoUtf8Error(f"must be text in UTF-8; {odd[0]!r} is none")
    return str(value)


def refuse_truth(value: object) -> None:
    """True is no 1: whoever gives it means something else."""
    if isinstance(value, bool) or is_of(value, "numpy", "bool_"):
        raise ValueError("must be a number, not True or False")


def is_of(value: object, module: str, name: str) -> bool:
    """Whether it is of a class of a module, which it cannot be if nobody has imported that."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)


def is_blank(text: str) -> bool:
    """Whether cleaning leaves nothing: spaces, controls and signs without width, as entities too.

    Text is cleaned this way before it is encoded (:func:`skyreels_jax.prompts.clean`).
    """
    import html

    text = html.unescape(html.unescape(text))
    return all(unicodedata.category(sign)[0] in "ZC" for sign in text)
