"""Reading snapshots."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar, overload

from vmsnap import _vmsnap, memory, migration, serialization
from vmsnap._handle import Handle
from vmsnap.errors import InvalidArgumentError
from vmsnap.io import FragmentReader
from vmsnap.keys import Keys, one_of
from vmsnap.location import SnapshotLocation, located
from vmsnap.memory import Progress
from vmsnap.serialization.build import converter

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from vmsnap.keys import Identity, KeyProvider, Passphrase
    from vmsnap.serialization import _Format

__all__ = ["SnapshotReader"]

Value = TypeVar("Value")

_MAX_VALUE_BYTES = 1 << 30


class SnapshotReader(Handle):
    """Reads a snapshot that vmsnap wrote, or a plain one that crosvm wrote.

    Parameters
    ----------
    location
        The snapshot: a directory, an archive, or a URL in an object store (``s3://``, ``gs://``, ``az://``), of which
        only the blocks that are read are fetched. A `Location` adds options.
    require_encrypted
        Refuse a snapshot that is not encrypted.
    keys
        The key as one object, instead of the single arguments.
    key
        The 32 bytes that the snapshot was written with. At most one of `key`, `identities`, `passphrase` and
        `key_provider` can be given, and any of them implies `require_encrypted`. Without them, the user's own age
        identity is looked for as in `SnapshotWriter`, but never made.
    identities
        Identities that open a snapshot encrypted to age recipients: one or several, each a text
        (``AGE-SECRET-KEY-1...``, an SSH private key), the path of a file that only you may read, or an `IdentityFile`.
    passphrase
        The passphrase that the snapshot was written with.
    key_provider
        A key service with the name that the snapshot was written with.
    threads
        The maximum number of threads that one call uses, as for `SnapshotWriter`.
    require_sealed
        Refuse a snapshot that is not sealed.
    expect_seal_digest
        The seal digest that the snapshot must have, 32 bytes or 64 hexadecimal digits, from a place outside the
        snapshot. It detects an older state of the snapshot, another snapshot in its place, and forgeries by anybody who
        once had the key.

    Raises
    ------
    FileNotFoundError
        The snapshot does not exist.
    NotSealedError
        The snapshot was required to be sealed, and is not.
    KeyUnavailableError
        The snapshot is encrypted, and no key or another kind of key was given; other users may read a file of
        identities; an age plugin or the key service failed.
    NotEncryptedError
        The snapshot was required to be encrypted, and is not.
    AuthenticationError
        The key is wrong, ``enc_metadata`` is damaged, or the seal digest is not the expected one.
    CorruptSnapshotError
        The manifest is damaged, or it is missing and the snapshot was created to have one.
    UnsupportedFormatError
        The snapshot needs a newer version of vmsnap.

    Notes
    -----
    The handle can be copied and pickled like a writer. **The pickle contains the data key in the clear.**
    """

    _raw: _vmsnap.SnapshotReader
    _raw_class = _vmsnap.SnapshotReader

    def __init__(
        self,
        location: SnapshotLocation,
        require_encrypted: bool = False,
        *,
        keys: Keys | None = None,
        key: "ReadableBuffer | None" = None,
        identities: "Identity | Iterable[Identity] | None" = None,
        passphrase: "Passphrase | None" = None,
        key_provider: "KeyProvider | None" = None,
        threads: int | None = None,
        require_sealed: bool = False,
        expect_seal_digest: "ReadableBuffer | str | None" = None,
    ) -> None:
        given = Keys(
            encrypt=require_encrypted,
            key=key,
            identities=identities,
            passphrase=passphrase,
            key_provider=key_provider,
        )
        credentials = one_of(keys, given)._credentials()
        digest = digest_bytes(expect_seal_digest)
        self._raw = _vmsnap.SnapshotReader(located(location), credentials, threads, require_sealed, digest)

    @property
    def snapshot_id(self) -> bytes | None:
        """The 16 random bytes that identify a sealed snapshot; None if the snapshot is not sealed."""
        return self._raw.snapshot_id

    @property
    def seal_digest(self) -> bytes | None:
        """The 32 bytes for `expect_seal_digest`; None if the snapshot is not sealed."""
        return self._raw.seal_digest

    def raw_fragment(self, name: str) -> FragmentReader:
        """Open a fragment.

        Raises
        ------
        FileNotFoundError
            There is no fragment of that name in this namespace.
        AuthenticationError
            The fragment is not the one that was written under that name: it was damaged, truncated, renamed, moved, or
            comes from another snapshot.
        CorruptSnapshotError
            The name belongs to something else: a link, a special file, a file that is not an encrypted fragment.
        """
        return FragmentReader(self._raw.raw_fragment(name), name)

    def memory(self) -> memory.GuestMemory:
        """Open the guest memory that `SnapshotWriter.write_memory`, or crosvm, wrote into this namespace.

        Raises
        ------
        FileNotFoundError
            This namespace does not contain guest memory.
        CorruptSnapshotError
            The regions and ranges contradict each other, or do not fit the data.
        AuthenticationError
            The data or the metadata is not authentic.
        """
        return memory.GuestMemory(self._raw.memory())

    def migration_front(self, fragment: str = "device_state") -> migration.MigrationFront:
        """Read the beginning of the fragment with the devices of a QEMU guest: machine type and RAM blocks.

        Raises
        ------
        FileNotFoundError
            There is no such fragment.
        CorruptSnapshotError, UnsupportedFormatError
            The fragment is not a migration stream of QEMU that vmsnap reads.
        AuthenticationError
            The fragment is not authentic.
        """
        return migration.MigrationFront(*self._raw.migration_front(fragment))

    def send_migration(
        self,
        fd: int,
        blocks: Iterable[migration.SentBlock],
        *,
        fragment: str = "device_state",
        threads: int | None = None,
        progress: Progress | None = None,
    ) -> int:
        """Write a migration stream for QEMU: the fragment, with the pages of guest memory put into it.

        Parameters
        ----------
        fd
            The descriptor of a pipe, a socket or a file.
        blocks
            The RAM blocks of the fragment whose pages are sent, or whose names are changed. The others stay as they
            are.
        fragment
            The name of the fragment.
        threads
            The maximum number of threads. By default the number that the reader was opened with.
        progress
            Called with the number of bytes of guest memory that are sent and of all, at most ten times a second, and at
            the end. An exception of the callback ends the call.

        Returns
        -------
        int
            The number of bytes of the stream.

        Raises
        ------
        InvalidArgumentError
            The blocks do not fit the fragment or guest memory. Nothing was written.
        CorruptSnapshotError, UnsupportedFormatError, AuthenticationError
            The fragment or guest memory is damaged or was changed.
        BrokenPipeError
            QEMU stopped reading.
        OSError
            The stream cannot be written.
        """
        return migration.send(self._raw, fd, blocks, fragment, threads, progress)

    @overload
    def read_fragment(
        self, name: str, type: None = None, *, format: "_Format | None" = None, max_size_bytes: int = _MAX_VALUE_BYTES
    ) -> Any: ...
    @overload
    def read_fragment(
        self,
        name: str,
        type: Callable[..., Value],
        *,
        format: "_Format | None" = None,
        max_size_bytes: int = _MAX_VALUE_BYTES,
    ) -> Value: ...
    @overload
    def read_fragment(
        self, name: str, type: Any, *, format: "_Format | None" = None, max_size_bytes: int = _MAX_VALUE_BYTES
    ) -> Any: ...
    def read_fragment(
        self, name: str, type: Any = None, *, format: "_Format | None" = None, max_size_bytes: int = _MAX_VALUE_BYTES
    ) -> Any:
        """Read a fragment that holds one value, in CBOR or JSON.

        Parameters
        ----------
        name
            The name of the fragment.
        type
            The type of the result: a dataclass, named tuple, typed dict, enum, ``Optional``, ``list[...]``,
            ``dict[...]``, ``bytes`` and others, in any nesting. Values are converted by serde's conventions; the table
            is in ``docs/guide.md``. Any other callable is called with the decoded value. By default the decoded value
            is returned.
        format
            The format is detected by default. Only JSON that is a bare number cannot be told from CBOR: pass
            ``format="json"``.
        max_size_bytes
            The largest fragment that is accepted. A fragment is read whole, and the decoded value can take many times
            its size in memory.

        Raises
        ------
        CorruptSnapshotError
            The fragment is too large, is not exactly one value, or the value cannot be converted to `type`.
        FileNotFoundError, AuthenticationError
            As for `raw_fragment`.
        UnsupportedFormatError
            The value contains typed arrays, and numpy is not installed.
        InvalidArgumentError
            The format is unknown, or values cannot be converted to `type`.

        Notes
        -----
        Exceptions of the caller's own callables and constructors are passed on unchanged.
        """
        build = None if type is None else converter(type)
        data, found = self._raw.read_value(name, format, max_size_bytes)
        return serialization.decode_checked(data, found, build, lambda: self._raw.place(name))

    def list_fragments(self) -> list[str]:
        """Return the names of the fragments in this namespace, sorted.

        Raises
        ------
        CorruptSnapshotError
            The directory contains a link, a special file, or a name that is not allowed.
        """
        return self._raw.list_fragments()

    def list_namespaces(self) -> list[str]:
        """Return the names of the namespaces in this namespace, sorted. Raises the errors of `list_fragments`."""
        return self._raw.list_namespaces()

    def namespace(self, name: str) -> "SnapshotReader":
        """Return a reader of a namespace.

        Raises
        ------
        FileNotFoundError
            There is no namespace of that name.
        """
        return self._of(self._raw.namespace(name))


def digest_bytes(digest: "ReadableBuffer | str | None") -> bytes | None:
    """Return the bytes of a seal digest, which may be given in hexadecimal digits."""
    if isinstance(digest, str):
        try:
            return bytes.fromhex(digest)
        except ValueError:
            raise InvalidArgumentError("a seal digest must be 32 bytes or 64 hexadecimal digits") from None
    return None if digest is None else bytes(digest)
