"""Where in a value something is, and what a dataclass' fields are called there."""

from dataclasses import Field
from typing import Any

__all__ = ["Located", "shortened", "wire_name"]

# Of what contains itself there would be as many as there may be levels.
_MAX_STEPS = 20
# Of one key, and of another library's text that may quote what it was given.
_MAX_STEP_LENGTH = 60
_MAX_REASON_LENGTH = 240


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


def shortened(text: str, length: int = _MAX_REASON_LENGTH) -> str:
    """Return `text`, or its beginning where it is long: what a stranger wrote is quoted in few words."""
    return text if len(text) <= length else f"{text[:length]}..."


def _step(step: object) -> str:
    if isinstance(step, str):
        name = shortened(step, _MAX_STEP_LENGTH)
        return f".{name}" if step.isidentifier() else f"[{name!r}]"
    if isinstance(step, bytes):
        return f"[{step[:_MAX_STEP_LENGTH]!r}{'...' if len(step) > _MAX_STEP_LENGTH else ''}]"
    # Python refuses to write out an int of thousands of digits.
    if isinstance(step, float) or (isinstance(step, int) and step.bit_length() <= 128):
        return f"[{step!r}]"
    return f"[a {type(step).__qualname__}]"


def wire_name(field: "Field[Any]") -> str:
    """Return what a dataclass' field is called in a map: its name, or ``metadata={"name": ...}`` (serde's rename)."""
    name = field.metadata.get("name", field.name)
    if not isinstance(name, str):
        raise TypeError(f"metadata['name'] of the field {field.name} is a text, not {name!r}")
    return name
