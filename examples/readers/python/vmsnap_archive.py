"""A snapshot in one file: the layout of an archive, and reading at random. Section 7 of ``docs/format.md``."""

from __future__ import annotations

import io
import os
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, BinaryIO

from vmsnap_floe import FormatError
from vmsnap_snapshot import MAX_KEY_FILE_BYTES, MAX_MANIFEST_BYTES
from vmsnap_tree import KEY_METADATA_NAME, MANIFEST_NAME

BLOCK = 512
MANIFEST_ALIGNMENT = 1 << 16
LARGE_BYTES = 1 << 16
LARGE_ALIGNMENT = 4096
BASE_256_FROM = MTIME_END = 1 << 33
MAX_NAME_FIELD_BYTES = 100
LEAST_COMMENT_BYTES = 20
END = bytes(2 * BLOCK)

OTHER_NAME = b"vmsnap"
PAX_NAME = b"vmsnap.pax"


def _corrupt(text: str) -> FormatError:
    return FormatError("corrupt", text)


# Headers -------------------------------------------------------------------------------------------------------------


def _padded(size: int, alignment: int = BLOCK) -> int:
    return size + -size % alignment


def ustar_header(name: bytes, typeflag: bytes, size: int, mtime: int) -> bytes:
    """Return a header block."""
    mode = b"0000700" if typeflag == b"5" else b"0000600"
    size_field = b"%011o\0" % size if size < BASE_256_FROM else b"\x80" + size.to_bytes(11, "big")
    before = name.ljust(100, b"\0") + mode + b"\0" + 2 * b"0000000\0" + size_field + b"%011o\0" % mtime
    after = typeflag + bytes(100) + b"ustar\x0000" + bytes(64) + 2 * b"0000000\0" + bytes(167)
    return before + b"%06o\0 " % (sum(before) + sum(after) + 8 * ord(" ")) + after


def _pax_record(keyword: bytes, value: bytes) -> bytes:
    rest = b" " + keyword + b"=" + value + b"\n"
    length = len(rest) + 1
    while len(b"%d" % length) + len(rest) != length:
        length = len(b"%d" % length) + len(rest)
    return b"%d" % length + rest


def _comment(value: bytes, length: int) -> bytes:
    """Return a pax record of a length: a comment, followed by spaces."""
    start = b"%d comment=" % length + value
    return start.ljust(length - 1) + b"\n"


GLOBAL_HEADER = ustar_header(b"pax_global_header", b"g", BLOCK, 0) + _comment(b"vmsnap archive 1", BLOCK)


@dataclass(frozen=True)
class Member:
    """A member, which begins at `position`. The path of a namespace ends with a slash."""

    path: str
    size: int
    position: int
    pax_size: int | None

    @property
    def data_at(self) -> int:
        """Where its data begins."""
        pax = 0 if self.pax_size is None else BLOCK + self.pax_size
        return self.position + pax + BLOCK

    @property
    def end(self) -> int:
        """Where the next member begins."""
        return self.data_at + _padded(self.size)

    def headers(self, mtime: int) -> bytes:
        """Return everything before the data."""
        name = self.path.encode()
        if not _fits(name):
            name = OTHER_NAME
        header = ustar_header(name, b"5" if self.path.endswith("/") else b"0", self.size, mtime)
        if self.pax_size is None:
            return header
        records = _records(self.path, self.size)
        fill = self.pax_size - len(records)
        data = records + (_comment(b"", fill) if fill else b"")
        return ustar_header(PAX_NAME, b"x", self.pax_size, mtime) + data + header


def _fits(name: bytes) -> bool:
    return len(name) <= MAX_NAME_FIELD_BYTES and name.isascii()


def _records(path: str, size: int) -> bytes:
    """Return the pax records that a member needs."""
    name = path.encode()
    path_record = b"" if _fits(name) else _pax_record(b"path", name)
    return path_record + (b"" if size < BASE_256_FROM else _pax_record(b"size", b"%d" % size))


def placed(path: str, size: int, position: int) -> Member:
    """Return the member that begins at a position."""
    large = size >= LARGE_BYTES and path != KEY_METADATA_NAME
    alignment = MANIFEST_ALIGNMENT if path == MANIFEST_NAME else LARGE_ALIGNMENT if large else BLOCK
    need = len(_records(path, size))
    if need == 0 and (position + BLOCK) % alignment == 0:
        return Member(path, size, position, None)
    pax_size = max(BLOCK, _padded(need))
    pax_size += -(position + 2 * BLOCK + pax_size) % alignment
    while 0 < pax_size - need < LEAST_COMMENT_BYTES:
        pax_size += max(alignment, BLOCK)
    return Member(path, size, position, pax_size)


# The order of members ------------------------------------------------------------------------------------------------


def mtime_of(manifest: Mapping[str, Any]) -> int:
    """Return the mtime of all members: `created`, without its fraction."""
    created = datetime.strptime(manifest["created"][:19], "%Y-%m-%dT%H:%M:%S").replace(tzinfo=UTC)
    return min(max(0, int(created.timestamp())), MTIME_END - 1)


def in_order(manifest: Mapping[str, Any]) -> Iterator[tuple[str, int]]:
    """Yield path and size of all members after the manifest."""
    for path in sorted(manifest["namespaces"]):  # by code point, which is the order of the UTF-8 bytes
        yield f"{path}/", 0
    sizes = {path: entry["stored_size"] for path, entry in manifest["fragments"].items()}
    for path in sorted(sizes, key=lambda path: (sizes[path] >= LARGE_BYTES, path)):
        yield path, sizes[path]


