"""QEMU's migration stream: guest memory is taken out of it when it is received, and put back when it is sent."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from vmsnap import _vmsnap
from vmsnap._vmsnap import SpooledMemory
from vmsnap.memory import MemoryReport, Progress, report

__all__ = ["BlockRegion", "MigrationFront", "MigrationStream", "RamBlock", "SentBlock", "SpooledMemory"]


@dataclass(frozen=True, slots=True)
class RamBlock:
    """A block of RAM in a migration stream: guest memory, or a ROM or the memory of a device."""

    name: str
    """The name that QEMU gave it, for example ``pc.ram``."""
    size_bytes: int
    """Its size in bytes."""
    records: int
    """The number of page records in the stream.

    With 0, QEMU left the block out, because it is in a shared file; or the guest uses nothing of it, as of a virtio-mem
    device with nothing plugged in.
    """
    taken: bool
    """Whether it is guest memory, whose pages were taken out of the stream."""


@dataclass(frozen=True, slots=True)
class BlockRegion:
    """A guest region whose memory is a part of a RAM block, for `SnapshotWriter.receive_migration`."""

    guest_base: int
    """The guest-physical address of the region."""
    block: str
    """The name of the block."""
    offset: int
    """The offset in the block, in bytes."""
    size: int
    """The size in bytes."""


@dataclass(frozen=True, slots=True)
class MigrationFront:
    """The beginning of a migration stream. `SnapshotReader.migration_front` returns it."""

    machine_type: str | None
    """The machine type, for example ``pc-q35-7.2``. A stream without a configuration does not name it."""
    ignores_shared: bool
    """Whether the capability ``x-ignore-shared`` was on."""
    blocks: list[tuple[str, int]]
    """Name and size in bytes of each RAM block, in the order of the stream."""


@dataclass(frozen=True, slots=True)
class SentBlock:
    """A RAM block whose pages are sent, or whose name is changed, by `SnapshotReader.send_migration`."""

    name: str
    """The name in the fragment with the devices."""
    sent_name: str
    """The name in the QEMU that receives the stream."""
    ranges: Sequence[tuple[int, int, int]] = ()
    """The pages to send: offset in the block, guest-physical address in the snapshot, size in bytes."""
    zeros: bool = False
    """Whether pages of zeros are sent, for memory that may contain other bytes."""
    replaced: bool = False
    """Whether pages of the block that are in the fragment are left out, because all of them come from elsewhere."""


@dataclass(frozen=True)
class MigrationStream:
    """A migration stream that was received. `SnapshotWriter.receive_migration` returns it.

    Its guest memory is in a temporary file, until it is closed, at the end of a ``with`` block at the latest; or it was
    `written` to the snapshot as it came.
    """

    machine_type: str | None
    """The machine type, for example ``pc-q35-7.2``. A stream without a configuration does not name it."""
    ignores_shared: bool
    """Whether the capability ``x-ignore-shared`` was on."""
    blocks: list[RamBlock]
    """All blocks of RAM, in the order of the stream."""
    device_state_bytes: int
    """The number of bytes of the fragment with the devices."""
    page_bytes: int
    """The number of bytes of guest memory in the stream: 4096 for each page record, also for one of zeros."""
    repeated_bytes: int
    """How many of `page_bytes` were for pages that had come before."""
    written: MemoryReport | None
    """The sizes of the guest memory, if it was written to the snapshot as it came."""
    _raw: _vmsnap.MigrationStream = field(repr=False, compare=False)

    def memory(self, block: str, offset: int = 0, size: int | None = None) -> SpooledMemory:
        """Return a part of a block, as the source of a `GuestRegion`. Pages that did not come are zero.

        Parameters
        ----------
        block
            The name of the block.
        offset
            The offset in the block, in bytes.
        size
            The size in bytes. The default is everything from `offset` on.

        Raises
        ------
        InvalidArgumentError
            There is no such block, its pages were not taken, or it is too short. Or the stream has no page of it and
            ``x-ignore-shared`` was on: then its memory may be in a file.
        StateError
            The stream is closed, or its memory was `written` as it came.
        """
        if size is None:
            sizes = [each.size_bytes for each in self.blocks if each.name == block]
            size = max(0, sizes[0] - offset) if sizes else 0
        return self._raw.memory(block, offset, size)

    def close(self) -> None:
        """Free the temporary file. The memory cannot be used afterwards."""
        self._raw.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def receive(
    raw: _vmsnap.SnapshotWriter,
    fd: int,
    blocks: Iterable[str] | None,
    regions: Iterable[BlockRegion],
    fragment: str,
    progress: Progress | None,
) -> MigrationStream:
    """Receive a stream. `SnapshotWriter.receive_migration` describes the parameters."""
    names = None if blocks is None else list(blocks)
    placed = [(each.guest_base, each.block, each.offset, each.size) for each in regions]
    stream, machine_type, ignores_shared, found, device_state_bytes, page_bytes, repeated_bytes, written = (
        raw.receive_migration(fd, names, placed, fragment, progress)
    )
    listed = [RamBlock(*each) for each in found]
    sizes = None if written is None else report(written)
    return MigrationStream(
        machine_type, ignores_shared, listed, device_state_bytes, page_bytes, repeated_bytes, sizes, _raw=stream
    )


def send(
    raw: _vmsnap.SnapshotReader,
    fd: int,
    blocks: Iterable[SentBlock],
    fragment: str,
    threads: int | None,
    progress: Progress | None,
) -> int:
    """Send a stream. `SnapshotReader.send_migration` describes the parameters."""
    sent = [(each.name, each.sent_name, list(each.ranges), each.zeros, each.replaced) for each in blocks]
    return raw.send_migration(fd, sent, fragment, threads, progress)
