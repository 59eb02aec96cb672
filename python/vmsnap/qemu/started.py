"""A QEMU process that vmsnap starts in order to load a guest."""

import asyncio
import errno
import fcntl
import os
import re
import secrets
import socket
import subprocess
import tempfile
import threading
from collections import deque
from collections.abc import AsyncIterator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from itertools import pairwise
from time import monotonic, time_ns

from vmsnap import _vmsnap
from vmsnap.errors import QemuError
from vmsnap.qemu.background import in_thread, no_thread, to_the_end
from vmsnap.qemu.leftovers import (
    FIRST_FREE,
    Guard,
    Leftovers,
    above_standard,
    end_processes,
    remove_socket,
    sizes_of,
)
from vmsnap.qemu.monitor import Monitor, connected
from vmsnap.qemu.process import MappedFile

# The last lines of the standard error of QEMU, for the error if it fails.
_LAST_LINES = 20
_EXIT_SECONDS = 10.0
# QEMU that has not answered yet does not obey SIGTERM while it waits for a client of another socket.
_UNANSWERED_EXIT_SECONDS = 2.0
# QEMU connects at once, but answers only when it has preallocated its memory.
_START_SECONDS = 300.0
# The last output of a process that has ended. Another process may hold the other end of the pipe.
_OUTPUT_SECONDS = 1.0
# QEMU said that it waits for a client of another socket.
_WAITING_SECONDS = 30.0
_POLL_SECONDS = 0.002
# The length of sun_path, without the null byte: unix(7).
_SOCKET_PATH_BYTES = 107

_WAITS = re.compile(rb"waiting for connection on: (?:disconnected:)?([^\s,]+)")


