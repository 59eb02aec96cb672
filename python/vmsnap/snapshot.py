"""Writing and reading snapshots: folders of fragments, nested by namespaces."""

import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self, TypeVar, cast, overload

from vmsnap import _vmsnap, keys, memory, serialization
from vmsnap.errors import InvalidArgumentError
from vmsnap.io import Fragment, FragmentReader
from vmsnap.serialization.build import converter

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, StrOrBytesPath

    from vmsnap.keys import Identity, KeyProvider, Passphrase
    from vmsnap.serialization import _Format

__all__ = ["SnapshotReader", "SnapshotWriter"]

Value = TypeVar("Value")

_MAX_VALUE_BYTES = 1 << 30


class _Handle:
    """What the handles of writers and readers share: both can be copied, and pickled to travel to another process."""

    _raw: _vmsnap.SnapshotReader | _vmsnap.SnapshotWriter
    _raw_class: ClassVar[type[_vmsnap.SnapshotReader] | type[_vmsnap.SnapshotWriter]]

    @property
    def root(self) -> Path:
        """The snapshot's folder, absolute."""
        return self._raw.root

    @property
    def namespace_path(self) -> str:
        """The namespace this handle is for: names joined with ``/``, empty at the root."""
        return self._raw.namespace_path

    @property
    def encrypted(self) -> bool:
        """Whether the snapshot is encrypted."""
        return self._raw.encrypted

    @classmethod
    def _of(cls, raw: _vmsnap.SnapshotReader | _vmsnap.SnapshotWriter) -> Self:
        handle = cls.__new__(cls)
        handle._raw = raw
        return handle

    def __reduce__(self) -> tuple[Callable[[bytes], Self], tuple[bytes]]:
        """Pickle, the data key included: whoever reads the pickle can read the snapshot."""
        return self._from_state, (self._raw.to_state(),)

    @classmethod
    def _from_state(cls, state: bytes) -> Self:
        return cls._of(cls._raw_class.from_state(state))

    def __repr__(self) -> str:
        namespace = f" namespace={self.namespace_path!r}" if self.namespace_path else ""
        state = "encrypted" if self.encrypted else "plain"
        return f"<vmsnap.{type(self).__name__} {str(self.root)!r}{namespace} {state}>"


class SnapshotWriter(_Handle):
    """Writes a snapshot.

    Parameters
    ----------
    root
        The folder to create. It must not exist; its parent must.
    encrypt
        Encrypt every fragment. Where nothing says for whom, that is for the user's own age identity: from the
        environment variables ``VMSNAP_IDENTITY`` (the text) and ``VMSNAP_IDENTITY_FILE``, from
        ``$CREDENTIALS_DIRECTORY/vmsnap-identity`` or ``$XDG_CONFIG_HOME/vmsnap/identity.txt``. If there is none, it is
        made there, and a `NewIdentityWarning` tells to keep a copy. Any of the next four implies `encrypt`, and only
        one can be given.
    key
        The 32 bytes that wrap the snapshot's own data key, from `generate_key`. Without them nobody can read the
        snapshot any more.
    recipients
        Whom it is written for: age recipients (``age1...``, those of plugins too) and SSH public keys. Who has nothing
        else can write a snapshot and not read it.
    passphrase
        What is made a key by scrypt, a second of work: a text, or what is called for one. A ``str`` cannot be wiped
        from memory; a ``bytearray`` is cleared once it was taken.
    key_provider
        A key service of your own that wraps the data key, see `KeyProvider`.
    threads
        The most threads that one call uses, itself included; no more than the process's pool has. By default the
        environment variable ``VMSNAP_THREADS``, or as many as the process may run on.
    format
        How `write_fragment` serializes: ``"cbor"``, or ``"json"`` as crosvm did before March 2025.

    Raises
    ------
    FileExistsError
        Something is at `root`.
    FileNotFoundError
        The folder that `root` is to lie in does not exist.
    KeyUnavailableError
        The default identity may be read by others; a plugin of age's or the key service failed. Nothing is created.
    InvalidArgumentError
        A key that is not 32 bytes long, what is no recipient, two kinds of keys together, a number of threads out of
        range, or a format that there is not.
    NewIdentityWarning
        As a warning: there is an identity now that must be kept.

    Notes
    -----
    The handle is small, may be used by many threads, and can be copied and pickled: workers of `multiprocessing` and
    `concurrent.futures` write their own fragments into one snapshot. **The pickle holds the data key in the clear.**
    """

    _raw: _vmsnap.SnapshotWriter
    _raw_class = _vmsnap.SnapshotWriter

    def __init__(
        self,
        root: "StrOrBytesPath",
        encrypt: bool = False,
        *,
        key: "ReadableBuffer | None" = None,
        recipients: str | Iterable[str] | None = None,
        passphrase: "Passphrase | None" = None,
        key_provider: "KeyProvider | None" = None,
        threads: int | None = None,
        format: "_Format" = "cbor",
    ) -> None:
        credentials = keys.writing(
            encrypt, key=key, recipients=recipients, passphrase=passphrase, key_provider=key_provider
        )
        self._raw = _vmsnap.SnapshotWriter(os.fsdecode(root), credentials, threads, format)

    @property
    def format(self) -> "_Format":
        """How values are serialized."""
        return cast("_Format", self._raw.format)

    @classmethod
    def open(
        cls,
        root: "StrOrBytesPath",
        *,
        key: "ReadableBuffer | None" = None,
        identities: "Identity | Iterable[Identity] | None" = None,
        passphrase: "Passphrase | None" = None,
        key_provider: "KeyProvider | None" = None,
        threads: int | None = None,
        format: "_Format" = "cbor",
    ) -> "SnapshotWriter":
        """Open a snapshot that exists, to add fragments and namespaces. What is there is never written over.

        Parameters
        ----------
        root
            The snapshot's folder.
        key, identities, passphrase, key_provider
            What opens it, where it is encrypted, as for `SnapshotReader`.
        threads
            The most threads that one call uses.
        format
            How `write_fragment` serializes from now on.

        Raises
        ------
        UnsupportedFormatError
            The snapshot is sealed: it does not change any more.
        FileNotFoundError, KeyUnavailableError, NotEncryptedError, AuthenticationError
            As `SnapshotReader`.
        """
        credentials = keys.reading(key=key, identities=identities, passphrase=passphrase, key_provider=key_provider)
        return cls._of(_vmsnap.SnapshotWriter.open(os.fsdecode(root), credentials, threads, format))

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
            return f"the value for {path!r} of {self.root}"

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
        detect_zeros: bool = True,
        min_gap_bytes: int = 4096,
        chunk_size_bytes: int = 65536,
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


