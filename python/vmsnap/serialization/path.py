"""Places within a value, for errors, and the names of dataclass fields in a map."""

from dataclasses import Field, dataclass
from typing import Any

from vmsnap.errors import InvalidArgumentError

__all__ = ["Located", "NthKey", "wire_name"]

# A value that contains itself would have as many steps as there may be levels.
_MAX_STEPS = 20
_MAX_STEP_LENGTH = 60


class Located(Exception):  # noqa: N818  the base of two, both caught inside this package
    """A reason why a part of a value cannot be converted. Callers append the steps to the part, the innermost first."""

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
    """The index of a key that was read, used because errors never show contents of a fragment, such as the key."""

    index: int


def _step(step: object) -> str:
    if isinstance(step, NthKey):
        return f"[key {step.index}]"
    if isinstance(step, str) and step.isidentifier() and len(step) <= _MAX_STEP_LENGTH:
        return f".{step}"
    # Python refuses to convert an int of thousands of digits to text.
    if type(step) not in (str, bytes, int, float) or (isinstance(step, int) and step.bit_length() > 128):
        return f"[a {type(step).__qualname__}]"
    text = repr(step)
    return f"[{text if len(text) <= _MAX_STEP_LENGTH else text[:_MAX_STEP_LENGTH] + '...'}]"


def wire_name(field: "Field[Any]") -> str:
    """Return the key of a dataclass field in a map: its name, or ``metadata={"name": ...}`` (serde's rename)."""
    name = field.metadata.get("name", field.name)
    if not isinstance(name, str):
        raise InvalidArgumentError(f"metadata['name'] of the field {field.name} must be a str, not {name!r}")
    return name
