"""What a QEMU runs, and where the memory of its guest lies."""

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
# Of a PC, those parts of its RAM that it sees below and above the hole for devices; in the order in which they follow
# each other in the RAM. hw/i386/pc.c of QEMU.
_PC_WINDOWS = ("/machine/unattached/ram-below-4g[0]", "/machine/unattached/ram-above-4g[0]")

_HOW = "-object memory-backend-memfd,id=mem,size=SIZE,share=on -machine TYPE,memory-backend=mem"


@dataclass(frozen=True)
class RamRange:
    """A contiguous range of guest-physical memory, and which part of a backend it is; in bytes."""

    backend: str
    """The id of the memory backend."""
    guest_base: int
    """The guest-physical address of its first byte."""
    offset: int
    """Where in the backend it begins."""
    size: int


@dataclass(frozen=True)
class Machine:
    """What a guest ran on: the fragment ``machine``."""

    qemu_version: str
    """As QEMU tells it: ``7.2.22``."""
    target: str
    """The processor's architecture: ``x86_64``."""
    machine_type: str
    """With its version, not an alias: ``pc-i440fx-7.2``."""
    ram: list[RamRange]
    """In the order of the regions in ``mem``."""
    command_line: list[str] = field(default_factory=list, repr=False)
    """How QEMU was started. It may hold what was meant for nobody else."""
    format: str = _FORMAT
    version: int = _VERSION

    def check_format(self, root: Path) -> None:
        """Refuse what this version of vmsnap does not know.

        Raises
        ------
        UnsupportedFormatError
            It is of a later version.
        """
        if (self.format, self.version) != (_FORMAT, _VERSION):
            raise UnsupportedFormatError(
                f"{root}: the fragment 'machine' is {self.format!r} of version {self.version}: it needs a newer vmsnap"
            )

    def check_against(self, started: "Machine") -> None:
        """Refuse to load this machine into the one that was started.

        A later QEMU is good, since the type has its version in its name.

        Raises
        ------
        QemuError
            It is another machine, or its QEMU is older. The text says what differs, and how.
        """
        for what, saved, found in (
            ("the processor's architecture", self.target, started.target),
            ("the machine type", self.machine_type, started.machine_type),
            ("the memory", _told(self.ram), _told(started.ram)),
        ):
            if saved != found:
                raise QemuError(f"{what} of the saved guest is {saved}, of the QEMU that was started {found}")
        if _release(self.qemu_version) > _release(started.qemu_version):
            raise QemuError(
                f"the guest was saved by QEMU {self.qemu_version}, and {started.qemu_version} was started: "
                "take the same or a newer one"
            )


def _told(ram: list[RamRange]) -> str:
    return ", ".join(f"{each.size >> 20} MiB of backend {each.backend!r} at {each.guest_base:#x}" for each in ram)


def _release(version: str) -> tuple[int, ...]:
    """Return what decides whether one QEMU loads the state of another: not the last number, of corrections."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


@dataclass(frozen=True)
class Ram:
    """The memory of a guest that is there, open as long as the stack that it was found with."""

    machine: Machine
    regions: list[GuestRegion]
    """Where each of the machine's ranges lies."""
    files: list[str]
    """The path of the file behind each, for those that have a name."""


async def survey(monitor: Monitor, pid: int, stack: ExitStack, *, to_fill: bool) -> Ram:
    """Ask a QEMU what it runs, and open its guest's memory.

    Parameters
    ----------
    monitor
        The QEMU.
    pid
        Its process.
    stack
        Closes what is opened.
    to_fill
        Whether memory is to be written, not read: then it need not be shared.

    Raises
    ------
    QemuError
        Its memory lies in no file, or not in a shared one.
    OSError
        This user may not look into the process.
    """
    version = (await monitor.run("query-version"))["qemu"]
    kind = await monitor.run("qom-get", path="/machine", property="type")
    backends = sorted(await monitor.run("query-memdev"), key=lambda each: str(each.get("id")))
    if not backends:
        raise QemuError(f"this guest's memory has no backend: start QEMU with {_HOW}")
    private = [each["id"] for each in backends if not each["share"]]
    if private and not to_fill:
        raise QemuError(f"the memory backend {private[0]!r} of this guest is not shared: start QEMU with {_HOW}")
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
    """Return where the guest sees a backend: by the memory regions of QEMU's object model, one within the other."""
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
            f"QEMU does not tell where this guest sees its memory backend {backend!r}: it is no RAM of the machine, or "
            "the machine is of a kind that vmsnap does not know"
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
    """Return where in QEMU's own memory a range begins; only the monitor for people tells."""
    told = await monitor.run("human-monitor-command", command_line=f"gpa2hva {each.guest_base:#x}")
    found = re.search(r"\((.*)\) is (0x[0-9a-f]+)", told)
    if not found:
        raise QemuError(f"QEMU does not tell where it keeps the guest's memory at {each.guest_base:#x}: {told.strip()}")
    return int(found[2], 16)


def _proc(pid: int, name: str) -> Path:
    return Path("/proc", str(pid), name)


class _Process:
    """The files that QEMU's process has mapped."""

    # Of /proc/PID/maps, see proc(5).
    _LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) [-rwxsp]{4} ([0-9a-f]+) \S+ (\d+) *(.*)")

    def __init__(self, pid: int, flags: int, stack: ExitStack) -> None:
        self._pid, self._flags, self._stack = pid, flags, stack
        self._opened: dict[str, int] = {}
        try:
            text = _proc(pid, "maps").read_text("utf-8", "surrogateescape")
            self._names = os.listdir(_proc(pid, "fd"))
        except PermissionError as error:
            raise PermissionError(
                error.errno, "this user may not look into QEMU: be root, or the user that it runs as", error.filename
            ) from None
        self._maps: list[Any] = [found.groups() for line in text.splitlines() if (found := self._LINE.match(line))]

    def file_at(self, address: int, backend: str) -> tuple[int, int, str]:
        """Return the file mapped at an address: open, the offset in it, and its path where it has one."""
        for start, end, offset, inode, path in self._maps:
            if int(start, 16) <= address < int(end, 16) and inode != "0":
                for name in self._names:
                    link = _proc(self._pid, f"fd/{name}")
                    # The device in maps is not that of stat on every file system.
                    if self._is(link, int(inode), path):
                        where = int(offset, 16) + address - int(start, 16)
                        return self._open(link), where, "" if path.endswith(" (deleted)") else path
        raise QemuError(
            f"the memory backend {backend!r} of this guest lies in no file that process {self._pid} has open: "
            f"start QEMU with {_HOW}; where something else made QEMU's socket for it, say which process it is"
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
