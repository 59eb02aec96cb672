"""Removal of everything that a load leaves behind if it fails or is killed: processes, and contents of memory files.

This file is a module of vmsnap, and also a program: the guard of a load. The guard outlives a vmsnap that is killed,
and then removes the leftovers. It imports only the standard library, so that it starts within milliseconds.
"""

import fcntl
import json
import os
import select
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

# The time for an exit after SIGTERM: freeing the memory of a large guest takes seconds.
_EXIT_SECONDS = 10.0
# A process that was started at the last moment shows its command line a little later.
_LOOK_AGAIN_SECONDS = 0.05
_QUIET_LOOKS, _MOST_LOOKS = 2, 20
# The standard streams have lower numbers.
FIRST_FREE = 3
_BATCH_BYTES = 1 << 20
_MESSAGE_BYTES = 1 << 20


class Leftovers:
    """The processes and files of a load that has not completed."""

    def __init__(self, monitor: str, sizes: dict[str, int | None]) -> None:
        self._monitor = monitor
        self._sizes = sizes
        self._processes: list[int] = []
        self._filled: list[int] = []

    def add(self, kind: str, descriptor: int) -> None:
        """Add a process (a pidfd), or a file that is being filled (a locked descriptor), and own the descriptor."""
        (self._processes if kind == "process" else self._filled).append(descriptor)

    def add_new(self, path: str) -> None:
        """Add a file that did not exist before."""
        self._sizes[path] = None

    def kill(self) -> None:
        """Kill the processes that were added, without waiting."""
        for process in self._processes:
            with suppress(OSError):
                signal.pidfd_send_signal(process, signal.SIGKILL)

    def remove(self, patience: float = _EXIT_SECONDS) -> None:
        """End the processes, empty the files, and remove the files that did not exist before.

        Parameters
        ----------
        patience
            The number of seconds from SIGTERM to SIGKILL.
        """
        remove_socket(self._monitor)
        end_processes(self._monitor, self._processes, patience)
        for file in self._filled:
            with suppress(OSError):
                size = os.fstat(file).st_size
                os.ftruncate(file, 0)
                os.ftruncate(file, size)
        self.close()
        for path, size_before in self._sizes.items():
            with suppress(OSError):
                _put_back(path, size_before)

    def close(self) -> None:
        """Close the descriptors, and release the locks of the files."""
        for file in self._filled:
            # Other descriptors of the same open file would keep the lock.
            fcntl.flock(file, fcntl.LOCK_UN)
        for descriptor in [*self._processes, *self._filled]:
            os.close(descriptor)
        self._processes, self._filled = [], []


class Guard:
    """A process that removes the leftovers if this process ends before `release`.

    Where no process can be started, it does nothing.
    """

    def __init__(self, monitor: str, sizes: dict[str, int | None]) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._connection = above_standard(ours)
        self._process: subprocess.Popen[bytes] | None = None
        with theirs, suppress(OSError):
            # A frozen program is not an interpreter.
            if sys.executable and not getattr(sys, "frozen", False):
                # A session of its own: Ctrl-C in the terminal must not end it.
                self._process = subprocess.Popen(
                    [sys.executable, "-I", "-S", __file__],
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    start_new_session=True,
                )
        self._send({"monitor": monitor, "sizes": sizes})
        with suppress(OSError):
            # A caller that forks gives its end of the connection to its child, so its own end is watched, too.
            this = os.pidfd_open(os.getpid())
            self._send({"kind": "starter"}, [this])
            os.close(this)

    def add(self, kind: str, descriptor: int) -> None:
        """Share a leftover with the guard, with the parameters of `Leftovers.add`."""
        self._send({"kind": kind}, [descriptor])

    def add_new(self, path: str) -> None:
        """Share a file that did not exist before."""
        self._send({"kind": "new", "path": path})

    def release(self) -> None:
        """End the guard. It removes nothing."""
        self._send({"kind": "done"})
        self._connection.close()
        if self._process is None:
            return
        try:
            self._process.wait(_EXIT_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _send(self, message: dict[str, Any], descriptors: Sequence[int] = ()) -> None:
        # A guard that was killed must not fail the load.
        with suppress(OSError):
            socket.send_fds(self._connection, [json.dumps(message).encode()], descriptors)


def above_standard(connection: socket.socket) -> socket.socket:
    """Return a connection whose descriptor is not that of a standard stream."""
    if connection.fileno() >= FIRST_FREE:
        return connection
    with connection:
        return socket.socket(fileno=fcntl.fcntl(connection, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE))


def remove_socket(path: str) -> None:
    """Remove a socket and its private directory."""
    with suppress(OSError):
        os.unlink(path)
    with suppress(OSError):
        os.rmdir(os.path.dirname(path))


def end_processes(monitor: str, processes: Sequence[int] = (), patience: float = _EXIT_SECONDS) -> None:
    """End QEMU and everything between vmsnap and QEMU: with SIGTERM first, so that QEMU removes its sockets.

    Parameters
    ----------
    monitor
        The path of the socket that QEMU was started with. Each process that has it in its command line is ended: QEMU,
        and a wrapper such as ``sh`` or ``sudo``.
    processes
        More processes to end, as pidfds.
    patience
        The number of seconds from SIGTERM to SIGKILL.
    """
    for number, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, _EXIT_SECONDS)):
        until = time.monotonic() + seconds
        quiet = 0
        while True:
            found, is_certain = _with_argument(os.fsencode(monitor))
            alive = [*found, *(each for each in processes if not _has_ended(each, 0))]
            try:
                for each in alive:
                    with suppress(OSError):
                        signal.pidfd_send_signal(each, number)
                ended = [_has_ended(each, max(0.0, until - time.monotonic())) for each in alive]
            finally:
                for each in found:
                    os.close(each)
            if not all(ended):
                break
            # A wrapper may have started QEMU at the last moment, while this looked at other processes.
            quiet = 0 if alive else quiet + 1
            if quiet >= (_QUIET_LOOKS if is_certain else _MOST_LOOKS):
                return
            time.sleep(_LOOK_AGAIN_SECONDS)


