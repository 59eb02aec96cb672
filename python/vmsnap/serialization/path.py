"""Where in a value something is, and what a dataclass' fields are called there."""

from dataclasses import Field
from typing import Any

__all__ = ["Located", "wire_name"]

# Of what contains itself there would be as many as there may be levels.
_MAX_STEPS = 20


class Located(Exception):  # noqa: N818  the base of two, each caught where it is made an error
    """Something about a part of a value. The steps to it are added on the way up, the innermost first."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason
        self.steps: list[object] = []

    def __str__(self) -> str:
        if not self.steps:
            return self.reason
        steps = [_step(step) for step in reversed(self.steps)]
        if len(steps) > _MAX_STEPS:
            steps[_MAX_STEPS:] = [" and deeper"]
        return f"at {''.join(steps).removeprefix('.')}: {self.reason}"


def _step(step: object) -> str:
    if isinstance(step, str):
        return f".{step}" if step.isidentifier() else f"[{step!r}]"
    return f"[{step!r}]" if isinstance(step, (int, float, bytes)) else f"[a {type(step).__qualname__}]"


def wire_name(field: "Field[Any]") -> str:
    """Return what a dataclass' field is called in a map: its name, or ``metadata={"name": ...}`` (serde's rename)."""
    name = field.metadata.get("name", field.name)
    if not isinstance(name, str):
        raise TypeError(f"metadata['name'] of the field {field.name} is a text, not {name!r}")
    return name
