"""Guest memory: which there is, where it comes from, and reading it back."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

from vmsnap import _vmsnap
from vmsnap._backing import Handles
from vmsnap._vmsnap import ProcessMemory
from vmsnap.errors import InvalidArgumentError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, StrPath, WriteableBuffer

    from vmsnap._backing import OpenFile

    _Source: TypeAlias = ReadableBuffer | StrPath | int | OpenFile | ProcessMemory
    _Target: TypeAlias = WriteableBuffer | StrPath | int | OpenFile | "GuestRegion" | None

__all__ = ["GuestMemory", "GuestRegion", "MemoryReport", "ProcessMemory"]

Progress: TypeAlias = Callable[[int, int], object]


@dataclass(frozen=True, slots=True)
class GuestRegion:
    """A contiguous range of guest-physical memory, and what holds it.

    Parameters
    ----------
    guest_base
        The guest-physical address of its first byte.
    source
        A buffer (mmap, memoryview, numpy array); or a file, memfd or block device: its path, its descriptor, or an open
        file; or a live process: a `ProcessMemory`. Of a file, holes are not read, and its position stays what it is; of
        a process, pages that it never touched are neither read nor made resident.

        ``bytes`` are memory, not a path. An open file is what ``open`` or ``tempfile`` returns, and is flushed first.
        An object that decompresses, or reads from an archive or a socket, is not one, though it may have a ``fileno``.
    offset
        Where in the source the region begins, in bytes; of a process, the virtual address.
    size
        Bytes; by default all from there. Of a process it is needed.
    """

    guest_base: int
    source: "_Source" = field(repr=False)
    offset: int = 0
    size: int | None = None


@dataclass(frozen=True, slots=True)
class MemoryReport:
    """How `SnapshotWriter.write_memory` went."""

    logical_bytes: int
    """Bytes of all regions."""
    data_bytes: int
    """Bytes of all data ranges; the rest is zero."""
    stored_bytes: int
    """Bytes of the two fragments' files."""
    ranges: int
    """Data ranges."""
    seconds: float
    """How long it took."""
    unreadable: list[range]
    """Guest-physical addresses of what could not be read, and was taken for zeros."""


def write(
    raw: _vmsnap.SnapshotWriter,
    regions: Iterable[GuestRegion],
    *,
    compress: 'Literal["lz4"] | None',
    progress: Progress | None,
    on_error: Literal["raise", "zero"],
    sparse: bool,
    stable: bool,
    detect_zeros: bool,
    min_gap_bytes: int,
    chunk_size_bytes: int,
    block_size_bytes: int,
) -> MemoryReport:
    """Write guest memory; `SnapshotWriter.write_memory` says what everything is."""
    if compress not in (None, "lz4"):
        raise InvalidArgumentError(f'compress is "lz4" or None, not {compress!r}')
    if on_error not in ("raise", "zero"):
        raise InvalidArgumentError(f'on_error is "raise" or "zero", not {on_error!r}')
    with Handles(writable=False) as handles:
        logical_bytes, data_bytes, stored_bytes, ranges, seconds, unreadable = _vmsnap.write_memory(
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
            progress,
        )
    addresses = [range(start, end) for start, end in unreadable]
    return MemoryReport(logical_bytes, data_bytes, stored_bytes, ranges, seconds, addresses)


class GuestMemory:
    """The guest memory in a snapshot, vmsnap's or crosvm's; from `SnapshotReader.memory`.

    ``memory[0x1000:0x2000]`` reads a range of guest-physical addresses. Any number of threads may read at once.
    """

    def __init__(self, raw: _vmsnap.GuestMemory) -> None:
        self._raw = raw

    @property
    def regions(self) -> list[range]:
        """The guest-physical addresses of each region, in the order in which they are stored."""
        return [range(base, base + size) for base, size in self._raw.regions]

    @property
    def compressed(self) -> bool:
        """Whether it is compressed."""
        return self._raw.compressed

    @property
    def data_bytes(self) -> int:
        """Bytes of all data ranges."""
        return self._raw.data_bytes

    def data_ranges(self, region: int) -> list[range]:
        """Return the data ranges of a region, in bytes from its start; between them it is zero.

        Raises
        ------
        InvalidArgumentError
            There is no region of that number.
        """
        return [range(start, end) for start, end in self._raw.data_ranges(region)]

    def read(self, guest_address: int, size: int) -> bytes:
        """Return `size` bytes from a guest-physical address; only what has to be is decrypted and decompressed.

        Raises
        ------
        InvalidArgumentError
            They do not all lie in one region.
        AuthenticationError, CorruptSnapshotError
            It is not what was written.
        """
        return self._raw.read(guest_address, size)

    def __getitem__(self, addresses: slice) -> bytes:
        if not isinstance(addresses, slice) or addresses.step not in (None, 1):
            raise TypeError("guest memory is read by a range of addresses: memory[0x1000:0x2000]")
        start, end = addresses.start, addresses.stop
        if start is None or end is None or end < start:
            raise InvalidArgumentError("a range of guest-physical addresses has a start and an end not before it")
        return self.read(start, end - start)

    def restore(
        self, destinations: "Iterable[_Target]", *, huge_pages: bool = False, progress: Progress | None = None
    ) -> None:
        """Restore all regions, each to its destination, by all threads.

        Parameters
        ----------
        destinations
            For each region, in their order: a buffer of its size that can be written to; a file or memfd (a path, a
            descriptor, an open file) of its size, or an empty or new one; or a `GuestRegion`, whose address is checked
            and whose offset may be anywhere in a file; or None, for a region that is left out. What lies between the
            data becomes holes where it can. An open file is flushed first, keeps its position, and reads what was
            restored afterwards.
        huge_pages
            Whether anonymous memory gets transparent huge pages where 2 MiB of it are all data. Filling it takes less
            time then, and so does using it.
        progress
            Called with the bytes done and all bytes, ten times a second at most, and at the end.

        Raises
        ------
        InvalidArgumentError
            The destinations are not those of the regions. Nothing was written.
        AuthenticationError, CorruptSnapshotError, OSError
            As for any read, or the destination cannot be written. It holds anything then; a file that this call made
            is removed.
        TypeError
            A destination is not one of these.
        """
        with Handles(writable=True) as handles:
            self._raw.restore([_destination(handles, each) for each in destinations], huge_pages, progress)

    def __repr__(self) -> str:
        regions = ", ".join(f"{each.start:#x}-{each.stop:#x}" for each in self.regions[:4])
        return f"<vmsnap.GuestMemory {regions}{', ...' if len(self.regions) > 4 else ''}>"


def _destination(handles: Handles, target: "_Target") -> tuple[int | None, object, int | None, int | None]:
    if target is None:
        return None, None, None, None
    if not isinstance(target, GuestRegion):
        return None, handles.of(target), None, None
    return target.guest_base, handles.of(target.source), target.offset, target.size
