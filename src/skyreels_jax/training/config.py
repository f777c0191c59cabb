"""A training run as a TOML file: tables to frozen dataclasses, every key and value checked."""

import dataclasses
import difflib
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from skyreels_jax.errors import RequestError

T = TypeVar("T")


def read_toml(file: Path) -> Mapping[str, Any]:
    """The tables of a file.

    Raises:
        RequestError: it is missing or is no TOML.
    """
    try:
        with file.open("rb") as stream:
            return tomllib.load(stream)
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RequestError(f"{file} cannot be read as TOML: {error}") from error


def from_table(kind: type[T], table: Mapping[str, Any], where: str) -> T:
    """A dataclass with the values of a table; what is absent keeps its default.

    Args:
        kind: a dataclass of numbers, strings, Literals, tuples of them, and other dataclasses.
        table: as TOML gives it.
        where: its name in messages.

    Raises:
        RequestError: a key is unknown or missing, or a value has another type or breaks a rule of
            the dataclass.
    """
    fields = {field.name: field for field in dataclasses.fields(kind)}  # pyright: ignore[reportArgumentType]
    hints = get_type_hints(kind)
    for key in table:
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(fields)}"
            raise RequestError(f"{where}: {key} is unknown; {hint}")
    required = [
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    ]
    if missing := [name for name in required if name not in table]:
        raise RequestError(f"{where}: {', '.join(missing)} must be given")
    values = {key: _value(hints[key], value, f"{where}.{key}") for key, value in table.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise RequestError(f"{where}: {error}") from error


def _value(hint: Any, value: Any, where: str) -> Any:
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        return _value(next(h for h in get_args(hint) if h is not type(None)), value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        if not isinstance(value, Mapping):
            raise RequestError(f"{where} = {value!r} should be a table")
        return from_table(hint, value, where)
    if origin is Literal:
        legal = get_args(hint)
        if value not in legal:
            raise RequestError(f"{where} = {value!r} should be one of {', '.join(map(str, legal))}")
        return value
    if origin is tuple:
        return _tuple(hint, value, where)
    if hint is float and type(value) is int:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not hint:
        raise RequestError(
            f"{where} = {value!r} should be of type {getattr(hint, '__name__', hint)}"
        )
    return value


def _tuple(hint: Any, value: Any, where: str) -> tuple[Any, ...]:
    parts = get_args(hint)
    endless = parts[-1] is Ellipsis
    if not isinstance(value, list) or not (endless or len(value) == len(parts)):
        raise RequestError(f"{where} = {value!r} should be a list" + _of(parts, endless))
    hints = [parts[0]] * len(value) if endless else parts
    return tuple(
        _value(h, v, f"{where}[{i}]") for i, (h, v) in enumerate(zip(hints, value, strict=True))
    )


def _of(parts: tuple[Any, ...], endless: bool) -> str:
    return "" if endless else f" of {len(parts)} values"
