"""The machine that a QEMU runs, and the location of its guest memory."""

import os
import re
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vmsnap.errors import QemuError, UnsupportedFormatError
from vmsnap.memory import GuestRegion
from vmsnap.qemu.monitor import Monitor

_FORMAT, _VERSION = "vmsnap-qemu", 1

_SYSTEM = "/machine/unattached/system[0]"
# A PC sees one part of its RAM below the hole for devices and the rest above it. These are both parts, in the order in
# which they are in the RAM: see hw/i386/pc.c of QEMU.
_PC_WINDOWS = ("/machine/unattached/ram-below-4g[0]", "/machine/unattached/ram-above-4g[0]")

_HOW = "-object memory-backend-memfd,id=mem,size=SIZE,share=on -machine TYPE,memory-backend=mem"


@dataclass(frozen=True)
class RamRange:
    """A contiguous range of guest-physical addresses, and the range of a memory backend behind it, in bytes."""

    backend: str
    """The id of the memory backend."""
    guest_base: int
    """The guest-physical address of the first byte."""
    offset: int
    """The offset of the range in the backend."""
    size: int
    """The size of the range."""


@dataclass(frozen=True)
class Machine:
    """A description of the machine that a guest ran on. It is the fragment ``machine``."""

    qemu_version: str
    """The version of QEMU, such as ``7.2.22``."""
    target: str
    """The architecture of the processor, such as ``x86_64``."""
    machine_type: str
    """The machine type with its version, such as ``pc-i440fx-7.2``; never an alias."""
    ram: list[RamRange]
    """The memory, in the order of the regions in the fragment ``mem``."""
    command_line: list[str] = field(default_factory=list, repr=False)
    """The command line of QEMU. It may contain secrets."""
    format: str = _FORMAT
    version: int = _VERSION

    def check_format(self, root: Path) -> None:
        """Check that this version of vmsnap supports the description.

        Raises
        ------
        UnsupportedFormatError
            A newer version of vmsnap wrote it.
        """
        if (self.format, self.version) != (_FORMAT, _VERSION):
            raise UnsupportedFormatError(
                f"{root}: the fragment 'machine' is {self.format!r}, version {self.version}: use a newer vmsnap"
            )

    def check_against(self, started: "Machine") -> None:
        """Check that the started machine can load the state of this one.

        A newer QEMU can load it, because the version is part of the machine type.

        Raises
        ------
        QemuError
            The started machine is another one, or its QEMU is older. The text names the difference.
        """
        for what, saved, found in (
            ("the architecture", self.target, started.target),
            ("the machine type", self.machine_type, started.machine_type),
            ("the memory", _told(self.ram), _told(started.ram)),
        ):
            if saved != found:
                raise QemuError(
                    f"{what} of the saved guest is {saved}, but that of the started QEMU is {found}: "
                    "start the same machine"
                )
        if _release(self.qemu_version) > _release(started.qemu_version):
            raise QemuError(
                f"the guest was saved by QEMU {self.qemu_version}, but the started QEMU is {started.qemu_version}: "
                "use the same version or a newer one"
            )


def _told(ram: list[RamRange]) -> str:
    return ", ".join(f"{each.size >> 20} MiB of backend {each.backend!r} at {each.guest_base:#x}" for each in ram)


