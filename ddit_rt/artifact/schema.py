"""Plain JSON values to frozen dataclasses, with nothing unknown, missing or mistyped let in."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from ddit_rt.errors import ArtifactError

_Record = TypeVar("_Record")


def from_plain(cls: type[_Record], raw: Any, where: str) -> _Record:
    """Builds a dataclass from what JSON gives.

    Args:
        cls: The dataclass; fields may be records, tuples, dictionaries, unions with None and
            plain values.
        raw: A dictionary.
        where: Name of the place, for messages.

    Raises:
        ArtifactError: A missing, unknown or mistyped entry; the message names it.
    """
    if not isinstance(raw, dict):
        raise ArtifactError(f"{where}: expected an object, got {type(raw).__name__}")
    assert is_dataclass(cls)
    hints = get_type_hints(cls)
    known = {field.name: field for field in fields(cls)}
    unknown = sorted(raw.keys() - known.keys())
    required = {
        name
        for name, field in known.items()
        if field.default is MISSING and field.default_factory is MISSING
    }
    missing = sorted(required - raw.keys())
    if unknown or missing:
        raise ArtifactError(
            f"{where}: unknown entries {unknown}, missing entries {missing}: the file was edited, "
            "or written by another version of ddit_rt"
        )
    values = {name: _convert(hints[name], raw[name], f"{where}: {name}") for name in raw}
    try:
        return cls(**values)
    except ValueError as error:
        raise ArtifactError(f"{where}: {error}") from error


def _convert(kind: Any, raw: Any, where: str) -> Any:
    if kind is Any:
        return raw
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return _convert_optional(arguments, raw, where)
    if origin is tuple:
        return _convert_tuple(arguments, raw, where)
    if origin in (dict, Mapping):
        _expect(dict, raw, where)
        return {key: _convert(arguments[1], v, f"{where}.{key}") for key, v in raw.items()}
    if is_dataclass(kind):
        assert isinstance(kind, type)
        return from_plain(kind, raw, where)
    return _expect(kind, raw, where)


def _convert_optional(kinds: tuple[Any, ...], raw: Any, where: str) -> Any:
    (kind,) = (kind for kind in kinds if kind is not type(None))
    return None if raw is None else _convert(kind, raw, where)


def _convert_tuple(kinds: tuple[Any, ...], raw: Any, where: str) -> Any:
    _expect(list, raw, where)
    if kinds[-1] is Ellipsis:
        kinds = (kinds[0],) * len(raw)
    if len(kinds) != len(raw):
        raise ArtifactError(f"{where}: expected {len(kinds)} values, got {len(raw)}")
    return tuple(_convert(kind, value, where) for kind, value in zip(kinds, raw, strict=True))


def _expect(kind: type, raw: Any, where: str) -> Any:
    # bool is an int to Python, but not in a manifest.
    if not isinstance(raw, kind) or (isinstance(raw, bool) and kind is not bool):
        raise ArtifactError(f"{where}: expected {kind.__name__}, got {type(raw).__name__}")
    return raw
