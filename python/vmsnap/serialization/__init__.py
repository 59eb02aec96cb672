"""Values as bytes and back: CBOR, or JSON as crosvm wrote it before March 2025.

Writing, ``plain`` turns a value into what the format has. Reading, ``build`` finds what builds the type that is asked
for: ``converter`` and ``leaves`` (what has no parts), ``containers``, ``records``; ``hints`` knows the types of fields.
``arrays`` are numpy's, ``path`` says where in a value something is. The bytes themselves are cbor2's and the standard
library's work; whatever is to be read is looked at by `vmsnap._vmsnap.check_serialized` first, so that no decoder sees
what could harm it.

>>> from vmsnap.serialization import decode, encode
>>> data = encode({"ns": 12, "host": "a"})
>>> data.hex()
'a2626e730c64686f73746161'
>>> decode(data)
{'ns': 12, 'host': 'a'}
"""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from io import BytesIO
from typing import TYPE_CHECKING, Any, Literal, cast

import cbor2

from vmsnap import _vmsnap
from vmsnap.errors import CorruptSnapshotError, SerializationError, UnsupportedFormatError, VmsnapError
from vmsnap.serialization import arrays
from vmsnap.serialization.build import converter
from vmsnap.serialization.converter import Mismatch
from vmsnap.serialization.plain import Plain, Unwritable, located

__all__ = ["decode", "encode", "format_of"]

if TYPE_CHECKING:
    _Format = Literal["cbor", "json"]


def encode(
    value: object,
    *,
    format: "_Format" = "cbor",
    default: Callable[[Any], object] | None = None,
    as_list: bool = False,
    place: str = "the value",
) -> bytes:
    """Serialize a value.

    Parameters
    ----------
    value
        None, bool, int, float, str, anything bytes-like, lists, tuples, named tuples, sets, dicts, dataclasses, enums,
        UUIDs, dates and datetimes with a time zone, paths, numpy scalars and arrays; nested up to 127 levels.
    format
        ``"cbor"`` or ``"json"``. JSON has less: bytes and arrays become lists of numbers, UUIDs and times texts, sets
        lists, keys texts; NaN and infinities it has not.
    default
        Called with what is none of these; returns something that is, or raises.
    as_list
        Write numpy arrays as (nested) lists, as serde expects a ``Vec``, instead of typed arrays.
    place
        What errors name.

    Returns
    -------
    bytes
        One value, the same bytes in every process: members of a set in an order of their own, keys of a map in theirs.

    Raises
    ------
    SerializationError
        Something in the value cannot be written. The text says where in the value.
    InvalidArgumentError
        There is no such format.
    """
    return encode_at(lambda: place, value, format=format, default=default, as_list=as_list)


def encode_at(
    place: Callable[[], str],
    value: object,
    *,
    format: "_Format",
    default: Callable[[Any], object] | None,
    as_list: bool,
) -> bytes:
    """`encode`, with the place found out when an error names it."""
    try:
        plain = Plain(json=format == "json", default=default, as_list=as_list).value(value)
        return located(plain, lambda part: _serialized(part, format))
    except Unwritable as error:
        raise SerializationError(f"{place()} cannot be serialized: {error}") from error
    except VmsnapError:
        raise
    except Exception as error:
        # From the caller's own code: `default`, a property.
        error.add_note(f"while {place()} was serialized")
        raise


def _serialized(plain: object, format: str) -> bytes:
    try:
        if format == "json":
            data = json.dumps(plain, ensure_ascii=False, allow_nan=False, separators=(",", ":")).encode()
        else:
            data = cbor2.dumps(plain)
    except (cbor2.CBOREncodeError, ValueError) as error:
        raise Unwritable(str(error)) from error
    try:
        _vmsnap.check_serialized(data, format, "it")
    except CorruptSnapshotError as error:
        raise Unwritable(f"it would not read back: {error}") from error
    return data


