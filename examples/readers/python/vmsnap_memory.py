"""Guest memory, from the fragments ``mem`` and ``mem_metadata``. Section 6 of ``docs/format.md``."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, BinaryIO

import vmsnap_cbor
from vmsnap_floe import FormatError
from vmsnap_snapshot import Snapshot

U64 = 1 << 64
MAX_FILE_BYTES = (1 << 63) - 1

# One frame of LZ4, of independent blocks without checksums: by the size of its blocks, its header.
FRAME_HEADERS = {
    65536: bytes.fromhex("04224d18604082"),
    262144: bytes.fromhex("04224d186050fb"),
    1048576: bytes.fromhex("04224d18606051"),
    4194304: bytes.fromhex("04224d18607073"),
}
FRAME_HEADER_BYTES = 7
SIZE_WORD_BYTES = 4
STORED_AS_IT_IS = 1 << 31


def _corrupt(text: str) -> FormatError:
    return FormatError("corrupt", text)


# What `mem_metadata` says --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Region:
    """A guest region: its guest-physical address and size in bytes, and what is stored of it, from its start."""

    guest_base: int
    size: int
    data_ranges: list[tuple[int, int]]


@dataclass(frozen=True)
class Layout:
    """What was checked of the metadata; `block_lengths` is None where there is no index of LZ4 blocks."""

    regions: list[Region]
    data_bytes: int
    compressed: bool
    block_size: int | None
    block_lengths: list[int] | None


def _value(data: bytes) -> object:
    # No JSON begins with a byte of CBOR's maps.
    if data[:1] and 0xA0 <= data[0] <= 0xBF:
        return vmsnap_cbor.decode(data)
    try:
        return json.loads(data.decode(), object_pairs_hook=_object, parse_constant=_no_number)
    except (ValueError, RecursionError) as error:
        raise _corrupt(f"mem_metadata: neither CBOR nor JSON: {type(error).__name__}") from None


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("a key comes twice")
    return fields


def _no_number(text: str) -> object:
    raise ValueError(f"{text} is no JSON")


def _field(fields: object, name: str, kind: type) -> Any:
    value = fields.get(name) if isinstance(fields, Mapping) else None
    if type(value) is not kind or (kind is int and not 0 <= value < U64):
        raise _corrupt(f"mem_metadata: {name!r} is missing or malformed")
    return value


def read_layout(data: bytes) -> Layout:
    """Check everything that can be without the data."""
    fields = _value(data)
    regions = []
    data_bytes = 0
    for entry in _field(fields, "regions", list):
        region = Region(_field(entry, "guest_base", int), _field(entry, "size", int), [])
        if region.guest_base + region.size >= U64:
            raise _corrupt(f"mem_metadata: the region at {region.guest_base:#x} goes beyond 64 bits")
        end_before = 0
        for stored in _field(entry, "data_ranges", list):
            start, end = _field(stored, "start", int), _field(stored, "end", int)
            if len(stored) != 2:
                raise _corrupt("mem_metadata: a data range has another key than 'start' and 'end'")
            if not end_before <= start < end <= region.size:
                raise _corrupt(f"mem_metadata: data range {start:#x} to {end:#x} does not ascend within its region")
            region.data_ranges.append((start, end))
            data_bytes += end - start
            end_before = end
        regions.append(region)
    ends = sorted((region.guest_base, region.guest_base + region.size) for region in regions)
    if any(following[0] < before[1] for before, following in pairwise(ends)):
        raise _corrupt("mem_metadata: regions overlap")
    if data_bytes > MAX_FILE_BYTES:
        raise _corrupt("mem_metadata: more data than a file can hold")
    compressed = _field(fields, "compressed", bool)
    index = fields.get("lz4") if isinstance(fields, Mapping) else None
    if index is None:
        return Layout(regions, data_bytes, compressed, None, None)
    block_size = _field(index, "block_size", int)
    # JSON has no bytes: there they are a list of numbers.
    raw = index.get("block_lengths")
    if isinstance(raw, list) and all(type(byte) is int and 0 <= byte < 256 for byte in raw):
        raw = bytes(raw)
    if not isinstance(raw, bytes) or block_size not in FRAME_HEADERS or len(raw) % 4:
        raise _corrupt("mem_metadata: the index of LZ4 blocks is malformed")
    lengths = [int.from_bytes(raw[at : at + 4], "little") for at in range(0, len(raw), 4)]
    if len(lengths) != -(-data_bytes // block_size):
        raise _corrupt("mem_metadata: the index of LZ4 blocks does not fit the data")
    return Layout(regions, data_bytes, compressed, block_size, lengths)


# What `mem` holds ----------------------------------------------------------------------------------------------------


class _Bytes:
    """The pieces of a fragment, taken in other lengths."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def take(self, count: int) -> bytes:
        """Return so many bytes."""
        parts = []
        while count:
            if not self._rest:
                self._rest = next(self._pieces, b"")
                if not self._rest:
                    raise _corrupt("mem: too short for the data ranges")
            parts.append(self._rest[:count])
            self._rest = self._rest[count:]
            count -= len(parts[-1])
        return b"".join(parts)

    def at_end(self) -> bool:
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return True
            self._rest = piece
        return False


