"""Writing snapshots: directories of fragments, nested by namespaces."""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Literal, cast

from vmsnap import _vmsnap, memory, migration, serialization
from vmsnap._handle import Handle
from vmsnap.io import Fragment
from vmsnap.keys import Keys, one_of
from vmsnap.location import SnapshotLocation, located

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from vmsnap.keys import Identity, KeyProvider, Passphrase
    from vmsnap.serialization import _Format

__all__ = ["SnapshotWriter"]


class SnapshotWriter(Handle):
    """Writes a snapshot in place: it is visible at its location from the start, and not sealed.

    Use `create` for a snapshot that is complete or absent.

    Parameters
    ----------
    location
        The directory to create. It must not exist; its parent directory must. Its name must not end in
        ``.vmsnap.tar``, because an archive cannot be written in place.
    encrypt
        Encrypt every fragment. Without any of the keys below, the snapshot is encrypted to the user's own age
        identity: from the environment variables ``VMSNAP_IDENTITY`` (the text) or ``VMSNAP_IDENTITY_FILE``, from
        ``$CREDENTIALS_DIRECTORY/vmsnap-identity`` or ``$XDG_CONFIG_HOME/vmsnap/identity.txt``. If none of these exists,
        the last one is made, and a `NewIdentityWarning` says to back it up. Any of the next four implies `encrypt`, and
        only one of them can be given.
    keys
        The key as one object, instead of the single arguments.
    key
        The 32 bytes that wrap the snapshot's own data key, from `generate_key`. Without them the snapshot cannot be
        read.
    recipients
        The recipients that can open the snapshot: age (``age1...``, also of plugins) or SSH public keys. They only
        encrypt.
    passphrase
        A passphrase, or a callable that returns one; stretched by scrypt (about 1 s). A ``str`` cannot be wiped from
        memory; a ``bytearray`` is cleared once it is read.
    key_provider
        A key service of your own that wraps the data key, see `KeyProvider`.
    threads
        The maximum number of threads that one call uses, including its own; never more than the process's pool has. By
        default the environment variable ``VMSNAP_THREADS``, or the number of processors that the process may use.
    format
        The format of values that `write_fragment` writes: ``"cbor"``, or ``"json"`` as in crosvm before March 2025.

    Raises
    ------
    FileExistsError
        Something exists at `location`.
    FileNotFoundError
        The parent directory does not exist.
    KeyUnavailableError
        Other users may read the user's own identity, or an age plugin or the key service failed. Nothing is created.
    InvalidArgumentError
        The key is not 32 bytes long, a text is not a recipient, more than one kind of key is given, the thread count is
        out of range, or the format is unknown.
    NewIdentityWarning
        This is a warning: an identity is made, and must be backed up.

    Notes
    -----
    The handle is small, may be used by many threads, and can be copied and pickled: workers of `multiprocessing` and
    `concurrent.futures` write their own fragments into one snapshot. **The pickle contains the data key in the clear.**
    """

    _raw: _vmsnap.SnapshotWriter
    _raw_class = _vmsnap.SnapshotWriter

    def __init__(
        self,
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
    ) -> None:
        given = Keys(encrypt=encrypt, key=key, recipients=recipients, passphrase=passphrase, key_provider=key_provider)
        credentials = one_of(keys, given)._credentials()
        self._raw = _vmsnap.SnapshotWriter(located(location), credentials, threads, format)

    @property
    def format(self) -> "_Format":
        """The serialization format of values."""
        return cast("_Format", self._raw.format)

    @classmethod
    def open(
        cls,
        location: SnapshotLocation,
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
            The key that opens an encrypted snapshot, as for `SnapshotReader`.
        threads
            The maximum number of threads that one call uses.
        format
            The format of values that `write_fragment` writes.

        Raises
        ------
        SealedError
            The snapshot is sealed, so nothing can be added.
        FileNotFoundError, KeyUnavailableError, NotEncryptedError, AuthenticationError
            The snapshot cannot be opened, see `SnapshotReader`.
        """
        given = Keys(key=key, identities=identities, passphrase=passphrase, key_provider=key_provider)
        credentials = one_of(keys, given)._credentials()
        return cls._of(_vmsnap.SnapshotWriter.open(located(location), credentials, threads, format))

    def raw_fragment(self, name: str, *, chunk_size_bytes: int = _vmsnap.DEFAULT_CHUNK_SIZE_BYTES) -> Fragment:
        """Create a fragment.

        Parameters
        ----------
        name
            Up to 255 bytes of UTF-8 without slash, backslash and NUL; not ``.``, ``..`` or a name that vmsnap reserves.
        chunk_size_bytes
            The size of the chunks in which an encrypted fragment is encrypted: 32 bytes to 64 MiB. Larger chunks make
            sequential writes faster, smaller ones random reads. Ignored if the snapshot is not encrypted.

        Raises
        ------
        FileExistsError
            There is a fragment or a namespace of that name.
        InvalidArgumentError
            The name or the size is not allowed.
        """
        return Fragment(self._raw.raw_fragment(name, chunk_size_bytes), name)

    def raw_fragment_with_chunk_size(self, name: str, chunk_size_bytes: int) -> Fragment:
        """Create a fragment as `raw_fragment` does. This is the name of the method in crosvm."""
        return self.raw_fragment(name, chunk_size_bytes=chunk_size_bytes)

    def write_fragment(
        self, name: str, value: object, *, default: Callable[[Any], object] | None = None, as_list: bool = False
    ) -> None:
        """Write a fragment that holds one value. The value is serialized before a file is created.

        Parameters
        ----------
        name
            As for `raw_fragment`.
        value
            None, bool, int, float, str, bytes-like objects, lists, tuples, named tuples, sets, dicts, dataclasses,
            enums (by value), UUIDs, dates, datetimes with a time zone, paths, numpy scalars and arrays (in CBOR with
            their dtype and shape), nested up to 127 levels. ``docs/guide.md`` has the table.
        default
            Called with an object of any other type. Returns an object of one of these types, or raises.
        as_list
            Write numpy arrays as (nested) lists, as serde expects a ``Vec``, instead of as typed arrays.

        Raises
        ------
        SerializationError
            A part of the value cannot be written; the text names it. Nothing is created.
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
        """Write guest memory with all threads: the fragments ``mem`` and ``mem_metadata``, which crosvm can read.

        Holes and pages of zeros are not stored. Memory may change during the call: each byte is read once and stored as
        it was then.

        Parameters
        ----------
        regions
            The regions of guest memory, in the order in which they will be restored. They must not overlap.
        compress
            ``"lz4"``, or None for no compression.
        progress
            Called with the number of bytes done and of all bytes, at most ten times a second, and at the end. An
            exception of the callback cancels the dump.
        on_error
            ``"raise"``: a page that cannot be read is an error. ``"zero"``: it is stored as zeros and reported.
        sparse
            Skip the holes that the file system, or the page table of the process, reports, without reading them. Pass
            ``False`` to read everything, if the file system reports holes wrongly. Pages of zeros are left out in
            either case.
        stable
            Promise that no buffer among the sources changes during the call, for instance because the guest is paused.
            Such buffers are stored without a copy, which is faster. If one changes, the stored contents are undefined.
            ``bytes`` objects cannot change, so they need no promise.
        uncached
            Bypass the page cache for the stored bytes and for files that are read. A dump of tens of GiB then does not
            evict other data from the cache, and runs at the speed of the disk. The option has no effect on tmpfs, whose
            files are the page cache. Before Linux 6.14, vmsnap can only advise the kernel to do so.
        detect_zeros
            Leave out pages that are not in a hole but contain only zeros, too.
        min_gap_bytes
            Gaps between data that are shorter than this are stored as zeros.
        chunk_size_bytes
            The size of the chunks in which the memory is encrypted, as for `raw_fragment`.
        block_size_bytes
            The size of the blocks in which the memory is compressed: 64 KiB, 256 KiB, 1 MiB or 4 MiB.

        Raises
        ------
        FileExistsError
            ``mem`` or ``mem_metadata`` exists in this namespace.
        InvalidArgumentError
            Regions overlap, a source is too short or has no known size, or an option is not allowed.
        TypeError
            A source is not of a kind that `GuestRegion` allows.
        OSError
            Memory cannot be read, and the text has its guest-physical address; or the disk is full. After an error
            neither fragment exists.
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

    def receive_migration(
        self,
        fd: int,
        blocks: Iterable[str] | None,
        *,
        regions: Iterable[migration.BlockRegion] = (),
        fragment: str = "device_state",
        progress: memory.Progress | None = None,
    ) -> migration.MigrationStream:
        """Read a migration stream of QEMU to its end, and take the pages of guest memory out of it.

        The rest is written to a fragment as it passes, and is still a stream that QEMU accepts. If a page comes several
        times, as in a live migration, its last record counts.

        Parameters
        ----------
        fd
            The descriptor of a pipe, a socket or a file.
        blocks
            The names of the RAM blocks that are guest memory. If it is None, the names decide: ROMs, flash and the
            memory of graphics cards are not guest memory.
        regions
            Where the guest memory is. It is then written as it comes, as `write_memory` writes these regions with its
            default options, and takes no other space. `MigrationStream.written` has its sizes. QEMU sends a guest that
            stands still in such an order. If a page comes out of the order of the regions, comes again, or is in none
            of them, the guest memory is in the returned `MigrationStream`, as without regions.
        fragment
            The name of the fragment for the rest.
        progress
            Called with the number of bytes of guest memory that have come and of all, at most ten times a second, and
            at the end. An exception of the callback ends the call.

        Raises
        ------
        QemuError
            The stream is malformed or truncated, or contains something that vmsnap does not read. The text says what,
            and at which byte.
        OSError
            The stream cannot be read, a fragment exists, or the disk is full. After an error the fragments do not
            exist.
        InvalidArgumentError
            The name of the fragment is not allowed.
        """
        return migration.receive(self._raw, fd, blocks, regions, fragment, progress)

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
        """Return a writer into a namespace that exists.

        Raises
        ------
        FileNotFoundError
            There is no namespace of that name.
        """
        return self._of(self._raw.namespace(name))
