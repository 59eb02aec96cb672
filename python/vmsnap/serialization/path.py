"""Where in a value something is, and what a dataclass' fields are called there."""

from dataclasses import Field, dataclass
from typing import Any

from vmsnap.errors import InvalidArgumentError

__all__ = ["Located", "NthKey", "wire_name"]

# Of what contains itself there would be as many as there may be levels.
_MAX_STEPS = 20
_MAX_STEP_LENGTH = 60


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


@dataclass(frozen=True)
class NthKey:
    """Stands for a key that was read: it is part of the contents, which no error tells."""

    index: int


def _step(step: object) -> str:
    if isinstance(step, NthKey):
        return f"[key {step.index}]"
    if isinstance(step, str) and step.isidentifier() and len(step) <= _MAX_STEP_LENGTH:
        return f".{step}"
    # Python refuses to write out an int of thousands of digits.
    if type(step) not in (str, bytes, int, float) or (isinstance(step, int) and step.bit_length() > 128):
        return f"[a {type(step).__qualname__}]"
    text = repr(step)
    return f"[{text if len(text) <= _MAX_STEP_LENGTH else text[:_MAX_STEP_LENGTH] + '...'}]"


def wire_name(field: "Field[Any]") -> str:
    """Return what a dataclass' field is called in a map: its name, or ``metadata={"name": ...}`` (serde's rename)."""
    name = field.metadata.get("name", field.name)
    if not isinstance(name, str):
        raise InvalidArgumentError(f"metadata['name'] of the field {field.name} is a text, not {name!r}")
    return name
