"""The step before serialization: values become trees of the types that CBOR or JSON has."""

import sys
from collections import UserString
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from datetime import UTC, date, datetime
from enum import Enum
from functools import lru_cache
from json import dumps as json_dumps
from pathlib import PurePath
from typing import Any, TypeVar
from uuid import UUID

import cbor2
from cbor2 import CBORTag

from vmsnap import _vmsnap
from vmsnap.serialization import arrays
from vmsnap.serialization.path import Located, wire_name

__all__ = ["Plain", "Unwritable", "located"]

_Result = TypeVar("_Result")

# The limit of serde_json.
_MAX_DEPTH = 127
_TOO_DEEP = f"it is nested deeper than {_MAX_DEPTH} levels, or contains itself"
_SET_TAG = 258

_TEXT = frozenset({str})
_JSON_SCALARS = _TEXT | {type(None), bool, int, float}
_CBOR_SCALARS = _JSON_SCALARS | {bytes}
# Floats are left out, because NaN is not equal to itself.
_CBOR_KEYS = _CBOR_SCALARS - {float}


# The kinds of bools, numbers and strings of numpy. Its times would become plain numbers or None if datetime cannot
# express them, and its records would lose the names of their fields.
_NUMPY_KINDS = "biufSU"


class Unwritable(Located):
    """A part of a value cannot be written."""


