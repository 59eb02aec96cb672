"""Converters for lists, tuples, sets and dicts."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from typing import Any

from vmsnap import _vmsnap
from vmsnap.serialization import arrays
from vmsnap.serialization.converter import Anything, Converter, Mismatch, at, expected
from vmsnap.serialization.path import NthKey

__all__ = ["Collection", "Dict", "Tuple"]


class Collection(Converter):
    """A converter for any number of members of one type."""

    def __init__(self, kind: type, member: Converter) -> None:
        self._kind = kind
        self._member = member
        self._is_set = issubclass(kind, Set)
        self._as_they_are = isinstance(member, Anything) and member.function is None

    def __call__(self, value: Any) -> Any:
        if not self.fits(value):
            raise expected("a list", value)
        if self._as_they_are and type(value) is self._kind:
            return value
        members = _members(value)
        if not self._as_they_are:
            members = _each(self._member, members, step=int)
        if self._is_set:
            _check_hash_values(members)
        return members if type(members) is self._kind else self._kind(members)

    def fits(self, value: Any) -> bool:
        return isinstance(value, (list, tuple, set, frozenset)) or (arrays.is_array(value) and value.ndim > 0)

    def parts(self) -> Iterable[Converter]:
        return (self._member,)


class Tuple(Converter):
    """A converter for a fixed number of members, each with its own type."""

    def __init__(self, members: list[Converter]) -> None:
        self._members = members

    def __call__(self, value: Any) -> Any:
        if not self.fits(value):
            what = f"a list of {len(self._members)}"
            if _is_row(value):
                raise Mismatch(f"expected {what}, found a list of {len(value)}")
            raise expected(what, value)
        parts = zip(self._members, _members(value), strict=True)
        return tuple(at(index, member, item) for index, (member, item) in enumerate(parts))

    def fits(self, value: Any) -> bool:
        return _is_row(value) and len(value) == len(self._members)

    def parts(self) -> Iterable[Converter]:
        return self._members


class Dict(Converter):
    """A converter for a dict: keys of one type, items of another."""

    def __init__(self, kind: type[dict[Any, Any]], key: Converter, item: Converter) -> None:
        self._kind = kind
        self._key = key
        self._item = item

    def __call__(self, value: Any) -> Any:
        if not self.fits(value):
            raise expected("a map", value)
        keys = _each(self._convert_key, value, step=NthKey)
        _check_hash_values(keys)
        result = self._kind(zip(keys, _each(self._item, value.values(), step=NthKey), strict=True))
        if len(result) != len(value):
            raise Mismatch("two keys of a map are equal")
        return result

    def _convert_key(self, key: Any) -> Any:
        """Convert a key. JSON has only strings as keys, so numbers and bools are parsed from them."""
        if isinstance(key, str) and not self._key.fits(key):
            if key in ("true", "false"):
                return self._key(key == "true")
            if (number := _json_number(key)) is not None:
                return self._key(number)
        return self._key(key)

    def fits(self, value: Any) -> bool:
        return isinstance(value, Mapping)

    def parts(self) -> Iterable[Converter]:
        return (self._key, self._item)


def _each(convert: Callable[[Any], Any], items: Iterable[Any], *, step: Callable[[int], object]) -> list[Any]:
    """Convert all items. If one fails, `step` returns the step to its index for the error."""
    result: list[Any] = []
    try:
        for item in items:
            result.append(convert(item))
    except Mismatch as error:
        error.steps.append(step(len(result)))
        raise
    return result


def _is_row(value: Any) -> bool:
    return isinstance(value, (list, tuple)) or (arrays.is_array(value) and value.ndim > 0)


def _members(value: Any) -> Any:
    """Return the members as an iterable. A typed array becomes a list of Python numbers."""
    return value.tolist() if arrays.is_array(value) else value


_JSON_NUMBER = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?")
# No numeric key is longer. The time to convert digits grows with the square of their number.
_MAX_DIGITS = 1000


def _json_number(text: str) -> int | float | None:
    if len(text) >= _MAX_DIGITS or not _JSON_NUMBER.fullmatch(text):
        return None
    return int(text) if text.lstrip("-").isdigit() else float(text)


# At most 16 numbers of 64 bits share a hash value.
_MAX_EQUAL_HASHES = 100


def _check_hash_values(members: Sequence[Any]) -> None:
    """Refuse keys or members of a set whose hash values were chosen to collide, because hashing them is slow."""
    hashes: list[int] = []
    alike: dict[int, list[Any]] = {}
    # Python randomizes the hash values of str and bytes in every process.
    others = [member for member in members if type(member) not in (str, bytes)]
    for member in others:
        try:
            hashes.append(hash(member))
        except TypeError:
            text = f"a map key or set member is a {type(member).__name__}, which is not hashable"
            raise Mismatch(text) from None
        if isinstance(member, float) and member != member:
            raise Mismatch("a map key or set member is NaN")
    if len(others) <= _MAX_EQUAL_HASHES:
        return
    if _vmsnap.are_crowded(hashes):
        raise Mismatch("map keys or set members were chosen to have hash values that collide")
    for member, value in zip(others, hashes, strict=True):
        equal = alike.setdefault(value, [])
        if member not in equal:
            equal.append(member)
            if len(equal) > _MAX_EQUAL_HASHES:
                raise Mismatch(f"more than {_MAX_EQUAL_HASHES} map keys or set members have the same hash value")