def _release(version: str) -> tuple[int, ...]:
    """Return the parts of a version that decide whether QEMU can load a state: all but the patch level."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


@dataclass(frozen=True)
class Ram:
    """The open memory of a guest in QEMU. It is valid until the exit stack of `survey` closes."""

    machine: Machine
    regions: list[GuestRegion]
    """A region for each range of the machine, with its open file."""
    files: list[str]
    """The path of the file behind each region, empty if it does not have one."""


async def survey(monitor: Monitor, pid: int, stack: ExitStack, *, to_fill: bool) -> Ram:
    """Describe the machine that QEMU runs, and open the guest memory.

    Parameters
    ----------
    monitor
        The connection to QEMU.
    pid
        The process ID of QEMU.
    stack
        The exit stack that closes the opened files.
    to_fill
        Whether the memory will be written instead of read. Then it does not have to be shared.

    Raises
    ------
    QemuError
        The memory is not in a file, or the file is not shared.
    OSError
        This user may not access the process.
    """
    version = (await monitor.run("query-version"))["qemu"]
    kind = await monitor.run("qom-get", path="/machine", property="type")
    backends = sorted(await monitor.run("query-memdev"), key=lambda each: str(each.get("id")))
    if not backends:
        raise QemuError(f"the guest memory has no memory backend: start QEMU with {_HOW}")
    private = [each["id"] for each in backends if not each["share"]]
    if private and not to_fill:
        raise QemuError(f"the memory backend {private[0]!r} is not shared: start QEMU with {_HOW}")
    ranges = [each for backend in backends for each in await _ranges(monitor, backend["id"], backend["size"])]
    ranges.sort(key=lambda each: each.guest_base)
    machine = Machine(
        qemu_version=f"{version['major']}.{version['minor']}.{version['micro']}",
        target=(await monitor.run("query-target"))["arch"],
        machine_type=kind.removesuffix("-machine"),
        ram=ranges,
        command_line=[os.fsdecode(each) for each in _proc(pid, "cmdline").read_bytes().split(b"\0")[:-1]],
    )
    process = _Process(pid, os.O_RDWR if to_fill else os.O_RDONLY, stack)
    regions, files = [], []
    for each in ranges:
        descriptor, offset, path = process.file_at(await _host_address(monitor, each), each.backend)
        regions.append(GuestRegion(each.guest_base, descriptor, offset=offset, size=each.size))
        files.append(path)
    return Ram(machine, regions, files)


async def _ranges(monitor: Monitor, backend: str, size: int) -> list[RamRange]:
    """Return where the guest sees a backend. The nested memory regions in the object model of QEMU tell."""
    objects = await monitor.run("qom-list", path=f"/objects/{backend}")
    names = [each["name"] for each in objects if each["type"] == "child<memory-region>"]
    region = f"/objects/{backend}/{names[0]}" if names else ""
    address, seen = 0, set[str]()
    while region and region != _SYSTEM and region not in seen:
        seen.add(region)
        address += await monitor.run("qom-get", path=region, property="addr")
        outermost, region = region, await monitor.run("qom-get", path=region, property="container")
    if region == _SYSTEM:
        return [RamRange(backend, address, 0, size)]
    main = await monitor.run("qom-get", path="/machine", property="memory-backend")
    ranges = []
    if seen and (main == f"/objects/{backend}" or outermost.startswith("/machine/")):
        start = 0
        for window in await _windows(monitor):
            low, high = max(address, start), min(address + size, start + window.size)
            if low < high:
                ranges.append(RamRange(backend, window.guest_base + low - start, low - address, high - low))
            start += window.size
    if sum(each.size for each in ranges) != size:
        raise QemuError(
            f"cannot find the guest-physical addresses of the memory backend {backend!r}: it is not RAM of the "
            "machine, or vmsnap does not support this machine type"
        )
    return ranges


async def _windows(monitor: Monitor) -> list[RamRange]:
    known = {each["name"] for each in await monitor.run("qom-list", path="/machine/unattached")}
    windows = []
    for path in _PC_WINDOWS:
        if path.rpartition("/")[2] in known:
            base = await monitor.run("qom-get", path=path, property="addr")
            windows.append(RamRange("", base, 0, await monitor.run("qom-get", path=path, property="size")))
    return windows


async def _host_address(monitor: Monitor, each: RamRange) -> int:
    """Return the address of a range in the memory of QEMU. Only the human monitor reports it."""
    told = await monitor.run("human-monitor-command", command_line=f"gpa2hva {each.guest_base:#x}")
    found = re.search(r"\((.*)\) is (0x[0-9a-f]+)", told)
    if not found:
        raise QemuError(f"QEMU does not report where the guest memory at {each.guest_base:#x} is: {told.strip()}")
    return int(found[2], 16)


def _proc(pid: int, name: str) -> Path:
    return Path("/proc", str(pid), name)


class _Process:
    """The files that the process of QEMU has mapped."""

    # The format of /proc/PID/maps, see proc(5).
    _LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) [-rwxsp]{4} ([0-9a-f]+) \S+ (\d+) *(.*)")

    def __init__(self, pid: int, flags: int, stack: ExitStack) -> None:
        self._pid, self._flags, self._stack = pid, flags, stack
        self._opened: dict[str, int] = {}
        try:
            text = _proc(pid, "maps").read_text("utf-8", "surrogateescape")
            self._names = os.listdir(_proc(pid, "fd"))
        except PermissionError as error:
            raise PermissionError(
                error.errno, "no permission to access QEMU: run as root, or as the user of QEMU", error.filename
            ) from None
        self._maps: list[Any] = [found.groups() for line in text.splitlines() if (found := self._LINE.match(line))]

    def file_at(self, address: int, backend: str) -> tuple[int, int, str]:
        """Return the open file mapped at an address, the offset in it, and its path if it has one."""
        for start, end, offset, inode, path in self._maps:
            if int(start, 16) <= address < int(end, 16) and inode != "0":
                for name in self._names:
                    link = _proc(self._pid, f"fd/{name}")
                    # On some file systems the device number in maps differs from that of stat.
                    if self._is(link, int(inode), path):
                        where = int(offset, 16) + address - int(start, 16)
                        return self._open(link), where, "" if path.endswith(" (deleted)") else path
        raise QemuError(
            f"the memory backend {backend!r} is not in a file that process {self._pid} has open: "
            f"start QEMU with {_HOW}; if another process created the socket for QEMU, pass the process ID of QEMU"
        )

    @staticmethod
    def _is(link: Path, inode: int, path: str) -> bool:
        try:
            return link.stat().st_ino == inode and os.readlink(link) == path
        except FileNotFoundError:
            return False  # closed meanwhile

    def _open(self, link: Path) -> int:
        name = str(link)
        if name not in self._opened:
            self._opened[name] = os.open(link, self._flags | os.O_CLOEXEC)
            self._stack.callback(os.close, self._opened[name])
        return self._opened[name]