def _plain_data(stored: Iterator[bytes], layout: Layout) -> Iterator[bytes]:
    left = layout.data_bytes
    for piece in stored:
        left -= len(piece)
        if left < 0:
            break
        yield piece
    if left:
        raise _corrupt("mem: has another length than the data ranges")


def _unpacked_data(stored: Iterator[bytes], layout: Layout) -> Iterator[bytes]:
    """Yield what an LZ4 frame holds, block by block (``lz4_Frame_format.md`` 1.6.4 in LZ4's repository)."""
    frame = _Bytes(stored)
    header = frame.take(FRAME_HEADER_BYTES)
    block_size = next((size for size, known in FRAME_HEADERS.items() if known == header), None)
    if block_size is None or layout.block_size not in (None, block_size):
        raise _corrupt("mem: no LZ4 frame of independent blocks without checksums, or not the one of the index")
    for number, start in enumerate(range(0, layout.data_bytes, block_size)):
        expected = min(block_size, layout.data_bytes - start)
        word = int.from_bytes(frame.take(SIZE_WORD_BYTES), "little")
        length = word & ~STORED_AS_IT_IS
        if not 0 < length <= block_size:
            raise _corrupt(f"mem: block {number} has a stored length of {length} bytes")
        if layout.block_lengths is not None and layout.block_lengths[number] != length:
            raise _corrupt(f"mem: block {number} has another length than in the index")
        block = frame.take(length)
        data = block if word & STORED_AS_IT_IS else unpack_block(block, expected)
        if len(data) != expected:
            raise _corrupt(f"mem: block {number} holds {len(data)} bytes, not {expected}")
        yield data
    if frame.take(SIZE_WORD_BYTES) != bytes(SIZE_WORD_BYTES) or not frame.at_end():
        raise _corrupt("mem: the LZ4 frame does not end where the data end")


def unpack_block(block: bytes, size: int) -> bytes:
    """Decode one LZ4 block that holds at most `size` bytes (``lz4_Block_format.md`` in LZ4's repository).

    A sequence is a token, literals, and a match: bytes that came before, `offset` back. The last has literals only.
    """
    out = bytearray()
    at = 0

    def more(length: int) -> int:
        nonlocal at
        while length >= 15:
            byte = block[at]
            at += 1
            length += byte
            if byte != 255:
                break
        return length

    try:
        while True:
            token = block[at]
            at += 1
            length = more(token >> 4)
            literals = block[at : at + length]
            at += length
            if len(literals) != length or len(out) + length > size:
                raise _corrupt("mem: an LZ4 block is cut off or holds too much")
            out += literals
            if at == len(block):
                return bytes(out)
            offset = block[at] | block[at + 1] << 8
            at += 2
            length = more(token & 15) + 4
            if not 0 < offset <= len(out) or len(out) + length > size:
                raise _corrupt("mem: an LZ4 block refers to what it does not have, or holds too much")
            while length:  # a match may overlap what it makes
                copied = out[len(out) - offset :][:length]
                out += copied
                length -= len(copied)
    except IndexError:
        raise _corrupt("mem: an LZ4 block is cut off") from None


# Restoring -----------------------------------------------------------------------------------------------------------


def restore(snapshot: Snapshot, folder: str | os.PathLike[str], namespace: str = "") -> None:
    """Write the guest memory of a namespace into a new folder, a sparse file for each region; all of it or nothing.

    Parameters
    ----------
    snapshot
        The snapshot.
    folder
        The folder to make. The files in it are named by their guest-physical addresses, in 16 hexadecimal digits.
    namespace
        Where ``mem`` and ``mem_metadata`` are, as a path from the root.

    Raises
    ------
    FormatError
        There is none, or it is damaged.
    OSError
        The folder exists, or cannot be written to.
    """
    prefix = f"{namespace}/" if namespace else ""
    layout = read_layout(snapshot.read(f"{prefix}mem_metadata"))
    stored = snapshot.stream(f"{prefix}mem")
    data = _Bytes(_unpacked_data(stored, layout) if layout.compressed else _plain_data(stored, layout))
    os.mkdir(folder, 0o700)
    try:
        for region in layout.regions:
            path = os.path.join(folder, f"{region.guest_base:016x}")
            with open(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600), "wb") as file:
                _write_region(file, region, data)
        # What follows the last byte that is needed has to be looked at, too: the end mark, the last tag.
        if not data.at_end():
            raise _corrupt("mem: holds more than the data ranges")
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _write_region(file: BinaryIO, region: Region, data: _Bytes) -> None:
    file.truncate(region.size)
    for start, end in region.data_ranges:
        file.seek(start)
        for at in range(start, end, 1 << 20):
            file.write(data.take(min(end - at, 1 << 20)))
