"""What a setting takes: a kind turns what people give into one plain type, and knows the range.

``convert`` takes whatever means the same (a NumPy integer, ``"30"``, ``30.0`` for 30) and raises a
ValueError for the rest; ``violation`` says what is wrong with a converted value, or nothing. The
text of both goes on after the setting's name and value: "must be …". Nothing heavy is imported.
"""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from skyreels_jax import geometry
from skyreels_jax.generation.request.conversion import (
    NoUtf8Error,
    exact_fraction,
    is_blank,
    is_of,
    refuse_truth,
    text_of,
    whole_number,
)


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

    def unusual(self, value: Any) -> str | None:
        """What is odd about a legal value."""
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
        return whole_number(value)

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
    """An ``int`` ``k * step + offset`` up to ``most``; ``rule`` says it in words."""

    annotation = "int"
    metavar = "N"

    step: int
    offset: int
    rule: str
    most: int

    @property
    def takes(self) -> str:
        """In words."""
        return f"{self.rule}, at most {self.most}"

    def convert(self, value: object) -> int:
        """As :class:`WholeNumber`."""
        return whole_number(value)

    def violation(self, value: int) -> str | None:
        """Between two legal numbers, which are named."""
        if value > self.most:
            return f"must be at most {self.most}"
        if value >= 1 and value % self.step == self.offset:
            return None
        near = " or ".join(map(str, geometry.nearest_multiples(value, self.step, self.offset)))
        return f"must be {self.rule}; nearest: {near}"


@dataclass(frozen=True)
class Real(SettingKind):
    """A ``float`` from ``least`` (or above it where it is ``open``) to ``most``.

    ``usual`` is advice, which also stands behind values outside of ``common``.
    """

    annotation = "float"
    metavar = "X"

    least: float
    most: float
    open: bool = False
    usual: str = ""
    common: tuple[float, float] = (-math.inf, math.inf)

    @property
    def takes(self) -> str:
        """In words."""
        if self.open:
            return f"a number above {self.least:g}, at most {self.most:g}"
        return f"a number from {self.least:g} to {self.most:g}"

    def convert(self, value: object) -> float:
        """From whatever is a number, written or counted, but a truth value."""
        refuse_truth(value)
        try:
            if isinstance(value, str):
                return float(Fraction(value.strip())) if "/" in value else float(value)
            return float(value)  # pyright: ignore[reportArgumentType]
        except (TypeError, ValueError, OverflowError, ZeroDivisionError) as error:
            raise ValueError(f"must be {self.takes}") from error

    def violation(self, value: float) -> str | None:
        """Not finite, too small or too large."""
        above = value > self.least if self.open else value >= self.least
        return (
            None if above and value <= self.most else _advised(f"must be {self.takes}", self.usual)
        )

    def unusual(self, value: float) -> str | None:
        """Outside of what is common."""
        low, high = self.common
        return None if low <= value <= high else f"is unusual: {self.usual}"


@dataclass(frozen=True)
class FrameRate(SettingKind):
    """Frames a second, whole or a fraction (:func:`skyreels_jax.geometry.frame_rate`)."""

    annotation = "int | float | str | Fraction"
    takes = f"a number from 1 to {geometry.MAX_FPS}, for example 24, 29.97 or 30000/1001"
    metavar = "RATE"

    def convert(self, value: object) -> int | Fraction:
        """Rates of television from how people write them."""
        refuse_truth(value)
        try:
            return geometry.nearest_rate(exact_fraction(value))
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
    """A ``bool``; with ``has_off`` a checkpoint may turn it on, and a flag turns it off."""

    annotation = "bool"

    has_off: bool = False

    takes = "True or False"

    def convert(self, value: object) -> bool:
        """True and False, and NumPy's; neither numbers nor words."""
        if isinstance(value, bool) or is_of(value, "numpy", "bool_"):
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
        return text_of(value)


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
        if isinstance(value, str) or is_of(value, "numpy", "ndarray"):
            return value
        if is_of(value, "PIL.Image", "Image"):
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
                return text_of(value)
            if isinstance(value, Mapping):
                return {whole_number(frame): text_of(prompt) for frame, prompt in value.items()}
            if isinstance(value, Sequence):
                return tuple(map(text_of, value))
        except NoUtf8Error:
            raise
        except ValueError:
            pass
        raise ValueError(f"must be {self.takes}")

    def violation(self, value: str | Sequence[str] | Mapping[int, str]) -> str | None:
        """Empty, or nothing but what the text encoder does not see."""
        texts = [value] if isinstance(value, str) else value
        texts = list(texts.values() if isinstance(texts, Mapping) else texts)
        if texts and not any(map(is_blank, texts)):
            return None
        return "is empty; say what the video should show"


def _advised(rule: str, usual: str) -> str:
    return f"{rule}; {usual}" if usual else rule
