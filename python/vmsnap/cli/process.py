"""A live process: its mappings, its memory, and stopping it while they are read."""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import cached_property
from typing import Self

from vmsnap.cli.failure import CommandError
from vmsnap.cli.files import named
from vmsnap.process import ProcessMemory, ProcessRange, StoppedProcess

# A thread deep in the kernel (a hanging network file system, a vfork) stops only when it comes out.
_STOP_TIMEOUT_SECONDS = 10.0

# An address at which nothing is mapped, that a file offset reaches.
_NOWHERE = 0x7FFF_FFFF_FFFF_0000

_STDERR = 2


@dataclass(frozen=True, slots=True)
class Mapping:
    """A line of ``/proc/PID/maps``."""

    start: int
    end: int
    readable: bool
    label: str


def range_name(start: int, end: int) -> str:
    """Return the name of the fragment for these addresses: of one width, so that names sort as addresses do."""
    return f"{start:016x}-{end:016x}"


def parse_maps(maps: bytes) -> list[Mapping]:
    """Return the mappings that the text of ``/proc/PID/maps`` lists."""
    mappings = []
    for line in maps.split(b"\n")[:-1]:
        addresses, permissions, _offset, _device, _inode, *label = line.split(maxsplit=5)
        start, _, end = addresses.partition(b"-")
        text = os.fsdecode(label[0]) if label else "anonymous"
        mappings.append(Mapping(int(start, 16), int(end, 16), permissions.startswith(b"r"), text))
    return mappings


class Process:
    """An open process. Its descriptors belong to this very process, even if another process gets its ID.

    Raises
    ------
    CommandError
        If there is no such process, or this user may not read its memory.
    """

    def __init__(self, pid: int) -> None:
        if pid == os.getpid():
            raise CommandError("vmsnap cannot dump itself")
        self.pid = pid
        with ExitStack() as stack, self._explained():
            self._memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, self._memory)
            if not self.maps():
                raise self.without_memory()
            self._open_files = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._open_files.close()

    def without_memory(self) -> CommandError:
        """Return the error for a process without memory to store."""
        return CommandError(f"process {self.pid} has no memory to read: it has ended, or is a kernel thread")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            with named(f"process {self.pid}"):
                yield
        except PermissionError as error:
            raise CommandError(
                f"process {self.pid}: no permission to stop it and read its memory: run vmsnap as root, or as its "
                "owner after 'sysctl kernel.yama.ptrace_scope=0'"
            ) from error
        except (FileNotFoundError, ProcessLookupError) as error:
            raise CommandError(f"process {self.pid}: no such process, or a process without memory") from error

    def maps(self) -> bytes:
        """Return the text of ``/proc/PID/maps``."""
        with self._explained(), open(f"/proc/{self.pid}/maps", "rb") as file:
            return file.read()

    def readable_bytes(self) -> int:
        """Return the size of the mappings that the process itself may read, touched or not."""
        return sum(each.end - each.start for each in parse_maps(self.maps()) if each.readable)

    @cached_property
    def memory(self) -> ProcessMemory:
        """The memory of the process, as mapped when this is first used. To stop the process, do so before."""
        return ProcessMemory(self.pid)

    def range(self, start: int, end: int) -> ProcessRange:
        """Return the memory at these addresses."""
        return ProcessRange(self.memory, start, end - start)

    def check_still_stopped(self) -> None:
        """Raise an error if the process is no longer stopped."""
        with self._explained():
            if not StoppedProcess.is_stopped(self.pid):
                raise CommandError(
                    f"process {self.pid} continued or ended during the dump, so its memory is not of one moment: retry"
                )

    @contextmanager
    def stopped(self) -> Iterator[Callable[[], None]]:
        """Stop the process during the block, and give the function that lets it continue earlier.

        A process that was stopped before is left as it is. However vmsnap ends, the process continues.
        """
        with self._explained():
            stopped = StoppedProcess.is_stopped(self.pid)
        if stopped:
            yield lambda: None
            return
        held = StoppedProcess(self.pid, _STOP_TIMEOUT_SECONDS)
        try:
            self._check_same()
            yield held.let_go
        finally:
            held.let_go()

    def _check_same(self) -> None:
        """Refuse another process that got the ID in the meantime."""
        with suppress(OSError):  # nothing is mapped at this address; an end of file means that the process is gone
            if not os.pread(self._memory, 1, _NOWHERE):
                raise CommandError(f"process {self.pid} has ended, or started another program")

    def shows_progress(self) -> bool:
        """Return whether it may be the process that shows our standard error, so that writing could block.

        It shows it if it has the other end of the terminal open (as a terminal emulator, tmux or sshd has), and may
        show it if it is an ancestor of this process.
        """
        if not os.isatty(_STDERR):
            return False
        if self.pid in _ancestors():
            return True
        number = f"tty-index:\t{os.minor(os.fstat(_STDERR).st_rdev)}\n"
        directory = f"/proc/{self.pid}"
        with suppress(OSError):
            for name in os.listdir(f"{directory}/fd"):
                # One may be closed while the others are looked at.
                with suppress(OSError):
                    if not os.readlink(f"{directory}/fd/{name}").endswith("/ptmx"):
                        continue
                    with open(f"{directory}/fdinfo/{name}") as file:
                        if number in file.readlines():
                            return True
            return False
        return True


def _ancestors() -> set[int]:
    """Return the IDs of the parent of this process, of the parent's parent, and so on."""
    found: set[int] = set()
    pid = os.getppid()
    with suppress(OSError):
        while pid > 0 and pid not in found:
            found.add(pid)
            with open(f"/proc/{pid}/stat", "rb") as file:
                # The command's name is in parentheses and may itself hold some; the state and the parent come after it.
                pid = int(file.read().rpartition(b")")[2].split()[1])
    return found
