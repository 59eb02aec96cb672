"""Snapshots that are complete or absent: creating, sealing and cleaning up."""

from collections.abc import Iterable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from vmsnap import _vmsnap
from vmsnap.keys import Keys, one_of
from vmsnap.location import SnapshotLocation, local_path, located
from vmsnap.writer import SnapshotWriter

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from vmsnap.keys import Identity, KeyProvider, Passphrase
    from vmsnap.serialization import _Format

__all__ = ["Cleaned", "StagedSnapshot", "clean", "create", "seal"]


class StagedSnapshot:
    """A snapshot that `create` began: nothing exists at its location until `commit`, which puts all of it there.

    As a context manager it returns the `SnapshotWriter` of the root, and commits at the end of the block. If the block
    raises, nothing is left behind. Only the process that created the object can commit or discard the snapshot. The
    object cannot be copied or pickled; its writers can.
    """

    def __init__(self, raw: _vmsnap.StagedSnapshot) -> None:
        self._raw = raw
        self._seal: tuple[bytes, bytes] | None = None

    @property
    def writer(self) -> SnapshotWriter:
        """The writer at the root of the snapshot."""
        return SnapshotWriter._of(self._raw.writer)

    @property
    def location(self) -> str:
        """The absolute path or URL where the snapshot will be. That of a local writer is the hidden directory."""
        return self._raw.location

    @property
    def path(self) -> Path | None:
        """The location as a `pathlib.Path`; None if it is a URL."""
        return local_path(self._raw.location)

    @property
    def snapshot_id(self) -> bytes | None:
        """The 16 random bytes that identify the snapshot; None until it is committed."""
        return self._seal[0] if self._seal else None

    @property
    def seal_digest(self) -> bytes | None:
        """The 32 bytes for `expect_seal_digest` of `open`; None until the snapshot is committed."""
        return self._seal[1] if self._seal else None

    def commit(self) -> None:
        """Complete the snapshot: list all fragments in its manifest, sync them, and rename it into place.

        After any of these errors the snapshot stays staged, and can be committed again or discarded, with one
        exception: if only the last sync fails, the snapshot is complete and in place, and the error's text says so.

        Raises
        ------
        StateError
            A fragment is still being written, in any process, or was never finished; this is not the process that
            created the snapshot; or the snapshot was committed or discarded before.
        FileExistsError
            Something exists at the location by now.
        CorruptSnapshotError
            The hidden directory contains something that a snapshot cannot contain: a link or a special file.
        OSError
            Another error of the operating system, for instance a full disk.
        """
        self._seal = self._raw.commit()

    def discard(self) -> None:
        """Remove everything that was written. Does nothing if the snapshot was committed or discarded before."""
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
        """Discard because of an error. A second error is added to the first one as a note."""
        try:
            self.discard()
        except OSError as left:
            error.add_note(f"{left.strerror or left}; vmsnap.clean removes it")

    def __reduce__(self) -> str:
        raise TypeError("a StagedSnapshot cannot leave the process that created it; copy or pickle its writers instead")

    def __repr__(self) -> str:
        return f"<vmsnap.StagedSnapshot {self.location!r} {'committed' if self._seal else 'not committed'}>"


