"""A small process that lets the guest go on if the saving process dies: by SIGKILL, a crash, or the end of its memory.

It waits at the end of a pipe. If the pipe ends before the word that all is well, it connects to QEMU and undoes the
changes that the mark of the save lists (`mark`). It is started before the first change, and the save never waits for
it: a guard that is still starting when the saving process dies finds the end of the pipe at once.
"""

import asyncio
import json
import os
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

from vmsnap.errors import QemuError
from vmsnap.qemu.mark import recover
from vmsnap.qemu.monitor import connected, connection_to

# QEMU serves one client at a time, and a stopped QEMU answers when it continues.
_TURN_SECONDS = 600.0

# The interval of tries while QEMU refuses.
_AGAIN_SECONDS = 0.2

# The standard streams have lower numbers.
_FIRST_FREE = 3

_DONE = b"done"

# It imports nothing of vmsnap until it is needed. A caller that forks gives its end of the pipe to its child, so the
# end of the caller itself is watched too. SIGTERM goes to all processes of a service that is being stopped.
_PROGRAM = """
import json, os, select, signal, sys
for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
poll, text, pidfd = select.poll(), b"", int(sys.argv[1])
poll.register(0, select.POLLIN)
if pidfd >= 0:
    poll.register(pidfd, select.POLLIN)
os.set_blocking(0, False)
dead = False
while not dead:
    dead = pidfd in dict(poll.poll())
    try:
        while batch := os.read(0, 65536):
            text += batch
        dead = True
    except BlockingIOError:
        pass
    if text.endswith(b"\\ndone"):
        sys.exit()
sys.path[:], socket, save = json.loads(text.partition(b"\\n")[0])
from vmsnap.qemu.guard import rescue
rescue(socket, save)
"""


class Guard:
    """The guard of one save. Where no process can be started, it does nothing."""

    def __init__(self, qmp: str, save: str) -> None:
        """Start the process.

        Parameters
        ----------
        qmp
            The path of QEMU's socket.
        save
            The identifier in the mark of the save.
        """
        self._pipe = -1
        # A frozen program is not an interpreter.
        if not sys.executable or getattr(sys, "frozen", False):
            return
        reading, self._pipe = os.pipe2(os.O_CLOEXEC)
        this = _pidfd()
        told = json.dumps([[each for each in sys.path if isinstance(each, str)], qmp, save]).encode() + b"\n"
        try:
            os.set_blocking(self._pipe, False)
            if os.write(self._pipe, told) < len(told):
                raise BlockingIOError
            process = subprocess.Popen(
                # Without -P, modules in the current directory would be imported.
                [sys.executable, "-P", "-c", _PROGRAM, str(this), "vmsnap-guard", qmp],
                stdin=reading,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
                pass_fds=[this] if this >= 0 else [],
            )
            # Waited for, so that it is not a zombie when it has ended.
            threading.Thread(target=process.wait, name="vmsnap-qemu-guard", daemon=True).start()
        except (OSError, RuntimeError):
            pass
        finally:
            os.close(reading)
            if this >= 0:
                os.close(this)

    def dismiss(self) -> None:
        """End the process, because there is nothing to undo."""
        if self._pipe >= 0:
            with suppress(OSError):
                os.write(self._pipe, _DONE)
        self.take_over()

    def take_over(self) -> None:
        """Let the process undo the changes, because this one could not, as soon as QEMU answers."""
        if self._pipe >= 0:
            os.close(self._pipe)
            self._pipe = -1


def _pidfd() -> int:
    """Return a descriptor of this process for another one to watch, or -1."""
    try:
        this = os.pidfd_open(os.getpid())
    except (OSError, AttributeError):
        return -1  # this system does not have them
    if this >= _FIRST_FREE:
        return this
    os.close(this)
    return -1


def rescue(qmp: str, save: str) -> None:
    """Undo the changes of a save in QEMU. The guard process calls it."""

    async def rescuing() -> None:
        connection = connection_to(Path(qmp))
        async with connected(connection, qmp, _TURN_SECONDS) as monitor:
            until = time.monotonic() + _TURN_SECONDS
            while time.monotonic() < until:
                try:
                    await recover(monitor, save)
                    return
                except QemuError:
                    # QEMU refuses other settings while it migrates, for example for another client.
                    await asyncio.sleep(_AGAIN_SECONDS)

    asyncio.run(rescuing())
