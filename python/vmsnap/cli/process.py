"""A live process: its mappings, its memory, and holding it still while they are read."""

import errno
import mmap
import os
import signal
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Self

from vmsnap.cli.failure import CommandError
from vmsnap.cli.files import named

# A thread deep in the kernel (a hanging network file system, a vfork) stops only when it comes out.
_STOP_TIMEOUT_SECONDS = 10.0


class UnreadableMemoryError(Exception):
    """The page at `address` can be read by nobody: a device's, the kernel's, beyond the end of its file, a guard."""

    def __init__(self, address: int) -> None:
        super().__init__(f"{address:#x}")
        self.address = address


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
    """An open process. Its descriptors belong to this very process, even when its number is taken by another.

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
            self._pidfd = os.pidfd_open(pid)
            stack.callback(os.close, self._pidfd)
            self._memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
            stack.callback(os.close, self._memory)
            self._open_files = stack.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_exception: object) -> None:
        self._open_files.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            with named(f"process {self.pid}"):
                yield
        except PermissionError as error:
            raise CommandError(
                f"process {self.pid}: no permission to stop it and read its memory: run vmsnap as root, or as its "
                "owner and with 'sysctl kernel.yama.ptrace_scope=0'"
            ) from error
        except (FileNotFoundError, ProcessLookupError) as error:
            raise CommandError(f"process {self.pid}: no such process, or one without memory") from error

    def maps(self) -> bytes:
        """Return the text of ``/proc/PID/maps``."""
        with self._explained(), open(f"/proc/{self.pid}/maps", "rb") as file:
            return file.read()

    def read_into(self, address: int, buffer: memoryview) -> None:
        """Fill `buffer` with the memory at `address`.

        Raises
        ------
        UnreadableMemoryError
            At the first page that cannot be read.
        CommandError
            If the process has ended or runs another program now.
        """
        filled = 0
        while filled < len(buffer):
            try:
                with named(f"memory of process {self.pid} at {address + filled:#x}"):
                    count = os.preadv(self._memory, [buffer[filled:]], address + filled)
            except OverflowError:  # [vsyscall] lies where no file offset reaches
                raise UnreadableMemoryError(address + filled) from None
            except OSError as error:
                if error.errno not in (errno.EIO, errno.EFAULT):
                    raise
                raise UnreadableMemoryError(address + filled) from None
            if count == 0:
                raise CommandError(f"process {self.pid} has ended, or started another program")
            filled += count

    def next_readable(self, address: int, end: int) -> int:
        """Return the first page after `address` that can be read, or `end`."""
        byte = memoryview(bytearray(1))
        for page in range(address + mmap.PAGESIZE, end, mmap.PAGESIZE):
            with suppress(UnreadableMemoryError):
                self.read_into(page, byte)
                return page
        return end

    def _states(self) -> set[str]:
        folder = f"/proc/{self.pid}/task"
        states = set()
        with self._explained():
            for thread in os.listdir(folder):
                # A thread may end while the others are looked at.
                with suppress(FileNotFoundError, ProcessLookupError), open(f"{folder}/{thread}/stat", "rb") as file:
                    # The command's name before the state is in parentheses and may itself hold some.
                    states.add(file.read().rpartition(b")")[2].split()[0].decode())
        return states

    def is_stopped(self) -> bool:
        """Return whether no thread runs: all are stopped or traced, apart from those that have ended."""
        states = self._states()
        return bool(states & {"T", "t"}) and states <= {"T", "t", "Z", "X"}

    def check_still_stopped(self) -> None:
        """Refuse what was read since it was stopped, if it is not stopped any more."""
        if not self.is_stopped():
            raise CommandError(
                f"process {self.pid} went on, or ended, during the dump: that is not one moment's memory"
            )

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Hold the process still. One that was stopped already is left as it was found."""
        if self.is_stopped():
            yield
            return
        try:
            with self._explained():
                signal.pidfd_send_signal(self._pidfd, signal.SIGSTOP)
            self._await_stop()
            yield
        finally:
            with named(f"process {self.pid}"), suppress(ProcessLookupError, PermissionError):
                signal.pidfd_send_signal(self._pidfd, signal.SIGCONT)

    def _await_stop(self) -> None:
        deadline = time.monotonic() + _STOP_TIMEOUT_SECONDS
        while not self.is_stopped():
            if time.monotonic() > deadline:
                states = "".join(sorted(self._states()))
                raise CommandError(f"process {self.pid} does not stay stopped (thread states: {states}): try --no-stop")
            time.sleep(0.001)
