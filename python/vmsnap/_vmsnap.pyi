"""The core of vmsnap, compiled from Rust. Programs use the modules of the package `vmsnap` instead."""

from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Final, Self, TypeAlias, final

from _typeshed import ReadableBuffer, WriteableBuffer

__all__ = [
    "COMMIT",
    "DEFAULT_CHUNK_SIZE_BYTES",
    "FEATURES",
    "Credentials",
    "Fragment",
    "FragmentReader",
    "GuestMemory",
    "MigrationStream",
    "ProcessMemory",
    "ProcessRange",
    "SnapshotReader",
    "SnapshotWriter",
    "SpooledMemory",
    "StagedSnapshot",
    "StoppedProcess",
    "__version__",
    "aead_provider",
    "are_crowded",
    "cache_usage",
    "check_serialized",
    "clean",
    "copy_buffer",
    "created_at",
    "empty_cache",
    "generate_identity",
    "generate_key",
    "identity_file",
    "inspect",
    "is_marked",
    "key_wrapping",
    "pack",
    "pull",
    "push",
    "read_recipients",
    "read_secret_file",
    "recipients_of",
    "rekey",
    "remove",
    "seal",
    "unpack",
    "verify",
    "write_memory",
]

# A path or a URL; or a URL, storage options, the directory of the cache, the connections, and whether to allow HTTP.
_Located: TypeAlias = str | tuple[str, Mapping[str, str], str | None, int, bool]

__version__: Final[str]
DEFAULT_CHUNK_SIZE_BYTES: Final[int]
FEATURES: Final[list[str]]
COMMIT: Final[str | None]

def write_memory(
    writer: SnapshotWriter,
    regions: Sequence[tuple[int, object, int, int | None]],
    compress: bool,
    block_size_bytes: int,
    chunk_size_bytes: int,
    detect_zeros: bool,
    min_gap_bytes: int,
    zero_unreadable: bool,
    sparse: bool,
    stable: bool,
    uncached: bool,
    progress: Callable[[int, int], object] | None,
) -> tuple[int, int, int, int, float, list[tuple[int, int]]]:
    """Write guest memory. A region is its base; its source; the offset in that; its size.

    A source is a descriptor, a buffer, a process, or spooled memory.
    """

@final
class MigrationStream:
    """The guest memory of a migration stream; `vmsnap.migration.MigrationStream` is the class to use."""

    def memory(self, block: str, offset: int, size: int) -> SpooledMemory: ...
    def close(self) -> None: ...

@final
class SpooledMemory:
    """A part of a RAM block of a migration stream, as the source of a `GuestRegion`."""

@final
class ProcessMemory:
    """The memory of a live process, as the source of a `GuestRegion`: its offset is then a virtual address.

    The mappings are read when the object is created. Memory mapped from a file or memfd is read from
    that file. Other memory is read only where the process has touched it. Pages of a userfaultfd are requested from its
    handler. The process is not stopped. If it is stopped, pages that it would have to provide itself, by userfaultfd or
    as a FUSE server, cannot be read.

    Parameters
    ----------
    pid
        The ID of the process.

    Raises
    ------
    OSError
        There is no such process, or this user may not read its memory.
    """

    def __new__(cls, pid: int) -> Self: ...
    @property
    def pid(self) -> int:
        """The ID of the process."""

@final
class ProcessRange:
    """A range of addresses in the memory of a process. Offsets count from its first address."""

    def __new__(cls, memory: ProcessMemory, address: int, size: int) -> Self: ...
    def next_data(self, offset: int) -> int | None:
        """Return the offset of the next bytes that may be other than zero; None if only zeros follow."""

    def next_readable(self, start: int, end: int) -> int:
        """Return the first offset from `start` on at which a page can be read, or `end`."""

    def read_into(self, offset: int, buffer: WriteableBuffer) -> int:
        """Fill a buffer up to the first page that cannot be read, and return the number of bytes.

        Pages that the process never touched read as zeros, and stay untouched.
        """

