"""Bytes in the layout of ``hexdump -C``."""

from collections.abc import Iterable, Iterator

_LINE_BYTES = 16
# What hexdump shows as it is: ASCII without the control characters.
_SHOWN = bytes(byte if 0x20 <= byte < 0x7F else ord(".") for byte in range(256))


def hexdump(
    pieces: Iterable[bytes | memoryview], offset: int = 0, *, end: bool = True, digits: int = 8
) -> Iterator[str]:
    """Give the lines of a dump.

    Parameters
    ----------
    pieces
        The bytes, each piece but the last a multiple of 16 of them.
    offset
        Where the first byte lies.
    end
        Give a last line with the offset of the end, as hexdump does; it comes after a star in any case.
    digits
        Of an offset, at least.
    """
    before, squeezing, start = b"", False, offset
    for piece in pieces:
        for at in range(0, len(piece), _LINE_BYTES):
            data = bytes(piece[at : at + _LINE_BYTES])
            # A line like the one before it is shown as one star, however many there are.
            if data == before:
                if not squeezing:
                    yield "*"
                squeezing = True
            else:
                yield f"{offset:0{digits}x}  {_line(data)}"
                before, squeezing = data, False
            offset += len(data)
    if squeezing or (end and offset > start):
        yield f"{offset:0{digits}x}"


def _line(data: bytes) -> str:
    left, right = data[:8].hex(" "), data[8:].hex(" ")
    return f"{left:<23}  {right:<23}  |{data.translate(_SHOWN).decode('ascii')}|"
