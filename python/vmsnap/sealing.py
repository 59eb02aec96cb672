"""Snapshots that are complete or absent: created, sealed, verified, and cleaned up after."""

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from vmsnap import _vmsnap, keys
from vmsnap.snapshot import SnapshotReader, SnapshotWriter, digest_bytes

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, StrOrBytesPath

    from vmsnap.keys import Identity, KeyProvider, Passphrase
    from vmsnap.serialization import _Format

__all__ = ["Cleaned", "Problem", "StagedSnapshot", "Verification", "clean", "create", "open", "seal", "verify"]


class StagedSnapshot:
    """A snapshot being created, by `create`: nothing is at its path until `commit`, and then all of it.

    As a context manager it gives the `SnapshotWriter` of the root, commits at the end, and leaves nothing behind where
    the block raises. It alone commits or discards, in the process that made it; it cannot be copied or pickled. The
    writers can.
    """

    def __init__(self, raw: _vmsnap.StagedSnapshot) -> None:
        self._raw = raw
        self._seal: tuple[bytes, bytes] | None = None

    @property
    def writer(self) -> SnapshotWriter:
        """Writes into the snapshot, at its root."""
        return SnapshotWriter._of(self._raw.writer)

    @property
    def path(self) -> Path:
        """Where the snapshot will be."""
        return self._raw.path

    @property
    def snapshot_id(self) -> bytes | None:
        """16 random bytes that name the snapshot, once it is committed."""
        return self._seal[0] if self._seal else None

    @property
    def seal_digest(self) -> bytes | None:
        """What to pin the snapshot by, once it is committed: 32 bytes, for `open`'s `expect_seal_digest`."""
        return self._seal[1] if self._seal else None

    def commit(self) -> None:
        """Complete the snapshot: list all fragments in its manifest, sync them, and rename it into place.

        Raises
        ------
        FragmentStateError
            A fragment is still being written, in whatever process, or was begun and never finished; or this is not the
            process that made the snapshot, or it was committed or discarded before.
        FileExistsError
            Something is at the path by now.
        CorruptSnapshotError
            Something else was put into it: a link, a special file.
        OSError
            The disk is full, say. It stays staged after any of these, and may be committed again or discarded. Only
            where the very last sync fails it is in place, complete, and the text says so.
        """
        self._seal = self._raw.commit()

    def discard(self) -> None:
        """Give the snapshot up and remove all of it; nothing where it was committed or discarded before."""
        self._raw.discard()

    def __enter__(self) -> SnapshotWriter:
        return self.writer

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self._give_up(error)
            return
        try:
            self.commit()
        except BaseException as refused:
            self._give_up(refused)
            raise

    def _give_up(self, error: BaseException) -> None:
        """Discard because of an error, which nothing that goes wrong here shall hide."""
        try:
            self.discard()
        except OSError as left:
            error.add_note(f"{left.strerror or left}; vmsnap.clean removes it")

    def __reduce__(self) -> str:
        raise TypeError("a StagedSnapshot stays in the process that made it; its writers can be copied and pickled")

    def __repr__(self) -> str:
        return f"<vmsnap.StagedSnapshot {str(self.path)!r} {'committed' if self._seal else 'not committed'}>"


def create(
    path: "StrOrBytesPath",
    encrypt: bool = False,
    *,
    key: "ReadableBuffer | None" = None,
    recipients: str | Iterable[str] | None = None,
    passphrase: "Passphrase | None" = None,
    key_provider: "KeyProvider | None" = None,
    threads: int | None = None,
    format: "_Format" = "cbor",
    durable: bool = True,
) -> StagedSnapshot:
    """Begin a snapshot that is complete or absent: ``with vmsnap.create(path) as snap:``.

    It is written in a hidden folder beside `path` and renamed there at the end. An exception removes it. A process that
    is killed leaves at most the hidden folder, which no reader takes for a snapshot and which `clean` removes.

    Parameters
    ----------
    path
        Where it is to be. Nothing may be there; the folder it is to lie in must exist.
    encrypt, key, recipients, passphrase, key_provider, threads, format
        As for `SnapshotWriter`.
    durable
        Whether the commit waits until everything is on the disk, so that it outlives a power failure. Nothing else
        depends on it. Where the file system cannot sync directories, only the files are waited for.

    Raises
    ------
    FileExistsError, FileNotFoundError, KeyUnavailableError, InvalidArgumentError
        As `SnapshotWriter`. Nothing is left behind.
    """
    credentials = keys.writing(
        encrypt, key=key, recipients=recipients, passphrase=passphrase, key_provider=key_provider
    )
    return StagedSnapshot(_vmsnap.StagedSnapshot(os.fsdecode(path), credentials, threads, format, durable))