def first_members(key_metadata_size: int | None, manifest_size: int) -> list[Member]:
    """Return the members that do not depend on the contents of the manifest."""
    members = []
    position = len(GLOBAL_HEADER)
    if key_metadata_size is not None:
        members.append(placed(KEY_METADATA_NAME, key_metadata_size, position))
        position = members[0].end
    return [*members, placed(MANIFEST_NAME, manifest_size, position)]


def later_members(manifest_member: Member, manifest: Mapping[str, Any]) -> list[Member]:
    """Return all members after the manifest."""
    members, position = [], manifest_member.end
    for path, size in in_order(manifest):
        members.append(placed(path, size, position))
        position = members[-1].end
    return members


# Reading -------------------------------------------------------------------------------------------------------------


class Archive:
    """A snapshot that is an archive: the headers of `enc_metadata` and of the manifest were compared."""

    def __init__(self, path: str) -> None:
        self.what = f"snapshot {path!r}"
        try:
            self._descriptor = os.open(path, os.O_RDONLY)
        except OSError as error:
            raise FormatError("io", f"{self.what}: {error.strerror}") from error
        weakref.finalize(self, os.close, self._descriptor)
        if self._read(0, len(GLOBAL_HEADER), whole=False) != GLOBAL_HEADER:
            raise _corrupt(f"{self.what}: not a vmsnap archive: unpack it with tar if it is a tar file")
        self._mtime: int | None = None
        self._members: dict[str, Member] = {}
        name = self._read(len(GLOBAL_HEADER), BLOCK)[:100].rstrip(b"\0")
        if name == KEY_METADATA_NAME.encode():
            self._first_member(KEY_METADATA_NAME, len(GLOBAL_HEADER), MAX_KEY_FILE_BYTES)
            self._first_member(MANIFEST_NAME, self._members[KEY_METADATA_NAME].end, MAX_MANIFEST_BYTES)
        else:
            self._first_member(MANIFEST_NAME, len(GLOBAL_HEADER), MAX_MANIFEST_BYTES)

    def has(self, name: str) -> bool:
        """Tell whether the root has an entry of this name."""
        return name in self._members

    def sealed_by(self, manifest: Mapping[str, Any]) -> None:
        """Compute where everything is, of a manifest that was checked."""
        if self._mtime != mtime_of(manifest):
            raise _corrupt(f"{self.what}: the headers have another time than the manifest")
        members = later_members(self._members[MANIFEST_NAME], manifest)
        length = (members[-1] if members else self._members[MANIFEST_NAME]).end + len(END)
        size = os.fstat(self._descriptor).st_size
        if size != length:
            raise _corrupt(f"{self.what}: {size} bytes long instead of {length}: cut off, extended or damaged")
        self._members |= {member.path: member for member in members}

    @contextmanager
    def file(self, names: Sequence[str], what: str) -> Iterator[BinaryIO]:
        """Open the data of the member at a path, after its headers were compared."""
        member = self._members["/".join(names)]  # the caller asks for paths of the manifest alone
        try:
            self._compare(member)
            with io.BufferedReader(_Range(self._descriptor, member.data_at, member.size)) as stream:
                yield stream
        except OSError as error:
            raise FormatError("io", f"{what}: {error.strerror}") from error

    def fragments(self) -> list[str]:
        """Return the paths of all fragments, sorted by their UTF-8 bytes."""
        first = (KEY_METADATA_NAME, MANIFEST_NAME)
        return sorted(path for path in self._members if path not in first and not path.endswith("/"))

    def _first_member(self, name: str, position: int, most: int) -> None:
        """Compare the headers at a position with those computed from their own size and mtime."""
        header_at = placed(name, 0, position).data_at - BLOCK
        header = self._read(header_at, BLOCK)
        size, mtime = _octal(header[124:136]), _octal(header[136:148])
        if size is None or size > most or mtime is None:
            raise _corrupt(f"{self.what}: the header of {name} is malformed")
        if self._mtime is None:
            self._mtime = mtime
        self._members[name] = placed(name, size, position)
        self._compare(self._members[name])
        if os.fstat(self._descriptor).st_size < self._members[name].end:
            raise _corrupt(f"{self.what}: cut off")

    def _compare(self, member: Member) -> None:
        assert self._mtime is not None
        computed = member.headers(self._mtime)
        if self._read(member.position, len(computed)) != computed:
            raise _corrupt(f"{self.what}: the header of {member.path!r} is not the one of an archive")

    def _read(self, position: int, length: int, *, whole: bool = True) -> bytes:
        data = b""
        while len(data) < length and (more := os.pread(self._descriptor, length - len(data), position + len(data))):
            data += more
        if whole and len(data) < length:
            raise _corrupt(f"{self.what}: cut off")
        return data


def _octal(field: bytes) -> int | None:
    """Return the number in a field of 12 bytes; None where it is not 11 octal digits and a NUL."""
    digits = field[:11]
    return int(digits, 8) if field[11:] == b"\0" and not digits.strip(b"01234567") else None


class _Range(io.RawIOBase):
    """A part of a file, read as a file of its own."""

    def __init__(self, descriptor: int, start: int, size: int) -> None:
        self._descriptor, self._start, self._size = descriptor, start, size
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._position = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:
        view = memoryview(buffer)[: max(0, self._size - self._position)]
        count = os.preadv(self._descriptor, [view], self._start + self._position) if view else 0
        self._position += count
        return count
