"""Fuzz `vmsnap.serialization.decode` with atheris: ``make fuzz`` runs this.

An input is a recipe. `Recipe` makes a type from it, and bytes: arbitrary ones, nearly valid CBOR, or a valid value with
some bytes changed. `decode` may return a value that can be encoded again, or raise `CorruptSnapshotError` with a short
text that a terminal can show. Everything else is a finding. ``tests/test_hostile_values.py`` also calls `try_recipe`,
with a few hundred inputs.
"""

import json
import struct
import sys
from dataclasses import dataclass
from datetime import UTC, date, datetime
from enum import Enum
from pathlib import Path
from typing import Any, Literal
from uuid import UUID

if __name__ == "__main__":
    import atheris

    with atheris.instrument_imports(include=["vmsnap"]):
        import vmsnap.serialization

import numpy as np
import vmsnap
from vmsnap.serialization import decode, encode

_MAX_TEXT_LENGTH = 2000
_MAX_ITEMS = 12
_MAX_DEPTH = 8


@dataclass
class Linked:
    """A record with a single field of its own type."""

    next: "Linked | None"


@dataclass
class Device:
    """A record like those in snapshots."""

    name: str
    registers: dict[int, bytes]
    flags: "set[Flag]"
    parts: "list[Device | Linked | int]"
    table: "np.ndarray | None" = None


class Flag(Enum):
    """Variants without data."""

    ON = 1
    OFF = "off"


_TYPES: list[Any] = [
    Linked,
    Device,
    Flag,
    dict[UUID, Any],
    dict[float, set[Any]],
    dict[tuple[int, ...], list[bytes]],
    frozenset[Any],
    set[tuple[Any, ...]],
    list[np.ndarray],
    np.ndarray[Any, np.dtype[np.float64]],
    Literal["a", 1, None],
    type(None),
    tuple[int, str],
    datetime | date | None | bytearray | Path,
]

# Values from which the first inputs are made.
VALUES: list[Any] = [
    None,
    [True, False, 0, -1, 2**64, -(2**80), 1.5, float("inf"), "text", b"bytes"],
    {"a": {1: [], (2, "x"): {}}, b"k": {1.5: frozenset({1, (2, 3)})}},
    {UUID(int=7), date(2024, 2, 29), datetime(2025, 1, 2, 3, 4, 5, 6, tzinfo=UTC)},
    [np.arange(6, dtype="<u4"), np.zeros((2, 0, 3)), np.array(1.5, "<f2"), np.ones((2, 2), ">i8")],
    {"name": "a", "registers": {0: b"\x01"}, "flags": [1, "off"], "parts": [{"next": None}, 3], "table": [1, 2]},
    {"next": {"next": {"next": None}}},
]

_TAGS = [0, 1, 2, 3, 37, 40, 258, 1004, 1040, *range(64, 88), 4, 28, 29, 35, 55799]


def _head(major: int, argument: int, size: int = 0) -> bytes:
    """Return the head of a data item, with at least `size` bytes for its argument."""
    if argument < 24 and not size:
        return bytes([major << 5 | argument])
    for info, width in ((24, 1), (25, 2), (26, 4), (27, 8)):
        if size <= width and argument < 1 << 8 * width:
            return bytes([major << 5 | info]) + argument.to_bytes(width, "big")
    raise AssertionError(argument)


