"""Finding the converter for a type: dataclasses and the types of their fields, by the conventions of serde.

docs/guide.md has a table of the Rust types and the Python types.
"""

import dataclasses
import inspect
import typing
from collections import OrderedDict, deque
from collections.abc import Collection as AnyCollection
from collections.abc import Iterable, Mapping, MutableMapping, MutableSequence, MutableSet, Sequence, Set
from enum import Enum
from functools import lru_cache
from pathlib import PurePath
from types import NoneType, UnionType
from typing import Any, Literal, NewType, TypeVar

from vmsnap.errors import InvalidArgumentError
from vmsnap.serialization import leaves
from vmsnap.serialization.containers import Collection, Dict, Tuple
from vmsnap.serialization.converter import Anything, Converter
from vmsnap.serialization.hints import alias_value, field_types, is_init_var
from vmsnap.serialization.path import wire_name
from vmsnap.serialization.records import Alias, Field, Record, Union

__all__ = ["converter"]


def converter(kind: Any) -> Converter:
    """Return the converter for a type.

    Raises
    ------
    InvalidArgumentError
        The type, or a part of it, cannot be built from a value.
    """
    try:
        return _complete(kind)
    except TypeError:  # not hashable: Literal and Annotated may hold anything
        return _completed(_made(kind))


def _completed(result: Converter) -> Converter:
    """Find the converters of all parts now. They are found on demand, because a class may have itself as a part."""
    seen, pending = {result}, [result]
    while pending:
        for part in pending.pop().parts():
            if part not in seen:
                seen.add(part)
                pending.append(part)
    return result


def _part(kind: Any) -> Converter:
    try:
        return _kept(kind)
    except TypeError:  # not hashable, as in `converter`
        return _made(kind)


def _made(kind: Any) -> Converter:
    if hasattr(kind, "__value__"):  # the `type` statement of Python 3.12
        return Alias(lambda: _part(alias_value(kind)))
    if isinstance(kind, NewType):
        return _part(kind.__supertype__)
    if kind is Any or kind is object or isinstance(kind, TypeVar):
        return Anything()
    if kind is None:
        return leaves.LEAVES[NoneType]
    if isinstance(kind, type) and kind in leaves.LEAVES:
        return leaves.LEAVES[kind]
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Annotated, typing.Final):
        return _part(arguments[0])
    if origin is Literal:
        return leaves.literal(arguments)
    if origin is typing.Union or origin is UnionType:
        return _union(arguments)
    cls = origin or kind
    if isinstance(cls, type):
        return _class(cls, arguments)
    # Other objects of typing are callable too, but return nothing useful.
    if callable(kind) and type(kind).__module__ != "typing":
        return Anything(kind)
    raise _no_way(kind)


_kept = lru_cache(maxsize=1024)(_made)
_complete = lru_cache(maxsize=1024)(lambda kind: _completed(_kept(kind)))


def _no_way(kind: Any) -> InvalidArgumentError:
    return InvalidArgumentError(f"cannot build {kind!r} from a value: pass a class, a type from typing, or a callable")


def _union(kinds: tuple[Any, ...]) -> Converter:
    # An int fits float too, which may round it, so float comes last.
    by_exactness = sorted((kind for kind in kinds if kind is not NoneType), key=lambda kind: kind is float)
    return Union([_part(kind) for kind in by_exactness], NoneType in kinds)


_COLLECTIONS: dict[type, type] = {
    **dict.fromkeys((list, Sequence, MutableSequence, AnyCollection, Iterable), list),
    tuple: tuple,
    deque: deque,
    **dict.fromkeys((set, MutableSet, Set), set),
    frozenset: frozenset,
}
_DICTS: dict[type, type[dict[Any, Any]]] = {
    **dict.fromkeys((dict, Mapping, MutableMapping), dict),
    OrderedDict: OrderedDict,
}


def _class(cls: type, arguments: tuple[Any, ...]) -> Converter:
    if issubclass(cls, Enum):
        return leaves.enum(cls)
    if (
        dataclasses.is_dataclass(cls)
        or typing.is_typeddict(cls)
        or (issubclass(cls, tuple) and hasattr(cls, "_fields"))
    ):
        return Record(cls, lambda: _fields(cls, arguments))
    if issubclass(cls, PurePath):
        return leaves.path(cls)
    if cls is tuple and arguments and arguments[-1] is not Ellipsis:
        return Tuple([_part(member) for member in arguments if member != ()])
    if cls in _COLLECTIONS:
        return Collection(_COLLECTIONS[cls], _part(arguments[0] if arguments else Any))
    if cls in _DICTS:
        return Dict(_DICTS[cls], *map(_part, arguments or (Any, Any)))
    # numpy is not imported here: a caller that passes its types has imported it.
    if cls.__module__ == "numpy" and cls.__name__ == "ndarray":
        # The type is ndarray[shape, dtype[scalar]].
        scalar = typing.get_args(arguments[1]) if len(arguments) == 2 else ()
        return leaves.array(scalar[0] if scalar and isinstance(scalar[0], type) and scalar[0] is not Any else None)
    if any(base.__module__ == "numpy" and base.__name__ == "generic" for base in cls.__mro__):
        return leaves.array_scalar(cls)
    foreign = arguments and not hasattr(cls, "__orig_bases__")
    if foreign or inspect.isabstract(cls) or cls is typing.Generic or getattr(cls, "_is_protocol", False):
        raise _no_way(cls)
    # This is a class defined by the caller, or another callable.
    return Anything(cls)


def _fields(cls: Any, arguments: tuple[Any, ...]) -> list[Field]:
    try:
        hints = field_types(cls, arguments)
    except (NameError, AttributeError, TypeError, SyntaxError) as error:
        text = f"cannot resolve the annotations of {cls.__name__}: {error}; define their names in its module"
        raise InvalidArgumentError(text) from error
    if typing.is_typeddict(cls):
        return [_field(name, name, hint, name in cls.__required_keys__) for name, hint in hints.items()]
    if not dataclasses.is_dataclass(cls):
        defaults = cls._field_defaults
        return [_field(name, name, hints.get(name, Any), name not in defaults) for name in cls._fields]
    regular = {field.name: field.init for field in dataclasses.fields(cls)}
    return [
        _field(name, wire_name(field), hints[name], field.default is field.default_factory is dataclasses.MISSING)
        for name, field in cls.__dataclass_fields__.items()
        # An InitVar is in __dataclass_fields__, but fields() leaves it out.
        if regular.get(name, is_init_var(hints[name]))
    ]


def _field(name: str, wire: str, hint: Any, required: bool) -> Field:
    if is_init_var(hint):
        hint = getattr(hint, "type", Any)
    return Field(name, wire, _part(hint), required, typing.get_origin(hint) is Literal)
