"""A QEMU that vmsnap starts."""

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
from vmsnap.qemu.machine import Ram

# What QEMU said last, when it fails.
_LAST_LINES = 20
_EXIT_SECONDS = 10.0


class StartedQemu:
    """A QEMU that waits for a guest; it is ended with the block, unless the guest was told to go on."""

    def __init__(self, command: Sequence[str]) -> None:
        # Files that QEMU makes for the guest's memory are not left behind where it fails.
        paths = [path.replace(",,", ",") for each in command for path in re.findall(r"mem-path=((?:[^,]|,,)+)", each)]
        self._new_paths = {os.path.realpath(path) for path in paths if not os.path.exists(path)}
        self._filled: list[tuple[str, int]] = []
        self.connection, theirs = socket.socketpair()
        with theirs:
            try:
                self.process = subprocess.Popen(
                    [
                        *command,
                        *("-incoming", "defer"),
                        *("-chardev", f"socket,id=vmsnap-monitor,fd={theirs.fileno()}"),
                        *("-mon", "chardev=vmsnap-monitor,mode=control"),
                    ],
                    stderr=subprocess.PIPE,
                    pass_fds=[theirs.fileno()],
                )
            except BaseException:
                self.connection.close()
                raise
        self._said: deque[bytes] = deque(maxlen=_LAST_LINES)
        self._lock = threading.Lock()
        self._runs = False
        self._listener = threading.Thread(target=self._listen, name="vmsnap-qemu-stderr", daemon=True)
        try:
            self._listener.start()
        except RuntimeError as error:
            self.connection.close()
            end(self.process)
            raise no_thread(error) from None

    def _listen(self) -> None:
        """Keep what QEMU says until the guest runs: it may be why it does not. Pass it on from then on."""
        assert self.process.stderr is not None
        with self.process.stderr as lines:
            for line in lines:
                with self._lock:
                    self._said.append(line)
                    if self._runs:
                        self._pass_on()

    def _pass_on(self) -> None:
        with suppress(OSError):
            while self._said:
                os.write(2, self._said.popleft())

    def fills(self, ram: Ram) -> None:
        """Note the files that the guest's memory goes into: none of it stays there where the block fails."""
        for region, path in zip(ram.regions, ram.files, strict=True):
            if path and path not in (known for known, _ in self._filled):
                assert isinstance(region.source, int)
                self._filled.append((path, os.dup(region.source)))

    def runs(self) -> None:
        """Let QEMU be when the block ends."""
        with self._lock:
            self._runs = True
            self._pass_on()

    async def __aenter__(self) -> "StartedQemu":
        return self

    async def __aexit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        self.connection.close()
        if self._runs:
            for _, file in self._filled:
                os.close(file)
            return
        await in_thread(self._undo)
        said = " ".join(b"".join(self._said).decode("utf-8", "replace").split())
        if isinstance(error, QemuError) and said:
            raise QemuError(f"{error}; QEMU said: {said}") from None

    def _undo(self) -> None:
        end(self.process)
        # Not for ever: somebody else may hold the other end of the pipe.
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


def end(process: "subprocess.Popen[bytes]") -> None:
    """End a process: told first, so that QEMU removes its sockets."""
    process.terminate()
    try:
        process.wait(_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