def create(
    location: SnapshotLocation,
    encrypt: bool = False,
    *,
    keys: Keys | None = None,
    key: "ReadableBuffer | None" = None,
    recipients: str | Iterable[str] | None = None,
    passphrase: "Passphrase | None" = None,
    key_provider: "KeyProvider | None" = None,
    threads: int | None = None,
    format: "_Format" = "cbor",
    durable: bool = True,
    archive: bool | None = None,
    take_over: bool = False,
) -> StagedSnapshot:
    """Begin a snapshot that is complete or absent: ``with vmsnap.create(location) as snapshot:``.

    The snapshot is written in a hidden directory beside `location`, and renamed to it at the end. An exception removes
    it. A process that is killed leaves at most the hidden directory, which `clean` removes.

    At a URL (``s3://``, ``gs://``, ``az://``) the snapshot is written straight into the object store, and nothing of it
    to a local disk. Fragments are sent in parts while they are written, so memory holds a number of parts: as many as
    there are connections, and for each fragment that is being written one more than there are threads. A part has 8
    MiB, or a ten-thousandth of the fragment if that is more. Writers of such a snapshot stay in one process.

    Parameters
    ----------
    location
        The directory of the new snapshot, or the file for an archive. Nothing may exist there; the parent directory
        must exist. Or a URL, at which nothing may exist.
    encrypt, keys, key, recipients, passphrase, key_provider, threads, format
        As for `SnapshotWriter`.
    durable
        Whether the commit waits until everything is on the disk, so that it survives a power failure. If the file
        system cannot sync directories, the commit waits only for the files.
    archive
        Whether the snapshot becomes one file, as `pack` makes it, instead of a directory. By default it does if the
        name of `location` ends in ``.vmsnap.tar``.
    take_over
        Whether a snapshot that another process has begun at the URL, and not completed, is replaced. If that process
        still runs, it fails. At a local path this has no meaning.

    Raises
    ------
    FileExistsError, FileNotFoundError, KeyUnavailableError, InvalidArgumentError
        As for `SnapshotWriter`. Nothing is left behind.
    StateError
        Another process has begun a snapshot at the URL.
    PermissionError, TimeoutError, OSError
        The object store cannot be used; see `push`.
    """
    given = Keys(encrypt=encrypt, key=key, recipients=recipients, passphrase=passphrase, key_provider=key_provider)
    credentials = one_of(keys, given)._credentials()
    raw = _vmsnap.StagedSnapshot(located(location), credentials, threads, format, durable, archive, take_over)
    return StagedSnapshot(raw)


def seal(
    location: SnapshotLocation,
    *,
    keys: Keys | None = None,
    key: "ReadableBuffer | None" = None,
    identities: "Identity | Iterable[Identity] | None" = None,
    passphrase: "Passphrase | None" = None,
    key_provider: "KeyProvider | None" = None,
    threads: int | None = None,
    durable: bool = True,
) -> bytes:
    """Seal a snapshot that was written in place, and return its seal digest, for `expect_seal_digest` of `open`.

    Sealing writes a manifest with the digests of all fragments: it reads all of a plain snapshot, and the header and
    the last segment of each fragment of an encrypted one. From then on vmsnap refuses to change the snapshot, and finds
    changes that others make.

    Raises
    ------
    SealedError
        The snapshot is sealed already.
    StateError
        A fragment is still being written.
    FileNotFoundError, KeyUnavailableError, AuthenticationError, CorruptSnapshotError
        The snapshot cannot be opened, see `SnapshotReader`. It is unchanged.
    """
    given = Keys(key=key, identities=identities, passphrase=passphrase, key_provider=key_provider)
    return _vmsnap.seal(located(location), one_of(keys, given)._credentials(), threads, durable)[1]


@dataclass(frozen=True)
class Cleaned:
    """Paths or URLs: those that `clean` removed, and those it left because a living process may use them."""

    removed: list[Path | str]
    held: list[Path | str]


def clean(parent: SnapshotLocation, *, older_than: timedelta = timedelta(days=1)) -> Cleaned:
    """Remove the remains of killed processes in a directory, or below a URL.

    In a directory these are the hidden directories of snapshots that were never committed and, if the directory is
    itself a snapshot, unfinished replacements of its own files. Anything that a living process uses stays.

    Below a URL these are the objects of snapshots that were begun and not completed. Whether a process on another
    host still writes one is not known, so everything stays to which something was added lately. Parts of objects that
    were never completed cannot be seen: the bucket needs a lifecycle rule that removes them.

    Parameters
    ----------
    parent
        The directory, or the URL of a snapshot or of a prefix of several.
    older_than
        How long nothing was added to a snapshot at a URL that is removed. In a directory this has no meaning.

    Raises
    ------
    OSError
        There is no such directory, or something in it cannot be removed.
    StateError
        Several hosts may write to the file system (NFS, SMB, 9p, FUSE and others), and its locks on directories do not
        reach other hosts, so that vmsnap cannot know whether something is still used. Remove ``.vmsnap-*`` by hand.
    """
    removed, held = _vmsnap.clean(located(parent), older_than.total_seconds())
    return Cleaned([local_path(each) or each for each in removed], [local_path(each) or each for each in held])
