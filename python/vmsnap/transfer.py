"""Whole snapshots between this machine and an object store."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmsnap import _vmsnap
from vmsnap.archive import SealId
from vmsnap.keys import Keys, one_of
from vmsnap.location import Location, SnapshotLocation, located
from vmsnap.memory import Progress
from vmsnap.reader import digest_bytes

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from vmsnap.keys import Identity, KeyProvider, Passphrase

__all__ = ["Pushed", "pull", "push"]


@dataclass(frozen=True)
class Pushed:
    """The report of `push`.

    Attributes
    ----------
    snapshot_id, seal_digest
        The identification of the snapshot.
    already_there
        Whether this very snapshot was complete at the URL before, so that nothing was sent.
    sent_bytes
        The bytes of the fragments that were sent.
    resumed_bytes
        The bytes of the fragments that an earlier push had sent, and which were not sent again.
    """

    snapshot_id: bytes
    seal_digest: bytes
    already_there: bool
    sent_bytes: int
    resumed_bytes: int


def push(
    source: SnapshotLocation,
    url: str | Location,
    *,
    keys: Keys | None = None,
    key: "ReadableBuffer | None" = None,
    identities: "Identity | Iterable[Identity] | None" = None,
    passphrase: "Passphrase | None" = None,
    key_provider: "KeyProvider | None" = None,
    threads: int | None = None,
    expect_seal_digest: "ReadableBuffer | str | None" = None,
    take_over: bool = False,
    progress: Progress | None = None,
) -> Pushed:
    """Copy a sealed snapshot into an object store: complete or absent, and every byte checked before it is sent.

    Readers take it for a snapshot when its last object, the manifest, is there. Nothing is overwritten. If the push is
    interrupted or fails, its objects stay, and the next push of the same snapshot sends the rest; `clean` removes them
    instead.

    Parameters
    ----------
    source
        The snapshot: a directory, or an archive.
    url
        The URL of the new snapshot: ``s3://bucket/path``, ``gs://bucket/path`` or ``az://container/path``. A
        `Location` adds options.
    keys, key, identities, passphrase, key_provider
        The key that opens an encrypted snapshot, as for `SnapshotReader`. The copy opens with the same key.
    threads
        The maximum number of threads that the call uses.
    expect_seal_digest
        The seal digest that the snapshot must have, as for `SnapshotReader`.
    take_over
        Whether a snapshot that another process has begun at the URL, and not completed, is replaced. If that process
        still runs, it fails.
    progress
        Called with the number of bytes done and the total.

    Raises
    ------
    FileExistsError
        Another snapshot, or something else, is at the URL.
    StateError
        Another process has begun another snapshot at the URL; the text says which and when.
    NotSealedError
        The snapshot is not sealed: `seal` seals it.
    AuthenticationError, CorruptSnapshotError
        A fragment is not the one that the manifest lists. Everything that was sent is removed.
    KeyUnavailableError, NotEncryptedError, FileNotFoundError, UnsupportedFormatError
        The snapshot cannot be opened, see `SnapshotReader`; or there is no such bucket.
    InvalidArgumentError
        The URL or an option is not valid, or the store cannot have the name of a fragment.
    PermissionError
        There are no credentials, or they are refused; the text names the variables that were looked at.
    TimeoutError, OSError
        The store does not answer, or refuses.
    """
    given = Keys(key=key, identities=identities, passphrase=passphrase, key_provider=key_provider)
    credentials, digest = one_of(keys, given)._credentials(), digest_bytes(expect_seal_digest)
    seal, already_there, sent_bytes, resumed_bytes = _vmsnap.push(
        located(source), located(url), credentials, threads, digest, take_over, progress
    )
    return Pushed(*seal, already_there, sent_bytes, resumed_bytes)


def pull(
    url: str | Location,
    target: SnapshotLocation,
    *,
    keys: Keys | None = None,
    key: "ReadableBuffer | None" = None,
    identities: "Identity | Iterable[Identity] | None" = None,
    passphrase: "Passphrase | None" = None,
    key_provider: "KeyProvider | None" = None,
    threads: int | None = None,
    durable: bool = True,
    archive: bool | None = None,
    expect_seal_digest: "ReadableBuffer | str | None" = None,
    progress: Progress | None = None,
) -> SealId:
    """Copy a snapshot out of an object store: complete or absent, and every byte checked.

    Parameters
    ----------
    url
        The URL of the snapshot. A `Location` adds options.
    target
        The directory of the new snapshot, or the file for an archive, as for `create`.
    keys, key, identities, passphrase, key_provider
        The key that opens an encrypted snapshot, as for `SnapshotReader`. The copy opens with the same key.
    threads
        The maximum number of threads that the call uses.
    durable
        Whether the call waits until everything is on the disk, as for `create`.
    archive
        Whether the copy becomes one file, as for `create`.
    expect_seal_digest
        The seal digest that the snapshot must have, as for `SnapshotReader`.
    progress
        Called with the number of bytes done and the total.

    Raises
    ------
    FileExistsError
        Something exists at `target`.
    FileNotFoundError
        There is no snapshot at the URL, or no parent directory of `target`.
    AuthenticationError, CorruptSnapshotError
        An object is not the one that the manifest lists, or was replaced while it was read.
    KeyUnavailableError, NotEncryptedError, UnsupportedFormatError
        The snapshot cannot be opened, see `SnapshotReader`.
    PermissionError, TimeoutError, InvalidArgumentError
        The store cannot be used, see `push`.
    OSError
        Another error of the operating system, for instance a full disk. Nothing is left behind after any error.
    """
    given = Keys(key=key, identities=identities, passphrase=passphrase, key_provider=key_provider)
    credentials, digest = one_of(keys, given)._credentials(), digest_bytes(expect_seal_digest)
    return SealId(
        *_vmsnap.pull(located(url), located(target), credentials, threads, durable, archive, digest, progress)
    )
