"""The one encoding of vmsnap's own metadata as CBOR. Section 4 of ``docs/format.md``, RFC 8949."""

from __future__ import annotations

from vmsnap_floe import FormatError

MAX_DEPTH = 16


def decode(data: bytes) -> object:
    """Return the one item in the data, or raise `FormatError` if anything is not encoded as section 4 says."""
    return _Decoder(data).whole()


def _malformed(text: str) -> FormatError:
    return FormatError("corrupt", text)


class _Decoder:
    """Floats become None: no known key takes them."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._position = 0

    def whole(self) -> object:
        item = self._item(1)
        if self._position != len(self._data):
            raise _malformed("bytes after the CBOR item")
        return item

    def _take(self, count: int) -> bytes:
        data = self._data[self._position : self._position + count]
        if len(data) != count:
            raise _malformed("the CBOR item is cut off")
        self._position += count
        return data

    def _head(self) -> tuple[int, int, int]:
        """Return major type, additional information and argument, which must be in its shortest form."""
        major, info = divmod(self._take(1)[0], 32)
        if info < 24:
            return major, info, info
        if info > 27:
            raise _malformed("a CBOR item has no definite length, or is not well-formed")
        argument = int.from_bytes(self._take(1 << (info - 24)), "big")
        # A float's argument is its bits, whatever they are.
        if argument < (24, 1 << 8, 1 << 16, 1 << 32)[info - 24] and not (major == 7 and info > 24):
            raise _malformed("a CBOR number or length is not in its shortest form")
        return major, info, argument

    def _item(self, depth: int) -> object:
        if depth > MAX_DEPTH:
            raise _malformed("CBOR items are nested too deep")
        major, info, argument = self._head()
        match major:
            case 0:
                return argument
            case 1:
                return -1 - argument
            case 2:
                return self._take(argument)
            case 3:
                return self._text(argument)
            case 4:
                return [self._item(depth + 1) for _ in range(argument)]
            case 5:
                return self._map(argument, depth)
            case 7 if 20 <= info <= 22:
                return {20: False, 21: True, 22: None}[info]
            case 7 if info > 24:
                return None
        raise _malformed("a CBOR item has a tag, or a simple value other than false, true and null")

    def _map(self, count: int, depth: int) -> dict[str, object]:
        result: dict[str, object] = {}
        for _ in range(count):
            major, _, length = self._head()
            if major != 3:
                raise _malformed("a key of a CBOR map is not text")
            key = self._text(length)
            if key in result:
                raise _malformed(f"a CBOR map has the key {key!r} twice")
            result[key] = self._item(depth + 1)
        return result

    def _text(self, length: int) -> str:
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise _malformed("a CBOR text is not UTF-8") from None
