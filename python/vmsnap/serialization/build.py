"""What was read as the types that are asked for: dataclasses and all that their fields can be, by serde's conventions.

A `Converter` is made once for a type and kept. Which member of a union a value is for is told by its outermost level
alone (`fits`), so that nothing is tried twice and time stays proportional to the value.
"""

import dataclasses
import typing
from collections.abc import (
    Callable,
    Collection,
    Iterable,
    Mapping,
    MutableMapping,
    MutableSequence,
    MutableSet,
    Sequence,
    Set,
)
from datetime import date, datetime
from enum import Enum
from functools import cached_property, lru_cache
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Any, Literal, NewType, TypeVar, Union
from uuid import UUID

from vmsnap.errors import InvalidArgumentError
from vmsnap.serialization.path import Located, wire_name

__all__ = ["Converter", "Mismatch", "converter"]


class Mismatch(Located):
    """Something in a value is not of the type asked for."""


class Converter:
    """Builds one type."""

    def __call__(self, value: Any) -> Any:
        """Return what is built of `value`, or raise `Mismatch`."""
        raise NotImplementedError

    def fits(self, value: Any) -> bool:
        """Return whether `value` is meant for this type, as far as its outermost level tells."""
        raise NotImplementedError


def converter(kind: Any) -> Converter:
    """Return what builds a type.

    Raises
    ------
    InvalidArgumentError
        There is no way to build it.
    """
    try:
        return _kept(kind)
    except TypeError:  # not hashable: Literal and Annotated may hold anything
        return _made(kind)


def _made(kind: Any) -> Converter:
    if hasattr(kind, "__value__"):  # the `type` statement of Python 3.12
        return converter(kind.__value__)
    if isinstance(kind, NewType):
        return converter(kind.__supertype__)
    if kind is Any or kind is object or isinstance(kind, TypeVar):
        return _Anything()
    if kind is None or kind is NoneType:
        return _Unit()
    if kind in _LEAVES:
        return _Leaf(kind, _LEAVES[kind])
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return converter(arguments[0])
    if origin is Literal:
        return _Literal(arguments)
    if origin is Union or origin is UnionType:
        return _union(arguments)
    cls = origin or kind
    if isinstance(cls, type):
        return _class(cls, arguments)
    if callable(kind):
        return _Call(kind)
    raise InvalidArgumentError(f"there is no way to build {kind!r}: give a class, a type of typing's, or a callable")


_kept = lru_cache(maxsize=1024)(_made)


def _class(cls: type, arguments: tuple[Any, ...]) -> Converter:
    if issubclass(cls, Enum):
        return _Enum(cls)
    if (
        dataclasses.is_dataclass(cls)
        or typing.is_typeddict(cls)
        or (issubclass(cls, tuple) and hasattr(cls, "_fields"))
    ):
        return _Record(cls)
    if issubclass(cls, PurePath):
        return _Leaf(cls, lambda value: cls(value) if isinstance(value, str) else _NOT)
    if cls is tuple and arguments and arguments[-1] is not Ellipsis:
        return _Tuple(() if arguments == ((),) else arguments)
    if cls in _COLLECTIONS:
        return _Collection(_COLLECTIONS[cls], arguments[0] if arguments else Any)
    if cls in (dict, Mapping, MutableMapping):
        return _Dict(*(arguments or (Any, Any)))
    if cls.__module__ == "numpy" and cls.__name__ == "ndarray":
        return _Array(arguments)
    # A class of the caller's, or any other callable.
    return _Call(cls)


class _Not:
    """What a leaf returns for a value that is not its."""


_NOT = _Not()

# Of 64-bit numbers no more than 16 share one.
_MAX_EQUAL_HASHES = 100


def _hashed(members: Iterable[Any]) -> Iterable[Any]:
    """Pass on what becomes keys or members of a set, in time proportional to how many there are.

    The hash values of numbers, UUIDs and tuples can be chosen: whatever shares one is compared with all that has it.
    """
    alike: dict[int, list[Any]] = {}
    for index, member in enumerate(members):
        # That of a text is keyed anew in every process.
        if type(member) not in (str, bytes):
            try:
                others = alike.setdefault(hash(member), [])
            except TypeError:
                raise Mismatch(f"member {index} (of type {type(member).__name__}) is not hashable") from None
            if isinstance(member, float) and member != member:
                raise Mismatch(f"member {index} is not a number (NaN), which can be no key, nor in a set")
            if member not in others:
                others.append(member)
                if len(others) > _MAX_EQUAL_HASHES:
                    raise Mismatch(f"more than {_MAX_EQUAL_HASHES} keys or members of a set have one hash value")
        yield member


