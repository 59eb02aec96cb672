"""Pack a sealed snapshot directory into an archive. Section 7 of ``docs/format.md``."""

from __future__ import annotations

import errno
import os
import secrets
from typing import BinaryIO

import vmsnap_archive
from vmsnap_archive import BLOCK, END, GLOBAL_HEADER
from vmsnap_floe import FormatError
from vmsnap_snapshot import Snapshot
from vmsnap_tree import KEY_METADATA_NAME, MANIFEST_NAME

COPY_BYTES = 1 << 20


def pack(snapshot: Snapshot, archive: str | os.PathLike[str]) -> None:
    """Make an archive of a sealed snapshot; it is there as a whole, or not at all.

    The contents of fragments are copied as they are stored. Only their sizes and header tags are compared with the
    manifest.

    Parameters
    ----------
    snapshot
        The snapshot.
    archive
        Where the archive is to be; there must be nothing.

    Raises
    ------
    FormatError
        The snapshot is not sealed, or a fragment is not the one in the manifest.
    OSError
        Something is at `archive`, or the system refuses.
    """
    if snapshot.manifest is None:
        raise FormatError("missing", f"there is no {MANIFEST_NAME}: only a sealed snapshot can be packed")
    archive = os.path.abspath(archive)
    parent = os.path.dirname(archive)
    staged = os.path.join(parent, f".vmsnap-{secrets.token_hex(8)}")
    descriptor = os.open(staged, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    try:
        with open(descriptor, "wb") as sink:
            _write(snapshot, sink)
            sink.flush()
            os.fsync(descriptor)
        os.link(staged, archive)  # rename(2) would take the place of a file
    finally:
        os.unlink(staged)
    _sync(parent)


def _write(snapshot: Snapshot, sink: BinaryIO) -> None:
    """Write all members, with holes instead of zero bytes."""
    assert snapshot.manifest is not None
    first = {name: snapshot.metadata(name) for name in (KEY_METADATA_NAME, MANIFEST_NAME)}
    key_metadata, manifest = first[KEY_METADATA_NAME], first[MANIFEST_NAME]
    assert manifest is not None
    members = vmsnap_archive.first_members(None if key_metadata is None else len(key_metadata), len(manifest))
    members += vmsnap_archive.later_members(members[-1], snapshot.manifest)
    mtime = vmsnap_archive.mtime_of(snapshot.manifest)

    sink.write(GLOBAL_HEADER)
    for member in members:
        sink.seek(member.position)
        sink.write(member.headers(mtime))
        if (data := first.get(member.path)) is not None:
            sink.write(data)
        elif not member.path.endswith("/"):
            with snapshot.stored(member.path) as stored:
                _copy(stored, sink, member.data_at)
    sink.truncate(members[-1].end + len(END))


def _copy(source: BinaryIO, sink: BinaryIO, at: int) -> None:
    """Copy a file without its holes, and without its blocks of zeros."""
    size, position = source.seek(0, os.SEEK_END), 0
    while position < size:
        position = _next_data(source, position, size)
        source.seek(position)
        data = source.read(min(COPY_BYTES, size - position))
        for start in range(0, len(data), BLOCK):
            block = data[start : start + BLOCK]
            if block.count(0) != len(block):
                sink.seek(at + position + start)
                sink.write(block)
        if not data and position < size:
            raise FormatError("io", "a fragment became shorter while it was read")
        position += len(data)


def _next_data(source: BinaryIO, position: int, size: int) -> int:
    """Return where data follows; a file system or a stream that does not know holes says: here."""
    try:
        return os.lseek(source.fileno(), position, os.SEEK_DATA)
    except OSError as error:
        return size if error.errno == errno.ENXIO else position


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
