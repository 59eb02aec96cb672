"""numpy arrays as typed arrays (RFC 8746), and from typed arrays or lists. numpy is imported only when it is needed."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cbor2 import CBORTag

if TYPE_CHECKING:
    import numpy

__all__ = ["DECODERS", "as_array", "as_scalar", "is_array", "tagged"]

# The tags of RFC 8746, section 2.1, by the names of numpy. 128-bit floats are missing, because numpy has no such type.
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
    """Return the typed array of the same type, byte order and shape, or None if RFC 8746 has no tag for the type."""
    tag = _TAGS.get(array.dtype.str)
    if tag is None:
        return None
    # tobytes() returns the elements in row-major order for any order in memory.
    elements = CBORTag(tag, array.tobytes())
    return elements if array.ndim == 1 else CBORTag(_ROW_MAJOR, [list(array.shape), elements])


def _decoder(dtype: str) -> Callable[[bytes, bool], "numpy.ndarray[Any, Any]"]:
    def decode(elements: bytes, _immutable: bool) -> "numpy.ndarray[Any, Any]":
        import numpy

        # Without a copy the array would be read-only, like the bytes.
        return numpy.frombuffer(elements, dtype=dtype).copy()

    return decode


def _shaped(parts: Any, _immutable: bool) -> "numpy.ndarray[Any, Any]":
    shape, elements = parts
    return elements.reshape(shape)  # type: ignore[no-any-return]


def _shaped_by_column(parts: Any, _immutable: bool) -> "numpy.ndarray[Any, Any]":
    shape, elements = parts
    return elements.reshape(shape, order="F")  # type: ignore[no-any-return]


#: Decoders by tag, for cbor2.
DECODERS: dict[int, Callable[[Any, bool], Any]] = {
    **{tag: _decoder(dtype) for dtype, tag in _TAGS.items()},
    _CLAMPED_UINT8: _decoder("|u1"),
    _ROW_MAJOR: _shaped,
    _COLUMN_MAJOR: _shaped_by_column,
}


def is_array(value: object) -> bool:
    """Return whether a value is a numpy array, without importing numpy."""
    return type(value).__module__ == "numpy" and type(value).__name__ == "ndarray"


# The kinds of dtype that each requested kind is built from, as for the types of Python.
_BUILT_OF = {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}


def as_array(value: Any, scalar: Any) -> Any:
    """Return a list or an array as an array of numbers or bools, None if that is not possible.

    No number changes, except for the precision of floats.

    Parameters
    ----------
    value
        A list or an array; for any other object the result is None.
    scalar
        The requested numpy type of the elements, a base of several types (``numpy.floating``), or None for any.
    """
    import numpy

    if not isinstance(value, (list, numpy.ndarray)):
        return None
    kinds = _kinds(value) if isinstance(value, list) else set()
    # numpy would pad all strings to the width of the longest, and convert bools among numbers to numbers.
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
    # Above this limit some integers have no exact float.
    limit = 2 ** (numpy.finfo(dtype).nmant + 1)
    large = (array > limit) | (array < -limit)
    exact = all(
        numpy.isfinite(made) and int(made) == int(given)
        for made, given in zip(result[large], array[large], strict=True)
    )
    return result if exact else None


def as_scalar(value: Any, scalar: Any) -> Any:
    """Return a number, string or bytes as the numpy scalar type `scalar`, None if that is not possible."""
    if isinstance(value, (str, bytes)):
        return scalar(value) if issubclass(scalar, type(value)) else None
    array = as_array([value], scalar) if isinstance(value, (bool, int, float)) else None
    return None if array is None else array[0]


def _kinds(items: list[Any]) -> set[type]:
    """Return the types of all elements in nested lists. An array counts as the Python type of its elements."""
    import numpy

    kinds = set(map(type, items))
    if list in kinds:
        kinds.remove(list)
        kinds.update(*(_kinds(item) for item in items if type(item) is list))
    if numpy.ndarray in kinds:
        kinds.remove(numpy.ndarray)
        kinds.update({"b": bool, "f": float}.get(item.dtype.kind, int) for item in items if is_array(item))
    return kinds