@final
class StoppedProcess:
    """Stops all threads of a process until `let_go`, or until this process ends.

    Parameters
    ----------
    pid
        The ID of the process.
    patience_seconds
        How long to wait until all threads have stopped.

    Raises
    ------
    OSError
        There is no such process, this user may not trace it, or a thread does not stop in time.
    """

    def __new__(cls, pid: int, patience_seconds: float) -> Self: ...
    def let_go(self) -> None:
        """Let the process continue. Does nothing if it was let go before."""

    @staticmethod
    def is_stopped(pid: int) -> bool:
        """Return whether all threads of a process are stopped, for any reason."""

@final
class GuestMemory:
    """Guest memory in a snapshot; `vmsnap.GuestMemory` is the class to use."""

    @property
    def regions(self) -> list[tuple[int, int]]:
        """The guest base and the size of each region."""

    @property
    def compressed(self) -> bool: ...
    @property
    def data_bytes(self) -> int: ...
    def data_ranges(self, region: int) -> list[tuple[int, int]]: ...
    def read(self, guest_address: int, size: int) -> bytes: ...
    def restore(
        self,
        destinations: Sequence[tuple[int | None, object, int | None, int | None]],
        huge_pages: bool,
        uncached: bool,
        keep_allocated: bool,
        progress: Callable[[int, int], object] | None,
    ) -> None:
        """Restore to destinations: the expected base, a descriptor or buffer, the offset in it, the size."""

def copy_buffer(buffer: ReadableBuffer) -> bytes:
    """Return the bytes of a contiguous buffer. Raise `OSError` if a page of it cannot be read."""

def created_at(path: str | Path) -> int | None:
    """Return the time when a file was created, in nanoseconds since 1970, or None if it is not recorded."""

def generate_key() -> bytes:
    """Return 32 random bytes from the operating system: a key that a snapshot can be written with."""

def aead_provider() -> str:
    """Return the name of the AEAD provider this process uses: ``aws-lc`` or ``aes-gcm``.

    This is the fastest provider of this build, or the one that the environment variable ``VMSNAP_AEAD`` names. It is
    chosen once per process.

    Raises
    ------
    InvalidArgumentError
        ``VMSNAP_AEAD`` does not name a provider of this build.
    """

def are_crowded(hashes: list[int]) -> bool:
    """Return whether different keys with these hash values would make a dict or a set of them slow."""

def check_serialized(data: bytes, format: str | None, place: str) -> str:
    """Return the format of `data`, which must be one serialized value: ``cbor`` or ``json``.

    If `format` is None, the format is detected.

    Raises
    ------
    CorruptSnapshotError
        `data` is not such a value. The text names `place` and the byte.
    """

def key_wrapping(location: _Located) -> tuple[str, str | None, list[str]] | None:
    """Return the wrapping of a snapshot's data key: the kind, the name of the key service, the kinds of recipients."""

def generate_identity() -> tuple[str, str]:
    """Return a new age identity, and its recipient."""

def identity_file(identity: str, recipient: str) -> str:
    """Return the text of an identity file, as ``age-keygen`` writes it."""

def recipients_of(identity: tuple[object, bool, object]) -> list[str]:
    """Return the recipients of an identity: a text or a path, whether it is a path, and its passphrase."""

def read_recipients(path: str) -> tuple[list[str], list[str]]:
    """Return the recipients in a file, at least one, and a warning for each line that is ignored."""

def read_secret_file(path: str) -> bytearray:
    """Return the contents of a file with a secret. Raise if other users may read or change the file."""

def rekey(location: _Located, old: Credentials, new: Credentials) -> None:
    """Replace the key that wraps a snapshot's data key."""

