"""The incoming migration of a load: a thread sends the stream of a snapshot through a pipe to QEMU."""

import asyncio
import os
from collections.abc import Callable, Coroutine
from contextlib import suppress
from io import FileIO
from typing import Any, TypeVar

from vmsnap.errors import QemuError
from vmsnap.qemu.background import to_the_end
from vmsnap.qemu.monitor import Monitor

Result = TypeVar("Result")

_NAME = "vmsnap-device-state"
_BATCH_BYTES = 1 << 20


async def load_devices(monitor: Monitor, send: Callable[[int], int], end_qemu: Callable[[], object]) -> int:
    """Let QEMU load a migration stream, and return its size in bytes.

    Parameters
    ----------
    monitor
        QEMU, which waits for a stream.
    send
        Writes the stream to a descriptor, and returns its size.
    end_qemu
        Called on an error, because a QEMU with half of its devices loaded is useless.

    Raises
    ------
    QemuError
        QEMU cannot load the state. Usually it ends, and prints the reason on its standard error.
    AuthenticationError
        The fragment is damaged or was changed.
    """

    def give(pipe: FileIO) -> int:
        # QEMU stops reading when it fails, and its own error is reported elsewhere.
        with suppress(BrokenPipeError):
            return send(pipe.fileno())
        return 0

    async def give_up() -> None:
        end_qemu()

    reading, writing = os.pipe2(os.O_CLOEXEC)
    return await _transfer(monitor, "migrate-incoming", reading, FileIO(writing, "w"), give, give_up)


async def _transfer(
    monitor: Monitor,
    command: str,
    theirs: int,
    ours: FileIO,
    work: Callable[[FileIO], Result],
    give_up: Callable[[], Coroutine[Any, Any, None]],
) -> Result:
    """Let QEMU migrate through one end of a pipe, while a thread works at the other end."""

    def work_and_close() -> Result:
        # The end is closed even if the work fails, because QEMU would wait for more bytes.
        with ours:
            return work(ours)

    try:
        try:
            await monitor.send_descriptor(_NAME, theirs)
        finally:
            os.close(theirs)
        await monitor.run(command, uri=f"fd:{_NAME}")
    except BaseException:
        ours.close()
        with suppress(QemuError):
            await to_the_end(monitor.run("closefd", fdname=_NAME))
        raise
    working = asyncio.ensure_future(asyncio.to_thread(work_and_close))
    waiting = asyncio.ensure_future(monitor.migrated())
    try:
        # If the thread fails, QEMU is not waited for: 7.2 does not notice a pipe that ends immediately.
        await asyncio.wait([working, waiting], return_when=asyncio.FIRST_EXCEPTION)
        if working.done():
            working.result()
        await waiting
    except BaseException:
        waiting.cancel()
        # QEMU closes its end, so the thread ends too. If the thread failed first, its error is the reason.
        await to_the_end(give_up())
        await to_the_end(_ended(working))
        if error := working.exception():
            raise error from None
        raise
    return working.result()


async def _ended(task: "asyncio.Future[Any]") -> None:
    await asyncio.wait([task])