class StartedQemu:
    """A QEMU process that waits for a guest. It ends with the ``with`` block, unless `runs` was called.

    QEMU connects to a socket in a private directory. The command may therefore be a wrapper that starts QEMU. If this
    process is killed, a guard process ends QEMU and empties the files that were being filled.
    """

    def __init__(self, command: Sequence[str]) -> None:
        self._name = command[0]
        # The clock of file systems is some milliseconds behind. QEMU takes longer until it creates a file.
        self._started_at = time_ns()
        sizes = sizes_of(_memory_paths(command))
        self._known = set(sizes)
        self._new = {path for path, size in sizes.items() if size is None}
        self._said: deque[bytes] = deque(maxlen=_LAST_LINES)
        self._lock = threading.Lock()
        self._runs = self._ended = self._answered = False
        self._stderr: int | None = None
        # The locked files, by device and inode.
        self._locked: dict[tuple[int, int], int] = {}
        self._filled = set[tuple[int, int]]()
        self.monitor_path = _socket_path()
        self._leftovers = Leftovers(self.monitor_path, sizes)
        # It must know the directory before that exists.
        self._guard = Guard(self.monitor_path, sizes)
        try:
            self._listening = _listen(self.monitor_path)
        except BaseException:
            self._guard.release()
            raise
        try:
            self.process = subprocess.Popen(
                [
                    *command,
                    *("-S", "-incoming", "defer"),
                    *("-chardev", f"socket,id=vmsnap-monitor,path={self.monitor_path.replace(',', ',,')},server=off"),
                    *("-mon", "chardev=vmsnap-monitor,mode=control"),
                ],
                stdin=_inherited(0),
                stdout=_inherited(1),
                stderr=subprocess.PIPE,
            )
        except BaseException:
            self._close_socket()
            self._guard.release()
            raise
        self._listener = threading.Thread(target=self._listen_to_stderr, name="vmsnap-qemu-stderr", daemon=True)
        try:
            self._share("process", os.pidfd_open(self.process.pid))
            # A copy, because descriptor 2 may belong to another file when QEMU prints something.
            if _inherited(2) is None:
                self._stderr = fcntl.fcntl(2, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE)
            self._listener.start()
        except BaseException as error:
            self._undo()
            if isinstance(error, RuntimeError):
                raise no_thread(error) from None
            raise

    def _share(self, kind: str, descriptor: int) -> None:
        self._leftovers.add(kind, descriptor)
        self._guard.add(kind, descriptor)

    def _close_socket(self) -> None:
        self._listening.close()
        remove_socket(self.monitor_path)

    def _listen_to_stderr(self) -> None:
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

    def _has_said(self) -> bytes:
        with self._lock:
            return b"".join(self._said)

    @asynccontextmanager
    async def monitor(self) -> AsyncIterator[Monitor]:
        """Wait until QEMU has connected and answers, and open a session for a ``with`` block.

        Raises
        ------
        QemuError
            QEMU ended, cannot connect, or waits for something else.
        """
        started = monotonic()
        while True:
            with suppress(BlockingIOError):
                connection = above_standard(self._listening.accept()[0])
                break
            await self._still_starting(started)
        self._close_socket()
        async with AsyncExitStack() as stack:
            session = connected(connection, self._name, patience=2 * _START_SECONDS)
            opening = asyncio.ensure_future(stack.enter_async_context(session))
            try:
                while not opening.done():
                    await self._still_starting(started)
                monitor = opening.result()
            except BaseException as error:
                opening.cancel()
                await to_the_end(asyncio.wait([opening]))
                if isinstance(error, QemuError):
                    # Usually QEMU closed the connection because it ends.
                    await in_thread(self._wait_for_end)
                    self._check_not_ended()
                raise
            finally:
                # See `background`.
                del opening
            self._answered = True
            yield monitor

    async def _still_starting(self, started: float) -> None:
        """Wait for a moment, if QEMU may still answer.

        Raises
        ------
        QemuError
            It has ended, or waits for something else.
        """
        if self.process.poll() is not None:
            await in_thread(lambda: self._listener.join(_OUTPUT_SECONDS))
            self._check_not_ended()
        seconds = monotonic() - started
        waits = _WAITS.search(self._has_said())
        if waits and seconds > _WAITING_SECONDS:
            raise QemuError(
                f"QEMU does not start, because it waits for a client of {os.fsdecode(waits[1])}: use wait=off there"
            )
        if seconds > _START_SECONDS:
            raise QemuError(f"{self._name} did not connect QEMU to vmsnap within {_START_SECONDS:.0f} s{self._hint()}")
        await asyncio.sleep(_POLL_SECONDS)

    def _wait_for_end(self) -> None:
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_OUTPUT_SECONDS)
        self._listener.join(_OUTPUT_SECONDS)

    def _check_not_ended(self) -> None:
        if (status := self.process.poll()) is not None:
            how = f"ended with status {status}" if status >= 0 else f"was ended by signal {-status}"
            raise QemuError(f"{self._name} {how} before QEMU answered{self._hint()}")

    def _hint(self) -> str:
        """Return what to do if QEMU could not reach the socket."""
        said = self._has_said()
        if b"Failed to connect" not in said or os.fsencode(self.monitor_path) not in said:
            return ""
        return (
            f": QEMU cannot connect to {self.monitor_path}, because it runs as another user or in another mount "
            "namespace: run vmsnap itself as that user, or set TMPDIR to a directory that both see"
        )

    def owns(self, pid: int) -> None:
        """Record the process of QEMU, so that it is ended if the block fails."""
        with suppress(OSError):
            self._share("process", os.pidfd_open(pid))

    def has(self, files: Iterable[MappedFile]) -> None:
        """Record the files of its memory, so that those that QEMU created are removed if the block fails.

        The command names only some of them: a script or a configuration file may name others.
        """
        for file in files:
            if file.path and file.path not in self._known and self._is_new(file):
                self._known.add(file.path)
                self._new.add(file.path)
                self._leftovers.add_new(file.path)
                self._guard.add_new(file.path)

    def _is_new(self, file: MappedFile) -> bool:
        """Return whether a file was created after QEMU was started. Its path must lead to it here, too."""
        created_at = _vmsnap.created_at(f"/proc/self/fd/{file.descriptor}")
        with suppress(OSError):
            here = os.stat(file.path, follow_symlinks=False)
            is_it = (here.st_dev, here.st_ino) == _identity(file.descriptor)
            return is_it and created_at is not None and created_at > self._started_at
        return False

    def lock(self, file: MappedFile) -> None:
        """Lock a file for guest memory until the block ends, so that no other load fills it.

        Raises
        ------
        BlockingIOError
            Another load is filling the file.
        FileNotFoundError
            Another load has removed it.
        """
        if (identity := _identity(file.descriptor)) in self._locked:
            return
        try:
            fcntl.flock(file.descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            text = "another vmsnap is loading a guest into it: use another file"
            raise BlockingIOError(error.errno, text, file.path or "the memfd") from None
        self._locked[identity] = fcntl.fcntl(file.descriptor, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE)
        if file.path in self._new and not os.path.exists(file.path):
            raise FileNotFoundError(errno.ENOENT, "another load that failed has removed it: try again", file.path)

    def fills(self, file: MappedFile) -> None:
        """Record a locked file that is about to be filled, so that it is emptied if the block fails."""
        if (identity := _identity(file.descriptor)) not in self._filled:
            self._filled.add(identity)
            self._share("file", self._locked.pop(identity))

    def runs(self) -> None:
        """Leave QEMU running when the block ends."""
        with self._lock:
            self._runs = True
            self._pass_on()
            self._let_go()

    def kill(self) -> None:
        """Kill QEMU, without waiting."""
        self._leftovers.kill()

    async def __aenter__(self) -> "StartedQemu":
        return self

    async def __aexit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        if self._runs:
            self._leftovers.close()
            try:
                await in_thread(self._release)
            except asyncio.CancelledError:
                # The caller does not get the process.
                await in_thread(lambda: end(self.process, self.monitor_path))
                raise
            return
        await in_thread(self._undo)
        if self._stderr is not None:
            os.close(self._stderr)
        said = " ".join(self._has_said().decode("utf-8", "replace").split())
        if isinstance(error, QemuError) and said:
            raise QemuError(f"{error}; QEMU printed: {said}") from None

    def _release(self) -> None:
        self._unlock()
        self._guard.release()

    def _unlock(self) -> None:
        for file in self._locked.values():
            fcntl.flock(file, fcntl.LOCK_UN)
            os.close(file)
        self._locked.clear()

    def _undo(self) -> None:
        self._listening.close()
        self._unlock()
        self._leftovers.remove(_EXIT_SECONDS if self._answered else _UNANSWERED_EXIT_SECONDS)
        # The limits are for a process that this user must not end, and for another process that holds the pipe.
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(_EXIT_SECONDS)
        if self._listener.ident is not None:
            self._listener.join(_EXIT_SECONDS)
        self._guard.release()


def _identity(file: int) -> tuple[int, int]:
    found = os.fstat(file)
    return found.st_dev, found.st_ino


def _memory_paths(command: Sequence[str]) -> list[str]:
    """Return the paths that a command line names for guest memory, in the syntax of QEMU's options or in JSON."""
    options = [path.replace(",,", ",") for each in command for path in re.findall(r"mem-path=((?:[^,]|,,)+)", each)]
    options += [path for each, path in pairwise(command) if each in ("-mem-path", "--mem-path")]
    in_json = [path for each in command for path in re.findall(r'"mem-path"\s*:\s*"([^"\\]+)"', each)]
    return options + in_json


def _socket_path() -> str:
    """Return a path for a socket in a private directory that does not exist yet."""
    name = f"vmsnap-{secrets.token_hex(8)}/qmp"
    path = f"{tempfile.gettempdir()}/{name}"
    return path if len(os.fsencode(path)) <= _SOCKET_PATH_BYTES else f"/tmp/{name}"


def _listen(path: str) -> socket.socket:
    """Listen at a socket in a new private directory."""
    os.mkdir(os.path.dirname(path), 0o700)
    listening = above_standard(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
    try:
        listening.bind(path)
        listening.listen(1)
        listening.setblocking(False)
    except BaseException:
        listening.close()
        remove_socket(path)
        raise
    return listening


def _inherited(number: int) -> int | None:
    """Return the value for a standard stream of a child: None to inherit it, or `DEVNULL`.

    If a standard stream is closed, the next file that this program opens gets its number. A child must not read or
    write such a file. It is recognized because Python opens files as not inheritable.
    """
    try:
        return None if os.get_inheritable(number) else subprocess.DEVNULL
    except OSError:
        return subprocess.DEVNULL


def end(process: "subprocess.Popen[bytes]", monitor_path: str) -> None:
    """End the command that started QEMU, and QEMU.

    Parameters
    ----------
    process
        The command.
    monitor_path
        The socket that QEMU was started with.
    """
    process.terminate()
    end_processes(monitor_path)
    try:
        process.wait(_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
