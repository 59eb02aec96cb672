"""Converters for values without parts, such as numbers, strings, enums, paths and numpy arrays."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from datetime import date, datetime
from enum import Enum
from pathlib import PurePath
from types import NoneType
from typing import Any
from uuid import UUID

from vmsnap.serialization import arrays
from vmsnap.serialization.converter import Converter, Mismatch, expected

__all__ = ["LEAVES", "Leaf", "array", "array_scalar", "enum", "literal", "path"]


class _Not:
    """The type of `_NOT`, which `convert` of a leaf returns for a value that it cannot convert."""


_NOT = _Not()


class Leaf(Converter):
    """A converter that calls `convert`. A value that already has the type `kind` is returned as it is."""

    def __init__(self, kind: type | None, what: str, convert: Callable[[Any], Any]) -> None:
        self._kind = kind
        self._what = what
        self._convert = convert

    def __call__(self, value: Any) -> Any:
        if type(value) is self._kind:
            return value
        try:
            result = self._convert(value)
        except (ValueError, TypeError, OverflowError):
            result = _NOT
        if result is _NOT:
            raise expected(self._what, value)
        return result

    def fits(self, value: Any) -> bool:
        try:
            self(value)
        except Mismatch:
            return False
        return True


def _never(_value: Any) -> Any:
    return _NOT


def _unit(value: Any) -> Any:
    """Convert Rust's ``()`` and unit structs, which are written as null or as an empty container."""
    return None if isinstance(value, (list, tuple, dict)) and not value else _NOT


def _float(value: Any) -> Any:
    # Above 2^53 some integers have no exact float.
    return float(value) if type(value) is int and float(value) == value else _NOT


def _bytes(value: Any) -> Any:
    """Convert bytes. Serde writes a ``Vec<u8>`` as a list of numbers, and JSON has no other way."""
    if isinstance(value, list):
        return bytes(value) if {int}.issuperset(map(type, value)) else _NOT
    if isinstance(value, str):
        return _NOT
    # This is an array of bytes, written from numpy.
    view = memoryview(value)
    return view.tobytes() if view.format == "B" and view.ndim == 1 else _NOT


def _bytearray(value: Any) -> Any:
    content = _bytes(value)
    return content if content is _NOT else bytearray(content)


def _uuid(value: Any) -> Any:
    if isinstance(value, bytes):
        return UUID(bytes=value)
    return UUID(value) if isinstance(value, str) else _NOT


def _datetime(value: Any) -> Any:
    return datetime.fromisoformat(value) if isinstance(value, str) else _NOT


def _date(value: Any) -> Any:
    return date.fromisoformat(value) if isinstance(value, str) else _NOT


#: Converters by type.
LEAVES: Mapping[Any, Leaf] = {
    kind: Leaf(kind, "null" if kind is NoneType else kind.__name__, convert)
    for kind, convert in (
        (NoneType, _unit),
        # A value that already has the type does not get here.
        (bool, _never),
        (int, _never),
        (float, _float),
        (str, _never),
        (bytes, _bytes),
        (bytearray, _bytearray),
        (UUID, _uuid),
        (datetime, _datetime),
        (date, _date),
    )
}


def path(cls: type[PurePath]) -> Leaf:
    """Return the converter from a string to a path."""
    return Leaf(cls, cls.__name__, lambda value: cls(value) if isinstance(value, str) else _NOT)


def literal(values: tuple[Any, ...]) -> Leaf:
    """Return the converter that accepts only these values."""

    def own(value: Any) -> Any:
        # True is equal to 1.
        return value if any(type(value) is type(one) and value == one for one in values) else _NOT

    return Leaf(None, "one of " + ", ".join(map(repr, values)), own)


def enum(cls: type[Enum]) -> Leaf:
    """Return the converter that finds a member by its value, or by its name as serde writes it."""

    def member(value: Any) -> Any:
        for form in _forms(value):
            try:
                found = cls(form)
            except (ValueError, TypeError):
                continue
            # True and 1.0 are equal to 1, so a lookup of them finds the member with the value 1.
            if type(value) not in (bool, float) or type(found.value) is type(value):
                return found
        return cls.__members__.get(value, _NOT) if isinstance(value, str) else _NOT

    return Leaf(cls, f"a value or name of {cls.__name__}", member)


def _forms(value: Any) -> Iterator[Any]:
    """Yield the values that an enum member may have had before it was written."""
    yield value
    if isinstance(value, list):
        yield _as_tuples(value)
        with suppress(ValueError, TypeError):
            yield bytes(value)


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value


def array(scalar: Any) -> Leaf:
    """Return the converter from an array or a list to a numpy array.

    Parameters
    ----------
    scalar
        The numpy type of the elements, or None for any.
    """
    what = "an array of numbers" if scalar is None else f"an array of {scalar.__name__}"
    return Leaf(None, what, lambda value: _or_not(arrays.as_array(value, scalar)))


def array_scalar(cls: Any) -> Leaf:
    """Return the converter to a scalar type of numpy."""
    return Leaf(cls, cls.__name__, lambda value: _or_not(arrays.as_scalar(value, cls)))


def _or_not(result: Any) -> Any:
    return _NOT if result is None else result
