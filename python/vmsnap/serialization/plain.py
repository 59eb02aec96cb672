"""Values as what CBOR or JSON has: the walk before serializing."""

import sys
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import fields, is_dataclass
from datetime import UTC, date, datetime
from enum import Enum
from json import dumps as json_dumps
from pathlib import PurePath
from typing import Any
from uuid import UUID

import cbor2
from cbor2 import CBORTag

from vmsnap.serialization import arrays
from vmsnap.serialization.path import Located, wire_name

__all__ = ["Plain", "Unwritable"]

# What serde_json reads; docs/format.md.
_MAX_DEPTH = 127
_SET_TAG = 258

_JSON_SCALARS = frozenset({type(None), bool, int, float, str})
_CBOR_SCALARS = _JSON_SCALARS | {bytes}
# Their hash values are equal where they are.
_CBOR_KEYS = _CBOR_SCALARS - {float}


class Unwritable(Located):
    """Something in a value that cannot be written."""


class Plain:
    """Turns values into trees of what the format has. Whatever is that already is passed on, not copied."""

    def __init__(self, *, json: bool, default: Callable[[Any], object] | None, as_list: bool) -> None:
        self._json = json
        self._default = default
        self._as_list = as_list
        self._scalars = _JSON_SCALARS if json else _CBOR_SCALARS

    def value(self, value: Any, depth: int = 1) -> Any:
        """Return `value` as the format has it.

        Raises
        ------
        Unwritable
            Something in it cannot be written.
        """
        kind = type(value)
        if kind in self._scalars:
            return value
        if depth > _MAX_DEPTH:
            raise Unwritable(f"it is nested deeper than {_MAX_DEPTH} levels, or contains itself")
        if kind is dict:
            return self._mapping(value, depth)
        if kind is list or kind is tuple:
            return self._items(value, depth)
        return self._other(value, depth)

    def _items(self, items: Sequence[Any], depth: int) -> Sequence[Any]:
        if self._scalars.issuperset(map(type, items)):
            return items
        return [self._member(item, index, depth) for index, item in enumerate(items)]

    def _mapping(self, mapping: dict[Any, Any], depth: int) -> dict[Any, Any]:
        keys_are_text = {str}.issuperset(map(type, mapping))
        if keys_are_text and self._scalars.issuperset(map(type, mapping.values())):
            return mapping
        if keys_are_text:
            return {key: self._member(item, key, depth) for key, item in mapping.items()}
        result = {self._key(key): self._member(item, key, depth) for key, item in mapping.items()}
        if len(result) != len(mapping):
            raise Unwritable("two of its keys are the same when they are written")
        return result

    def _member(self, item: Any, step: object, depth: int) -> Any:
        try:
            return self.value(item, depth + 1)
        except Unwritable as error:
            error.steps.append(step)
            raise

    def _other(self, value: Any, depth: int) -> Any:
        """Return what is none of the usual types, the more special before the more general."""
        scalar = self._scalar(value)
        if scalar is not _NOTHING:
            return scalar
        if isinstance(value, Enum):
            return self.value(value.value, depth)
        if is_dataclass(value) and not isinstance(value, type):
            return self._mapping({wire_name(field): getattr(value, field.name) for field in fields(value)}, depth)
        if isinstance(value, Mapping):
            return self._mapping(dict(value), depth)
        if isinstance(value, Set):
            return self._set(value, depth)
        if (content := _bytes_of(value)) is not None:
            return list(content) if self._json else content
        if isinstance(value, memoryview):
            return self.value(value.tolist(), depth)
        if isinstance(value, Sequence):
            return self._items(list(value), depth)
        if (array := self._array(value, depth)) is not _NOTHING:
            return array
        if self._default is not None:
            # As deep as what it stands for, and one deeper: it may return the same again and again.
            return self.value(self._default(value), depth + 1)
        raise Unwritable(f"there is no way to write {_name(value)}: convert it, or give default=")

    def _scalar(self, value: Any) -> Any:
        if isinstance(value, Enum):
            return _NOTHING
        if isinstance(value, (str, PurePath)):
            return str.__str__(value) if isinstance(value, str) else str(value)
        if isinstance(value, int):
            return int(value)
        if isinstance(value, float):
            return float(value)
        if isinstance(value, UUID):
            return str(value) if self._json else UUID(int=value.int)
        # Not what derives from it: pandas' has nanoseconds.
        if type(value) is datetime:
            return self._datetime(value)
        if type(value) is date:
            return value.isoformat() if self._json else value
        numpy = sys.modules.get("numpy")
        if numpy is not None and isinstance(value, numpy.generic):
            item = value.item()
            return item if type(item) in self._scalars else _NOTHING
        return _NOTHING

    def _datetime(self, value: datetime) -> Any:
        offset = value.utcoffset()
        if offset is None:
            raise Unwritable("a datetime without a time zone is no moment: give it one by replace(tzinfo=...)")
        if offset.total_seconds() % 60:
            # RFC 3339 has hours and minutes.
            value = value.astimezone(UTC)
        return value.isoformat() if self._json else value

    def _set(self, members: Set[Any], depth: int) -> Any:
        # In an order of their own, for that of a set is another one in every process.
        if self._json:
            return sorted(self._items(list(members), depth), key=json_dumps)
        keys = [self._key(member) for member in members]
        if len(set(keys)) != len(keys):
            raise Unwritable("two members of a set are the same when they are written")
        return CBORTag(_SET_TAG, sorted(keys, key=cbor2.dumps))

    def _key(self, key: Any) -> Any:
        """Return a key of a dict, or a member of a set, as the format has it."""
        if self._json:
            return self._json_key(key)
        kind = type(key)
        if kind in _CBOR_KEYS:
            return key
        if kind is float:
            if key != key:
                raise Unwritable("NaN cannot be a key: it is not equal to itself")
            return key
        if isinstance(key, (tuple, frozenset)):
            members = map(self._key, key)
            return frozenset(members) if isinstance(key, frozenset) else tuple(members)
        if isinstance(key, Enum):
            return self._key(key.value)
        if (scalar := self._scalar(key)) is not _NOTHING:
            return scalar
        if (content := _bytes_of(key)) is not None:
            return content
        if self._default is not None:
            return self._key(self._default(key))
        raise Unwritable(f"there is no way to write {_name(key)} as a key or member of a set")

    def _json_key(self, key: Any) -> str:
        if isinstance(key, bool):
            return "true" if key else "false"
        if isinstance(key, Enum):
            return self._json_key(key.value)
        scalar = self._scalar(key)
        if isinstance(scalar, (str, int)):
            return str(scalar)
        raise Unwritable("JSON has texts and whole numbers as keys, and no others: use CBOR")

    def _array(self, value: Any, depth: int) -> Any:
        numpy = sys.modules.get("numpy")
        # Not what derives from it: a masked array is more than its elements.
        if numpy is None or not (type(value) is numpy.ndarray or isinstance(value, numpy.memmap)):
            return _NOTHING
        if self._json or self._as_list:
            return self.value(value.tolist(), depth)
        if (typed := arrays.tagged(value)) is None:
            text = f"there is no typed array for dtype {value.dtype}: convert it, or write it as_list=True"
            raise Unwritable(text)
        return typed


class _Nothing:
    """What stands for no value, as None is one."""


_NOTHING = _Nothing()


def _bytes_of(value: Any) -> bytes | None:
    """Return the bytes of a buffer of bytes, None for anything else: one of numbers is a list."""
    try:
        view = memoryview(value)
    except (TypeError, BufferError):
        return None
    numpy = sys.modules.get("numpy")
    if numpy is not None and isinstance(value, numpy.ndarray):
        return None
    with view:
        return view.tobytes() if view.itemsize == 1 and view.format[-1] in "Bbc" else None


def _name(value: object) -> str:
    kind = type(value)
    return (
        f"a value of type {kind.__qualname__}"
        if kind.__module__ == "builtins"
        else f"a value of type {kind.__module__}.{kind.__qualname__}"
    )
