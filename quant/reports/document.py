"""Reports as JSON: the fields of a dataclass beside a key that holds the version of its kind.

A report may come from a stranger's file. Reading one checks the type of every field, so that its
methods cannot fail on it.
"""

from __future__ import annotations

import functools
import json
import types
import typing
from dataclasses import MISSING, asdict, fields, is_dataclass

from ..container.header import FormatError, parse_object, quoted
from .verdict import Verdict

VERSION = 1  # of every kind; web/document.mjs expects the same


def write(key: str, values: dict, verdict: Verdict | None = None) -> str:
    """A report's fields as JSON, versioned, with what it comes down to."""
    derived = {} if verdict is None else {"verdict": asdict(verdict)}
    return json.dumps({key: VERSION, **derived, **values}, indent=1, allow_nan=False)


def read(kind: type, key: str, text: str | bytes, old_key: str | None = None):
    """A dataclass from what `write` made of it. Fields with a default may be missing.

    The verdict in it is dropped: it follows from the rest, by the thresholds of this version.

    A field's `metadata` may give its name in earlier versions as "old_name".

    Args:
        old_key: the key in earlier versions.

    Raises:
        FormatError: the text is no such report, or a field is not of its type.
    """
    data = parse_object(key, text)
    if key not in data and old_key in data:
        data[key] = data.pop(old_key)
    version = data.pop(key, None)
    data.pop("verdict", None)
    if version != VERSION:
        raise FormatError(f"not an {key} of version {VERSION} (it has version {quoted(version)})")
    return _typed(kind, data, key)


def _typed(kind, value, where: str):
    """A JSON value as the type of a field, checked."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (types.UnionType, typing.Union):  # of a type and None
        return None if value is None else _typed(arguments[0], value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_typed(arguments[0], part, f"{where}[{i}]") for i, part in enumerate(value))
    if origin is dict and isinstance(value, dict):
        return {key: _typed(arguments[1], part, where) for key, part in value.items()}
    if is_dataclass(kind) and isinstance(value, dict):
        return _record(kind, value, where)
    if kind is float and type(value) in (int, float) and abs(value) <= 1e300:
        return float(value)
    if kind is int and type(value) is int and abs(value) < 2**64:
        return value
    if kind in (str, bool, dict) and type(value) is kind:
        return value
    raise FormatError(f"{where} is not of type {getattr(kind, '__name__', kind)}")


def _record(kind, value: dict, where: str):
    optional, types_of, old_names = _fields(kind)
    for old, name in old_names.items():
        if old in value and name not in value:
            value[name] = value.pop(old)
    wrong = (types_of.keys() - optional - value.keys()) | (value.keys() - types_of.keys())
    if wrong:
        raise FormatError(f"field {quoted(min(wrong))} of {where} is missing or unknown")
    return kind(**{name: _typed(types_of[name], part, name) for name, part in value.items()})


@functools.cache
def _fields(kind) -> tuple[set[str], dict[str, object], dict[str, str]]:
    """(fields with a default, name -> type, earlier name -> name) of a dataclass."""
    optional = {
        f.name for f in fields(kind) if (f.default, f.default_factory) != (MISSING, MISSING)
    }
    old_names = {f.metadata["old_name"]: f.name for f in fields(kind) if "old_name" in f.metadata}
    return optional, typing.get_type_hints(kind), old_names
