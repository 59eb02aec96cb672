"""The base class of converters, which build a type from a decoded value, and their errors."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from vmsnap.serialization.path import Located

__all__ = ["Anything", "Converter", "Mismatch", "at", "expected"]


class Mismatch(Located):
    """A part of a value does not have the requested type."""


class Converter(ABC):
    """A converter for one type. It is created once and cached.

    The member of a union is chosen by the outermost level of the value alone (`fits`). So no part is converted twice,
    and the time is proportional to the size of the value.
    """

    @abstractmethod
    def __call__(self, value: Any) -> Any:
        """Return the object built from `value`, or raise `Mismatch`."""

    @abstractmethod
    def fits(self, value: Any) -> bool:
        """Return whether `value` fits this type, judged by its outermost level only."""

    def parts(self) -> "Iterable[Converter]":
        """Return the converters for the parts of a value."""
        return ()


class Anything(Converter):
    """A converter without a type of its own: it returns the value, or calls a class or function of the caller."""

    def __init__(self, function: Callable[[Any], Any] | None = None) -> None:
        self.function = function

    def __call__(self, value: Any) -> Any:
        return value if self.function is None else self.function(value)

    def fits(self, _value: Any) -> bool:
        return True


def expected(what: str, value: object) -> Mismatch:
    """Return the error for a value of another type. The text shows the type of the value, never the value."""
    found = "nothing (null)" if value is None else type(value).__name__
    return Mismatch(f"expected {what}, found {found}")


def at(step: object, convert: Converter, value: Any) -> Any:
    """Convert a part of a value. An error gets the step to that part."""
    try:
        return convert(value)
    except Mismatch as error:
        error.steps.append(step)
        raise
