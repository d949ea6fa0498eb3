"""Frozen records as JSON values and back, every field checked against its annotation, so that a file cannot put anything else in."""

import dataclasses
import types
from collections.abc import Hashable
from functools import cache
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from twofour.errors import InputError

T = TypeVar("T")
MAX_DEPTH = 6


def to_plain(value: Any) -> Any:
    """Return a record as dicts, lists, strings and numbers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: to_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, (tuple, list)):
        return [to_plain(item) for item in value]
    return value


@cache
def _fields(kind: Any) -> dict[str, tuple[Any, bool]]:
    hints = get_type_hints(kind)
    return {
        f.name: (hints[f.name], f.default is dataclasses.MISSING and f.default_factory is dataclasses.MISSING)
        for f in dataclasses.fields(kind)
    }


def from_plain(kind: type[T], data: Any, where: str) -> T:
    """Return the record of type `kind` that `to_plain` gave as `data`; its own checks run.

    Raises:
        InputError: a field is missing, unknown, of another type, or refused by the record; `where` names the place.
    """
    if not isinstance(data, dict):
        raise InputError(f"{where} is {_shown(data)}, expected an object with the fields of {kind.__name__}")
    fields = _fields(cast(Hashable, kind))
    unknown = sorted(str(name) for name in data if name not in fields)
    missing = [name for name, (_, needed) in fields.items() if needed and name not in data]
    if unknown or missing:
        raise InputError(f"{where} has unknown fields {unknown[:3]} and lacks {missing[:3]}, expected the fields of {kind.__name__}")
    values = {name: _checked(fields[name][0], data[name], f"{where}.{name}", 0) for name in data}
    try:
        return kind(**values)
    except InputError as e:
        raise InputError(f"{where}: {e}") from e


def _shown(data: Any) -> str:
    text = repr(data)
    return text if len(text) <= 60 else text[:57] + "..."


def _checked(hint: Any, data: Any, where: str, depth: int) -> Any:
    if depth > MAX_DEPTH:
        raise InputError(f"{where} is nested more than {MAX_DEPTH} deep, expected a flat value")
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        options = get_args(hint)
        if data is None and type(None) in options:
            return None
        return _checked(next(option for option in options if option is not type(None)), data, where, depth)
    if origin is tuple:
        inner = get_args(hint)
        if not isinstance(data, (list, tuple)):
            raise InputError(f"{where} is {_shown(data)}, expected a list")
        if len(inner) == 2 and inner[1] is Ellipsis:
            return tuple(_checked(inner[0], item, where, depth + 1) for item in data)
        if len(inner) != len(data):
            raise InputError(f"{where} holds {len(data)} values, expected {len(inner)}")
        return tuple(_checked(want, item, where, depth + 1) for want, item in zip(inner, data, strict=True))
    if origin is dict:
        if not isinstance(data, dict):
            raise InputError(f"{where} is {_shown(data)}, expected an object")
        key, value = get_args(hint)
        return {_checked(key, name, where, depth + 1): _checked(value, item, f"{where}.{name}", depth + 1) for name, item in data.items()}
    if hint is Any:
        if isinstance(data, (list, tuple)):
            return tuple(_checked(Any, item, where, depth + 1) for item in data)
        if isinstance(data, (str, int, float)):
            return data
        raise InputError(f"{where} holds {_shown(data)}, expected numbers, strings and lists of them")
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, data, where)
    if hint is float and isinstance(data, int) and not isinstance(data, bool) and abs(data) <= 2**53:
        return float(data)
    if not isinstance(data, hint) or (isinstance(data, bool) and hint is not bool):
        raise InputError(f"{where} is {_shown(data)}, expected {hint.__name__}")
    return data