def _expected(what: str, value: object) -> Mismatch:
    found = "nothing (null)" if value is None else type(value).__name__
    return Mismatch(f"expected {what}, found {found}")


class _Anything(Converter):
    def __call__(self, value: Any) -> Any:
        return value

    def fits(self, _value: Any) -> bool:
        return True


class _Unit(Converter):
    """Rust's ``()`` and unit structs: null, or empty."""

    def __call__(self, value: Any) -> None:
        if not self.fits(value):
            raise _expected("null", value)

    def fits(self, value: Any) -> bool:
        return value is None or (isinstance(value, (list, dict)) and not value)


class _Leaf(Converter):
    """A type whose values have no parts."""

    def __init__(self, kind: type, convert: Callable[[Any], Any]) -> None:
        self._kind = kind
        self._convert = convert

    def __call__(self, value: Any) -> Any:
        if type(value) is self._kind:
            return value
        try:
            result = self._convert(value)
        except (ValueError, TypeError, OverflowError):
            result = _NOT
        if result is _NOT:
            raise _expected(self._kind.__name__, value)
        return result

    def fits(self, value: Any) -> bool:
        try:
            self(value)
        except Mismatch:
            return False
        return True


def _never(_value: Any) -> Any:
    return _NOT


def _float(value: Any) -> Any:
    return float(value) if type(value) is int else _NOT


def _bytes(value: Any) -> Any:
    """Serde writes a ``Vec<u8>`` as a list of numbers, and everything so in JSON."""
    if isinstance(value, list):
        return bytes(value) if {int}.issuperset(map(type, value)) else _NOT
    if isinstance(value, str):
        return _NOT
    # An array of bytes, written from numpy.
    array = memoryview(value)
    return array.tobytes() if array.format == "B" else _NOT


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


def _are_numbers(items: list[Any]) -> bool:
    """Whether a list holds nothing but numbers, arrays, and lists of them."""
    import numpy

    kinds = set(map(type, items)) - {bool, int, float, numpy.ndarray}
    return not kinds or (kinds == {list} and all(_are_numbers(item) for item in items if type(item) is list))


_LEAVES: dict[Any, Callable[[Any], Any]] = {
    # What is of the type already does not come here.
    bool: _never,
    int: _never,
    float: _float,
    str: _never,
    bytes: _bytes,
    bytearray: _bytearray,
    UUID: _uuid,
    datetime: _datetime,
    date: _date,
}


class _Array(Converter):
    """A numpy array, of any type or that of ``ndarray[shape, dtype[scalar]]``; a list becomes one."""

    def __init__(self, arguments: tuple[Any, ...]) -> None:
        scalar = typing.get_args(arguments[1]) if len(arguments) == 2 else ()
        self._scalar = scalar[0] if scalar and isinstance(scalar[0], type) and scalar[0] is not Any else None

    def __call__(self, value: Any) -> Any:
        import numpy

        # numpy would make each text as wide as the widest.
        if not self.fits(value) or (isinstance(value, list) and not _are_numbers(value)):
            raise _expected("an array of numbers", value)
        wanted = self._scalar
        try:
            array = numpy.asarray(value)
            if wanted is None or wanted not in numpy.sctypeDict.values():
                # Any type, or any of an abstract one such as floating.
                if array.dtype == object or not issubclass(array.dtype.type, wanted or numpy.generic):
                    raise TypeError(array.dtype)
                return array
            if array.size == 0 or (
                isinstance(value, list) and {array.dtype.kind, numpy.dtype(wanted).kind} <= {"i", "u"}
            ):
                # Raises where a number does not fit.
                return numpy.asarray(value, dtype=wanted)
            return array.astype(wanted, casting="same_kind", copy=False)
        except (ValueError, TypeError, OverflowError):
            raise _expected(f"an array of {wanted.__name__ if wanted else 'numbers'}", value) from None

    def fits(self, value: Any) -> bool:
        return isinstance(value, list) or (type(value).__module__ == "numpy" and type(value).__name__ == "ndarray")


class _Literal(Converter):
    def __init__(self, values: tuple[Any, ...]) -> None:
        self._values = values

    def __call__(self, value: Any) -> Any:
        if not self.fits(value):
            raise _expected("one of " + ", ".join(map(repr, self._values)), value)
        return value

    def fits(self, value: Any) -> bool:
        return any(type(value) is type(own) and value == own for own in self._values)


class _Enum(Converter):
    """By value, or by the name of the variant."""

    def __init__(self, cls: type[Enum]) -> None:
        self._cls = cls

    def __call__(self, value: Any) -> Any:
        try:
            return self._cls(value)
        except (ValueError, TypeError):
            pass
        if isinstance(value, str) and value in self._cls.__members__:
            return self._cls[value]
        raise _expected(f"a value or name of {self._cls.__name__}", value)

    def fits(self, value: Any) -> bool:
        try:
            self(value)
        except Mismatch:
            return False
        return True