def decode(data: bytes, type: Any = None, *, format: "_Format | None" = None, place: str = "the value") -> Any:
    """Return the value that `data` is.

    Parameters
    ----------
    data
        One value in CBOR or JSON, nothing before and nothing after it.
    type
        What to build of it, see `SnapshotReader.read_fragment`.
    format
        ``"cbor"`` or ``"json"``; found out where none is given. Only a bare number in JSON cannot be.
    place
        What errors name.

    Raises
    ------
    CorruptSnapshotError
        It is no such value, or not one that `type` can be built of.
    InvalidArgumentError
        There is no such format, or no way to build `type`.
    UnsupportedFormatError
        It has typed arrays, and numpy is not installed.
    """
    # First, for what cannot be built cannot be built of anything.
    build = None if type is None else converter(type)
    return decode_checked(data, _vmsnap.check_serialized(data, format, place), build, lambda: place)


def format_of(data: bytes) -> "_Format | None":
    """Return the format of the one serialized value that `data` holds; None if it holds anything else.

    A bare number in JSON cannot be told from CBOR, and counts as CBOR.
    """
    try:
        return cast("_Format", _vmsnap.check_serialized(data, None, "the data"))
    except CorruptSnapshotError:
        return None


def decode_checked(data: bytes, format: str, build: Callable[[Any], Any] | None, place: Callable[[], str]) -> Any:
    """Return the value that `data` is, which `_vmsnap.check_serialized` found to be one of that format."""
    value = _decode_cbor(data, place) if format == "cbor" else json.loads(data)
    if build is None:
        return value
    try:
        return build(value)
    except Mismatch as error:
        raise CorruptSnapshotError(f"{place()} is not of the type asked for: {error}") from None
    except Exception as error:
        # From the caller's own code: a callable, a constructor.
        error.add_note(f"while {place()} was read")
        raise


def _decode_cbor(data: bytes, place: Callable[[], str]) -> Any:
    try:
        return cbor2.loads(data, semantic_decoders=_TAGS, allow_duplicate_keys=False)
    except cbor2.CBORDecodeError as error:
        cause = error.__cause__
        # cbor2 makes whatever a tag's decoder raises an error of its own, Ctrl-C too. These are not the bytes' fault.
        if cause is not None and (isinstance(cause, (MemoryError, RecursionError)) or not isinstance(cause, Exception)):
            raise cause from None
        if isinstance(cause, ImportError):
            text = f"{place()} has typed arrays, which need numpy: pip install 'vmsnap[numpy]'"
            raise UnsupportedFormatError(text) from error
        text = f"{place()} does not contain a serialized value: {_reason(error)}, before byte {_offset_of_error(data)}"
        raise CorruptSnapshotError(text) from None


def _reason(error: cbor2.CBORDecodeError) -> str:
    """Return what is wrong, without what was read: cbor2 and datetime quote it after a last colon."""
    if "Duplicate map key" in str(error):
        return "a key of a map comes twice"
    parts = (str(part).partition(": ")[0] for part in (error, error.__cause__) if part is not None)
    return ": ".join(parts)


def _offset_of_error(data: bytes) -> int:
    """Return how many bytes cbor2 had read when it failed. It does not tell, so it has to read them one by one."""
    file = BytesIO(data)
    with suppress(cbor2.CBORDecodeError):
        cbor2.load(file, read_size=1, semantic_decoders=_TAGS, allow_duplicate_keys=False)
    return file.tell()


def _set(immutable: bool) -> tuple[None, Callable[[Any], frozenset[Any] | set[Any]]]:
    def of(members: tuple[Any, ...]) -> frozenset[Any] | set[Any]:
        result = frozenset(members) if immutable else set(members)
        if len(result) != len(members):
            raise ValueError("a set has a member twice")
        return result

    return None, of


# The other tags that check_serialized lets pass are as cbor2 reads them: times, big numbers, UUIDs.
_TAGS: Mapping[int, Any] = {
    258: cbor2.shareable_decoder(name="set", immutable=True)(_set),
    **arrays.DECODERS,
}