# Opens a snapshot to read it; the class by the name that goes with `create`.
open = SnapshotReader


def seal(
    root: "StrOrBytesPath",
    *,
    key: "ReadableBuffer | None" = None,
    identities: "Identity | Iterable[Identity] | None" = None,
    passphrase: "Passphrase | None" = None,
    key_provider: "KeyProvider | None" = None,
    threads: int | None = None,
    durable: bool = True,
) -> bytes:
    """Seal a snapshot that was written in place, and return its seal digest, to pin it by.

    All of a plain one is read for that; of an encrypted one, the header and the last segment of each fragment. From
    then on it does not change any more, and what is changed nevertheless is found.

    Raises
    ------
    UnsupportedFormatError
        It is sealed already.
    FragmentStateError
        A fragment of it is still being written.
    FileNotFoundError, KeyUnavailableError, AuthenticationError, CorruptSnapshotError
        As `SnapshotReader`. It stays as it was.
    """
    credentials = keys.reading(key=key, identities=identities, passphrase=passphrase, key_provider=key_provider)
    return _vmsnap.seal(os.fsdecode(root), credentials, threads, durable)[1]


@dataclass(frozen=True)
class Cleaned:
    """What `clean` removed, and what it left because a living process holds it."""

    removed: list[Path]
    held: list[Path]


def clean(parent: "StrOrBytesPath") -> Cleaned:
    """Remove what killed processes left behind in a folder; what a living one holds stays.

    Those are the hidden folders of snapshots that were never committed and, where the folder is itself a snapshot,
    files that were to replace one of its own.

    Raises
    ------
    OSError
        There is no such folder, or something in it cannot be removed.
    FragmentStateError
        The file system has no locks that would tell whether somebody holds it: several hosts write to it (NFS, SMB, 9p,
        FUSE and others), and a lock on a directory does not reach the other hosts. Remove ``.vmsnap-*`` by hand.
    """
    return Cleaned(*_vmsnap.clean(os.fsdecode(parent)))


@dataclass(frozen=True)
class Problem:
    """Something that is not as it should be.

    Attributes
    ----------
    path
        From the snapshot's root.
    kind
        ``missing``, ``extra``, ``changed``, ``truncated``, ``swapped``, ``not authentic``, ``wrong size``,
        ``bad manifest``, ``bad key metadata``, ``not sealed``, ``link``, ``special file``, ``not UTF-8``,
        ``unreadable``.
    text
        The same in words.
    """

    path: str
    kind: str
    text: str


@dataclass(frozen=True)
class Verification:
    """What `verify` found.

    Attributes
    ----------
    problems
        Everything that is not as it should be, sorted by path.
    not_checked
        What could not be looked at, and why: without the key, say.
    fragments
        All fragments there are or should be: by path, the kind of problem, or ``ok``.
    verified_bytes
        Bytes of plaintext that were read and verified.
    snapshot_id, seal_digest
        What names the snapshot, where its manifest could be read.
    """

    problems: list[Problem]
    not_checked: list[str]
    fragments: dict[str, str]
    verified_bytes: int
    snapshot_id: bytes | None
    seal_digest: bytes | None

    @property
    def ok(self) -> bool:
        """Whether everything was checked, and is as it was sealed."""
        return not self.problems and not self.not_checked


def verify(
    root: "StrOrBytesPath",
    *,
    expect_seal_digest: "ReadableBuffer | str | None" = None,
    key: "ReadableBuffer | None" = None,
    identities: "Identity | Iterable[Identity] | None" = None,
    passphrase: "Passphrase | None" = None,
    key_provider: "KeyProvider | None" = None,
    threads: int | None = None,
) -> Verification:
    """Read all of a snapshot, by all threads, and tell everything that is not as it was sealed.

    Without the key of an encrypted snapshot it checks what can be checked, and says what it could not. One that is not
    sealed is read, too; that it is not is a problem of its own.

    Raises
    ------
    FileNotFoundError
        There is no such folder.
    NotEncryptedError, InvalidArgumentError
        As `SnapshotReader`. Everything else is in the report.
    """
    credentials = keys.reading(key=key, identities=identities, passphrase=passphrase, key_provider=key_provider)
    problems, not_checked, fragments, verified_bytes, found = _vmsnap.verify(
        os.fsdecode(root), credentials, threads, digest_bytes(expect_seal_digest)
    )
    snapshot_id, seal_digest = found or (None, None)
    return Verification(
        [Problem(*problem) for problem in problems],
        not_checked,
        {path: kind or "ok" for path, kind in fragments},
        verified_bytes,
        snapshot_id,
        seal_digest,
    )
