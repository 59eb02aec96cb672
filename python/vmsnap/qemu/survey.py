"""The memory of a guest in QEMU: its blocks, their place in the guest, and the files behind them."""

import mmap
import os
import re
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

from vmsnap.errors import QemuError
from vmsnap.qemu.machine import Machine, RamRange, describe
from vmsnap.qemu.monitor import Monitor
from vmsnap.qemu.process import MappedFile, Process, process_of

_SYSTEM = "/machine/unattached/system[0]"
# A PC sees one part of its RAM below the hole for devices and the rest above it. These are both parts, in the order in
# which they are in the RAM: see hw/i386/pc.c of QEMU.
_PC_WINDOWS = ("/machine/unattached/ram-below-4g[0]", "/machine/unattached/ram-above-4g[0]")

# Addresses for memory that the guest sees at no fixed address. Processors have at most 52 bits of physical addresses.
_NOWHERE = 1 << 52

_HOW = "-object memory-backend-memfd,id=mem,size=SIZE,share=on -machine TYPE,memory-backend=mem"

# A line of `info ramblock`: name, page size, offset, used and total length, and since QEMU 8.2 the host address.
_BLOCK_LINE = re.compile(r" *(\S.*?)? +(\d+) (B|[KMGT]iB) +0x[0-9a-f]+ 0x[0-9a-f]+ (0x[0-9a-f]+)(?: +(0x[0-9a-f]+))?")
_UNITS = {"B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}
# A line of `info mtree -f`: first and last address, priority, kind, name, and the offset in the region.
_VIEW_LINE = re.compile(r" +([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, [^)]*\): (.*?)(?: @([0-9a-f]{16}))?(?: KVM)?")


@dataclass(frozen=True)
class Block:
    """A block of guest memory: a memory backend of QEMU. The memory of plain ``-m`` is one, too."""

    name: str
    """The name of the block in the migration stream."""
    backend: str
    """The id of the memory backend."""
    size: int
    """The size in bytes."""
    shared: bool
    """Whether the backend has ``share=on``."""
    preallocated: bool
    """Whether the backend has ``prealloc=on``."""
    page_size: int
    """The size of its pages in bytes: larger than usual for ``hugetlb``."""
    migrated: bool
    """Whether it is in the migration stream. The memory of a virtio-pmem device is not, and always has a file."""
    ranges: list[RamRange]
    """Where the guest sees it. The ranges cover the block; some may not be mapped."""
    file: MappedFile | None
    """The open file behind it, if there is one and it is of use."""
    why_no_file: QemuError | OSError | None
    """The error to raise if `file` is None and the caller needs a file."""
    writable: bool
    """Whether bytes that are written to the file reach the guest. Only known with `to_fill`."""


@dataclass(frozen=True)
class Ram:
    """The memory of a guest. Its open files are valid until the exit stack of `survey` closes."""

    machine: Machine
    """The machine."""
    blocks: list[Block]
    """All blocks of guest memory, by name."""
    pid: int | None
    """The process ID of QEMU, or None if the process is not visible here."""

    def places(self) -> list[tuple[RamRange, Block]]:
        """Return the ranges in the order of the regions of ``mem``, each with its block."""
        by_range = {each: block for block in self.blocks for each in block.ranges}
        return [(each, by_range[each]) for each in self.machine.ram]


async def survey(monitor: Monitor, stack: ExitStack, pid: int | None = None, *, to_fill: bool = False) -> Ram:
    """Describe the machine that QEMU runs, and find the guest memory.

    Parameters
    ----------
    monitor
        The connection to QEMU.
    stack
        The exit stack that closes the opened files.
    pid
        The process ID of QEMU, or None to find the process.
    to_fill
        Whether the memory will be written instead of read. Files are opened for writing, and also those of memory that
        is not shared.

    Raises
    ------
    QemuError
        The guest has no memory backend; process `pid` is not this QEMU; or a block that QEMU does not migrate is not in
        a file.
    PermissionError
        This user may not look into process `pid`, or into the process that has such a block.
    """
    found = await _found(monitor)
    process, why = _process(monitor, pid, found)
    blocks = [_block(each, process, why, stack, to_fill) for each in found]
    ranges = sorted((each for block in blocks for each in block.ranges), key=lambda each: each.guest_base)
    machine = await describe(monitor, ranges, _command_line(process))
    return Ram(machine, blocks, process.pid if process else None)


async def layout(monitor: Monitor) -> object:
    """Return the memory blocks and the plugged devices: equal as long as nothing is plugged in or out."""
    # The size of a virtio-mem device changes while the guest runs.
    memory = [
        {name: each["data"][name] for name in each["data"].keys() & {"id", "memdev", "addr", "memaddr"}}
        for each in await monitor.run("query-memory-devices")
    ]
    backends = await monitor.run("query-memdev")
    blocks = _listed(await _ask(monitor, "info ramblock"))
    plugged = [await monitor.run("qom-list", path=f"/machine/peripheral{each}") for each in ("", "-anon")]
    return memory, backends, blocks, plugged


@dataclass(frozen=True)
class _Found:
    """A block of guest memory, without its file."""

    name: str
    size: int
    page_size: int
    migrated: bool
    backend: dict[str, Any]
    ranges: list[RamRange]
    address: int | None
    """The address in the memory of QEMU."""


async def _found(monitor: Monitor) -> list[_Found]:
    backends = [each for each in await monitor.run("query-memdev") if each.get("id")]
    listed = _listed(await _ask(monitor, "info ramblock"))
    places = _Places(monitor)
    found = []
    nowhere = _NOWHERE
    for backend in sorted(backends, key=lambda each: str(each["id"])):
        name, size = backend["id"], backend["size"]
        parts = await places.of(name, size)
        block = _stream_block(listed, name, size)
        migrated = block is not None
        if block is None:
            if not parts:
                continue  # an object that the machine does not use
            block = _Listed(name, size, mmap.PAGESIZE, None)
        stream_name = "" if block.name == name else block.name
        ranges = [RamRange(name, base, at, length, block=stream_name) for base, at, length in parts]
        for at, length in _gaps(parts, block.size):
            ranges.append(RamRange(name, nowhere, at, length, mapped=False, block=stream_name))
            nowhere += length
        address = block.address
        if address is None and parts:
            base, at, _ = parts[0]
            address = await _host_address(monitor, base) - at
        found.append(_Found(block.name, block.size, block.page_size, migrated, backend, ranges, address))
    if not found:
        raise QemuError(f"the guest memory has no memory backend: start QEMU with {_HOW}")
    return sorted(found, key=lambda each: each.name)


async def _ask(monitor: Monitor, command: str) -> str:
    """Return the answer of the human monitor, which alone tells some things."""
    return str(await monitor.run("human-monitor-command", command_line=command))


@dataclass(frozen=True)
class _Listed:
    """A block as QEMU lists it."""

    name: str
    size: int
    page_size: int
    address: int | None


def _listed(text: str) -> list[_Listed]:
    blocks = []
    for line in text.splitlines():
        if match := _BLOCK_LINE.match(line):
            name, number, unit, total, address = match.groups()
            at = int(address, 16) if address else None
            blocks.append(_Listed(name or "", int(total, 16), int(number) * _UNITS[unit], at))
    return blocks


def _stream_block(listed: list[_Listed], backend: str, size: int) -> _Listed | None:
    """Return the block of a backend.

    The name is the id; with x-use-canonical-path-for-ramblock-id, of old machine types, the path of the object; and
    after the path of the device for memory of a device, such as ``0000:00:03.0/ID``.
    """
    fitting = [each for each in listed if size <= each.size < size + each.page_size]
    for wanted in (backend, f"/objects/{backend}"):
        if found := [each for each in fitting if each.name == wanted]:
            return found[0]
    found = [each for each in fitting if each.name.endswith(f"/{backend}")]
    return found[0] if len(found) == 1 else None


def _gaps(parts: list[tuple[int, int, int]], size: int) -> list[tuple[int, int]]:
    """Return the ranges of a block, as offset and size, that no part covers."""
    gaps, reached = [], 0
    for at, length in sorted((at, length) for _, at, length in parts):
        if reached < at:
            gaps.append((reached, at - reached))
        reached = max(reached, at + length)
    if reached < size:
        gaps.append((reached, size - reached))
    return gaps


class _Places:
    """Where the guest sees memory backends: parts of guest-physical address, offset in the backend, and size."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._devices: list[dict[str, Any]] | None = None

    async def of(self, backend: str, size: int) -> list[tuple[int, int, int]]:
        """Return the parts of a backend that have a fixed address."""
        if self._devices is None:
            self._devices = [each["data"] for each in await self._monitor.run("query-memory-devices")]
        for device in self._devices:
            if device.get("memdev") == f"/objects/{backend}":
                # A DIMM, or a virtio device.
                base = device.get("addr", device.get("memaddr", 0))
                return [(base, 0, min(size, device.get("max-size", device["size"])))] if base else []
        objects = await self._monitor.run("qom-list", path=f"/objects/{backend}")
        names = [each["name"] for each in objects if each["type"] == "child<memory-region>"]
        region = f"/objects/{backend}/{names[0]}" if names else ""
        address, walked = 0, list[str]()
        while region and region != _SYSTEM and region not in walked:
            walked.append(region)
            address += await self._get(region, "addr")
            region = await self._get(region, "container")
        if any("pci" in each.rpartition("/")[2] for each in walked[1:]):
            return []  # the guest chooses the address
        if region == _SYSTEM:
            return [(address, 0, size)]
        is_main = await self._get("/machine", "memory-backend") == f"/objects/{backend}"
        # The nodes of a NUMA machine are in one region of the machine.
        if walked and (is_main or walked[-1].rpartition("/")[0] == "/machine"):
            return await self._in_windows(address, size) or await self._in_view(backend)
        return []

    async def _get(self, path: str, name: str) -> Any:
        return await self._monitor.run("qom-get", path=path, property=name)

    async def _in_windows(self, address: int, size: int) -> list[tuple[int, int, int]]:
        known = {each["name"] for each in await self._monitor.run("qom-list", path="/machine/unattached")}
        parts, start = [], 0
        for path in _PC_WINDOWS:
            if path.rpartition("/")[2] in known:
                base, length = await self._get(path, "addr"), await self._get(path, "size")
                low, high = max(address, start), min(address + size, start + length)
                if low < high:
                    parts.append((base + low - start, low - address, high - low))
                start += length
        return parts

    async def _in_view(self, backend: str) -> list[tuple[int, int, int]]:
        """Return the parts that QEMU shows in its flat view of the memory. ROMs may cover parts of them."""
        text = await _ask(self._monitor, "info mtree -f")
        views = [each for each in text.split("FlatView #") if re.search(r'^ AS "memory", root: system$', each, re.M)]
        spans: dict[int, tuple[int, int]] = {}
        for line in views[0].splitlines() if views else []:
            if (match := _VIEW_LINE.fullmatch(line)) and match[3] in (backend, f"/objects/{backend}"):
                base, end, at = int(match[1], 16), int(match[2], 16) + 1, int(match[4] or "0", 16)
                start, stop = spans.get(base - at, (at, at))
                spans[base - at] = min(start, at), max(stop, at + end - base)
        return [(shift + start, start, stop - start) for shift, (start, stop) in sorted(spans.items())]


async def _host_address(monitor: Monitor, guest_address: int) -> int:
    """Return the address in the memory of QEMU."""
    told = await _ask(monitor, f"gpa2hva {guest_address:#x}")
    found = re.search(r"\((.*)\) is (0x[0-9a-f]+)", told)
    if not found:
        raise QemuError(f"QEMU does not report where the guest memory at {guest_address:#x} is: {told.strip()}")
    return int(found[2], 16)


def _process(
    monitor: Monitor, pid: int | None, found: list[_Found]
) -> tuple[Process | None, QemuError | OSError | None]:
    """Return the process of QEMU, or the reason why it is not known."""
    known = [(each.address, each.size) for each in found if each.address is not None]
    try:
        return process_of(monitor.connection, pid, lambda process: all(process.maps(*each) for each in known)), None
    except (QemuError, PermissionError) as error:
        if pid is not None:
            raise
        return None, error


def _command_line(process: Process | None) -> list[str]:
    try:
        return process.command_line() if process else []
    except OSError:
        return []


def _block(
    found: _Found, process: Process | None, why: QemuError | OSError | None, stack: ExitStack, to_fill: bool
) -> Block:
    backend, shared = found.backend["id"], bool(found.backend["share"])
    file = None
    if process is None:
        pass
    elif not shared and not to_fill:
        why = QemuError(f"the memory backend {backend!r} is not shared: start QEMU with {_HOW}")
    else:
        why = QemuError(
            f"the memory backend {backend!r} is not in a file that process {process.pid} has open: "
            f"start QEMU with {_HOW}"
        )
        try:
            if found.address is not None:
                flags = os.O_RDWR if to_fill else os.O_RDONLY
                file = process.file_at(found.address, found.size, flags, stack)
        except OSError as error:
            why = error
    if file is None and not found.migrated:
        assert why is not None
        raise why
    writable = (
        to_fill
        and file is not None
        and file.opened_for_writing
        and not file.changed
        and found.page_size <= mmap.PAGESIZE
    )
    return Block(
        name=found.name,
        backend=backend,
        size=found.size,
        shared=shared,
        preallocated=bool(found.backend["prealloc"]),
        page_size=found.page_size,
        migrated=found.migrated,
        ranges=found.ranges,
        file=file,
        why_no_file=why if file is None else None,
        writable=writable,
    )
