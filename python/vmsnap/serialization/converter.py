"""What builds a type of what was read: the base of all that do, and what they say where they cannot."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any

from vmsnap.serialization.path import Located

__all__ = ["Anything", "Converter", "Mismatch", "at", "expected"]


class Mismatch(Located):
    """Something in a value is not of the type asked for."""


class Converter(ABC):
    """Builds one type. It is made once and kept.

    Which member of a union a value is for is told by its outermost level alone (`fits`), so that nothing is tried twice
    and time stays in proportion to the value.
    """

    @abstractmethod
    def __call__(self, value: Any) -> Any:
        """Return what is built of `value`, or raise `Mismatch`."""

    @abstractmethod
    def fits(self, value: Any) -> bool:
        """Return whether `value` is meant for this type, as far as its outermost level tells."""

    def parts(self) -> "Iterable[Converter]":
        """Return the converters of its parts."""
        return ()


class Anything(Converter):
    """No type is asked for, or one that is the caller's own business: a class or function that gets the value."""

    def __init__(self, function: Callable[[Any], Any] | None = None) -> None:
        self.function = function

    def __call__(self, value: Any) -> Any:
        return value if self.function is None else self.function(value)

    def fits(self, _value: Any) -> bool:
        return True


def expected(what: str, value: object) -> Mismatch:
    """Return the error that something else was expected; it tells the type of the value, not the value."""
    found = "nothing (null)" if value is None else type(value).__name__
    return Mismatch(f"expected {what}, found {found}")


def at(step: object, convert: Converter, value: Any) -> Any:
    """Convert a part of a value; an error tells where that is."""
    try:
        return convert(value)
    except Mismatch as error:
        error.steps.append(step)
        raise
