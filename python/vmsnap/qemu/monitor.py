"""A conversation with a QEMU over QMP: https://www.qemu.org/docs/master/interop/qmp-spec.html."""

import asyncio
import errno
import logging
import os
import socket
import stat
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

from qemu.qmp import ExecInterruptedError, ExecuteError, QMPClient, QMPError

from vmsnap.errors import QemuError

# QEMU greets at once; what does not within this time is held by another client, or is no QEMU.
_GREETING_SECONDS = 10.0
# How often a migration is asked after: less than it takes, and it takes ten milliseconds.
_POLL_SECONDS = 0.001
# A list of all that a large machine has.
_ANSWER_BYTES = 1 << 22
# struct ucred of unix(7): pid, uid, gid.
_CREDENTIALS = struct.Struct("3i")

# What the package logs is what it raises; without a handler Python prints it.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


class Monitor:
    """A QEMU that answers over QMP; from `connected`."""

    def __init__(self, client: QMPClient, connection: socket.socket) -> None:
        self._client = client
        self._connection = connection

    @property
    def peer_pid(self) -> int:
        """The process that listens at the socket: QEMU, unless something else made the socket for it."""
        credentials = self._connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        return int(_CREDENTIALS.unpack(credentials)[0])

    async def run(self, command: str, **arguments: object) -> Any:
        """Run a command; ``_`` in the names of arguments stands for ``-``.

        Raises
        ------
        QemuError
            QEMU refuses, and the text says why; or it has ended.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            return await self._client.execute(command, named or None)
        except ExecuteError as refusal:
            raise QemuError(f"QEMU refuses {command!r}: {refusal}") from None
        except ExecInterruptedError:
            raise QemuError(f"QEMU ended, or closed the connection, during {command!r}") from None
        except QMPError as error:
            raise QemuError(f"QEMU cannot be asked {command!r}: {error}") from None

    async def send_descriptor(self, name: str, descriptor: int) -> None:
        """Give QEMU a copy of a descriptor, under a name for ``fd:``."""
        self._client.send_fd_scm(descriptor)
        await self.run("getfd", fdname=name)

    async def migrates(self) -> bool:
        """Whether a migration goes on."""
        status = (await self.run("query-migrate")).get("status", "none")
        return status not in ("none", "completed", "failed", "cancelled")

    async def migrated(self) -> None:
        """Wait until a migration, out or in, has completed.

        Raises
        ------
        QemuError
            It failed, and the text says why as far as QEMU tells.
        """
        while (found := await self.run("query-migrate")).get("status") != "completed":
            if found.get("status") in ("failed", "cancelled"):
                reason = found.get("error-desc", "it does not say why; its standard error may")
                raise QemuError(f"QEMU failed with the device state: {reason}")
            await asyncio.sleep(_POLL_SECONDS)

    async def quit(self) -> None:
        """End QEMU, and return when it has let go of the connection, or does not answer."""
        with suppress(QemuError, TimeoutError):
            await asyncio.wait_for(self.run("quit"), _GREETING_SECONDS)
        with suppress(QMPError, EOFError, OSError):
            await self._client.disconnect()


@asynccontextmanager
async def connected(connection: socket.socket, what: str) -> AsyncIterator[Monitor]:
    """Talk to the QEMU at the other end of a connection.

    Raises
    ------
    QemuError
        It does not answer as QEMU does, or not in time. The text begins with `what`.
    """
    client = QMPClient("vmsnap", readbuflen=_ANSWER_BYTES)
    try:
        await asyncio.wait_for(client.connect(connection), _GREETING_SECONDS)
    except TimeoutError:
        connection.close()
        raise QemuError(
            f"{what}: does not answer; QEMU talks to one client at a time: is another one connected, libvirt say?"
        ) from None
    except (QMPError, EOFError, OSError) as error:
        connection.close()
        raise QemuError(f"{what}: does not answer as QEMU's monitor does, in QMP: {error}") from None
    try:
        yield Monitor(client, connection)
    finally:
        # A QEMU that has ended in the meantime is an error of whoever asked it.
        with suppress(QMPError, EOFError, OSError):
            await client.disconnect()


def connection_to(path: Path) -> socket.socket:
    """Connect to the QMP socket at `path`.

    Raises
    ------
    FileNotFoundError, ConnectionRefusedError, PermissionError, OSError
        There is no socket, nobody listens, or this user may not connect.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise OSError(errno.ENOTSOCK, "is no socket", str(path))
        connection.settimeout(_GREETING_SECONDS)
        connection.connect(os.fspath(path))
    except OSError as error:
        connection.close()
        match error:
            case FileNotFoundError():
                text = "no QMP socket is there: start QEMU with -qmp unix:PATH,server=on,wait=off"
            case ConnectionRefusedError():
                text = "nobody listens at this QMP socket: QEMU has ended"
            case PermissionError():
                text = "this user may not connect to it: be root, or the user that QEMU runs as"
            case _:
                text = error.strerror or "cannot be connected to"
        raise type(error)(error.errno or errno.ETIMEDOUT, text, str(path)) from None
    return connection
