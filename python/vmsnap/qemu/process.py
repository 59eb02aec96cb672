"""The process that runs QEMU, and the files that it has mapped. Linux tells both in /proc: see proc(5)."""

import errno
import os
import re
import socket
import struct
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path

from vmsnap.errors import QemuError

_PROC = Path("/proc")

# struct ucred of unix(7): pid, uid, gid.
_CREDENTIALS = struct.Struct("3i")

# sock_diag(7): the header of a netlink message, `struct unix_diag_req`, and its answer `struct unix_diag_msg`.
_NETLINK_SOCK_DIAG, _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST = 4, 20, 1
_HEADER, _REQUEST, _ANSWER, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BBHIIIII"), 16, struct.Struct("=HH")
_ALL_STATES, _ANY_COOKIE = 0xFFFFFFFF, 0xFFFFFFFF
_UDIAG_SHOW_PEER, _UNIX_DIAG_PEER = 4, 2
_ATTRIBUTE_ALIGNMENT = 4
# The answer comes from the kernel immediately.
_ANSWER_SECONDS = 5.0


def peer_inode(connection: socket.socket) -> int | None:
    """Return the inode of the socket at the other end of a Unix connection, or None if the kernel does not tell.

    QEMU alone has the socket that it accepted, even if another process created the socket that it listens at.
    """
    own = os.fstat(connection.fileno()).st_ino
    request = _REQUEST.pack(
        socket.AF_UNIX, 0, 0, _ALL_STATES, own & 0xFFFFFFFF, _UDIAG_SHOW_PEER, _ANY_COOKIE, _ANY_COOKIE
    )
    header = _HEADER.pack(_HEADER.size + len(request), _SOCK_DIAG_BY_FAMILY, _NLM_F_REQUEST, 0, 0)
    try:
        with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, _NETLINK_SOCK_DIAG) as netlink:
            netlink.settimeout(_ANSWER_SECONDS)
            netlink.send(header + request)
            answer = netlink.recv(1 << 16)
    except OSError:
        return None  # a kernel without unix_diag, or a sandbox without netlink
    if len(answer) < _HEADER.size or _HEADER.unpack_from(answer)[1] != _SOCK_DIAG_BY_FAMILY:
        return None
    at = _HEADER.size + _ANSWER
    while at + _ATTRIBUTE.size <= len(answer):
        length, kind = _ATTRIBUTE.unpack_from(answer, at)
        if kind == _UNIX_DIAG_PEER:
            return int.from_bytes(answer[at + _ATTRIBUTE.size : at + length], "little")
        at += max(length, _ATTRIBUTE.size) + -length % _ATTRIBUTE_ALIGNMENT
    return None


def process_of(connection: socket.socket, pid: int | None, is_qemu: Callable[["Process"], bool]) -> "Process":
    """Return the process at the other end of the connection to a monitor.

    Parameters
    ----------
    connection
        The connection to the QMP socket of QEMU.
    pid
        The process that the caller says it is, or None to find it.
    is_qemu
        Decides between several processes that have the socket open: whether one has mapped the guest memory.

    Raises
    ------
    QemuError
        The process `pid` does not have the socket open; or the process is not visible here.
    PermissionError
        This user may not look into the process.
    """
    inode = peer_inode(connection)
    creator = _CREDENTIALS.unpack(connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size))[0]
    if pid is not None:
        try:
            holds = pid == creator if inode is None else _holds(pid, inode)
        except PermissionError as error:
            raise _not_permitted(error) from None
        if not holds:
            more = " (the kernel lacks the module unix_diag, which would tell more)" if inode is None else ""
            raise QemuError(
                f"process {pid} does not have the monitor's socket open{more}: "
                "leave out the process ID (--pid), or pass that of this QEMU"
            )
        return Process(pid)
    if inode is None and creator:
        return Process(creator)
    holders: list[Process] = []
    hidden = None
    # The creator of the socket is QEMU itself in most cases. A process that is not in this PID namespace has the ID 0.
    with suppress(OSError):
        if creator and inode is not None and _holds(creator, inode) and is_qemu(Process(creator)):
            return Process(creator)
    for found in _processes() if inode is not None else ():
        try:
            if _holds(found, inode):
                holders.append(Process(found))
        except PermissionError as error:
            hidden = error
    for process in holders:
        with suppress(OSError):
            if is_qemu(process):
                return process
    if holders:
        # None can be told from the others: a process that passed the socket on is older.
        return holders[-1]
    if hidden and creator:
        raise _not_permitted(hidden)
    raise QemuError(
        "the process of QEMU is not visible here: it runs in another PID namespace (a container), or /proc hides it: "
        "run vmsnap as root where QEMU runs, for example with nsenter, or outside of both"
    )


def _processes() -> list[int]:
    return sorted(int(name) for name in os.listdir(_PROC) if name.isdigit())


def _holds(pid: int, inode: int | None) -> bool:
    """Return whether a process has the socket with this inode open."""
    wanted = f"socket:[{inode}]"
    folder = _PROC / str(pid) / "fd"
    with suppress(FileNotFoundError, ProcessLookupError, NotADirectoryError):
        for name in os.listdir(folder):
            with suppress(FileNotFoundError):  # closed meanwhile
                if os.readlink(folder / name) == wanted:
                    return True
    return False


