"""A QEMU process that vmsnap starts in order to load a guest."""

import fcntl
import os
import re
import socket
import subprocess
import threading
from collections import deque
from collections.abc import Sequence
from contextlib import suppress

from vmsnap.errors import QemuError
from vmsnap.qemu.background import in_thread, no_thread
from vmsnap.qemu.survey import Ram

# The last lines of the standard error of QEMU, for the error if it fails.
_LAST_LINES = 20
_EXIT_SECONDS = 10.0
# The standard streams have lower numbers.
_FIRST_FREE = 3


class StartedQemu:
    """A QEMU process that waits for a guest. It ends with the ``with`` block, unless `runs` was called."""

    def __init__(self, command: Sequence[str]) -> None:
        # If loading fails, the files that QEMU created for the guest memory are removed.
        paths = [path.replace(",,", ",") for each in command for path in re.findall(r"mem-path=((?:[^,]|,,)+)", each)]
        self._new_paths = {os.path.realpath(path) for path in paths if not os.path.exists(path)}
        self._filled: list[tuple[str, int]] = []
        self.connection, theirs = map(_above_standard, socket.socketpair())
        with theirs:
            try:
                self.process = subprocess.Popen(
                    [
                        *command,
                        *("-incoming", "defer"),
                        *("-chardev", f"socket,id=vmsnap-monitor,fd={theirs.fileno()}"),
                        *("-mon", "chardev=vmsnap-monitor,mode=control"),
                    ],
                    stdin=_inherited(0),
                    stdout=_inherited(1),
                    stderr=subprocess.PIPE,
                    pass_fds=[theirs.fileno()],
                )
            except BaseException:
                self.connection.close()
                raise
        # A copy, because descriptor 2 may belong to another file when QEMU prints something.
        self._stderr = None if _inherited(2) is not None else fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE)
        self._said: deque[bytes] = deque(maxlen=_LAST_LINES)
        self._lock = threading.Lock()
        self._runs = self._ended = False
        self._listener = threading.Thread(target=self._listen, name="vmsnap-qemu-stderr", daemon=True)
        try:
            self._listener.start()
        except RuntimeError as error:
            self.connection.close()
            end(self.process)
            raise no_thread(error) from None

    def _listen(self) -> None:
        """Keep the output of QEMU until the guest runs, for an error; pass it on afterwards."""
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                with self._lock:
                    self._said.append(line)
                    if self._runs:
                        self._pass_on()
        with self._lock:
            self._ended = True
            self._let_go()

    def _pass_on(self) -> None:
        while self._said:
            line = self._said.popleft()
            if self._stderr is not None:
                with suppress(OSError):
                    os.write(self._stderr, line)

    def _let_go(self) -> None:
        """Close the copy of standard error when QEMU has ended."""
        if self._runs and self._ended and self._stderr is not None:
            os.close(self._stderr)
            self._stderr = None

    def fills(self, ram: Ram) -> None:
        """Record the files that the guest memory is restored to, so that they are emptied if the block fails."""
        for file in (block.file for block in ram.blocks):
            if file and file.path:
                self._filled.append((file.path, os.dup(file.descriptor)))

    def runs(self) -> None:
        """Leave QEMU running when the block ends."""
        with self._lock:
            self._runs = True
            self._pass_on()
            self._let_go()

    async def __aenter__(self) -> "StartedQemu":
        return self

    async def __aexit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self.connection.close()
        if self._runs:
            for _, file in self._filled:
                os.close(file)
            return
        await in_thread(self._undo)
        if self._stderr is not None:
            os.close(self._stderr)
        said = " ".join(b"".join(self._said).decode("utf-8", "replace").split())
        if isinstance(error, QemuError) and said:
            raise QemuError(f"{error}; QEMU printed: {said}") from None

    def _undo(self) -> None:
        end(self.process)
        # With a limit, because another process may hold the other end of the pipe.
        self._listener.join(_EXIT_SECONDS)
        for path, file in self._filled:
            with suppress(OSError):
                found = os.fstat(file)
                os.ftruncate(file, 0)
                os.ftruncate(file, found.st_size)
                there = os.stat(path)
                if path in self._new_paths and (there.st_ino, there.st_dev) == (found.st_ino, found.st_dev):
                    os.unlink(path)
            os.close(file)


def _inherited(number: int) -> int | None:
    """Return the value for a standard stream of a child: None to inherit it, or `DEVNULL`.

    If a standard stream is closed, the next file that this program opens gets its number. A child must not read or
    write such a file. It is recognized because Python opens files as not inheritable.
    """
    try:
        return None if os.get_inheritable(number) else subprocess.DEVNULL
    except OSError:
        return subprocess.DEVNULL


def _above_standard(connection: socket.socket) -> socket.socket:
    """Return a connection whose descriptor is not that of a standard stream."""
    if connection.fileno() >= _FIRST_FREE:
        return connection
    with connection:
        return socket.socket(fileno=fcntl.fcntl(connection, fcntl.F_DUPFD_CLOEXEC, _FIRST_FREE))


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a process: with SIGTERM first, so that QEMU removes its sockets."""
    process.terminate()
    try:
        process.wait(_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