@final
class Credentials:
    """The keys for writing or opening a snapshot.

    An identity has the form that `recipients_of` takes. `on_new_identity` is called with the path of the user's own
    identity before it is made there; an exception prevents that and is passed on.
    """

    def __new__(
        cls,
        encrypt: bool,
        key: ReadableBuffer | None,
        recipients: list[str] | None,
        identities: Sequence[tuple[object, bool, object]] | None,
        passphrase: object,
        key_provider: object,
        on_new_identity: Callable[[Path], object] | None,
    ) -> Credentials: ...

def inspect(
    location: _Located,
) -> tuple[
    str, tuple[str, str | None, list[str]] | None, bool, list[str], list[tuple[str, int, datetime | None, bool]]
]:
    """Return the absolute location, the key wrapping, whether it is sealed, the namespaces and the fragments.

    Each fragment is its path, stored size, time of modification (None if Python cannot represent it) and whether it was
    finished.
    """

def is_marked(location: _Located) -> bool:
    """Return whether a snapshot has ``enc_metadata`` or ``vmsnap_manifest``, also if these cannot be read."""

@final
class SnapshotWriter:
    def __new__(
        cls, location: _Located, credentials: Credentials, threads: int | None, format: str
    ) -> SnapshotWriter: ...
    @staticmethod
    def open(location: _Located, credentials: Credentials, threads: int | None, format: str) -> SnapshotWriter: ...
    def raw_fragment(self, name: str, chunk_size_bytes: int) -> Fragment: ...
    def write_whole(self, name: str, data: bytes) -> None: ...
    def receive_migration(
        self,
        descriptor: int,
        blocks: Sequence[str] | None,
        regions: Sequence[tuple[int, str, int, int]],
        fragment: str,
        progress: Callable[[int, int], object] | None,
    ) -> tuple[
        MigrationStream,
        str | None,
        bool,
        list[tuple[str, int, int, bool]],
        int,
        int,
        int,
        tuple[int, int, int, int, float, list[tuple[int, int]]] | None,
    ]: ...
    def add_namespace(self, name: str) -> SnapshotWriter: ...
    def namespace(self, name: str) -> SnapshotWriter: ...
    @property
    def location(self) -> str: ...
    @property
    def namespace_path(self) -> str: ...
    @property
    def format(self) -> str: ...
    @property
    def encrypted(self) -> bool: ...
    def to_state(self) -> bytes: ...
    @staticmethod
    def from_state(state: bytes) -> SnapshotWriter: ...

@final
class SnapshotReader:
    def __new__(
        cls,
        location: _Located,
        credentials: Credentials,
        threads: int | None,
        require_sealed: bool,
        expect_seal_digest: bytes | None,
    ) -> SnapshotReader: ...
    def memory(self) -> GuestMemory: ...
    def raw_fragment(self, name: str) -> FragmentReader: ...
    def migration_front(self, fragment: str) -> tuple[str | None, bool, list[tuple[str, int]]]: ...
    def send_migration(
        self,
        descriptor: int,
        blocks: Sequence[tuple[str, str, Sequence[tuple[int, int, int]], bool, bool]],
        fragment: str,
        threads: int | None,
        progress: Callable[[int, int], object] | None,
    ) -> int: ...
    def read_value(self, name: str, format: str | None, max_size_bytes: int) -> tuple[bytes, str]: ...
    def place(self, name: str) -> str: ...
    def namespace(self, name: str) -> SnapshotReader: ...
    def list_fragments(self) -> list[str]: ...
    def list_namespaces(self) -> list[str]: ...
    @property
    def location(self) -> str: ...
    @property
    def namespace_path(self) -> str: ...
    @property
    def encrypted(self) -> bool: ...
    @property
    def snapshot_id(self) -> bytes | None: ...
    @property
    def seal_digest(self) -> bytes | None: ...
    def to_state(self) -> bytes: ...
    @staticmethod
    def from_state(state: bytes) -> SnapshotReader: ...