def _not_permitted(error: OSError) -> PermissionError:
    text = "no permission to access QEMU: run as root, or as the user of QEMU"
    return PermissionError(error.errno or errno.EACCES, text, error.filename)


@dataclass(frozen=True)
class Mapping:
    """A range of the memory of a process, from ``/proc/PID/maps``."""

    start: int
    end: int
    private: bool
    offset: int
    inode: int
    path: str


@dataclass(frozen=True)
class MappedFile:
    """A file that a process has mapped, opened here."""

    descriptor: int
    """The open file."""
    offset: int
    """The offset in the file of the first byte that was asked for."""
    path: str
    """The path of the file; empty if it does not have one, like a memfd."""
    private: bool
    """Whether the process has mapped it privately, so that its writes do not reach the file."""
    changed: bool
    """Whether the process has pages of its own instead of those of the file, in a private mapping."""
    opened_for_writing: bool
    """Whether the process itself opened the file for writing."""


class Process:
    """A process whose memory and open files are looked at."""

    _LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) [-r][-w][-x]([sp]) ([0-9a-f]+) \S+ (\d+) *(.*)")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._opened: dict[tuple[str, int], int] = {}

    def command_line(self) -> list[str]:
        """Return the arguments that the process was started with."""
        return [os.fsdecode(each) for each in self._path("cmdline").read_bytes().split(b"\0")[:-1]]

    def maps(self, address: int, size: int) -> list[Mapping]:
        """Return the mappings that contain a range of addresses, in order; empty if the range is not all mapped."""
        try:
            text = self._path("maps").read_text("utf-8", "surrogateescape")
        except PermissionError as error:
            raise _not_permitted(error) from None
        found, reached = [], address
        for line in text.splitlines():
            if not (match := self._LINE.match(line)):
                continue
            start, end = int(match[1], 16), int(match[2], 16)
            if start <= reached < end:
                found.append(Mapping(start, end, match[3] == "p", int(match[4], 16), int(match[5]), match[6]))
                reached = end
            if reached >= address + size:
                return found
        return []

    def file_at(self, address: int, size: int, flags: int, stack: ExitStack) -> MappedFile | None:
        """Open the file that the process has mapped at a range of addresses; None if that is not one open file.

        Parameters
        ----------
        address, size
            The range.
        flags
            The flags of `os.open`.
        stack
            The exit stack that closes the file.

        Raises
        ------
        PermissionError
            This user may not look into the process, or not open the file.
        """
        mappings = self.maps(address, size)
        if not mappings or not mappings[0].inode:
            return None
        first = mappings[0]
        if any(
            (each.inode, each.path, each.offset - each.start) != (first.inode, first.path, first.offset - first.start)
            for each in mappings
        ):
            return None
        if (link := self._link_to(first)) is None:
            return None
        try:
            opened_for_writing = bool(os.lstat(link).st_mode & 0o200)
            descriptor = self._open(link, flags, stack)
        except FileNotFoundError:
            return None  # closed meanwhile
        path = "" if first.path.endswith(" (deleted)") else first.path
        private = any(each.private for each in mappings)
        changed = private and self._has_own_pages(mappings)
        return MappedFile(descriptor, first.offset + address - first.start, path, private, changed, opened_for_writing)

    def _path(self, name: str) -> Path:
        return _PROC / str(self.pid) / name

    def _link_to(self, mapping: Mapping) -> Path | None:
        """Return the link to the open file behind a mapping."""
        try:
            names = os.listdir(self._path("fd"))
        except PermissionError as error:
            raise _not_permitted(error) from None
        for name in names:
            link = self._path(f"fd/{name}")
            with suppress(FileNotFoundError):  # closed meanwhile
                # On some file systems the device number in maps differs from that of stat.
                if link.stat().st_ino == mapping.inode and os.readlink(link).replace("\n", "\\012") == mapping.path:
                    return link
        return None

    def _open(self, link: Path, flags: int, stack: ExitStack) -> int:
        key = (str(link), flags)
        if key not in self._opened:
            self._opened[key] = os.open(link, flags | os.O_CLOEXEC)
            stack.callback(os.close, self._opened[key])
        return self._opened[key]

    def _has_own_pages(self, mappings: list[Mapping]) -> bool:
        """Return whether private mappings have pages that were written, and are no longer those of the file."""
        wanted = {f"{each.start:x}-{each.end:x}" for each in mappings}
        within, unseen = False, len(wanted)
        with open(self._path("smaps"), encoding="utf-8", errors="surrogateescape") as lines:
            for line in lines:
                name, _, value = line.partition(" ")
                if not name.endswith(":"):
                    within = "-".join(part.lstrip("0") or "0" for part in name.split("-")) in wanted
                    unseen -= within
                elif within and name in ("Anonymous:", "Swap:", "Private_Hugetlb:") and int(value.split()[0]):
                    return True
        return unseen > 0
