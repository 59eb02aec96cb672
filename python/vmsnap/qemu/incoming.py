"""The incoming migration of a load: a thread sends the stream of a snapshot through a pipe to QEMU."""

import asyncio
import os
from collections.abc import Callable
from contextlib import suppress

from vmsnap.qemu.background import to_the_end
from vmsnap.qemu.monitor import Monitor

_NAME = "vmsnap-stream"


async def load_stream(monitor: Monitor, send: Callable[[int], int], end_qemu: Callable[[], object]) -> int:
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
        QEMU cannot load the stream. Usually it ends, and prints the reason on its standard error.
    AuthenticationError
        The snapshot is damaged or was changed.
    """
    theirs, ours = os.pipe2(os.O_CLOEXEC)

    def send_and_close() -> int:
        # The end is closed even if the work fails, because QEMU would wait for more bytes.
        try:
            # QEMU stops reading when it fails, and its own error is reported elsewhere.
            with suppress(BrokenPipeError):
                return send(ours)
            return 0
        finally:
            os.close(ours)

    try:
        try:
            await monitor.send_descriptor(_NAME, theirs)
        finally:
            os.close(theirs)
        await monitor.run("migrate-incoming", uri=f"fd:{_NAME}")
    except BaseException:
        os.close(ours)
        raise
    sending = asyncio.ensure_future(asyncio.to_thread(send_and_close))
    waiting = asyncio.ensure_future(monitor.migrated())
    error = None
    try:
        # If the thread fails, QEMU is not waited for: 7.2 does not notice a pipe that ends immediately.
        await asyncio.wait([sending, waiting], return_when=asyncio.FIRST_EXCEPTION)
        if sending.done():
            sending.result()
        await waiting
        return sending.result()
    except BaseException:
        waiting.cancel()
        # QEMU closes its end, so the thread ends too. If the thread failed first, its error is the reason.
        end_qemu()
        await to_the_end(asyncio.wait([sending]))
        if error := sending.exception():
            raise error from None
        raise
    finally:
        # See `background`.
        del sending, waiting, error
