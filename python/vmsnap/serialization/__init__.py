"""Serialization of values: CBOR, or JSON as crosvm wrote it before March 2025.

To write a value, ``plain`` converts it to the types of the format. To read one into a requested type, ``build`` finds
the converters for that type: ``converter`` is their base, ``leaves`` has those for values without parts, ``containers``
and ``records`` the others. ``hints`` finds the types of fields, ``arrays`` converts numpy arrays, ``path`` names a
place within a value. cbor2 and the standard library encode and decode the bytes. `vmsnap._vmsnap.check_serialized`
checks the bytes before they are decoded, so that a decoder never gets bytes that could harm it.

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
        ``"cbor"`` or ``"json"``. JSON has fewer types: bytes and arrays become lists of numbers, UUIDs and times
        strings, sets lists, and keys strings. JSON cannot express NaN and infinities.
    default
        Called with an object of any other type. It returns an object of a supported type, or raises.
    as_list
        Write numpy arrays as (nested) lists, as serde expects a ``Vec``, instead of typed arrays.
    place
        The name of the value in errors.

    Returns
    -------
    bytes
        The serialized value. The bytes are the same in every process: members of a set are sorted, keys of a map keep
        their order.

    Raises
    ------
    SerializationError
        A part of the value cannot be written. The text names the part.
    InvalidArgumentError
        The format is unknown.
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
    """Serialize a value like `encode`. `place` is called only if an error needs the name."""
    try:
        plain = Plain(json=format == "json", default=default, as_list=as_list).value(value)
        return located(plain, lambda part: _serialized(part, format))
    except Unwritable as error:
        raise SerializationError(f"{place()} cannot be serialized: {error}") from error
    except VmsnapError:
        raise
    except Exception as error:
        # The error comes from the caller's code, such as `default` or a property.
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
        raise Unwritable(f"it could not be read back: {error}") from error
    return data


def decode(data: bytes, type: Any = None, *, format: "_Format | None" = None, place: str = "the value") -> Any:
    """Decode a serialized value.

    Parameters
    ----------
    data
        Exactly one value in CBOR or JSON, with nothing before and nothing after it.
    type
        The type of the result, as for `SnapshotReader.read_fragment`.
    format
        ``"cbor"`` or ``"json"``. By default it is detected, except that a JSON value which is only a number needs it.
    place
        The name of the value in errors.

    Raises
    ------
    CorruptSnapshotError
        The bytes are not one value of the format, or the value does not fit `type`.
    InvalidArgumentError
        The format is unknown, or `type` cannot be built from a value.
    UnsupportedFormatError
        The value contains typed arrays, and numpy is not installed.
    """
    # First, because a type without a converter is an error for any data.
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
    """Decode a value of the format that `_vmsnap.check_serialized` returned for `data`."""
    value = _decode_cbor(data, place) if format == "cbor" else json.loads(data)
    if build is None:
        return value
    try:
        return build(value)
    except Mismatch as error:
        raise CorruptSnapshotError(f"{place()} does not have the requested type: {error}") from None
    except Exception as error:
        # The error comes from the caller's code, such as a callable or a constructor.
        error.add_note(f"while {place()} was read")
        raise


def _decode_cbor(data: bytes, place: Callable[[], str]) -> Any:
    try:
        return cbor2.loads(data, semantic_decoders=_TAGS, allow_duplicate_keys=False)
    except cbor2.CBORDecodeError as error:
        cause = error.__cause__
        # cbor2 wraps every exception of a tag's decoder, even KeyboardInterrupt. These say nothing about the bytes.
        if cause is not None and (isinstance(cause, (MemoryError, RecursionError)) or not isinstance(cause, Exception)):
            raise cause from None
        if isinstance(cause, ImportError):
            text = f"{place()} contains typed arrays, which need numpy: pip install 'vmsnap[numpy]'"
            raise UnsupportedFormatError(text) from error
        text = f"{place()} does not contain a serialized value: {_reason(error)}, before byte {_offset_of_error(data)}"
        raise CorruptSnapshotError(text) from None


def _reason(error: cbor2.CBORDecodeError) -> str:
    """Return the reason without data from the fragment, which cbor2 and datetime quote after the last colon."""
    if "Duplicate map key" in str(error):
        return "a key of a map comes twice"
    parts = (str(part).partition(": ")[0] for part in (error, error.__cause__) if part is not None)
    return ": ".join(parts)


def _offset_of_error(data: bytes) -> int:
    """Return how many bytes cbor2 had read when it failed. It reads them again one by one, as it does not report it."""
    file = BytesIO(data)
    with suppress(cbor2.CBORDecodeError):
        cbor2.load(file, read_size=1, semantic_decoders=_TAGS, allow_duplicate_keys=False)
    return file.tell()


def _set(immutable: bool) -> tuple[None, Callable[[Any], frozenset[Any] | set[Any]]]:
    def of(members: tuple[Any, ...]) -> frozenset[Any] | set[Any]:
        result = frozenset(members) if immutable else set(members)
        if len(result) != len(members):
            raise ValueError("a member of a set comes twice")
        return result

    return None, of


# cbor2 itself decodes the other tags that check_serialized accepts: times, big numbers, UUIDs.
_TAGS: Mapping[int, Any] = {
    258: cbor2.shareable_decoder(name="set", immutable=True)(_set),
    **arrays.DECODERS,
}