class SnapshotReader(_Handle):
    """Reads a snapshot that `SnapshotWriter` wrote, or a plain one of crosvm's.

    Parameters
    ----------
    root
        The snapshot's folder.
    require_encrypted
        Refuse a plain snapshot.
    key
        The 32 bytes it was written with. One of these four, any of which implies `require_encrypted`; without them, the
        user's own age identity is looked for as in `SnapshotWriter`, and never made.
    identities
        What opens a snapshot that was written for age recipients: one or several of them, each the text
        (``AGE-SECRET-KEY-1...``, an SSH private key), the path of a file that only you may read, or an `IdentityFile`.
    passphrase
        The one it was written with.
    key_provider
        A key service of the name it was written with.
    threads
        The most threads that one call uses, as for `SnapshotWriter`.
    require_sealed
        Refuse a snapshot that has no manifest.
    expect_seal_digest
        The seal digest it must have, 32 bytes or 64 hexadecimal digits, kept elsewhere: that catches an older state of
        the snapshot, another one in its place, and forging by those who once had the key.

    Raises
    ------
    FileNotFoundError
        There is no such folder.
    NotSealedError
        The snapshot has no manifest, and was required to.
    KeyUnavailableError
        The snapshot is encrypted, and there is no key, or another kind of key; a file of identities may be read by
        others; a plugin of age's or the key service failed.
    NotEncryptedError
        The snapshot is plain, and was required to be encrypted.
    AuthenticationError
        The key is not the one, or ``enc_metadata`` is damaged; or the seal digest is not the one expected.
    CorruptSnapshotError
        The manifest is damaged, or lacks where the snapshot was to have one.
    UnsupportedFormatError
        The snapshot needs a newer version of vmsnap.

    Notes
    -----
    The handle can be copied and pickled, as a writer's. **The pickle holds the data key in the clear.**
    """

    _raw: _vmsnap.SnapshotReader
    _raw_class = _vmsnap.SnapshotReader

    def __init__(
        self,
        root: "StrOrBytesPath",
        require_encrypted: bool = False,
        *,
        key: "ReadableBuffer | None" = None,
        identities: "Identity | Iterable[Identity] | None" = None,
        passphrase: "Passphrase | None" = None,
        key_provider: "KeyProvider | None" = None,
        threads: int | None = None,
        require_sealed: bool = False,
        expect_seal_digest: "ReadableBuffer | str | None" = None,
    ) -> None:
        credentials = keys.reading(
            require_encrypted, key=key, identities=identities, passphrase=passphrase, key_provider=key_provider
        )
        digest = digest_bytes(expect_seal_digest)
        self._raw = _vmsnap.SnapshotReader(os.fsdecode(root), credentials, threads, require_sealed, digest)

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