class Recipe:
    """Decisions that are read from the bytes of an input. After their end, each decision is the first choice."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    def take(self, count: int) -> bytes:
        """Return that many bytes, or as many as are left."""
        self._at += count
        return self._data[self._at - count : self._at]

    def below(self, limit: int) -> int:
        """Return a number from 0 to `limit` - 1."""
        return int.from_bytes(self.take(1 if limit <= 256 else 8), "big") % limit

    def rest(self) -> bytes:
        """Return all bytes that are left."""
        return self.take(len(self._data))

    def input(self) -> tuple[bytes, Any, Literal["cbor", "json"] | None]:
        """Return bytes to decode, a type, and a format."""
        what = self.below(8)
        type = [None, *_TYPES][self.below(1 + len(_TYPES))]
        match what:
            case 0:
                return self.rest(), type, None
            case 1:
                return self.rest(), type, "cbor"
            case 2:
                return self.rest(), type, "json"
            case 3:
                value = VALUES[self.below(len(VALUES))]
                return self._changed(encode(value)), type, "cbor"
            case 4:
                value = VALUES[self.below(len(VALUES))]
                return self._changed(json.dumps(value, default=repr, skipkeys=True).encode()), type, None
            case 5:
                return self._changed(self.item()), type, "cbor"
            case _:
                return self.item(), type, "cbor"

    def _changed(self, data: bytes) -> bytes:
        """Change a few bytes, remove or repeat a part, or truncate."""
        for _ in range(1 + self.below(3)):
            at, to = sorted((self.below(len(data) + 1), self.below(len(data) + 1)))
            match self.below(5):
                case 0:
                    data = data[:at] + bytes([self.below(256)]) + data[at + 1 :]
                case 1:
                    data = data[:at] + data[to:]
                case 2:
                    data = data[:to] + data[at:]
                case 3:
                    data = data[:at]
                case _:
                    data = data[:at] + self.take(1 + self.below(8)) + data[at:]
        return data

    def item(self, depth: int = 1) -> bytes:
        """Return a data item that is mostly valid."""
        match self.below(12 if depth < _MAX_DEPTH else 6):
            case 0:
                return _head(self.below(2), self.below(1 << 64))
            case 1:
                return _head(self.below(2), self.below(256), 1 << self.below(4))
            case 2 | 3:
                return self._string()
            case 4:
                return self._float()
            case 5:
                return (
                    b"\xf4" if self.below(2) else [b"\xf5", b"\xf6", b"\xf7", b"\x80", b"\xa0", b"\xff"][self.below(6)]
                )
            case 6:
                return self._container(4, lambda: self.item(depth + 1))
            case 7 | 8:
                return self._container(5, lambda: self.item(depth + 2) + self.item(depth + 1))
            case 9:
                return _head(6, 258) + self._container(4, lambda: self.item(depth + 2))
            case 10:
                return _head(6, _TAGS[self.below(len(_TAGS))]) + self.item(depth + 1)
            case _:
                return self._tagged()

    def _float(self) -> bytes:
        special = [0.0, -0.0, float("nan"), float("inf"), 1e300, 2.0**63, 5e-324, -1.0]
        number = (
            special[self.below(len(special))] if self.below(2) else struct.unpack(">d", self.take(8).rjust(8, b"\0"))[0]
        )
        return b"\xfb" + struct.pack(">d", number)

    def _string(self) -> bytes:
        major = 2 + self.below(2)
        chunks = [self.take(self.below(20)) for _ in range(1 + self.below(3))]
        if major == 3 and self.below(8):
            chunks = [chunk.decode(errors="ignore").encode() for chunk in chunks]
        encoded = [_head(major, len(chunk)) + chunk for chunk in chunks]
        return encoded[0] if len(encoded) == 1 else bytes([major << 5 | 31]) + b"".join(encoded) + b"\xff"

    def _container(self, major: int, item: Any) -> bytes:
        items = [item() for _ in range(self.below(_MAX_ITEMS))]
        match self.below(8):
            case 0:
                return bytes([major << 5 | 31]) + b"".join(items) + b"\xff"
            case 1:
                return _head(major, self.below(1 << 64)) + b"".join(items)
            case _:
                return _head(major, len(items)) + b"".join(items)

    def _tagged(self) -> bytes:
        """Return a tagged item: a date, a big number, or a typed array."""
        match self.below(5):
            case 0:
                text = f"{self.below(10_000):04}-{self.below(14):02}-{self.below(33):02}"
                if self.below(2):
                    return _head(6, 1004) + _head(3, len(text)) + text.encode()
                zone = ["Z", "+00:00", "-23:59", "+00:00:01", "+24:00", ""][self.below(6)]
                text += f"T{self.below(25):02}:{self.below(61):02}:{self.below(62):02}{zone}"
                return _head(6, 0) + _head(3, len(text)) + text.encode()
            case 1:
                return _head(6, 1) + (self._float() if self.below(2) else _head(self.below(2), self.below(1 << 64)))
            case 2:
                number = self.take(self.below(20))
                return _head(6, 2 + self.below(2)) + _head(2, len(number)) + number
            case 3:
                return _head(6, 37) + _head(2, 16) + self.take(16).ljust(16, b"\0")
            case _:
                elements = bytes(8 * self.below(5))
                typed = _head(6, 64 + self.below(24)) + _head(2, len(elements)) + elements
                shape = [self.below(1 << 64) if self.below(8) == 7 else self.below(5) for _ in range(self.below(4))]
                parts = _head(4, len(shape)) + b"".join(_head(0, length) for length in shape) + typed
                return typed if self.below(2) else _head(6, [40, 1040][self.below(2)]) + _head(4, 2) + parts


def try_recipe(recipe: bytes) -> None:
    """Raise AssertionError if `decode` accepts or reports something wrong. Other exceptions pass through."""
    data, type, format = Recipe(recipe).input()
    for kind in (None, type):
        try:
            value = decode(data, kind, format=format)
        except vmsnap.CorruptSnapshotError as error:
            text = str(error)
            assert len(text) <= _MAX_TEXT_LENGTH, len(text)
            assert text.isprintable(), ascii(text)
            continue
        try:
            again = encode(value)
        except vmsnap.SerializationError:
            # A list that becomes a key may contain NaN, and a time may be outside the years of UTC.
            assert kind is not None or b"\xc0" in data
            continue
        # The encodings are compared, because NaN and arrays are not equal to themselves.
        assert encode(decode(again, format="cbor")) == again


def main() -> None:
    """Run atheris. Its options follow the name of the directory in which inputs are kept."""
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for index, value in enumerate(VALUES):
        (directory / f"cbor-{index}").write_bytes(b"\x01\x00" + encode(value))
        (directory / f"json-{index}").write_bytes(b"\x02\x00" + json.dumps(value, default=repr, skipkeys=True).encode())
    atheris.Setup(sys.argv, try_recipe)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
