"""A connection to QEMU over QMP: https://www.qemu.org/docs/master/interop/qmp-spec.html."""

import asyncio
import errno
import logging
import os
import socket
import stat
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qemu.qmp import EventListener, ExecInterruptedError, ExecuteError, Message, QMPClient, QMPError, StateError

from vmsnap.errors import QemuError

# QEMU sends its greeting immediately. Without one, another client is connected, or the process is not QEMU.
_GREETING_SECONDS = 10.0
# The limit for the answer to a command. QEMU normally answers within milliseconds; a disk may have to be flushed first.
_ANSWER_SECONDS = 30.0
# The interval of queries for a migration, which takes about ten milliseconds.
_POLL_SECONDS = 0.001
# Enough for the object list of a large machine.
_ANSWER_BYTES = 1 << 22

# The package logs the errors that it raises, and Python prints them if there is no handler.
logging.getLogger("qemu.qmp").addHandler(logging.NullHandler())


@dataclass(frozen=True)
class Event:
    """An event that QEMU has sent."""

    name: str
    """Its name, such as ``STOP``."""
    seconds: float
    """When it happened, by the clock of QEMU's host: seconds since the epoch."""
    data: dict[str, Any]
    """Its details."""


class Monitor:
    """An open QMP connection. `connected` returns it."""

    def __init__(self, client: QMPClient, connection: socket.socket) -> None:
        self._client = client
        self._connection = connection
        self._listener = EventListener(names={"STOP", "RESUME", "RESET", "MIGRATION"})
        self._events: list[Event] = []
        client.register_listener(self._listener)

    @property
    def events(self) -> list[Event]:
        """The events STOP, RESUME, RESET and MIGRATION that QEMU has sent on this connection, in their order.

        An event that happened before QEMU answered a command has been received when `run` returns that answer.
        """
        for message in self._listener.clear():
            self._keep(message)
        return self._events

    def _keep(self, message: Message) -> None:
        told: dict[str, Any] = dict(message)
        seconds = told["timestamp"]["seconds"] + told["timestamp"]["microseconds"] / 1e6
        self._events.append(Event(told["event"], seconds, told.get("data", {})))

    async def event_comes(self, limit_seconds: float) -> None:
        """Wait until QEMU sends an event, but not longer than a limit."""
        with suppress(TimeoutError):
            async with asyncio.timeout(limit_seconds):
                self._keep(await self._listener.get())

    @property
    def connection(self) -> socket.socket:
        """The connection itself, from which the process at the other end can be told."""
        return self._connection

    async def run(self, command: str, **arguments: object) -> Any:
        """Run a command and return its result.

        Parameters
        ----------
        command
            The name of the QMP command.
        **arguments
            The arguments, with ``_`` for ``-`` in their names.

        Raises
        ------
        QemuError
            QEMU refused the command, with the reason in the text; QEMU has ended; or it does not answer in time.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            # Not wait_for, which loses a cancellation that comes at the same time as the answer.
            async with asyncio.timeout(_ANSWER_SECONDS):
                return await self._client.execute(command, named or None)
        except TimeoutError:
            raise QemuError(
                f"QEMU does not answer {command!r} within {_ANSWER_SECONDS:g} s: it may be stopped by a signal, or "
                "wait for a disk"
            ) from None
        except ExecuteError as refusal:
            raise QemuError(f"QEMU refused {command!r}: {refusal}") from None
        except ExecInterruptedError:
            raise QemuError(f"QEMU ended or closed the connection during {command!r}") from None
        except StateError:
            raise QemuError(f"QEMU ended or closed the connection before {command!r}") from None
        except QMPError as error:
            raise QemuError(f"cannot send {command!r} to QEMU: {error}") from None

    async def run_both(self, first: str, second: str) -> None:
        """Send two commands at once, so that as little time as possible passes between them, and wait for both."""
        await asyncio.gather(self.run(first), self.run(second))

    async def send_descriptor(self, name: str, descriptor: int) -> None:
        """Send a descriptor to QEMU, under a name that ``fd:`` refers to."""
        self._client.send_fd_scm(descriptor)
        await self.run("getfd", fdname=name)

    async def migrates(self) -> bool:
        """Return whether a migration is in progress."""
        return migrates(await self.run("query-migrate"))

    async def migrated(self, interval_seconds: float = _POLL_SECONDS) -> None:
        """Wait until an outgoing or incoming migration has completed.

        Parameters
        ----------
        interval_seconds
            The interval of queries. An event of QEMU ends it early.

        Raises
        ------
        QemuError
            The migration failed. The text contains the reason if QEMU reports one.
        """
        while (found := await self.run("query-migrate")).get("status") != "completed":
            if found.get("status") in ("failed", "cancelled"):
                reason = found.get("error-desc", "no reason given; see the standard error of QEMU")
                raise QemuError(f"QEMU failed to transfer the device state: {reason}")
            await self.event_comes(interval_seconds)

    async def quit(self) -> None:
        """End QEMU. Returns when QEMU has closed the connection, or does not answer in time."""
        with suppress(QemuError, TimeoutError):
            async with asyncio.timeout(_GREETING_SECONDS):
                await self.run("quit")
        await _disconnect(self._client)


def migrates(found: dict[str, Any]) -> bool:
    """Return whether a migration is in progress, by the answer to ``query-migrate``."""
    return found.get("status", "none") not in ("none", "completed", "failed", "cancelled")


async def _disconnect(client: QMPClient) -> None:
    """Close a connection. If QEMU has ended, the command that was running has raised that error."""
    with suppress(QMPError, EOFError, OSError, TimeoutError):
        async with asyncio.timeout(_GREETING_SECONDS):
            await client.disconnect()


@asynccontextmanager
async def connected(connection: socket.socket, name: str, patience: float | None = None) -> AsyncIterator[Monitor]:
    """Open a QMP session on a connection, for a ``with`` block.

    Parameters
    ----------
    connection
        The connection. It is closed at the end.
    name
        The name of the other end in errors.
    patience
        The number of seconds in which the other end must answer. The default is for a QEMU that runs.

    Raises
    ------
    QemuError
        The other end does not answer in time, or does not speak QMP.
    """
    client = QMPClient("vmsnap", readbuflen=_ANSWER_BYTES)
    # The client would take an event that comes now, when the state of the guest changes, for the answer.
    client.negotiate = False
    try:
        async with asyncio.timeout(_GREETING_SECONDS if patience is None else patience):
            await client.connect(connection)
            await client.execute("qmp_capabilities")
    except TimeoutError:
        await _disconnect(client)
        connection.close()
        raise QemuError(
            f"{name}: QEMU does not answer; it serves one client at a time: disconnect any other one, such as libvirt"
        ) from None
    except (QMPError, EOFError, OSError) as error:
        await _disconnect(client)
        connection.close()
        raise QemuError(f"{name} is not a QMP monitor of QEMU: {error}") from None
    try:
        yield Monitor(client, connection)
    finally:
        await _disconnect(client)


def connection_to(path: Path) -> socket.socket:
    """Connect to the QMP socket at `path`.

    Raises
    ------
    FileNotFoundError, ConnectionRefusedError, PermissionError, OSError
        There is no socket, no process listens at it, or this user may not connect.
    """
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if not stat.S_ISSOCK(os.stat(path).st_mode):
            raise OSError(errno.ENOTSOCK, "is not a socket", str(path))
        connection.settimeout(_GREETING_SECONDS)
        connection.connect(os.fspath(path))
    except OSError as error:
        connection.close()
        match error:
            case FileNotFoundError():
                text = "there is no QMP socket: start QEMU with -qmp unix:PATH,server=on,wait=off"
            case ConnectionRefusedError():
                text = "no process listens at this QMP socket: QEMU has ended"
            case PermissionError():
                text = "no permission to connect: run as root, or as the user of QEMU"
            case _:
                text = error.strerror or "cannot connect"
        raise type(error)(error.errno or errno.ETIMEDOUT, text, str(path)) from None
    return connection
