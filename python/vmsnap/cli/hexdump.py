"""Bytes in the layout of ``hexdump -C``."""

from collections.abc import Iterable, Iterator

_LINE_BYTES = 16
# hexdump shows ASCII without the control characters, and a dot for all other bytes.
_SHOWN = bytes(byte if 0x20 <= byte < 0x7F else ord(".") for byte in range(256))


def hexdump(
    batches: Iterable[bytes | memoryview], offset: int = 0, *, end: bool = True, digits: int = 8
) -> Iterator[str]:
    """Give the lines of a hex dump.

    Parameters
    ----------
    batches
        The bytes. The length of each batch but the last is a multiple of 16.
    offset
        The offset of the first byte.
    end
        Give a last line with the offset of the end, as hexdump does. After a star that line always comes.
    digits
        The minimal number of digits of an offset.
    """
    before, squeezing, start = b"", False, offset
    for batch in batches:
        for at in range(0, len(batch), _LINE_BYTES):
            data = bytes(batch[at : at + _LINE_BYTES])
            # Any number of lines equal to the one before is shown as one star.
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
