"""Reading snapshots."""

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar, overload

from vmsnap import _vmsnap, memory, serialization
from vmsnap._handle import Handle
from vmsnap.errors import InvalidArgumentError
from vmsnap.io import FragmentReader
from vmsnap.keys import Keys, one_of
from vmsnap.serialization.build import converter

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, StrOrBytesPath

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
        The directory of the snapshot.
    require_encrypted
        Refuse a snapshot that is not encrypted.
    keys
        What opens the snapshot as one object, in place of the single arguments.
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
        There is no such directory.
    NotSealedError
        The snapshot was required to be sealed, and is not.
    KeyUnavailableError
        The snapshot is encrypted, and no key or another kind of key was given; a file of identities may be read by
        others; an age plugin or the key service failed.
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
    The handle can be copied and pickled like a writer. **The pickle holds the data key in the clear.**
    """

    _raw: _vmsnap.SnapshotReader
    _raw_class = _vmsnap.SnapshotReader

    def __init__(
        self,
        location: "StrOrBytesPath",
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
        self._raw = _vmsnap.SnapshotReader(os.fsdecode(location), credentials, threads, require_sealed, digest)

    @property
    def snapshot_id(self) -> bytes | None:
        """16 random bytes that name a sealed snapshot; None where it is not sealed."""
        return self._raw.snapshot_id

    @property
    def seal_digest(self) -> bytes | None:
        """What to pin a sealed snapshot by, 32 bytes; None where it is not sealed."""
        return self._raw.seal_digest

    def raw_fragment(self, name: str) -> FragmentReader:
        """Open a fragment.

        Raises
        ------
        FileNotFoundError
            There is none of that name in this namespace.
        AuthenticationError
            It is not the fragment that was written there: damaged, truncated, renamed, moved or another snapshot's.
        CorruptSnapshotError
            Something else is in its place: a link, a special file, a file that is no encrypted fragment.
        """
        return FragmentReader(self._raw.raw_fragment(name), name)

    def memory(self) -> memory.GuestMemory:
        """Open the guest memory that `SnapshotWriter.write_memory`, or crosvm, wrote into this namespace.

        Raises
        ------
        FileNotFoundError
            There is none.
        CorruptSnapshotError
            Its regions and ranges contradict each other, or do not fit the data.
        AuthenticationError
            It is not what was written.
        """
        return memory.GuestMemory(self._raw.memory())

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
            The fragment's.
        type
            What to build of the value: a dataclass, named tuple, typed dict, enum, ``Optional``, ``list[...]``,
            ``dict[...]``, ``bytes``, ... , nested as they come, by serde's conventions (the table is in
            ``docs/guide.md``); or any callable, which gets the value. By default the value as it was decoded.
        format
            Found out by default. Only a bare number in JSON cannot be told from CBOR: ``format="json"``.
        max_size_bytes
            A larger fragment is refused, for it is read whole. What is decoded may take many times its memory.

        Raises
        ------
        CorruptSnapshotError
            It does not hold one value and nothing else, it is not one that `type` can be built of, or it is too large.
        FileNotFoundError, AuthenticationError
            As for `raw_fragment`.
        UnsupportedFormatError
            It has typed arrays, and numpy is not installed.
        InvalidArgumentError
            There is no such format, or no way to build `type`.

        Notes
        -----
        What a `type` that is a callable, or a constructor of the caller's raises is passed on as it is.
        """
        build = None if type is None else converter(type)
        data, found = self._raw.read_value(name, format, max_size_bytes)
        return serialization.decode_checked(data, found, build, lambda: self._raw.place(name))

    def list_fragments(self) -> list[str]:
        """Return the names of the fragments at this level, sorted.

        Raises
        ------
        CorruptSnapshotError
            The folder holds a link, a special file, or a name that no snapshot can hold.
        """
        return self._raw.list_fragments()

    def list_namespaces(self) -> list[str]:
        """Return the names of the namespaces at this level, sorted; raises as `list_fragments`."""
        return self._raw.list_namespaces()

    def namespace(self, name: str) -> "SnapshotReader":
        """Open a namespace.

        Raises
        ------
        FileNotFoundError
            There is none of that name.
        """
        return self._of(self._raw.namespace(name))


def digest_bytes(digest: "ReadableBuffer | str | None") -> bytes | None:
    """Return a seal digest that may be given in hexadecimal digits."""
    if isinstance(digest, str):
        try:
            return bytes.fromhex(digest)
        except ValueError:
            raise InvalidArgumentError("a seal digest is 64 hexadecimal digits") from None
    return None if digest is None else bytes(digest)
