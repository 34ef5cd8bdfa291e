"""Control messages as frozen dataclasses, encoded as msgpack under strict limits.

A message class is decorated with `@message("name")`. Its fields may be `str`, `int`, `float`,
`bool`, `bytes`, `X | None`, `tuple[X, ...]`, `dict[str, X]`, a `Literal` of texts, a `NewType` of
those, or another frozen dataclass. On the wire a message is the msgpack map
`{"t": name, field: value, ...}`. Unknown fields are ignored, so that a newer peer can say more;
missing fields without a default, wrong types and whatever `__post_init__` refuses (ValueError) are
the other side's protocol error.
PROTOCOL.md section 4 lists every message.
"""

from __future__ import annotations

import dataclasses
import functools
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

import msgpack

from p2ptrain import limits
from p2ptrain.errors import InvariantBroken, LocalProtocolError, RemoteProtocolError
from p2ptrain.wire.structure import check_structure

_T = TypeVar("_T")
_by_name: dict[str, type] = {}
_names: dict[type, str] = {}

NESTING_MAX = 9
ITEMS_MAX = 65_536
INTEGER_MAX = (1 << 63) - 1
_SCALARS = frozenset({int, float, str, bytes, bool, type(None)})


def message(name: str) -> Callable[[type[_T]], type[_T]]:
    """Register a frozen dataclass as the control message called `name` on the wire."""

    def register(cls: type[_T]) -> type[_T]:
        if name in _by_name:
            raise InvariantBroken(f"two messages are called {name!r}")
        _by_name[name] = cls
        _names[cls] = name
        return cls

    return register


def message_name(value: object) -> str:
    """The wire name of a message object."""
    return _names[type(value)]


def registered() -> dict[str, type]:
    """Every message this peer understands, by wire name; a copy."""
    return dict(_by_name)


def encode(value: object) -> bytes:
    """Encode one message object.

    Raises:
        LocalProtocolError: not a registered message, or larger than a control body may be.
    """
    name = _names.get(type(value))
    if name is None:
        raise LocalProtocolError(f"{type(value).__name__} is not a registered message")
    body: bytes = msgpack.packb({"t": name, **_plain_fields(value)}, use_bin_type=True)
    if len(body) > limits.CONTROL_BODY_BYTES_MAX:
        raise LocalProtocolError(f"message {name!r} has {len(body)} bytes, over the limit")
    return body


def decode(body: bytes | memoryview) -> object:
    """Decode one message; the caller drops the link on an error.

    Raises:
        RemoteProtocolError: too large, not msgpack, unknown name, wrong field.
    """
    fields = unpack_map(body, bytes_max=limits.CONTROL_BODY_BYTES_MAX)
    name = fields.pop("t", None)
    cls = _by_name.get(name) if isinstance(name, str) else None
    if cls is None:
        raise RemoteProtocolError(f"unknown message {name!r:.80}")
    return _build(cls, fields, name if isinstance(name, str) else "")


def unpack_map(body: bytes | memoryview, *, bytes_max: int) -> dict[str, Any]:
    """Unpack a hostile msgpack map with string keys (Any: not checked further here)."""
    if len(body) > bytes_max:
        raise RemoteProtocolError(f"{len(body)} bytes where at most {bytes_max} are allowed")
    check_structure(body)
    try:
        value = msgpack.unpackb(
            body, raw=False, strict_map_key=True, max_ext_len=0,
            max_array_len=ITEMS_MAX, max_map_len=ITEMS_MAX,
            max_str_len=bytes_max, max_bin_len=bytes_max,
        )  # fmt: skip
    except (ValueError, msgpack.exceptions.UnpackException, RecursionError) as error:
        raise RemoteProtocolError(f"not a msgpack message: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise RemoteProtocolError("a message is a map with string keys")
    return value


def to_plain(value: object) -> Any:  # Any: msgpack and JSON values
    """A dataclass as nested dicts, lists and scalars, for msgpack, hashing and JSON."""
    if type(value) in _SCALARS:
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return _plain_fields(value)
    if isinstance(value, tuple | list):
        return [to_plain(item) for item in value]
    if isinstance(value, dict):
        return {key: to_plain(item) for key, item in value.items()}
    return value


def from_plain(cls: type[_T], value: object) -> _T:
    """The inverse of `to_plain` for a dataclass; RemoteProtocolError when it does not fit."""
    if not isinstance(value, dict):
        raise RemoteProtocolError(f"{cls.__name__} is not a map")
    return typing.cast(_T, _build(cls, value, cls.__name__))


def _plain_fields(value: Any) -> dict[str, Any]:  # Any: a dataclass instance
    cls: type = type(value)
    return {name: to_plain(getattr(value, name)) for name in _field_names(cls)}


@functools.cache
def _field_names(cls: type) -> tuple[str, ...]:
    return tuple(field.name for field in dataclasses.fields(cls))


@functools.cache
def _field_types(cls: type) -> dict[str, Any]:  # Any: type forms
    return typing.get_type_hints(cls)


def _build(cls: type, fields: dict[str, Any], where: str, depth: int = 0) -> object:
    if depth > NESTING_MAX:
        raise RemoteProtocolError(f"{where}: nested too deeply")
    hints = _field_types(cls)
    values = {}
    for field in dataclasses.fields(cls):
        if field.name in fields:
            place = f"{where}.{field.name}"
            values[field.name] = _check(hints[field.name], fields[field.name], place, depth)
        elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise RemoteProtocolError(f"{where}: field {field.name!r} is missing")
    try:
        return cls(**values)
    except ValueError as error:
        raise RemoteProtocolError(f"{where}: {error}") from error


def _check(kind: Any, value: Any, where: str, depth: int) -> Any:  # Any: type forms, raw values
    while isinstance(kind, typing.NewType):
        kind = kind.__supertype__
    origin = typing.get_origin(kind)
    if origin in (types.UnionType, typing.Union):
        return _check_optional(kind, value, where, depth)
    if origin is typing.Literal:
        if isinstance(value, str) and value in typing.get_args(kind):
            return value
        raise RemoteProtocolError(f"{where}: {value!r:.40} is none of {typing.get_args(kind)}")
    if origin is tuple and isinstance(value, list | tuple):
        return tuple(_check(typing.get_args(kind)[0], v, where, depth + 1) for v in value)
    if origin is dict and isinstance(value, dict):
        of = typing.get_args(kind)[1]
        return {_key(k, where): _check(of, v, where, depth + 1) for k, v in value.items()}
    if dataclasses.is_dataclass(kind) and isinstance(value, dict):
        return _build(typing.cast(type, kind), value, where, depth + 1)
    if kind is float and isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    if kind is int and isinstance(value, int) and not isinstance(value, bool):
        if not -INTEGER_MAX <= value <= INTEGER_MAX:
            raise RemoteProtocolError(f"{where}: integer out of range")
        return value
    if kind in (str, bool, bytes) and isinstance(value, kind):
        return value
    raise RemoteProtocolError(f"{where}: a {type(value).__name__} where {kind} is expected")


def _check_optional(kind: Any, value: Any, where: str, depth: int) -> Any:  # Any: as above
    if value is None:
        return None
    (inner,) = (arg for arg in typing.get_args(kind) if arg is not type(None))
    return _check(inner, value, where, depth)


def _key(key: object, where: str) -> str:
    if not isinstance(key, str):
        raise RemoteProtocolError(f"{where}: a map key is not a string")
    return key
