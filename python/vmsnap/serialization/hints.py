"""The types of the fields of classes."""

import dataclasses
import typing
from typing import Any, TypeVar

__all__ = ["alias_value", "field_types", "is_init_var"]


def is_init_var(hint: Any) -> bool:
    """Return whether a type hint is an `InitVar`: only a constructor argument, not an attribute."""
    return hint is dataclasses.InitVar or isinstance(hint, dataclasses.InitVar)


def alias_value(alias: Any) -> Any:
    """Return the type that a `type` statement's alias stands for, with any type arguments substituted."""
    origin = typing.get_origin(alias)
    if origin is None:
        return alias.__value__
    return _substituted(origin.__value__, dict(zip(origin.__type_params__, typing.get_args(alias), strict=False)))


def field_types(cls: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Return the types of the fields of a class, with the type arguments of a generic class substituted."""
    hints = typing.get_type_hints(cls)
    bindings: dict[Any, dict[Any, Any]] = {}
    _bind(cls, arguments, bindings)

    def bound(name: str, hint: Any) -> Any:
        # Look in the class that defines the field: a base class may use a type variable of the same name.
        owner = next((base for base in cls.__mro__ if name in getattr(base, "__annotations__", ())), cls)
        return _substituted(hint, bindings.get(owner, {}))

    return {name: bound(name, hint) for name, hint in hints.items()}


def _bind(cls: Any, arguments: tuple[Any, ...], bindings: dict[Any, dict[Any, Any]]) -> None:
    own = bindings.setdefault(cls, dict(zip(getattr(cls, "__parameters__", ()), arguments, strict=False)))
    for base in getattr(cls, "__orig_bases__", ()):
        origin = typing.get_origin(base)
        if isinstance(origin, type) and origin is not typing.Generic:
            _bind(origin, tuple(_substituted(argument, own) for argument in typing.get_args(base)), bindings)


def _substituted(hint: Any, bindings: dict[Any, Any]) -> Any:
    if isinstance(hint, dataclasses.InitVar):
        return dataclasses.InitVar(_substituted(hint.type, bindings))
    if isinstance(hint, TypeVar):
        return bindings.get(hint, hint)
    variables = () if isinstance(hint, type) else getattr(hint, "__parameters__", ())
    return hint[tuple(bindings.get(variable, variable) for variable in variables)] if variables else hint
