"""numpy arrays as typed arrays (RFC 8746) and back, and of lists; numpy itself is needed only where there are some."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cbor2 import CBORTag

if TYPE_CHECKING:
    import numpy

__all__ = ["DECODERS", "as_array", "as_scalar", "is_array", "tagged"]

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


def is_array(value: object) -> bool:
    """Return whether a value is an array, without importing numpy for it."""
    return type(value).__module__ == "numpy" and type(value).__name__ == "ndarray"


# By the kind of the dtype asked for, the kinds that it is built of: as for Python's own types.
_BUILT_OF = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}


def as_array(value: Any, scalar: Any) -> Any:
    """Return a list or an array as an array of numbers, or bools; None if it is none.

    `scalar` is the type asked for, or a base of several (``numpy.floating``), or None. No number becomes another one,
    but for the precision of floats.
    """
    import numpy

    if not isinstance(value, (list, numpy.ndarray)):
        return None
    kinds = _kinds(value) if isinstance(value, list) else set()
    # numpy would make each text as wide as the widest, and of bools among numbers numbers.
    if not (kinds <= {int, float} or kinds == {bool}):
        return None
    array = numpy.asarray(value)
    if array.dtype.kind not in _BUILT_OF or (kinds == {int} and array.dtype.kind == "f"):
        return None
    if scalar is None or issubclass(array.dtype.type, scalar):
        return array
    dtype = numpy.dtype(scalar) if scalar in numpy.sctypeDict.values() else None
    if dtype is None or (array.size and array.dtype.kind not in _BUILT_OF.get(dtype.kind, "")):
        return None
    with numpy.errstate(over="ignore"):
        result = array.astype(dtype)
    if dtype.kind != "f":
        return result if (result == array).all() else None
    if array.dtype.kind == "f":
        return result if (numpy.isinf(result) == numpy.isinf(array)).all() else None
    # Beyond so many not every integer has a float.
    limit = 2 ** (numpy.finfo(dtype).nmant + 1)
    large = (array > limit) | (array < -limit)
    exact = all(
        numpy.isfinite(made) and int(made) == int(given)
        for made, given in zip(result[large], array[large], strict=True)
    )
    return result if exact else None


def as_scalar(value: Any, scalar: Any) -> Any:
    """Return a number, a text or bytes as one of numpy's, None if it is none."""
    if isinstance(value, (str, bytes)):
        return scalar(value) if issubclass(scalar, type(value)) else None
    array = as_array([value], scalar) if isinstance(value, (bool, int, float)) else None
    return None if array is None else array[0]


def _kinds(items: list[Any]) -> set[type]:
    """Return the types of all that lists in a list hold; arrays do as what they are made of."""
    import numpy

    kinds = set(map(type, items))
    if list in kinds:
        kinds.remove(list)
        kinds.update(*(_kinds(item) for item in items if type(item) is list))
    if numpy.ndarray in kinds:
        kinds.remove(numpy.ndarray)
        kinds.update({"b": bool, "f": float}.get(item.dtype.kind, int) for item in items if is_array(item))
    return kinds