class Plain:
    """The conversion of values to trees of the types of a format. Parts with these types are not copied."""

    def __init__(self, *, json: bool, default: Callable[[Any], object] | None, as_list: bool) -> None:
        self._json = json
        self._default = default
        self._as_list = as_list
        self._scalars = _JSON_SCALARS if json else _CBOR_SCALARS

    def value(self, value: Any, depth: int = 1) -> Any:
        """Return `value` as a tree of the types of the format.

        Raises
        ------
        Unwritable
            A part of the value cannot be written.
        """
        kind = type(value)
        if kind in self._scalars:
            return value
        if depth > _MAX_DEPTH:
            raise Unwritable(_TOO_DEEP)
        if kind is dict:
            return self._mapping(value, depth)
        if kind is list or kind is tuple:
            return self._items(value, depth)
        return _way(kind)(self, value, depth)

    # Containers. Most hold only scalars, which issuperset finds out in C.

    def _items(self, items: Sequence[Any], depth: int) -> Sequence[Any]:
        if self._scalars.issuperset(map(type, items)):
            return items
        plain = []
        try:
            for item in items:
                plain.append(self.value(item, depth + 1))
        except Unwritable as error:
            error.steps.append(len(plain))
            raise
        return plain

    def _mapping(self, mapping: dict[Any, Any], depth: int) -> dict[Any, Any]:
        if _TEXT.issuperset(map(type, mapping)):
            if self._scalars.issuperset(map(type, mapping.values())):
                return mapping
        else:
            keyed = {self._key(key, depth + 1): item for key, item in mapping.items()}
            if len(keyed) != len(mapping):
                raise Unwritable("two keys of a dict are equal when they are written")
            mapping = keyed
        plain = {}
        key = None
        try:
            for key, item in mapping.items():
                plain[key] = self.value(item, depth + 1)
        except Unwritable as error:
            error.steps.append(key)
            raise
        return plain

    def _set(self, members: Set[Any], depth: int) -> Any:
        if self._json:
            # Sorted for the reason given at _ordered.
            return sorted(self._items(list(members), depth), key=json_dumps)
        return _ordered([self._key(member, depth + 1) for member in members])

    def _record(self, record: Any, depth: int) -> Any:
        names = _field_names(type(record))
        return self._mapping({wire: getattr(record, name) for name, wire in names}, depth)

    def _key(self, key: Any, depth: int) -> Any:
        """Return a key of a dict, or a member of a set, as the types of the format."""
        kind = type(key)
        if kind in (_TEXT if self._json else _CBOR_KEYS):
            return key
        if depth > _MAX_DEPTH:
            raise Unwritable(_TOO_DEEP)
        way = _way(kind)
        if way is Plain._enum:
            return self._key(key.value, depth)
        if self._json:
            return self._json_key(key, way, depth)
        if isinstance(key, (tuple, frozenset)):
            members = [self._key(member, depth + 1) for member in key]
            return _ordered(members) if isinstance(key, frozenset) else tuple(members)
        if (scalar := self._scalar(key, way, depth)) is not None:
            if scalar != scalar:
                raise Unwritable("NaN cannot be a key: it is not equal to itself")
            return scalar
        if (content := _bytes_of(key)) is not None:
            return content
        if self._default is not None:
            return self._key(self._default(key), depth + 1)
        raise Unwritable(f"cannot write {_name(key)} as a key or a member of a set")

    def _json_key(self, key: Any, way: "_Way", depth: int) -> str:
        scalar = self._scalar(key, way, depth)
        if isinstance(scalar, bool):
            return "true" if scalar else "false"
        if isinstance(scalar, (str, int)):
            return str(scalar)
        if scalar is None and key is not None and self._default is not None:
            return self._key(self._default(key), depth + 1)  # type: ignore[no-any-return]
        raise Unwritable("keys in JSON must be strings or whole numbers: use CBOR")

    def _scalar(self, key: Any, way: "_Way", depth: int) -> Any:
        if way not in _SCALAR_WAYS or (way is Plain._numpy_scalar and type(key.item()) not in _CBOR_SCALARS):
            return None
        return way(self, key, depth)

    # Values without parts.

    def _enum(self, member: Enum, depth: int) -> Any:
        return self.value(member.value, depth)

    def _text(self, text: str, _depth: int) -> str:
        return str.__str__(text)

    def _str(self, value: PurePath | UserString, _depth: int) -> str:
        return str(value)

    def _bool(self, value: bool, _depth: int) -> bool:
        return value

    def _int(self, number: int, _depth: int) -> int:
        return int(number)

    def _float(self, number: float, _depth: int) -> float:
        return float(number)

    def _uuid(self, uuid: UUID, _depth: int) -> Any:
        return str(uuid) if self._json else UUID(int=uuid.int)

    def _date(self, day: date, _depth: int) -> Any:
        return day.isoformat() if self._json else day

    def _datetime(self, moment: datetime, _depth: int) -> Any:
        offset = moment.utcoffset()
        if offset is None:
            raise Unwritable("a datetime without a time zone is ambiguous: set one with replace(tzinfo=...)")
        if offset.total_seconds() % 60:
            # Offsets in RFC 3339 consist of hours and minutes.
            try:
                moment = moment.astimezone(UTC)
            except OverflowError:
                raise Unwritable("in UTC, a datetime is before the year 1 or after 9999") from None
        return moment.isoformat() if self._json else moment

    def _numpy_scalar(self, scalar: Any, depth: int) -> Any:
        number = scalar.item()
        return number if type(number) in self._scalars else self._unusual(scalar, depth)

    def _array(self, array: Any, depth: int) -> Any:
        # Elements that are objects are converted one by one.
        listable = array.dtype.kind in _NUMPY_KINDS + "O"
        if self._json or self._as_list:
            return self.value(array.tolist(), depth) if listable else self._unusual(array, depth)
        if (typed := arrays.tagged(array)) is not None:
            return typed
        if listable and self._default is None:
            raise Unwritable(f"CBOR has no typed array of {array.dtype}: convert it, or pass as_list=True")
        return self._unusual(array, depth)

    def _unusual(self, value: Any, depth: int) -> Any:
        """Convert a value whose type is not enough to tell: a buffer of bytes, a sequence, or a value for `default`."""
        if (content := _bytes_of(value)) is not None:
            return list(content) if self._json else content
        if isinstance(value, memoryview):
            return self.value(value.tolist(), depth)
        if isinstance(value, Sequence):
            return self._items(list(value), depth)
        if self._default is not None:
            # One level deeper, because `default` may return the same object again and again.
            return self.value(self._default(value), depth + 1)
        raise Unwritable(f"cannot write {_name(value)}: convert it, or pass default=")


