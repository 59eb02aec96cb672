"""The outgoing migration of a save: QEMU writes its stream into a pipe, and a thread receives it."""

import asyncio
import os
from collections.abc import Callable, Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from vmsnap.errors import QemuError
from vmsnap.memory import Progress
from vmsnap.migration import MigrationStream
from vmsnap.qemu.background import to_the_end, with_progress
from vmsnap.qemu.monitor import Monitor

_NAME = "vmsnap-state"
_CANCEL_SECONDS = 30.0
# QEMU needs a moment between the end of the stream and the state in which the guest can go on.
_POLL_SECONDS = 0.001
# QEMU reports the end of a migration by an event. Without the capability `events` this is the interval of queries.
_EVENT_SECONDS = 0.05
# A round of a live save takes longer.
_ROUND_POLL_SECONDS = 0.02

# The number of rounds in which the amount that is left may fail to become smaller.
_ROUNDS_WITHOUT_PROGRESS = 3

Work = Callable[[], Coroutine[Any, Any, None]]


@dataclass
class Rounds:
    """The rounds of a live save. QEMU sends all memory, and then again the pages that the guest has written since."""

    limit: int
    """The largest number of rounds. The guest is stopped for the last one at the latest."""
    done: int = 0
    """The number of rounds so far."""
    _least: int | None = None
    _fruitless: int = 0

    def go_on(self, memory: dict[str, Any]) -> bool:
        """Return whether the guest may run on.

        Parameters
        ----------
        memory
            The statistics of the memory from ``query-migrate``.
        """
        number = memory.get("dirty-sync-count", 0)
        if number > self.done:
            self.done = number
            left = memory.get("remaining", 0)
            if self._least is None or left < self._least:
                self._least, self._fruitless = left, 0
            else:
                self._fruitless += 1
        return self.done <= self.limit and self._fruitless < _ROUNDS_WITHOUT_PROGRESS


async def receive(
    monitor: Monitor,
    call: Callable[[int, Progress], MigrationStream],
    migrate: Callable[[str], Coroutine[Any, Any, None]],
    progress: Progress | None,
    watch: Work | None = None,
) -> MigrationStream:
    """Let QEMU migrate into a pipe, and return the stream that `call` has received in a thread.

    Parameters
    ----------
    monitor
        The connection to QEMU.
    call
        Receives the stream from a descriptor.
    migrate
        Begins the migration to a URI.
    progress
        The progress of `call`.
    watch
        Runs beside the migration, and is cancelled when that has completed.

    Raises
    ------
    QemuError
        QEMU cannot save the guest, or has ended; or the stream is not understood. The migration may still be in
        progress, and must be cancelled.
    """
    ours, theirs = os.pipe2(os.O_CLOEXEC)

    ended = False
    failure: BaseException | None = None

    def receive_and_close(show: Progress) -> MigrationStream:
        nonlocal ended, failure
        # The end is closed even if the work fails, because QEMU would wait until its bytes are read.
        try:
            return call(ours, show)
        except BaseException as error:
            ended = isinstance(error, QemuError) and _is_at_its_end(ours)
            # QEMU fails when the end is closed, and that may be seen before this error.
            failure = error
            raise
        finally:
            os.close(ours)

    try:
        try:
            await monitor.send_descriptor(_NAME, theirs)
        finally:
            os.close(theirs)
        await migrate(f"fd:{_NAME}")
    except BaseException:
        os.close(ours)
        with suppress(QemuError):
            await to_the_end(monitor.run("closefd", fdname=_NAME))
        raise
    receiving = asyncio.ensure_future(with_progress(receive_and_close, progress))
    waiting = [asyncio.ensure_future(_completed(monitor))]
    if watch is not None:
        waiting.append(asyncio.ensure_future(watch()))
    done, pending = set[asyncio.Future[Any]](), set[asyncio.Future[Any]]([receiving, *waiting])
    error = None
    try:
        # If the thread fails, QEMU is not waited for: 7.2 does not notice a pipe that ends immediately.
        while not waiting[0].done():
            done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            if ended:
                # QEMU has closed the pipe too early, and tells why.
                await waiting[0]
            while done:
                done.pop().result()
        return await receiving
    except BaseException:
        # The thread ends soon, and closes its end of the pipe. If it failed first, its error is the reason.
        error = failure
        receiving.cancel()
        await to_the_end(_ended(receiving))
        if error is None and not receiving.cancelled():
            error = receiving.exception()
        if error is not None and not ended:
            raise error from None
        raise
    finally:
        await _cancel(waiting)
        # See `background`.
        del receiving, waiting, done, pending, error, failure


