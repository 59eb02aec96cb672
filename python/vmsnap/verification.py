"""Verifying snapshots."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from vmsnap import _vmsnap
from vmsnap.keys import Keys, one_of
from vmsnap.location import SnapshotLocation, located
from vmsnap.reader import digest_bytes

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from vmsnap.keys import Identity, KeyProvider, Passphrase

__all__ = ["Problem", "Verification", "verify"]


@dataclass(frozen=True)
class Problem:
    """A difference between a snapshot and its manifest.

    Attributes
    ----------
    path
        The path in the snapshot.
    kind
        ``missing``, ``extra``, ``changed``, ``truncated``, ``swapped``, ``not authentic``, ``wrong size``,
        ``bad manifest``, ``bad key metadata``, ``not sealed``, ``link``, ``special file``, ``not UTF-8``,
        ``unreadable``.
    text
        A description.
    """

    path: str
    kind: str
    text: str


@dataclass(frozen=True)
class Verification:
    """The report of `verify`.

    Attributes
    ----------
    problems
        All problems, sorted by path.
    not_checked
        Descriptions of everything that could not be checked, with the reason: for instance a missing key.
    fragments
        All fragments that exist or should exist: by path, the kind of problem, or ``ok``.
    verified_bytes
        The number of plaintext bytes that were read and verified.
    snapshot_id, seal_digest
        The identification of the snapshot; None if its manifest could not be read.
    """

    problems: list[Problem]
    not_checked: list[str]
    fragments: dict[str, str]
    verified_bytes: int
    snapshot_id: bytes | None
    seal_digest: bytes | None

    @property
    def ok(self) -> bool:
        """Whether everything was checked and nothing has changed since the snapshot was sealed."""
        return not self.problems and not self.not_checked


def verify(
    location: SnapshotLocation,
    *,
    expect_seal_digest: "ReadableBuffer | str | None" = None,
    keys: Keys | None = None,
    key: "ReadableBuffer | None" = None,
    identities: "Identity | Iterable[Identity] | None" = None,
    passphrase: "Passphrase | None" = None,
    key_provider: "KeyProvider | None" = None,
    threads: int | None = None,
) -> Verification:
    """Read all of a snapshot with all threads, and report every difference from its sealed state.

    Without the key of an encrypted snapshot it checks as much as it can, and reports everything else in `not_checked`.
    A snapshot that is not sealed is read too; the missing seal is reported as a problem.

    Raises
    ------
    FileNotFoundError
        The snapshot does not exist.
    NotEncryptedError, InvalidArgumentError
        As for `SnapshotReader`. Everything else is in the report.
    """
    given = Keys(key=key, identities=identities, passphrase=passphrase, key_provider=key_provider)
    credentials = one_of(keys, given)._credentials()
    problems, not_checked, fragments, verified_bytes, found = _vmsnap.verify(
        located(location), credentials, threads, digest_bytes(expect_seal_digest)
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
