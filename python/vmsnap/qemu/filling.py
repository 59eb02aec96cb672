"""How guest memory gets into a QEMU that was started: into the files of its memory, or through the migration stream."""

import errno
from collections.abc import Callable
from dataclasses import dataclass

from vmsnap.errors import QemuError
from vmsnap.memory import GuestRegion
from vmsnap.migration import MigrationFront, SentBlock
from vmsnap.qemu.leftovers import holds_something
from vmsnap.qemu.machine import Machine, RamRange, listed_name
from vmsnap.qemu.process import MappedFile
from vmsnap.qemu.survey import Block, Ram

# `-device loader` writes into guest memory before QEMU waits for the stream. Nothing else does.
_LOADER = "loader"


@dataclass(frozen=True)
class Filling:
    """The destination of each region of guest memory."""

    destinations: list[GuestRegion | None]
    """The file of each region, in the order of the regions of ``mem``; None for a region that is sent."""
    sent: list[SentBlock]
    """The blocks of the migration stream, with their names in the started QEMU and the memory that is sent."""
    files: list[MappedFile]
    """The files whose contents change, because vmsnap writes them, or because QEMU has mapped them shared."""
    keep_allocated: bool
    """Whether a file stays allocated, because QEMU preallocated it."""

    @property
    def file_bytes(self) -> int:
        """The size of the regions that are written into files."""
        return sum(each.size or 0 for each in self.destinations if each)

    @property
    def stream_bytes(self) -> int:
        """The size of the regions that are sent."""
        return sum(size for each in self.sent for _, _, size in each.ranges)


def plan(
    saved: Machine,
    ram: Ram,
    names: dict[str, str],
    front: MigrationFront,
    *,
    overwrite: bool,
    lock: Callable[[MappedFile], None],
) -> Filling:
    """Decide how each block of guest memory is filled, and lock the files whose contents change.

    Parameters
    ----------
    saved
        The machine that was saved.
    ram
        The memory of the started QEMU, with the same layout.
    names
        The names of the blocks in the started QEMU, by their names in the saved one.
    front
        The blocks in the saved device state.
    overwrite
        Whether the files may contain anything.
    lock
        Called with a file before its contents are looked at.

    Raises
    ------
    QemuError
        The memory of a backend cannot be filled.
    OSError
        A file is not empty or locked, or this user may not open it.
    """
    pairs = _pairs(saved, ram)
    destinations, files = list[GuestRegion | None](), list[MappedFile]()
    ranges: dict[str, list[tuple[int, int, int]]] = {each.name: [] for each in ram.blocks}
    zeros = dict[str, bool]()
    writes_early = any(each.type == _LOADER for each in ram.machine.devices or [])
    for block in ram.blocks:
        _check_can_be_filled(block, ram.pid)
        changes = block.file is not None and (block.shared or _is_filled(block))
        if block.file and changes:
            lock(block.file)
            files.append(block.file)
            if block.file.path and not overwrite and _holds_something(block):
                raise FileExistsError(
                    errno.EEXIST,
                    "is not empty, and another guest may use it: remove it, or pass overwrite=True (--force)",
                    block.file.path,
                )
        zeros[block.name] = not _is_filled(block) and (writes_early or _holds_something(block))
    for here in saved.ram:
        there, block = pairs[here]
        if block.file and _is_filled(block):
            offset = block.file.offset + there.offset
            destinations.append(GuestRegion(here.guest_base, block.file.descriptor, offset=offset, size=here.size))
        else:
            destinations.append(None)
            ranges[block.name].append((there.offset, here.guest_base, here.size))
    known = {name for name, _ in front.blocks}
    sent = [
        # vmsnap 0.1 left all memory in the stream of QEMU 8.1 and newer, beside `mem`.
        SentBlock(name, there, ranges.get(there, []), zeros=zeros.get(there, False), replaced=True)
        for here, there in names.items()
        if (name := listed_name(here, known))
    ]
    filling = Filling(destinations, sent, files, any(each.preallocated for each in ram.blocks))
    if filling.file_bytes + filling.stream_bytes != sum(each.size for each in saved.ram):
        raise QemuError("the device state of the snapshot lacks a block of the guest memory that must be sent to QEMU")
    return filling


def _pairs(saved: Machine, ram: Ram) -> dict[RamRange, tuple[RamRange, Block]]:
    """Return the range and the block in the started QEMU for each saved range. They have the same order."""
    here = sorted(saved.ram, key=lambda each: each.guest_base)
    there = sorted(ram.places(), key=lambda place: place[0].guest_base)
    return dict(zip(here, there, strict=True))


def _is_filled(block: Block) -> bool:
    """Return whether vmsnap writes into the file of a block. It writes through a mapping where the pages are huge."""
    file = block.file
    return block.writable or (block.shared and file is not None and not file.private and file.opened_for_writing)


def _check_can_be_filled(block: Block, pid: int | None) -> None:
    if not block.shared or _is_filled(block):
        return
    # A shared file must be looked at before it is overwritten.
    if block.file is None and (pid is None or isinstance(block.why_no_file, OSError)):
        assert block.why_no_file is not None
        raise block.why_no_file


def _holds_something(block: Block) -> bool:
    return block.file is not None and holds_something(block.file.descriptor, block.file.offset, block.size)