async def _cancel(tasks: "list[asyncio.Task[None]]") -> None:
    """Cancel tasks, and wait for their end. Their errors do not matter any more."""
    for each in tasks:
        each.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _is_at_its_end(pipe: int) -> bool:
    """Return whether nothing can be read from a pipe any more."""
    os.set_blocking(pipe, False)
    try:
        return not os.read(pipe, 1)
    except BlockingIOError:
        return False


async def _ended(receiving: "asyncio.Future[MigrationStream]") -> None:
    """Wait for the end of a thread, and free the memory that it has received."""
    await asyncio.wait([receiving])
    if not receiving.cancelled() and receiving.exception() is None:
        receiving.result().close()


async def _completed(monitor: Monitor) -> None:
    """Wait until the migration has completed, and the guest can be told to go on.

    Raises
    ------
    QemuError
        The migration failed. The text contains the reason if QEMU reports one.
    """
    await monitor.migrated(_EVENT_SECONDS)
    await finished(monitor)


async def finished(monitor: Monitor) -> str:
    """Wait until the guest can be told to go on after a migration that has ended, and return the state of the guest.

    Raises
    ------
    QemuError
        QEMU does not leave the state ``finish-migrate`` in time, or has ended.
    """
    try:
        async with asyncio.timeout(_CANCEL_SECONDS):
            while (state := str((await monitor.run("query-status"))["status"])) == "finish-migrate":
                await asyncio.sleep(_POLL_SECONDS)
            return state
    except TimeoutError:
        raise QemuError(f"QEMU does not finish its migration within {_CANCEL_SECONDS:g} s") from None


async def settled(monitor: Monitor) -> None:
    """Wait until QEMU has ended a migration in every respect, so that it accepts another one.

    Raises
    ------
    QemuError
        It does not, or has ended.
    """
    try:
        async with asyncio.timeout(_CANCEL_SECONDS):
            while await monitor.migrates():
                await asyncio.sleep(_POLL_SECONDS)
            await finished(monitor)
    except TimeoutError:
        raise QemuError(f"QEMU does not end its migration within {_CANCEL_SECONDS:g} s") from None


async def keep_to(rounds: Rounds, monitor: Monitor, notice: Work, stop: Work) -> None:
    """Watch a live migration, and stop the guest if it writes faster than its memory is saved.

    Parameters
    ----------
    rounds
        The limit, and the rounds so far.
    monitor
        The connection to QEMU.
    notice
        Called between two looks at the rounds.
    stop
        Stops the guest.
    """
    while rounds.go_on((await monitor.run("query-migrate")).get("ram", {})):
        await notice()
        await asyncio.sleep(_ROUND_POLL_SECONDS)
    await stop()


async def cancel(monitor: Monitor) -> None:
    """Cancel a migration in progress, and wait until it has ended.

    Raises
    ------
    QemuError
        QEMU has ended, or does not end the migration in time.
    """
    if not await monitor.migrates():
        return
    await monitor.run("migrate_cancel")
    try:
        async with asyncio.timeout(_CANCEL_SECONDS):
            while await monitor.migrates():
                await asyncio.sleep(_POLL_SECONDS)
    except TimeoutError:
        raise QemuError(f"QEMU does not cancel its migration within {_CANCEL_SECONDS:g} s") from None
