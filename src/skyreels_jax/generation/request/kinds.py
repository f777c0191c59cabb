"""What a setting takes: a kind turns what people give into one plain type, and knows the range.

``convert`` takes whatever means the same (a NumPy integer, ``"30"``, ``30.0`` for 30) and raises a
ValueError for the rest; ``violation`` says what is wrong with a converted value, or nothing. The
text of both goes on after the setting's name and value: "must be …". Nothing heavy is imported.
"""

import math
import operator
import os
import sys
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from skyreels_jax import geometry


class SettingKind(ABC):
    """How a setting's values are converted and checked.

    Attributes:
        takes: what it takes, to follow "must be".
        annotation: its type in the keywords of a call.
        metavar: what stands for a value in help.
    """

    takes: str
    annotation: str = "str"
    metavar: str = "TEXT"

    @abstractmethod
    def convert(self, value: object) -> Any:
        """The value as one plain type; a ValueError where it is none."""

    def violation(self, value: Any) -> str | None:
        """What is wrong with a converted value."""
        del value
        return None


@dataclass(frozen=True)
class WholeNumber(SettingKind):
    """An ``int`` from ``least`` to ``most``; ``usual`` is advice that stands behind the rule."""

    annotation = "int"
    metavar = "N"

    least: int
    most: int | None = None
    usual: str = ""

    @property
    def takes(self) -> str:
        """In words."""
        below = f"of at least {self.least}"
        return f"a whole number {below if self.most is None else f'{self.least} to {self.most}'}"

    def convert(self, value: object) -> int:
        """From whatever is a whole number, written or counted, but a truth value."""
        return _whole(value)

    def violation(self, value: int) -> str | None:
        """Outside of the range."""
        if value >= self.least and (self.most is None or value <= self.most):
            return None
        least = f"must be at least {self.least}"
        return _advised(
            least if self.most is None else f"must be between {self.least} and {self.most}",
            self.usual,
        )


@dataclass(frozen=True)
class Stepped(SettingKind):
    """An ``int`` ``k * step + offset``; ``takes`` says it in words."""

    annotation = "int"
    metavar = "N"

    step: int
    offset: int
    takes: str = ""

    def convert(self, value: object) -> int:
        """As :class:`WholeNumber`."""
        return _whole(value)

    def violation(self, value: int) -> str | None:
        """Between two legal numbers, which are named."""
        if value >= 1 and value % self.step == self.offset:
            return None
        near = " or ".join(map(str, geometry.nearest_multiples(value, self.step, self.offset)))
        return f"must be {self.takes}; nearest: {near}"


@dataclass(frozen=True)
class Real(SettingKind):
    """A ``float`` of at least ``least``, or above it where it is ``open``."""

    annotation = "float"
    metavar = "X"

    least: float
    open: bool = False
    usual: str = ""

    @property
    def takes(self) -> str:
        """In words."""
        return f"a number {'above' if self.open else 'of at least'} {self.least:g}"

    def convert(self, value: object) -> float:
        """From whatever is a number, written or counted, but a truth value."""
        _refuse_truth(value)
        try:
            if isinstance(value, str):
                return float(Fraction(value.strip())) if "/" in value else float(value)
            return float(value)  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            raise ValueError(f"must be {self.takes}") from error

    def violation(self, value: float) -> str | None:
        """Not finite, or too small."""
        legal = value > self.least if self.open else value >= self.least
        return (
            None
            if math.isfinite(value) and legal
            else _advised(f"must be {self.takes}", self.usual)
        )


@dataclass(frozen=True)
class FrameRate(SettingKind):
    """Frames a second, whole or a fraction (:func:`skyreels_jax.geometry.frame_rate`)."""

    annotation = "int | float | str | Fraction"
    takes = f"a number from 1 to {geometry.MAX_FPS}, for example 24, 29.97 or 30000/1001"
    metavar = "RATE"

    def convert(self, value: object) -> int | Fraction:
        """Rates of television from how people write them."""
        _refuse_truth(value)
        try:
            return geometry.nearest_rate(_fraction(value))
        except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            raise ValueError(f"must be {self.takes}") from error

    def violation(self, value: int | Fraction) -> str | None:
        """Out of range."""
        return None if 1 <= value <= geometry.MAX_FPS else f"must be {self.takes}"


@dataclass(frozen=True)
class Choice(SettingKind):
    """One of ``names``, which an editor completes."""

    names: tuple[str, ...]

    @property
    def annotation(self) -> str:
        """The names, so that an editor completes them."""
        return f"Literal[{', '.join(map(repr, self.names))}]".replace("'", '"')

    @property
    def metavar(self) -> str:
        """The names."""
        return "|".join(self.names)

    @property
    def takes(self) -> str:
        """In words."""
        return f"one of {', '.join(self.names)}"

    def convert(self, value: object) -> str:
        """Any text; whether it is a choice is checked with the rest."""
        if not isinstance(value, str):
            raise ValueError(f"must be {self.takes}")
        return value

    def violation(self, value: str) -> str | None:
        """None of the names."""
        if value in self.names:
            return None
        return f"does not exist; there are {', '.join(self.names)}"