class _Call(Converter):
    def __init__(self, function: Callable[[Any], Any]) -> None:
        self._function = function

    def __call__(self, value: Any) -> Any:
        return self._function(value)

    def fits(self, _value: Any) -> bool:
        return True


_COLLECTIONS: dict[type, type] = {
    **dict.fromkeys((list, Sequence, MutableSequence, Collection, Iterable), list),
    tuple: tuple,
    **dict.fromkeys((set, MutableSet, Set), set),
    frozenset: frozenset,
}


class _Collection(Converter):
    def __init__(self, kind: type, member: Any) -> None:
        self._kind = kind
        self._member = converter(member)
        self._as_it_is = isinstance(self._member, _Anything)
        self._is_set = issubclass(kind, Set)

    def __call__(self, value: Any) -> Any:
        if not self.fits(value):
            raise _expected("a list", value)
        if self._as_it_is and type(value) is self._kind:
            return value
        members = value if self._as_it_is else _each(self._member, value)
        return self._kind(_hashed(members) if self._is_set else members)

    def fits(self, value: Any) -> bool:
        return isinstance(value, (list, tuple, set, frozenset))


class _Tuple(Converter):
    def __init__(self, members: tuple[Any, ...]) -> None:
        self._members = [converter(member) for member in members]

    def __call__(self, value: Any) -> Any:
        if not self.fits(value):
            raise _expected(f"a list of {len(self._members)}", value)
        return tuple(
            _at(index, member, item) for index, (member, item) in enumerate(zip(self._members, value, strict=True))
        )

    def fits(self, value: Any) -> bool:
        return isinstance(value, (list, tuple)) and len(value) == len(self._members)


class _Dict(Converter):
    def __init__(self, key: Any, item: Any) -> None:
        self._key = converter(key)
        self._item = converter(item)

    def __call__(self, value: Any) -> Any:
        if not self.fits(value):
            raise _expected("a map", value)
        keys = _hashed(_at(key, self._convert_key, key) for key in value)
        result = {key: _at(step, self._item, item) for key, (step, item) in zip(keys, value.items(), strict=True)}
        if len(result) != len(value):
            raise Mismatch("two keys of a map are the same")
        return result

    def _convert_key(self, key: Any) -> Any:
        """JSON has texts as keys, also for numbers and bools."""
        if isinstance(key, str) and not self._key.fits(key):
            digits = key.removeprefix("-")
            if digits.isascii() and digits.isdigit() and len(digits) < _MAX_DIGITS:
                return self._key(int(key))
            if key in ("true", "false"):
                return self._key(key == "true")
        return self._key(key)

    def fits(self, value: Any) -> bool:
        return isinstance(value, Mapping)


# Of no integer that a map has as keys; converting takes time by the square of it.
_MAX_DIGITS = 1000


@dataclasses.dataclass(frozen=True, slots=True)
class _Part:
    """A field of a record."""

    name: str  # what the constructor calls it
    wire_name: str
    converter: Converter
    required: bool


