"""Writing snapshots: directories of fragments, nested by namespaces."""

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, cast

from vmsnap import _vmsnap, memory, serialization
from vmsnap._handle import Handle
from vmsnap.io import Fragment
from vmsnap.keys import Keys, one_of

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, StrOrBytesPath

    from vmsnap.keys import Identity, KeyProvider, Passphrase
    from vmsnap.serialization import _Format

__all__ = ["SnapshotWriter"]


class SnapshotWriter(Handle):
    """Writes a snapshot in place: it is visible at its location from the start, and not sealed.

    Use `create` for a snapshot that is complete or absent.

    Parameters
    ----------
    location
        The directory to create. It must not exist; its parent directory must.
    encrypt
        Encrypt every fragment. Without any of the keys below, the snapshot is encrypted to the user's own age
        identity: from the environment variables ``VMSNAP_IDENTITY`` (the text) or ``VMSNAP_IDENTITY_FILE``, from
        ``$CREDENTIALS_DIRECTORY/vmsnap-identity`` or ``$XDG_CONFIG_HOME/vmsnap/identity.txt``. If none of these exists,
        the last one is made, and a `NewIdentityWarning` says to back it up. Any of the next four implies `encrypt`, and
        only one of them can be given.
    keys
        All of these as one object, in place of the single arguments.
    key
        The 32 bytes that wrap the snapshot's own data key, from `generate_key`. Without them the snapshot cannot be
        read.
    recipients
        Recipients that can open the snapshot: age (``age1...``, those of plugins too) or SSH public keys. They encrypt
        only.
    passphrase
        A passphrase, or a callable that returns one; stretched by scrypt (about 1 s). A ``str`` cannot be wiped from
        memory; a ``bytearray`` is cleared once it is read.
    key_provider
        A key service of your own that wraps the data key, see `KeyProvider`.
    threads
        The maximum number of threads that one call uses, including its own; never more than the process's pool has. By
        default the environment variable ``VMSNAP_THREADS``, or the number of processors that the process may use.
    format
        How `write_fragment` serializes: ``"cbor"``, or ``"json"`` as crosvm did before March 2025.

    Raises
    ------
    FileExistsError
        Something exists at `location`.
    FileNotFoundError
        The parent directory does not exist.
    KeyUnavailableError
        The user's own identity may be read by others, or an age plugin or the key service failed. Nothing is created.
    InvalidArgumentError
        The key is not 32 bytes long, a text is not a recipient, more than one kind of key is given, the thread count is
        out of range, or the format is unknown.
    NewIdentityWarning
        As a warning: an identity is made, and must be backed up.

    Notes
    -----
    The handle is small, may be used by many threads, and can be copied and pickled: workers of `multiprocessing` and
    `concurrent.futures` write their own fragments into one snapshot. **The pickle holds the data key in the clear.**
    """

    _raw: _vmsnap.SnapshotWriter
    _raw_class = _vmsnap.SnapshotWriter

    def __init__(
        self,
        location: "StrOrBytesPath",
        encrypt: bool = False,
        *,
        keys: Keys | None = None,
        key: "ReadableBuffer | None" = None,
        recipients: str | Iterable[str] | None = None,
        passphrase: "Passphrase | None" = None,
        key_provider: "KeyProvider | None" = None,
        threads: int | None = None,
        format: "_Format" = "cbor",
    ) -> None:
        given = Keys(encrypt=encrypt, key=key, recipients=recipients, passphrase=passphrase, key_provider=key_provider)
        credentials = one_of(keys, given)._credentials()
        self._raw = _vmsnap.SnapshotWriter(os.fsdecode(location), credentials, threads, format)

    @property
    def format(self) -> "_Format":
        """How values are serialized."""
        return cast("_Format", self._raw.format)

    @classmethod
    def open(
        cls,
        location: "StrOrBytesPath",
        *,
        keys: Keys | None = None,
        key: "ReadableBuffer | None" = None,
        identities: "Identity | Iterable[Identity] | None" = None,
        passphrase: "Passphrase | None" = None,
        key_provider: "KeyProvider | None" = None,
        threads: int | None = None,
        format: "_Format" = "cbor",
    ) -> "SnapshotWriter":
        """Open an existing snapshot to add fragments and namespaces. Existing ones are never overwritten.

        Parameters
        ----------
        location
            The directory of the snapshot.
        keys, key, identities, passphrase, key_provider
            What opens an encrypted snapshot, as for `SnapshotReader`.
        threads
            The maximum number of threads that one call uses.
        format
            How `write_fragment` serializes from now on.

        Raises
        ------
        SealedError
            The snapshot is sealed, so nothing can be added.
        FileNotFoundError, KeyUnavailableError, NotEncryptedError, AuthenticationError
            The snapshot cannot be opened, see `SnapshotReader`.
        """
        given = Keys(key=key, identities=identities, passphrase=passphrase, key_provider=key_provider)
        credentials = one_of(keys, given)._credentials()
        return cls._of(_vmsnap.SnapshotWriter.open(os.fsdecode(location), credentials, threads, format))

    def raw_fragment(self, name: str, *, chunk_size_bytes: int = _vmsnap.DEFAULT_CHUNK_SIZE_BYTES) -> Fragment:
        """Create a fragment.

        Parameters
        ----------
        name
            Up to 255 bytes of UTF-8 without slash, backslash and NUL; not ``.``, ``..`` or one of vmsnap's own.
        chunk_size_bytes
            Where the snapshot is encrypted: bytes that are encrypted, and later decrypted, together; 32 to 64 MiB.
            Larger ones are faster to write, smaller ones to read at random.

        Raises
        ------
        FileExistsError
            There is a fragment or a namespace of that name.
        InvalidArgumentError
            The name or the size is not allowed.
        """
        return Fragment(self._raw.raw_fragment(name, chunk_size_bytes), name)

    def raw_fragment_with_chunk_size(self, name: str, chunk_size_bytes: int) -> Fragment:
        """Create a fragment, as `raw_fragment`; crosvm's name."""
        return self.raw_fragment(name, chunk_size_bytes=chunk_size_bytes)

    def write_fragment(
        self, name: str, value: object, *, default: Callable[[Any], object] | None = None, as_list: bool = False
    ) -> None:
        """Write a fragment that holds one value. It is serialized before any file exists.

        Parameters
        ----------
        name
            As for `raw_fragment`.
        value
            None, bool, int, float, str, anything bytes-like, lists, tuples, named tuples, sets, dicts, dataclasses,
            enums (by value), UUIDs, dates, datetimes with a time zone, paths, numpy scalars and arrays (with their
            dtype and shape, where the format is CBOR); nested up to 127 levels. ``docs/guide.md`` has the table.
        default
            Called with what is none of these; returns something that is, or raises.
        as_list
            Write numpy arrays as (nested) lists, as serde expects a ``Vec``, instead of as typed arrays.

        Raises
        ------
        SerializationError
            Something in the value cannot be written; the text says where in it. Nothing is created.
        FileExistsError
            There is a fragment or a namespace of that name.
        InvalidArgumentError
            The name is not allowed.
        """

        def place() -> str:
            path = "/".join(filter(None, [self.namespace_path, name]))
            return f"the value for {path!r} of {self.location}"

        data = serialization.encode_at(place, value, format=self.format, default=default, as_list=as_list)
        self._raw.write_whole(name, data)

    def write_memory(
        self,
        regions: Iterable[memory.GuestRegion],
        *,
        compress: Literal["lz4"] | None = None,
        progress: memory.Progress | None = None,
        on_error: Literal["raise", "zero"] = "raise",
        sparse: bool = True,
        stable: bool = False,
        uncached: bool = False,
        detect_zeros: bool = True,
        min_gap_bytes: int = 4096,
        chunk_size_bytes: int = 16384,
        block_size_bytes: int = 65536,
    ) -> memory.MemoryReport:
        """Write guest memory, by all threads: the fragments ``mem`` and ``mem_metadata``, as crosvm reads them.

        Holes, and pages of zeros, are not stored. Memory may change meanwhile; what is stored is what one read gave.

        Parameters
        ----------
        regions
            What memory there is, in the order in which it is to be restored. Regions do not overlap.
        compress
            ``"lz4"``, or nothing.
        progress
            Called with the bytes done and all bytes, ten times a second at most, and at the end. What it raises cancels
            the dump.
        on_error
            Whether pages that cannot be read are an error, or zeros that the report tells of.
        sparse
            Whether holes are left out unread, as the file system or the page table of the process tells of them.
            ``False`` reads everything: for a file system that tells of holes where there are none. Pages of zeros are
            left out all the same.
        stable
            The promise that no buffer among the sources changes during the call, as the memory of a paused guest does
            not. Such buffers are stored without a copy, which is faster. Where the promise is broken, what is stored is
            undefined; a ``bytes`` object cannot change, and needs no promise.
        uncached
            Whether the stored bytes, and files that are read, bypass the page cache. A dump of tens of GiB then does
            not push everything else out of it, and runs at the speed of the disk. It has no effect on tmpfs, whose
            files are the page cache. On Linux before 6.14 the same is requested by advice.
        detect_zeros
            Whether pages that were touched and are zero are left out too.
        min_gap_bytes
            Shorter gaps between data are stored as zeros.
        chunk_size_bytes
            Where the snapshot is encrypted: bytes that are encrypted together, as for `raw_fragment`.
        block_size_bytes
            Bytes that are compressed together: 64 KiB, 256 KiB, 1 MiB or 4 MiB.

        Raises
        ------
        FileExistsError
            There is a ``mem`` or ``mem_metadata`` in this namespace.
        InvalidArgumentError
            Regions overlap, a source is too short or does not tell its size, or a size is not allowed.
        TypeError
            A source is not one of those that `GuestRegion` names.
        OSError
            Memory cannot be read, and the text has its guest-physical address; or the disk is full. After any error
            neither fragment is there.
        """
        return memory.write(
            self._raw,
            regions,
            compress=compress,
            progress=progress,
            on_error=on_error,
            sparse=sparse,
            stable=stable,
            uncached=uncached,
            detect_zeros=detect_zeros,
            min_gap_bytes=min_gap_bytes,
            chunk_size_bytes=chunk_size_bytes,
            block_size_bytes=block_size_bytes,
        )

    def add_namespace(self, name: str) -> "SnapshotWriter":
        """Create a namespace, and return a writer into it.

        Raises
        ------
        FileExistsError
            There is a fragment or a namespace of that name.
        InvalidArgumentError
            The name is not allowed.
        """
        return self._of(self._raw.add_namespace(name))

    def namespace(self, name: str) -> "SnapshotWriter":
        """Enter a namespace that exists.

        Raises
        ------
        FileNotFoundError
            There is none of that name.
        """
        return self._of(self._raw.namespace(name))
