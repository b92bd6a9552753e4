"""Reports as JSON: the fields of a dataclass beside a key that holds the version of its kind.

A report may come from a stranger's file, so reading one checks the type of every field and leaves
nothing that its own methods would stumble over.
"""

from __future__ import annotations

import functools
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass

from ..container.header import FormatError, parse_object, quoted

VERSION = 1  # of every kind; web/document.mjs expects the same


def write(key: str, values: dict) -> str:
    """A report's fields as JSON, versioned."""
    return json.dumps({key: VERSION, **values}, indent=1, allow_nan=False)


def read(
    kind: type, key: str, text: str, old_names: Mapping[str, str] = types.MappingProxyType({})
):
    """A dataclass from what `write` made of it. Fields with a default may be missing.

    Args:
        old_names: the names of keys in earlier versions -> today's.

    Raises:
        FormatError: the text is no such report, or a field is not of its type.
    """
    data = _renamed(parse_object(key, text), old_names)
    version = data.pop(key, None)
    if version != VERSION:
        raise FormatError(f"no {key} of version {VERSION} (its version is {quoted(version)})")
    return _typed(kind, data, key)


def _renamed(value, names: Mapping[str, str]):
    if not isinstance(value, dict):
        return value
    return {names.get(name, name): _renamed(part, names) for name, part in value.items()}


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
    optional, types_of = _fields(kind)
    wrong = (types_of.keys() - optional - value.keys()) | (value.keys() - types_of.keys())
    if wrong:
        raise FormatError(f"field {quoted(min(wrong))} of {where} is missing or unknown")
    return kind(**{name: _typed(types_of[name], part, name) for name, part in value.items()})


@functools.cache
def _fields(kind) -> tuple[set[str], dict[str, object]]:
    """(fields with a default, name -> type) of a dataclass."""
    optional = {
        f.name for f in fields(kind) if (f.default, f.default_factory) != (MISSING, MISSING)
    }
    return optional, typing.get_type_hints(kind)