def _has_ended(process: int, seconds: float) -> bool:
    exits = select.poll()
    exits.register(process, select.POLLIN)
    return bool(exits.poll(seconds * 1000))


def _with_argument(text: bytes) -> tuple[list[int], bool]:
    """Open each process that has a text in its command line, as a pidfd.

    Returns
    -------
    tuple of list and bool
        The descriptors, and whether they are all: a process that starts a program has no command line for a moment.
    """
    found: list[int] = []
    is_certain = True
    try:
        # /proc may belong to another PID namespace. Its numbers then stand for other processes here.
        names = os.listdir("/proc") if os.readlink("/proc/self") == str(os.getpid()) else []
    except OSError:
        names = []  # there is no /proc
    for name in names:
        with suppress(OSError):
            if not name.isdigit() or int(name) == os.getpid():
                continue
            line = _command_line(name)
            if not line:
                os.readlink(f"/proc/{name}/exe")  # fails for a zombie and a thread of the kernel
                is_certain = False
            elif text in line:
                process = os.pidfd_open(int(name))
                if text in _command_line(name):
                    found.append(process)
                else:
                    os.close(process)
                    is_certain = False
    return found, is_certain


def _command_line(name: str) -> bytes:
    with open(f"/proc/{name}/cmdline", "rb") as file:
        return file.read()


def sizes_of(paths: Sequence[str]) -> dict[str, int | None]:
    """Return the size of each regular file, or None for a path that does not exist."""
    sizes: dict[str, int | None] = {}
    for path in paths:
        try:
            found = os.stat(path)
        except OSError:
            sizes[os.path.realpath(path)] = None
            continue
        if stat.S_ISREG(found.st_mode):
            sizes[os.path.realpath(path)] = found.st_size
    return sizes


def _put_back(path: str, size: int | None) -> None:
    """Remove a file that did not exist, and truncate one that was empty, unless it holds anything or is locked."""
    if size:
        return
    file = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        found = os.fstat(file)
        if not stat.S_ISREG(found.st_mode) or holds_something(file, 0, found.st_size):
            return
        if size is None:
            os.unlink(path)
        else:
            os.ftruncate(file, 0)
    finally:
        os.close(file)


def holds_something(descriptor: int, offset: int, size: int) -> bool:
    """Return whether a range of a file has nonzero bytes. QEMU may have allocated pages of zeros already."""
    end = offset + size
    while offset < end:
        try:
            offset = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError:
            return False  # no data up to the end
        batch = os.pread(descriptor, min(_BATCH_BYTES, end - offset), offset) if offset < end else b""
        if not batch:
            return False
        if batch.count(0) != len(batch):
            return True
        offset += len(batch)
    return False


def _guard() -> None:
    """Collect leftovers from standard input, and remove them when it ends."""
    # SIGTERM goes to all processes of a service that is being stopped.
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    leftovers: Leftovers | None = None
    events = select.poll()
    with socket.socket(fileno=0) as connection:
        events.register(connection, select.POLLIN)
        # All messages from before the end of the starter are read first.
        while connection.fileno() in dict(events.poll()):
            data, descriptors, _, _ = socket.recv_fds(connection, _MESSAGE_BYTES, 1)
            if not data:
                break
            message = json.loads(data)
            if leftovers is None:
                leftovers = Leftovers(message["monitor"], message["sizes"])
            elif message["kind"] == "done":
                return
            elif message["kind"] == "starter":
                events.register(descriptors[0], select.POLLIN)
            elif message["kind"] == "new":
                leftovers.add_new(message["path"])
            else:
                leftovers.add(message["kind"], descriptors[0])
    if leftovers is not None:
        leftovers.remove()


if __name__ == "__main__":
    _guard()
