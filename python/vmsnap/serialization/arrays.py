"""numpy arrays as typed arrays (RFC 8746) and back; numpy itself is needed only where there are some."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cbor2 import CBORTag

if TYPE_CHECKING:
    import numpy

__all__ = ["DECODERS", "tagged"]

# RFC 8746, 2.1, by numpy's names; without its 128-bit floats, which numpy has not.
_TAGS = {
    "|u1": 64,
    ">u2": 65,
    ">u4": 66,
    ">u8": 67,
    "<u2": 69,
    "<u4": 70,
    "<u8": 71,
    "|i1": 72,
    ">i2": 73,
    ">i4": 74,
    ">i8": 75,
    "<i2": 77,
    "<i4": 78,
    "<i8": 79,
    ">f2": 80,
    ">f4": 81,
    ">f8": 82,
    "<f2": 84,
    "<f4": 85,
    "<f8": 86,
}
_CLAMPED_UINT8 = 68
_ROW_MAJOR, _COLUMN_MAJOR = 40, 1040


def tagged(array: "numpy.ndarray[Any, Any]") -> CBORTag | None:
    """Return the typed array of the same type, byte order and shape, or None where RFC 8746 has none for its type."""
    tag = _TAGS.get(array.dtype.str)
    if tag is None:
        return None
    # tobytes() is in the order of rows, whatever the order in memory.
    elements = CBORTag(tag, array.tobytes())
    return elements if array.ndim == 1 else CBORTag(_ROW_MAJOR, [list(array.shape), elements])


def _decoder(dtype: str) -> Callable[[bytes, bool], "numpy.ndarray[Any, Any]"]:
    def decode(elements: bytes, _immutable: bool) -> "numpy.ndarray[Any, Any]":
        import numpy

        # A copy, for as the bytes' own it could not be written to.
        return numpy.frombuffer(elements, dtype=dtype).copy()

    return decode


def _shaped(parts: Any, _immutable: bool) -> "numpy.ndarray[Any, Any]":
    shape, elements = parts
    return elements.reshape(shape)  # type: ignore[no-any-return]


def _shaped_by_column(parts: Any, _immutable: bool) -> "numpy.ndarray[Any, Any]":
    shape, elements = parts
    return elements.reshape(shape, order="F")  # type: ignore[no-any-return]


#: By tag, for cbor2.
DECODERS: dict[int, Callable[[Any, bool], Any]] = {
    **{tag: _decoder(dtype) for dtype, tag in _TAGS.items()},
    _CLAMPED_UINT8: _decoder("|u1"),
    _ROW_MAJOR: _shaped,
    _COLUMN_MAJOR: _shaped_by_column,
}
