"""Guest memory: its regions, writing it into a snapshot, and reading it back."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from vmsnap import _vmsnap
from vmsnap._backing import Handles
from vmsnap._vmsnap import ProcessMemory, SpooledMemory
from vmsnap.errors import InvalidArgumentError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, StrPath, WriteableBuffer

    from vmsnap._backing import OpenFile

    _Source: TypeAlias = ReadableBuffer | StrPath | int | OpenFile | ProcessMemory | SpooledMemory
    _Target: TypeAlias = WriteableBuffer | StrPath | int | OpenFile | "GuestRegion" | None

__all__ = ["GuestMemory", "GuestRegion", "MemoryReport", "ProcessMemory"]

Progress: TypeAlias = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class GuestRegion:
    """A contiguous range of guest-physical addresses, and the source of its bytes.

    Parameters
    ----------
    guest_base
        The guest-physical address of the first byte.
    source
        One of these:

        - a buffer (mmap, memoryview, numpy array, ``bytes``);
        - a file, memfd or block device: its path, its descriptor, or an open file. Holes are not read, and the position
          of the file does not change;
        - a live process: a `ProcessMemory`. Pages that the process never touched are neither read nor made resident;
        - memory that QEMU sent, from `MigrationStream.memory`.

        ``bytes`` are memory, not a path. An open file is an object from ``open`` or ``tempfile``, and is flushed first.
        An object that decompresses, or that reads from an archive or a socket, is refused even if it has a ``fileno``.
    offset
        The offset of the region in the source, in bytes. For a process it is a virtual address.
    size
        The size of the region in bytes. The default is everything from `offset` on. A process needs a size.
    """

    guest_base: int
    source: "_Source" = field(repr=False)
    offset: int = 0
    size: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """Sizes and duration of a call of `SnapshotWriter.write_memory`."""

    logical_bytes: int
    """Size of all regions, in bytes."""
    data_bytes: int
    """Size of all data ranges, in bytes. The rest of the memory is zero."""
    stored_bytes: int
    """Size of the files of the two fragments, in bytes."""
    ranges: int
    """Number of data ranges."""
    seconds: float
    """Duration of the call."""
    unreadable: list[range]
    """Guest-physical addresses that could not be read and were stored as zeros."""


def write(
    raw: _vmsnap.SnapshotWriter,
    regions: Iterable[GuestRegion],
    *,
    compress: 'Literal["lz4"] | None',
    progress: Progress | None,
    on_error: Literal["raise", "zero"],
    sparse: bool,
    stable: bool,
    uncached: bool,
    detect_zeros: bool,
    min_gap_bytes: int,
    chunk_size_bytes: int,
    block_size_bytes: int,
) -> MemoryReport:
    """Write guest memory. `SnapshotWriter.write_memory` describes the parameters."""
    if compress not in (None, "lz4"):
        raise InvalidArgumentError(f'compress must be "lz4" or None, not {compress!r}')
    if on_error not in ("raise", "zero"):
        raise InvalidArgumentError(f'on_error must be "raise" or "zero", not {on_error!r}')
    with Handles(writable=False) as handles:
        written = _vmsnap.write_memory(
            raw,
            [(each.guest_base, handles.of(each.source), each.offset, each.size) for each in regions],
            compress is not None,
            block_size_bytes,
            chunk_size_bytes,
            detect_zeros,
            min_gap_bytes,
            on_error == "zero",
            sparse,
            stable,
            uncached,
            progress,
        )
    return report(written)


def report(fields: tuple[int, int, int, int, float, list[tuple[int, int]]]) -> MemoryReport:
    """Return the report with the fields from Rust."""
    logical_bytes, data_bytes, stored_bytes, ranges, seconds, unreadable = fields
    addresses = [range(start, end) for start, end in unreadable]
    return MemoryReport(logical_bytes, data_bytes, stored_bytes, ranges, seconds, addresses)


class GuestMemory:
    """The guest memory in a snapshot of vmsnap or crosvm. `SnapshotReader.memory` returns it.

    ``memory[0x1000:0x2000]`` reads a range of guest-physical addresses. Any number of threads may read at the same
    time.
    """

    def __init__(self, raw: _vmsnap.GuestMemory) -> None:
        self._raw = raw

    @property
    def regions(self) -> list[range]:
        """The guest-physical addresses of each region, in the order in which the regions are stored."""
        return [range(base, base + size) for base, size in self._raw.regions]

    @property
    def compressed(self) -> bool:
        """Whether the memory is compressed."""
        return self._raw.compressed

    @property
    def data_bytes(self) -> int:
        """Size of all data ranges, in bytes."""
        return self._raw.data_bytes

    def data_ranges(self, region: int) -> list[range]:
        """Return the data ranges of a region as offsets in bytes. Everything between them is zero.

        Parameters
        ----------
        region
            The index of the region in `regions`.

        Raises
        ------
        InvalidArgumentError
            There is no region with this index.
        """
        return [range(start, end) for start, end in self._raw.data_ranges(region)]

    def read(self, guest_address: int, size: int) -> bytes:
        """Return `size` bytes from a guest-physical address.

        Only the chunks and blocks that contain the bytes are decrypted and decompressed.

        Raises
        ------
        InvalidArgumentError
            The bytes are not all in one region.
        AuthenticationError, CorruptSnapshotError
            The stored memory is damaged or was changed.
        """
        return self._raw.read(guest_address, size)

    def __getitem__(self, addresses: slice) -> bytes:
        if not isinstance(addresses, slice) or addresses.step not in (None, 1):
            raise TypeError("guest memory is read by a range of addresses, as in memory[0x1000:0x2000]")
        start, end = addresses.start, addresses.stop
        if start is None or end is None or end < start:
            raise InvalidArgumentError("a range of guest-physical addresses needs a start, and an end not before it")
        return self.read(start, end - start)

    def restore(
        self,
        destinations: "Iterable[_Target]",
        *,
        huge_pages: bool = False,
        uncached: bool = False,
        keep_allocated: bool = False,
        progress: Progress | None = None,
    ) -> None:
        """Restore all regions, each to its own destination, with several threads.

        Parameters
        ----------
        destinations
            One destination for each region, in the order of `regions`:

            - a writable buffer of the size of the region;
            - a file or memfd (a path, a descriptor, an open file): as large as the region, empty, or new;
            - a `GuestRegion`, to check the address or to write at an offset in a file;
            - None, to leave the region out.

            Zeros between the data become holes if the destination supports them. An open file is flushed first and
            keeps its position. Later reads from it return the restored bytes.
        huge_pages
            Whether anonymous memory gets transparent huge pages for each 2 MiB that are all data. This makes filling
            and using the memory faster.
        uncached
            Bypass the page cache for the stored bytes and for files that are written. A restore of tens of GiB then
            does not evict other data from the cache. Before Linux 6.14, vmsnap can only advise the kernel to do so.
        keep_allocated
            Whether a file that is allocated completely stays so, as memory that QEMU preallocated: zeros are written
            instead of holes, and only where the file has other bytes.
        progress
            Called with the number of bytes done and the total, at most ten times a second, and at the end.

        Raises
        ------
        InvalidArgumentError
            The destinations do not match the regions. Nothing was written.
        AuthenticationError, CorruptSnapshotError
            The stored memory is damaged or was changed. The contents of the destinations are undefined. Files that this
            call created are removed.
        OSError
            A destination cannot be written. The contents of the destinations are undefined. Files that this call
            created are removed.
        TypeError
            A destination has an unsupported type.
        """
        with Handles(writable=True) as handles:
            targets = [_destination(handles, each) for each in destinations]
            self._raw.restore(targets, huge_pages, uncached, keep_allocated, progress)

    def __repr__(self) -> str:
        regions = ", ".join(f"{each.start:#x}-{each.stop:#x}" for each in self.regions[:4])
        return f"<vmsnap.GuestMemory {regions}{', ...' if len(self.regions) > 4 else ''}>"


def _destination(handles: Handles, target: "_Target") -> tuple[int | None, object, int | None, int | None]:
    if target is None:
        return None, None, None, None
    if not isinstance(target, GuestRegion):
        return None, handles.of(target), None, None
    return target.guest_base, handles.of(target.source), target.offset, target.size
