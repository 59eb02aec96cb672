"""Converters for dataclasses, named tuples, typed dicts, and unions of them: the structs and enums of serde."""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from typing import Any

from vmsnap.serialization.converter import Converter, Mismatch, at, expected

__all__ = ["Alias", "Field", "Record", "Union"]


@dataclasses.dataclass(frozen=True, slots=True)
class Field:
    """A field of a record."""

    name: str  # the argument of the constructor
    wire_name: str
    converter: Converter
    required: bool
    is_tag: bool = False  # ``Literal``: the field tells one variant from another


class Record(Converter):
    """A converter for a dataclass, named tuple or typed dict: from a map, a list in order, or its only field."""

    def __init__(self, cls: Any, fields: Callable[[], list[Field]]) -> None:
        self._cls = cls
        self._find_fields = fields

    @cached_property
    def fields(self) -> list[Field]:
        """The fields. They are found on demand, because a class may have itself as a part."""
        return self._find_fields()

    def parts(self) -> Iterable[Converter]:
        return [field.converter for field in self.fields]

    @property
    def name(self) -> str:
        """The name of the variant in serde."""
        return str(self._cls.__name__)

    @cached_property
    def is_empty(self) -> bool:
        """Whether the class can be built without any field."""
        return not any(field.required for field in self.fields)

    def __call__(self, value: Any) -> Any:
        fields = self.fields
        if self.is_newtype(value):
            return self._cls(**{fields[0].name: fields[0].converter(value)})
        if isinstance(value, Mapping):
            return self._from_map(value)
        if isinstance(value, (list, tuple)) and self._can_be(value):
            items = zip(fields, value, strict=False)
            return self._cls(**{f.name: at(index, f.converter, item) for index, (f, item) in enumerate(items)})
        if value is None and not fields:
            return self._cls()
        raise expected(f"a map for {self._cls.__name__}", value)

    def _from_map(self, value: Mapping[Any, Any]) -> Any:
        arguments = {}
        for field in self.fields:
            if field.wire_name in value:
                try:
                    arguments[field.name] = field.converter(value[field.wire_name])
                except Mismatch as error:
                    error.steps.append(field.wire_name)
                    raise
            elif field.required:
                # Like serde, take None for an optional field that is missing.
                if not _is_optional(field.converter):
                    raise Mismatch(f"{self._cls.__name__} needs {field.wire_name!r}, which is missing")
                arguments[field.name] = None
        return self._cls(**arguments)

    def is_newtype(self, value: Any) -> bool:
        """Return whether the only field is the whole value, as in ``struct Regs(BTreeMap<...>)``."""
        if self._newtype_of is None:
            return False
        if not isinstance(value, Mapping):
            return True
        only = self.fields[0]
        return only.wire_name not in value and only.required and self._newtype_of.fits(value)

    @cached_property
    def _newtype_of(self) -> Converter | None:
        """The converter of the only field; None if there are more fields, or if it could lead to this record again."""
        only = self.fields[0].converter if len(self.fields) == 1 else None
        seen: set[Converter] = set()
        pending = [] if only is None else [only]
        while pending:
            part = pending.pop()
            if part is self:
                return None
            if part not in seen:
                seen.add(part)
                if isinstance(part, (Union, Alias)) or (isinstance(part, Record) and len(part.fields) == 1):
                    pending += part.parts()
        return only

    def knows_all(self, value: Any) -> bool:
        """Return whether there is a field for each key."""
        return not isinstance(value, Mapping) or {field.wire_name for field in self.fields}.issuperset(value)

    def _can_be(self, value: Sequence[Any]) -> bool:
        required = sum(field.required for field in self.fields)
        return required <= len(value) <= len(self.fields)

    def fits(self, value: Any) -> bool:
        if self._newtype_of is not None and self.is_newtype(value):
            return self._newtype_of.fits(value)
        if isinstance(value, Mapping):
            present = [field for field in self.fields if field.wire_name in value]
            if value and not present:
                return False
            # An internally tagged enum in serde: a field of the map names the variant.
            tags = (field for field in present if field.is_tag)
            return all(tag.converter.fits(value[tag.wire_name]) for tag in tags) and all(
                field in present or not field.required or _is_optional(field.converter) for field in self.fields
            )
        if isinstance(value, (list, tuple)):
            return self._can_be(value)
        return value is None and not self.fields


class Union(Converter):
    """A converter for a union, such as an enum with data in serde.

    The value is the name of a variant, a map from one name to the data, or a value for the first member that it fits.
    """

    def __init__(self, members: list[Converter], optional: bool) -> None:
        self._members = members
        self.optional = optional

    @cached_property
    def _variants(self) -> dict[str, Record]:
        return {member.name: member for member in self._members if isinstance(member, Record)}

    def parts(self) -> Iterable[Converter]:
        return self._members

    def __call__(self, value: Any) -> Any:
        if value is None and self.optional:
            return None
        if len(self._members) == 1:
            return self._members[0](value)
        if isinstance(value, str) and value in self._variants and self._variants[value].is_empty:
            return self._variants[value]({})
        if isinstance(value, Mapping) and len(value) == 1:
            ((key, data),) = value.items()
            if isinstance(key, str) and key in self._variants:
                return at(key, self._variants[key], data)
        fitting = [member for member in self._members if member.fits(value)]
        if not fitting:
            raise expected("a value for one member of the union", value)
        # A member that the value fits directly comes before a newtype, and one that has a field for every key first.
        direct = [member for member in fitting if not (isinstance(member, Record) and member.is_newtype(value))]
        knowing = (member for member in direct if not isinstance(member, Record) or member.knows_all(value))
        return next(knowing, (direct or fitting)[0])(value)

    def fits(self, value: Any) -> bool:
        if value is None and self.optional:
            return True
        return any(member.fits(value) for member in self._members) or (
            isinstance(value, str) and value in self._variants
        )


class Alias(Converter):
    """A converter for a named type, which may be a part of itself."""

    def __init__(self, find: Callable[[], Converter]) -> None:
        self._find = find

    @cached_property
    def meant(self) -> Converter:
        """The converter of the type that the name stands for."""
        return self._find()

    def __call__(self, value: Any) -> Any:
        return self.meant(value)

    def fits(self, value: Any) -> bool:
        return self.meant.fits(value)

    def parts(self) -> Iterable[Converter]:
        return (self.meant,)


def _is_optional(kind: Converter) -> bool:
    while isinstance(kind, Alias):
        kind = kind.meant
    return isinstance(kind, Union) and kind.optional
