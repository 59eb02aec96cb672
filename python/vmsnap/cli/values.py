"""Decoded values as readable text, and as JSON."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from datetime import date
from typing import Any, TypeGuard
from uuid import UUID

from vmsnap.cli.hexdump import hexdump
from vmsnap.cli.terminal import printable

# Larger integers tend to be addresses, masks and flags, which are easier to read in hexadecimal.
_HEX_FROM = 1 << 16
# Python refuses to convert much longer integers to decimal digits, because it would take too long.
_DECIMAL_BITS = 4096
# The longest byte string that is shown beside its key.
_SHORT_BYTES = 16
_LINE_COLUMNS = 76
_INDENT = "  "
# Longer values are cut off unless --full is given.
_SHOWN_BYTES = 512
_SHOWN_NUMBERS = 512


def json_value(value: Any) -> Any:
    """Return a value as JSON can express it.

    Byte strings become ``{"hex": "..."}``, floats that JSON lacks ``"NaN"``, ``"inf"`` and ``"-inf"``, maps with a key
    that is not text lists of ``[key, value]``, sets lists, arrays nested lists, UUIDs and times text, and integers of
    more than 4096 bits hexadecimal text.
    """
    match value:
        case int() if value.bit_length() > _DECIMAL_BITS:
            return f"{value:#x}"
        case None | bool() | int() | str():
            return value
        case float():
            return value if math.isfinite(value) else _float(value)
        case bytes():
            return {"hex": value.hex()}
        case Mapping():
            if all(isinstance(key, str) for key in value):
                return {key: json_value(each) for key, each in value.items()}
            return [[json_value(key), json_value(each)] for key, each in value.items()]
        case list() | tuple():
            return [json_value(each) for each in value]
        case AbstractSet():
            return [json_value(each) for each in _sorted(value)]
        case date():
            return value.isoformat()
        case UUID():
            return str(value)
        case _ if _is_array(value):
            return json_value(value.tolist())
        case _:
            return str(value)


def value_lines(value: Any, *, full: bool = False) -> Iterator[str]:
    """Give a value as lines of text.

    Parameters
    ----------
    value
        The decoded value.
    full
        Whether nothing is cut off.
    """
    short = _short(value)
    if short is not None:
        yield short
        return
    if _is_array(value) or _is_numbers(value) or isinstance(value, bytes | AbstractSet):
        yield _title(value)
    yield from _long(value, full)


def _is_array(value: object) -> bool:
    # numpy may not be installed: then no value is an array.
    return hasattr(value, "dtype") and hasattr(value, "shape")


def _float(value: float) -> str:
    return "NaN" if math.isnan(value) else repr(value)


def _integer(value: int) -> str:
    if abs(value) < _HEX_FROM:
        return str(value)
    return f"{value} ({value:#x})" if value.bit_length() <= _DECIMAL_BITS else f"{value:#x}"


def _text(value: str) -> str:
    escaped = value.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{printable(escaped)}"'


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float)


def _key(key: Any) -> str:
    if isinstance(key, str):
        return key if re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", key) else _text(key)
    return _short(key) or _flow(key)


def _flow(value: Any) -> str:
    """Return a value in one line, however long."""
    match value:
        case bytes():
            return f"h'{value.hex()}'"
        case list():
            return f"[{', '.join(map(_flow, value))}]"
        case tuple():
            return f"({', '.join(map(_flow, value))}{',' if len(value) == 1 else ''})"
        case Mapping():
            return "{" + ", ".join(f"{_key(key)}: {_flow(each)}" for key, each in value.items()) + "}"
        case AbstractSet():
            return f"set {{{', '.join(map(_flow, _sorted(value)))}}}"
        case _:
            return _scalar(value)


def _scalar(value: Any) -> str:
    match value:
        case None:
            return "null"
        case bool():
            return str(value).lower()
        case int():
            return _integer(value)
        case float():
            return _float(value)
        case str():
            return _text(value)
        case date():
            return value.isoformat()
        case UUID():
            return f"uuid {value}"
        case _:
            return printable(repr(value))


def _short(value: Any) -> str | None:
    """Return a value that fits beside its key, None for one that needs lines of its own."""
    match value:
        case bytes():
            return _flow(value) if len(value) <= _SHORT_BYTES else None
        case list() | tuple() | AbstractSet():
            if not value:
                return _flow(value)
            if len(value) > _LINE_COLUMNS // 3 or not all(map(_is_plain, value)):
                return None
            line = _flow(value)
            return line if len(line) <= _LINE_COLUMNS else None
        case Mapping():
            return None if value else "{}"
        case _:
            return None if _is_array(value) else _scalar(value)


def _is_plain(value: object) -> bool:
    return not isinstance(value, bytes | list | tuple | Mapping | AbstractSet) and not _is_array(value)


def _long(value: Any, full: bool) -> Iterator[str]:
    match value:
        case bytes():
            yield from _byte_lines(value, full)
        case Mapping():
            for key, each in value.items():
                yield from _member(_key(key) + ":", each, full)
        case AbstractSet():
            for each in _sorted(value):
                yield from _member("-", each, full)
        case list() | tuple() if all(map(_is_number, value)):
            yield from _number_lines(value, full)
        case list() | tuple():
            for each in value:
                yield from _member("-", each, full)
        case _:
            yield from _array_lines(value, full)


def _member(head: str, value: Any, full: bool) -> Iterator[str]:
    short = _short(value)
    if short is not None:
        yield f"{head} {short}"
        return
    lines = _long(value, full)
    if head == "-" and isinstance(value, list | tuple | Mapping | AbstractSet) and not _is_numbers(value):
        # As in YAML: the first line beside the dash, the others below it.
        yield f"- {next(lines)}"
    else:
        yield f"{head} {_title(value)}".rstrip()
    yield from (_INDENT + line for line in lines)


def _is_numbers(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_is_number, value))


def _title(value: Any) -> str:
    """Return the text beside the key of a value whose lines follow below."""
    match value:
        case bytes():
            return f"{len(value)} bytes"
        case list() | tuple() if _is_numbers(value):
            return f"{len(value)} numbers"
        case list() | tuple():
            return f"{len(value)} item{'' if len(value) == 1 else 's'}"
        case AbstractSet():
            return f"set of {len(value)}"
        case Mapping():
            return ""
        case _:
            shape = " x ".join(map(str, value.shape)) or "no dimensions"
            return f"array of {value.dtype}, {shape}"


def _byte_lines(value: bytes, full: bool) -> Iterator[str]:
    shown = len(value) if full else _SHOWN_BYTES
    # With short offsets it fits into 80 columns three levels deep.
    yield from hexdump([value[:shown]], end=False, digits=4 if len(value) <= 1 << 16 else 8)
    yield from _rest(len(value) - shown, "bytes")


def _number_lines(values: Iterable[float], full: bool) -> Iterator[str]:
    """Give numbers side by side, each line with the index of its first."""
    values = list(values)
    shown = values if full else values[:_SHOWN_NUMBERS]
    digits = len(str(len(values)))
    line, start = "", 0
    for index, cell in enumerate(map(_scalar, shown)):
        if line and len(line) + len(cell) + 2 > _LINE_COLUMNS - digits - 3:
            yield f"[{start:>{digits}}] {line}"
            line, start = "", index
        line = f"{line}, {cell}" if line else cell
    yield f"[{start:>{digits}}] {line}"
    yield from _rest(len(values) - len(shown), "numbers")


def _array_lines(value: Any, full: bool) -> Iterator[str]:
    import numpy as np

    limit = value.size if full else _SHOWN_NUMBERS
    yield from np.array2string(value, threshold=limit, max_line_width=_LINE_COLUMNS).splitlines()


def _rest(count: int, unit: str) -> Iterator[str]:
    if count > 0:
        yield f"... {count} more {unit} (--full shows them)"


def _sorted(values: AbstractSet[Any]) -> list[Any]:
    """Return the members of a set in the same order in every run."""
    return sorted(values, key=lambda value: (type(value).__name__, _flow(value)))
