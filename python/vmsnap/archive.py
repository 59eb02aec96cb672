"""A snapshot in one file: packing and unpacking archives."""

import io
import os
import socket
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import IO, TYPE_CHECKING

from vmsnap import _vmsnap
from vmsnap._backing import drop_read_ahead, is_file, unwrapped
from vmsnap.keys import Keys, one_of
from vmsnap.location import SnapshotLocation, located
from vmsnap.reader import digest_bytes

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, StrOrBytesPath

    from vmsnap.keys import Identity, KeyProvider, Passphrase

__all__ = ["SealId", "pack", "unpack"]


@dataclass(frozen=True)
class SealId:
    """The identification of a sealed snapshot. It is the same for the directory and for its archive.

    Attributes
    ----------
    snapshot_id
        The 16 random bytes that identify the snapshot.
    seal_digest
        The 32 bytes for `expect_seal_digest`.
    """

    snapshot_id: bytes
    seal_digest: bytes


def pack(
    location: SnapshotLocation,
    archive: "StrOrBytesPath | IO[bytes]",
    *,
    keys: Keys | None = None,
    key: "ReadableBuffer | None" = None,
    identities: "Identity | Iterable[Identity] | None" = None,
    passphrase: "Passphrase | None" = None,
    key_provider: "KeyProvider | None" = None,
    threads: int | None = None,
    durable: bool = True,
    expect_seal_digest: "ReadableBuffer | str | None" = None,
) -> SealId:
    """Pack a sealed snapshot into one file: an archive, which can be read like the snapshot itself.

    An archive is an uncompressed tar file. Its bytes depend only on the snapshot, so packing twice gives equal files.
    Each fragment is checked against the manifest while it is copied. The snapshot stays as it is.

    Parameters
    ----------
    location
        The snapshot.
    archive
        The path of the new archive: nothing may exist there, and a file appears only when it is complete. Or an open
        binary file, for example a pipe: the archive is written to it from its position on, in order.
    keys, key, identities, passphrase, key_provider
        The key that opens an encrypted snapshot, as for `SnapshotReader`. The archive opens with the same key.
    threads
        The maximum number of threads that the call uses.
    durable
        Whether the call waits until a new archive is on the disk.
    expect_seal_digest
        The seal digest that the snapshot must have, as for `SnapshotReader`.

    Raises
    ------
    FileExistsError
        Something exists at the path of the archive.
    NotSealedError
        The snapshot is not sealed: `seal` seals it.
    AuthenticationError, CorruptSnapshotError
        A fragment is not the one that the manifest lists.
    KeyUnavailableError, NotEncryptedError, FileNotFoundError, UnsupportedFormatError
        The snapshot cannot be opened, see `SnapshotReader`.
    TypeError
        `archive` is neither a path nor a binary file that passes its bytes on as they are.
    OSError
        The archive cannot be written, for instance because the disk is full or the reader of a pipe has ended. A file
        at a path is removed; bytes that were written to an open file stay there.
    """
    given = Keys(key=key, identities=identities, passphrase=passphrase, key_provider=key_provider)
    credentials = one_of(keys, given)._credentials()
    target = _archive(archive, _to_write)
    digest = digest_bytes(expect_seal_digest)
    return SealId(*_vmsnap.pack(located(location), target, credentials, threads, durable, digest))


def unpack(
    archive: "StrOrBytesPath | IO[bytes]",
    location: SnapshotLocation,
    *,
    keys: Keys | None = None,
    key: "ReadableBuffer | None" = None,
    identities: "Identity | Iterable[Identity] | None" = None,
    passphrase: "Passphrase | None" = None,
    key_provider: "KeyProvider | None" = None,
    threads: int | None = None,
    durable: bool = True,
    expect_seal_digest: "ReadableBuffer | str | None" = None,
) -> SealId:
    """Unpack an archive into a new directory, which is complete or absent.

    The archive is read once and in order, so it may come from a pipe. Each fragment is checked against the manifest.

    Parameters
    ----------
    archive
        The path of the archive, or an open binary file: the archive must begin at its position, and the file must end
        with the archive. A pipe must not have been read before: bytes in a buffer of the file object would be missing.
    location
        The directory of the new snapshot. Nothing may exist there; the parent directory must exist.
    keys, key, identities, passphrase, key_provider
        The key that opens an encrypted archive, as for `SnapshotReader`. The new snapshot opens with the same key.
    threads
        The maximum number of threads that the call uses.
    durable
        Whether the call waits until everything is on the disk, as for `create`.
    expect_seal_digest
        The seal digest that the archive must have, as for `SnapshotReader`.

    Raises
    ------
    FileExistsError
        Something exists at `location`.
    CorruptSnapshotError
        The file is not an archive of vmsnap, ends too early, or is longer than the archive.
    AuthenticationError
        The archive is not authentic, the key is wrong, or the seal digest is not the expected one.
    KeyUnavailableError, NotEncryptedError, FileNotFoundError, UnsupportedFormatError
        The archive cannot be opened, see `SnapshotReader`.
    TypeError
        `archive` is neither a path nor a binary file that passes its bytes on as they are.
    OSError
        Another error of the operating system, for instance a full disk. Nothing is left behind after any error.
    """
    given = Keys(key=key, identities=identities, passphrase=passphrase, key_provider=key_provider)
    credentials = one_of(keys, given)._credentials()
    source = _archive(archive, _to_read)
    digest = digest_bytes(expect_seal_digest)
    return SealId(*_vmsnap.unpack(source, located(location), credentials, threads, durable, digest))


def _archive(given: "StrOrBytesPath | IO[bytes]", prepare: Callable[[IO[bytes]], None]) -> str | int:
    """Return a path, or the descriptor of an open file."""
    if isinstance(given, (str, bytes, os.PathLike)):
        return os.fsdecode(given)
    if not _passes_bytes_on(given):
        name = type(given).__name__
        more = ""
        if hasattr(given, "fileno"):
            more = "; if it does not change the bytes, pass open(file.fileno(), MODE, closefd=False)"
        raise TypeError(
            f"an object of type {name} is not an archive: pass a path, or a binary file from open(), subprocess or "
            f"socket.makefile(){more}"
        )
    descriptor = given.fileno()
    prepare(given)
    return descriptor


def _passes_bytes_on(given: object) -> bool:
    """Return whether a file object passes bytes to its descriptor as they are. A `GzipFile` does not."""
    found = unwrapped(given)
    if isinstance(found, io.TextIOBase):
        return False
    if is_file(found):
        return True
    raw = found.raw if type(found) in (io.BufferedReader, io.BufferedWriter) else found  # type: ignore[attr-defined]
    # A file of an SSLSocket is a SocketIO as well.
    return type(raw) is socket.SocketIO and type(getattr(raw, "_sock", None)) is socket.socket


def _to_write(file: IO[bytes]) -> None:
    if not file.writable():
        raise io.UnsupportedOperation("the file for the archive is not open for writing")
    # Bytes that were written before come before the archive.
    file.flush()


def _to_read(file: IO[bytes]) -> None:
    if not file.readable():
        raise io.UnsupportedOperation("the file of the archive is not open for reading")
    if file.seekable():
        # The descriptor is ahead of the position in the file object.
        drop_read_ahead(file, file.tell())