@final
class StagedSnapshot:
    def __new__(
        cls,
        location: _Located,
        credentials: Credentials,
        threads: int | None,
        format: str,
        durable: bool,
        archive: bool | None,
        take_over: bool,
    ) -> StagedSnapshot: ...
    @property
    def location(self) -> str: ...
    @property
    def writer(self) -> SnapshotWriter: ...
    def commit(self) -> tuple[bytes, bytes]: ...
    def discard(self) -> None: ...

def seal(location: _Located, credentials: Credentials, threads: int | None, durable: bool) -> tuple[bytes, bytes]:
    """Seal a snapshot that was written in place; return its snapshot id and seal digest."""

def remove(location: _Located, own: bool) -> None:
    """Remove a snapshot. One that this process has just made is not looked at."""

def clean(parent: _Located, older_than_seconds: float) -> tuple[list[str], list[str]]:
    """Remove the remains of killed processes; return the paths or URLs that were removed, and those still in use."""

def verify(
    location: _Located, credentials: Credentials, threads: int | None, expect_seal_digest: bytes | None
) -> tuple[list[tuple[str, str, str]], list[str], list[tuple[str, str | None]], int, tuple[bytes, bytes] | None]:
    """Return problems, unchecked things, fragments with their kinds, the number of bytes, the id with the digest."""

def pack(
    location: _Located,
    archive: str | int,
    credentials: Credentials,
    threads: int | None,
    durable: bool,
    expect_seal_digest: bytes | None,
) -> tuple[bytes, bytes]:
    """Pack a snapshot into a new file, or into a descriptor; return its snapshot id and seal digest."""

def unpack(
    archive: str | int,
    location: _Located,
    credentials: Credentials,
    threads: int | None,
    durable: bool,
    expect_seal_digest: bytes | None,
) -> tuple[bytes, bytes]:
    """Unpack an archive from a file, or from a descriptor; return its snapshot id and seal digest."""

def push(
    source: _Located,
    url: _Located,
    credentials: Credentials,
    threads: int | None,
    expect_seal_digest: bytes | None,
    take_over: bool,
    progress: Callable[[int, int], object] | None,
) -> tuple[tuple[bytes, bytes], bool, int, int]:
    """Copy a snapshot into an object store.

    Return its snapshot id and seal digest, whether it was there before, the bytes that were sent, and those that an
    earlier push had sent.
    """

def pull(
    url: _Located,
    target: _Located,
    credentials: Credentials,
    threads: int | None,
    durable: bool,
    archive: bool | None,
    expect_seal_digest: bytes | None,
    progress: Callable[[int, int], object] | None,
) -> tuple[bytes, bytes]:
    """Copy a snapshot out of an object store; return its snapshot id and seal digest."""

def cache_usage(directory: str) -> tuple[int, int, int]:
    """Return the number of blocks in a cache, the bytes that they occupy, and the bytes that they may occupy."""

def empty_cache(directory: str) -> tuple[int, int]:
    """Remove all blocks from a cache; return their number, and the bytes that they occupied."""

@final
class Fragment:
    def write(self, data: ReadableBuffer) -> int: ...
    def tell(self) -> int: ...
    def flush(self) -> None: ...
    def finish(self) -> None: ...
    def drop_unclosed(self) -> None: ...
    def discard(self) -> None: ...
    @property
    def ended(self) -> bool: ...

@final
class FragmentReader:
    @property
    def size(self) -> int: ...
    @property
    def stored_size(self) -> int: ...
    @property
    def chunk_size_bytes(self) -> int | None: ...
    def read_at(self, offset: int, size: int) -> bytes: ...
    def readinto_at(self, offset: int, buffer: WriteableBuffer) -> int: ...
    def readinto(self, buffer: WriteableBuffer) -> int: ...
    def read(self, size: int | None = None) -> bytes: ...
    def seek(self, offset: int, whence: int) -> int: ...
    def tell(self) -> int: ...