@dataclass(frozen=True)
class Switch(SettingKind):
    """A ``bool``."""

    annotation = "bool"

    takes = "True or False"

    def convert(self, value: object) -> bool:
        """True and False, and NumPy's; neither numbers nor words."""
        if isinstance(value, bool) or _is(value, "numpy", "bool_"):
            return bool(value)
        raise ValueError(f"must be {self.takes}")


@dataclass(frozen=True)
class Text(SettingKind):
    """A ``str``; ``rule`` says which."""

    annotation = "str"

    rule: str = "text"

    @property
    def takes(self) -> str:
        """In words."""
        return self.rule

    def convert(self, value: object) -> str:
        """Text is text; bytes are not."""
        if not isinstance(value, str):
            raise ValueError(f"must be {self.takes}")
        return str(value)


@dataclass(frozen=True)
class File(SettingKind):
    """A :class:`~pathlib.Path`, from one or from its name."""

    annotation = "str | Path"
    metavar = "FILE"

    takes = "the path of a file"

    def convert(self, value: object) -> Path:
        """Names as ``str``; files that are opened already are refused."""
        if isinstance(value, str | os.PathLike):
            return Path(value)
        raise ValueError(f"must be {self.takes}")


@dataclass(frozen=True)
class Picture(SettingKind):
    """An image: the path of a file, a PIL image or an array ``uint8 [height, width, 3]``."""

    annotation = "ImageInput"
    metavar = "FILE"

    takes = "one path, one PIL image or one NumPy array uint8 [height, width, 3]"

    def convert(self, value: object) -> Any:
        """As it is: reading it belongs to :mod:`skyreels_jax.media`."""
        if isinstance(value, os.PathLike):
            return Path(value)
        if isinstance(value, str) or _is(value, "numpy", "ndarray"):
            return value
        if _is(value, "PIL.Image", "Image"):
            return value
        raise ValueError(f"must be {self.takes}")


@dataclass(frozen=True)
class Prompts(SettingKind):
    """A prompt, several in order, or several by the pixel frame from which on each holds."""

    annotation = "str | Sequence[str] | Mapping[int, str]"

    takes = "text, a list of texts or a mapping from frames to texts"

    def convert(self, value: object) -> str | tuple[str, ...] | dict[int, str]:
        """Text, a tuple of texts, or a dictionary with whole numbers for keys."""
        try:
            if isinstance(value, str):
                return str(value)
            if isinstance(value, Mapping):
                return {_whole(frame): _text(prompt) for frame, prompt in value.items()}
            if isinstance(value, Sequence):
                return tuple(map(_text, value))
        except ValueError:
            pass
        raise ValueError(f"must be {self.takes}")

    def violation(self, value: str | Sequence[str] | Mapping[int, str]) -> str | None:
        """Empty, or nothing but what the text encoder does not see."""
        texts = [value] if isinstance(value, str) else value
        texts = list(texts.values() if isinstance(texts, Mapping) else texts)
        if texts and not any(map(_is_blank, texts)):
            return None
        return "is empty; say what the video should show"


def _whole(value: object) -> int:
    """An integer, exactly: floats and fractions only where they are whole."""
    _refuse_truth(value)
    try:
        return operator.index(value)  # pyright: ignore[reportArgumentType]
    except TypeError:
        pass
    try:
        number = _fraction(value)
    except (TypeError, ValueError, OverflowError, ZeroDivisionError):
        number = None
    if number is None or number.denominator != 1:
        raise ValueError("must be a whole number")
    return int(number)


def _fraction(value: Any) -> Fraction:
    """A number exactly; scalars of other libraries by way of ``float``."""
    if isinstance(value, str):
        return Fraction(value.strip())
    ratio = getattr(value, "as_integer_ratio", float(value).as_integer_ratio)
    return Fraction(*ratio())


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError("must be text")
    return str(value)


def _refuse_truth(value: object) -> None:
    """True is no 1: whoever gives it means something else."""
    if isinstance(value, bool) or _is(value, "numpy", "bool_"):
        raise ValueError("must be a number, not True or False")


def _is(value: object, module: str, name: str) -> bool:
    """Whether it is of a class of a module, which it cannot be if nobody has imported that."""
    kind = getattr(sys.modules.get(module), name, None)
    return kind is not None and isinstance(value, kind)


def _is_blank(text: str) -> bool:
    """Whether cleaning leaves nothing: spaces, controls and signs without width, as entities too.

    Text is cleaned this way before it is encoded (:func:`skyreels_jax.prompts.clean`).
    """
    import html

    text = html.unescape(html.unescape(text))
    return all(unicodedata.category(sign)[0] in "ZC" for sign in text)


def _advised(rule: str, usual: str) -> str:
    return f"{rule}; {usual}" if usual else rule
