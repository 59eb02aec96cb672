"""The state of a guest's devices, between QEMU and a fragment: through a pipe, so that no disk has it in plaintext."""

import asyncio
import os
from collections.abc import Callable, Coroutine
from contextlib import suppress
from io import FileIO
from typing import Any, TypeVar

from vmsnap.errors import QemuError
from vmsnap.io import Fragment, FragmentReader
from vmsnap.qemu.background import to_the_end
from vmsnap.qemu.monitor import Monitor

Result = TypeVar("Result")

_NAME = "vmsnap-device-state"
_PIECE_BYTES = 1 << 20


async def save_devices(monitor: Monitor, fragment: Fragment) -> int:
    """Let QEMU write the state into a fragment; return its bytes.

    Raises
    ------
    QemuError
        QEMU cannot, or has ended. No migration goes on afterwards.
    """

    def take(pipe: FileIO) -> int:
        buffer = memoryview(bytearray(_PIECE_BYTES))
        taken = 0
        while count := pipe.readinto(buffer):
            fragment.write(buffer[:count])
            taken += count
        return taken

    reading, writing = os.pipe2(os.O_CLOEXEC)
    return await _transfer(monitor, "migrate", writing, FileIO(reading), take, lambda: cancel(monitor))


async def load_devices(monitor: Monitor, fragment: FragmentReader, end_qemu: Callable[[], object]) -> None:
    """Let QEMU read the state out of a fragment.

    `end_qemu` is called where that cannot go on: a QEMU with half of its devices loaded is of no use.

    Raises
    ------
    QemuError
        QEMU cannot; most often it ends then, and says why on its standard error.
    AuthenticationError
        The fragment is not what was written.
    """

    def give(pipe: FileIO) -> None:
        # QEMU stops reading where it fails, and that is told by itself.
        with suppress(BrokenPipeError):
            while piece := memoryview(fragment.read(_PIECE_BYTES)):
                while piece:
                    piece = piece[pipe.write(piece) :]

    async def give_up() -> None:
        end_qemu()

    reading, writing = os.pipe2(os.O_CLOEXEC)
    await _transfer(monitor, "migrate-incoming", reading, FileIO(writing, "w"), give, give_up)


async def _transfer(
    monitor: Monitor,
    command: str,
    theirs: int,
    ours: FileIO,
    work: Callable[[FileIO], Result],
    give_up: Callable[[], Coroutine[Any, Any, None]],
) -> Result:
    """Give QEMU one end of a pipe to migrate through, while a thread works at the other."""

    def work_and_close() -> Result:
        # Closed where the work fails, so that QEMU, which would wait for more, fails too.
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
        # Where the thread fails QEMU is not waited for: of a pipe that ends at once 7.2 makes nothing.
        await asyncio.wait([working, waiting], return_when=asyncio.FIRST_EXCEPTION)
        if working.done():
            working.result()
        await waiting
    except BaseException:
        waiting.cancel()
        # QEMU closes its end then, and the thread ends too; where that failed first, it is the reason.
        await to_the_end(give_up())
        await to_the_end(_ended(working))
        if error := working.exception():
            raise error from None
        raise
    return working.result()


async def _ended(task: "asyncio.Future[Any]") -> None:
    await asyncio.wait([task])


def without_shared_memory(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the migration capabilities that QEMU has as they are to be: shared memory is vmsnap's to move.

    All others are off: they are for a network, and some change what is sent.

    Raises
    ------
    QemuError
        This QEMU has no such capability.
    """
    if not any(each["capability"] == "x-ignore-shared" for each in found):
        raise QemuError("this QEMU cannot leave shared memory to vmsnap (x-ignore-shared): take version 4 or newer")
    return [{**each, "state": each["capability"] == "x-ignore-shared"} for each in found]


async def cancel(monitor: Monitor) -> None:
    """Cancel a migration that goes on, and wait until it has ended."""
    with suppress(QemuError):
        if await monitor.migrates():
            await monitor.run("migrate_cancel")
            await monitor.migrated()
