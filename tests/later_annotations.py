"""Types whose annotations are evaluated later, and one whose annotation names an undefined type."""

from __future__ import annotations

from dataclasses import KW_ONLY, InitVar, dataclass, field
from typing import ClassVar, Generic, TypeVar

T = TypeVar("T")


@dataclass
class Tree:
    name: str
    children: list[Tree] = field(default_factory=list)
    parent: Tree | None = None
    count: ClassVar[int] = 0


@dataclass
class Scaled:
    _: KW_ONLY
    scale: InitVar[int]
    value: int

    def __post_init__(self, scale: int) -> None:
        self.value *= scale


@dataclass
class Pair(Generic[T]):
    one: T
    other: list[T]


@dataclass
class Unresolved:
    part: Nowhere  # noqa: F821
