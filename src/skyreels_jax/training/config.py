"""TOML tables to frozen dataclasses: every key and value is checked, in one line each."""

import dataclasses
import difflib
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any, Final, Literal, TypeVar, get_args, get_origin, get_type_hints

from skyreels_jax.errors import RequestError, UnsupportedError
from skyreels_jax.files import read_text

_T = TypeVar("_T")
# A TOML value: what tomllib gives.
Toml = Any
_NAMES: Final = {"array": "list", "object": "table"}
# What msgspec says is wrong, and where: "Expected `int`, got `str` - at `$.run.steps`".
_EXPECTED: Final = re.compile(r"Expected `(\w+)[^`]*`( of length \d+)?")
_WHERE: Final = re.compile(r" - at `\$\.?(.*)`$")


def read_toml(file: Path) -> Mapping[str, Toml]:
    """The tables of a file.

    Raises:
        RequestError: it is missing or is no TOML.
    """
    try:
        return tomllib.loads(read_text(file, "recipe"))
    except (ValueError, RecursionError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise RequestError(f"{file} cannot be read as TOML: {reason}") from error


def from_table(kind: type[_T], table: Toml, where: str) -> _T:
    """A dataclass with the values of a table; what is absent keeps its default.

    A field may have an older name, in ``metadata["alias"]``, by which it may stand too.

    Args:
        kind: a dataclass of numbers, strings, Literals, tuples of them, and other dataclasses.
        table: as TOML gives it.
        where: its name in messages.

    Raises:
        RequestError: a key is unknown or missing, or a value has another type or breaks a rule of
            the dataclass.
        UnsupportedError: the extra ``train`` is not installed.
    """
    try:
        from msgspec import ValidationError, convert
    except ModuleNotFoundError as error:
        raise UnsupportedError("training takes pip install 'skyreels-jax[train]'") from error
    table = _checked_keys(kind, table, where)
    try:
        return convert(table, kind)
    except ValidationError as error:
        raise RequestError(_explained(kind, table, where, error)) from error


def _checked_keys(kind: Any, table: Toml, where: str) -> dict[str, Toml]:
    """``table`` with today's names of keys, all of which exist; numbers are finite."""
    if not isinstance(table, Mapping):
        raise RequestError(f"{where} = {_shown(table)} should be a table")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    aliases = {f.metadata["alias"]: name for name, f in fields.items() if "alias" in f.metadata}
    found: dict[str, Toml] = {}
    for key, value in table.items():
        name = aliases.get(key, key)
        if name not in fields:
            near = difflib.get_close_matches(key, [*fields, *aliases], n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(fields)}"
            raise RequestError(f"{where}: {key:.40} is unknown; {hint}")
        if name in found:
            raise RequestError(f"{where}: {name} is given twice, once as {key}")
        inner = _hint_of(kind, name)
        if is_dataclass(inner):
            value = _checked_keys(inner, value, f"{where}.{key}")
        if element := _element(inner):
            if not isinstance(value, list) or not all(isinstance(v, Mapping) for v in value):
                raise RequestError(f"{where}.{key} = {_shown(value)} should be a list of tables")
            value = [_checked_keys(element, v, f"{where}.{key}[{i}]") for i, v in enumerate(value)]
            for number, table in enumerate(value):
                # By itself: what checks the whole does not say which of them is wrong.
                from_table(element, table, f"{where}.{key}[{number}]")
        if isinstance(value, float) and not math.isfinite(value):
            raise RequestError(f"{where}.{key} = {value} should be a finite number")
        found[name] = value
    return found


def _element(hint: object) -> type | None:
    """The dataclass that a tuple of any length holds, if it is one."""
    first, *rest = get_args(hint) if get_origin(hint) is tuple else (None,)
    return first if rest == [...] and isinstance(first, type) and is_dataclass(first) else None


def _hint_of(kind: object, name: str) -> object:
    """The type of a dataclass's field; of one that may be ``None``, what it is else."""
    hint = get_type_hints(kind)[name]
    others = [one for one in get_args(hint) if one is not type(None)]
    return others[0] if len(others) == 1 and type(None) in get_args(hint) else hint


def _explained(kind: Any, table: Toml, where: str, error: Exception) -> str:
    """What is wrong in this package's words: the value, and what it should be."""
    at = _WHERE.search(str(error))
    message = _WHERE.sub("", str(error))
    if missing := re.search(r"missing required field `(\w+)`", message):
        path = f".{at[1]}" if at else ""
        return f"{where}{path}: {missing[1]} must be given"
    if at is None:
        return f"{where}: {message}"
    value, hint = table, kind
    for step in re.findall(r"\w+", at[1]):
        if isinstance(value, list):
            value, hint = value[int(step)], get_args(hint)[0]
        else:
            value, hint = value[step], _hint_of(hint, step)
    name = f"{where}.{at[1]}"
    legal = get_args(hint) if get_origin(hint) is Literal else ()
    if legal:
        return f"{name} = {_shown(value)} should be one of {', '.join(map(str, legal))}"
    if wanted := _EXPECTED.match(message):
        if wanted[1] in _NAMES:
            return f"{name} = {_shown(value)} should be a {_NAMES[wanted[1]]}{wanted[2] or ''}"
        return f"{name} = {_shown(value)} should be of type {wanted[1]}"
    return f"{name}: {message}"


def _shown(value: Toml) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}…"


def check_at_least(table: object, least: int, *names: str, most: int = 2**31 - 1) -> None:
    """Rule of a dataclass: these whole numbers are ``least`` to ``most``; raises ValueError."""
    for name in names:
        value = getattr(table, name)
        if not least <= value <= most:
            near = least if value < least else most
            raise ValueError(
                f"{name} = {value} should be at least {least}"
                + (f" and at most {most}" if value > most else "")
                + f"; nearest: {near}"
            )


def check_choice(table: object, name: str, legal: Sequence[int], rule: str) -> None:
    """Rule of a dataclass: this number is one of those in rising order; raises ValueError."""
    value = getattr(table, name)
    if value in legal:
        return
    below, above = [x for x in legal if x < value][-1:], [x for x in legal if x > value][:1]
    near = " or ".join(map(str, below + above))
    raise ValueError(f"{name} = {value} should be {rule}; nearest: {near}")


def check_heads(table: object, multiple: int, least: int) -> None:
    """Rule of a dataclass: ``dim`` over ``num_heads`` is whole, a multiple and not below ``least``.

    Raises:
        ValueError: with the nearest numbers of heads.
    """
    dim, heads = getattr(table, "dim"), getattr(table, "num_heads")  # noqa: B009
    legal = [n for n in range(1, dim + 1) if not dim % n and not dim // n % multiple]
    legal = [n for n in legal if dim // n >= least]
    if not legal:
        step = max(multiple, least + least % multiple)
        raise ValueError(
            f"dim = {dim} should be a multiple of {multiple} and at least {step}; nearest: "
            f"{max(step, dim - dim % multiple)}"
        )
    if heads not in legal:
        near = sorted(sorted(legal, key=lambda n: abs(n - heads))[:2])
        raise ValueError(
            f"num_heads = {heads} should divide dim = {dim} into heads of at least {least} "
            f"features, a multiple of {multiple}; nearest: {' or '.join(map(str, near))}"
        )