_Way = Callable[[Plain, Any, int], Any]

#: Derived types come before their bases.
_WAYS: tuple[tuple[type | tuple[type, ...], _Way], ...] = (
    (Enum, Plain._enum),
    (str, Plain._text),
    ((PurePath, UserString), Plain._str),
    (bool, Plain._bool),
    (int, Plain._int),
    (float, Plain._float),
    (UUID, Plain._uuid),
    (Mapping, lambda plain, mapping, depth: plain._mapping(dict(mapping), depth)),
    (Set, Plain._set),
)
_SCALAR_WAYS = frozenset(
    {
        Plain._text,
        Plain._str,
        Plain._bool,
        Plain._int,
        Plain._float,
        Plain._uuid,
        Plain._date,
        Plain._datetime,
        Plain._numpy_scalar,
    }
)


def _find_way(kind: type) -> _Way:
    """Return the method that converts values of a type."""
    # Only the classes themselves: the datetime of pandas is a subclass with nanoseconds.
    if kind is datetime:
        return Plain._datetime
    if kind is date:
        return Plain._date
    for base, way in _WAYS:
        if issubclass(kind, base):
            return way
    if is_dataclass(kind):
        return Plain._record
    numpy = sys.modules.get("numpy")
    if numpy is not None and issubclass(kind, (numpy.bool_, numpy.number, numpy.character)):
        return Plain._unusual if issubclass(kind, numpy.timedelta64) else Plain._numpy_scalar
    # Only the class itself: a masked array is a subclass with more than its elements.
    if numpy is not None and (kind is numpy.ndarray or issubclass(kind, numpy.memmap)):
        return Plain._array
    return Plain._unusual


def _ordered(members: list[Any]) -> CBORTag:
    """Return a set as a sorted tuple, because its order differs from process to process. The result can be a key."""
    if len(set(members)) != len(members):
        raise Unwritable("two members of a set are equal when they are written")
    return CBORTag(_SET_TAG, tuple(sorted(members, key=cbor2.dumps)))


def _find_field_names(kind: Any) -> list[tuple[str, str]]:
    names = [(field.name, wire_name(field)) for field in fields(kind)]
    if len({wire for _, wire in names}) != len(names):
        raise Unwritable(f"two fields of {kind.__qualname__} have the same name when they are written")
    return names


_way: Callable[[type], _Way] = lru_cache(maxsize=4096)(_find_way)
_field_names: Callable[[type], list[tuple[str, str]]] = lru_cache(maxsize=4096)(_find_field_names)


def located(plain: Any, serialize: Callable[[Any], _Result]) -> _Result:
    """Return the result of `serialize` for a plain value. If it raises `Unwritable`, add the steps to the bad part."""
    try:
        return serialize(plain)
    except Unwritable:
        if isinstance(plain, dict):
            # An error of a key gets no further step.
            for key in plain:
                serialize({key: None})
        if isinstance(plain, (dict, list, tuple)):
            for step, part in plain.items() if isinstance(plain, dict) else enumerate(plain):
                try:
                    located(part, serialize)
                except Unwritable as error:
                    error.steps.append(step)
                    raise
        raise


def _bytes_of(value: Any) -> bytes | None:
    """Return the bytes of a one-dimensional buffer of bytes, None for any other object. Other buffers become lists."""
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, (numpy.ndarray, numpy.generic)):
        return value if isinstance(value, bytes) else None
    try:
        view = memoryview(value)
    except (TypeError, BufferError):
        return None
    with view:
        # A signed byte is a number.
        if view.ndim != 1 or view.format.lstrip("<>=@!|") not in ("B", "c"):
            return None
        # The buffer may be a mapping with pages that cannot be read, which copy_buffer turns into an error.
        return _vmsnap.copy_buffer(view) if view.contiguous else view.tobytes()


def _name(value: object) -> str:
    kind = type(value)
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    dtype = getattr(value, "dtype", None)
    return f"a value of type {name}" + (f" of {dtype}" if dtype is not None else "")