class _Record(Converter):
    """A dataclass, named tuple or typed dict: a map, a list of its fields in order, or what its only field is."""

    def __init__(self, cls: Any) -> None:
        self._cls = cls

    @cached_property
    def _parts(self) -> list[_Part]:
        # Not before they are needed: a class may have itself as a part.
        cls = self._cls
        try:
            hints = typing.get_type_hints(cls)
        except NameError as error:
            text = f"the annotations of {cls.__name__} cannot be resolved: {error}; define what they name in its module"
            raise InvalidArgumentError(text) from error
        if dataclasses.is_dataclass(cls):
            return [
                self._part(field.name, wire_name(field), hints[field.name], field.default, field.default_factory)
                for field in dataclasses.fields(cls)
                if field.init
            ]
        if typing.is_typeddict(cls):
            return [_Part(name, name, converter(hint), name in cls.__required_keys__) for name, hint in hints.items()]
        defaults = cls._field_defaults
        missing = dataclasses.MISSING
        return [
            self._part(name, name, hints.get(name, Any), defaults.get(name, missing), missing) for name in cls._fields
        ]

    @staticmethod
    def _part(name: str, wire: str, hint: Any, *defaults: Any) -> _Part:
        has_default = any(default is not dataclasses.MISSING for default in defaults)
        return _Part(name, wire, converter(hint), not has_default)

    def __call__(self, value: Any) -> Any:
        parts = self._parts
        if isinstance(value, Mapping) and not self._is_newtype_of(value):
            return self._from_map(value)
        if self._can_be_its_part:
            return self._cls(**{parts[0].name: parts[0].converter(value)})
        if isinstance(value, (list, tuple)) and self._can_be(value):
            items = zip(parts, value, strict=False)
            return self._cls(**{p.name: _at(index, p.converter, item) for index, (p, item) in enumerate(items)})
        if value is None and not parts:
            return self._cls()
        raise _expected(f"a map for {self._cls.__name__}", value)

    def _from_map(self, value: Mapping[Any, Any]) -> Any:
        arguments = {}
        for part in self._parts:
            if part.wire_name in value:
                try:
                    arguments[part.name] = part.converter(value[part.wire_name])
                except Mismatch as error:
                    error.steps.append(part.wire_name)
                    raise
            elif part.required:
                # As serde: an option that is not there is none.
                if not _is_optional(part.converter):
                    raise Mismatch(f"{self._cls.__name__} lacks {part.wire_name!r}")
                arguments[part.name] = None
        return self._cls(**arguments)

    @cached_property
    def _can_be_its_part(self) -> bool:
        """Whether a value can be that of the only field: not where that would be this type again, and again."""
        return len(self._parts) == 1 and not self._leads_to(self._parts[0].converter, set())

    def _leads_to(self, kind: Converter, seen: set[Converter]) -> bool:
        """Whether a value for `kind` can be for this type, without anything around it being taken off."""
        if kind is self:
            return True
        if kind in seen:
            return False
        seen.add(kind)
        if isinstance(kind, _Union):
            return any(self._leads_to(member, seen) for member in kind.members)
        return isinstance(kind, _Record) and len(kind._parts) == 1 and self._leads_to(kind._parts[0].converter, seen)

    def _is_newtype_of(self, value: Mapping[Any, Any]) -> bool:
        """Whether the only field is the whole map, as in ``struct Regs(BTreeMap<...>)``."""
        return self._can_be_its_part and self._parts[0].wire_name not in value and self._parts[0].required

    def _can_be(self, value: Sequence[Any]) -> bool:
        required = sum(part.required for part in self._parts)
        return required <= len(value) <= len(self._parts)

    @property
    def name(self) -> str:
        return str(self._cls.__name__)

    @property
    def is_empty(self) -> bool:
        return not any(part.required for part in self._parts)

    def fits(self, value: Any) -> bool:
        if isinstance(value, Mapping):
            if value and not any(part.wire_name in value for part in self._parts):
                return False
            return all(
                part.converter.fits(value[part.wire_name]) if isinstance(part.converter, _Literal) else True
                for part in self._parts
                if part.wire_name in value
            ) and all(
                part.wire_name in value or not part.required or _is_optional(part.converter) for part in self._parts
            )
        if isinstance(value, (list, tuple)):
            return len(self._parts) > 1 and self._can_be(value)
        return value is None and not self._parts


class _Union(Converter):
    """serde's enums with data: a variant's name alone, or a map of the one name to the data; or whatever fits first."""

    def __init__(self, members: list[Converter], optional: bool) -> None:
        self.members = members
        self.optional = optional

    @cached_property
    def _variants(self) -> dict[str, _Record]:
        return {member.name: member for member in self.members if isinstance(member, _Record)}

    def __call__(self, value: Any) -> Any:
        if value is None and self.optional:
            return None
        if len(self.members) == 1:
            return self.members[0](value)
        if isinstance(value, str) and value in self._variants and self._variants[value].is_empty:
            return self._variants[value]({})
        if isinstance(value, Mapping) and len(value) == 1:
            ((key, data),) = value.items()
            if isinstance(key, str) and key in self._variants:
                return _at(key, self._variants[key], data)
        for member in self.members:
            if member.fits(value):
                return member(value)
        raise _expected("a value for one member of the union", value)

    def fits(self, value: Any) -> bool:
        if value is None and self.optional:
            return True
        return any(member.fits(value) for member in self.members) or (
            isinstance(value, str) and value in self._variants
        )


def _union(kinds: tuple[Any, ...]) -> Converter:
    members = [converter(kind) for kind in kinds if kind is not NoneType]
    return _Union(members, NoneType in kinds)


def _is_optional(kind: Converter) -> bool:
    return isinstance(kind, _Union) and kind.optional


def _at(step: object, convert: Callable[[Any], Any], value: Any) -> Any:
    try:
        return convert(value)
    except Mismatch as error:
        error.steps.append(step)
        raise


def _each(convert: Converter, values: Iterable[Any]) -> Iterable[Any]:
    for index, value in enumerate(values):
        yield _at(index, convert, value)
