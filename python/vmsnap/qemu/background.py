"""What blocks, run in a thread while the event loop goes on; what has to come to its end; and a loop of one's own."""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import ContextVar, copy_context
from typing import Any, TypeVar

from vmsnap.errors import QemuError
from vmsnap.memory import Progress

Result = TypeVar("Result")

# Well within the 200 ms in which Ctrl-C is to work.
_SIGNAL_INTERVAL_SECONDS = 0.05

# One thread for what blocks, started before the guest is stopped and kept; in a caller's event loop its own threads.
_worker: ContextVar[ThreadPoolExecutor | None] = ContextVar("_worker", default=None)


def run(work: Coroutine[Any, Any, Result], undo: Callable[[Result], object] = lambda _: None) -> Result:
    """Run a coroutine in a thread with an event loop of its own, and wait for it.

    What a signal handler raises here (Ctrl-C, and the command line's at SIGTERM) cancels it, and is raised when it has
    ended. Raised in its own thread that would take the loop away under it, and with it the connection to QEMU. Where it
    had a result nevertheless, `undo` is called with that.
    """
    begun = threading.Event()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def main() -> Result:
        task = asyncio.current_task()
        assert task is not None
        _worker.set(worker)
        running.append((asyncio.get_running_loop(), task))
        begun.set()
        return await work

    with (
        ThreadPoolExecutor(1, thread_name_prefix="vmsnap-qemu") as thread,
        ThreadPoolExecutor(1, thread_name_prefix="vmsnap-qemu-worker") as worker,
    ):
        try:
            for each in (worker, thread):
                each.submit(int).result()
        except RuntimeError as error:
            work.close()
            raise no_thread(error) from None
        future = thread.submit(lambda: asyncio.run(main()))
        future.add_done_callback(lambda _: begun.set())
        try:
            # The system may hand a signal to any thread, and the wait for a lock ends for those of its own thread only:
            # Python looks for signals whenever this wakes up.
            while not future.done():
                wait([future], timeout=_SIGNAL_INTERVAL_SECONDS)
            return future.result()
        except BaseException:
            begun.wait()
            for loop, task in running:
                with suppress(RuntimeError):  # it has ended, and this is its own error
                    loop.call_soon_threadsafe(task.cancel)
            with suppress(Exception, asyncio.CancelledError):
                undo(future.result())
            raise


def no_thread(error: RuntimeError) -> QemuError:
    """Return what to say where Python cannot start a thread."""
    return QemuError(f"{error}: the system allows no more (ulimit -u, or pids.max of the control group)")


async def to_the_end(work: Awaitable[Result], cancel: Callable[[], object] = lambda: None) -> Result:
    """Wait for what must not be left half done, even where this task is cancelled; it is cancelled afterwards.

    `cancel` is called then, to let the work end sooner.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
            cancel()
    if cancelled is None:
        return task.result()
    # Looked at, or it would be reported as lost: what counts is that this was cancelled.
    if not task.cancelled():
        task.exception()
    raise cancelled


async def in_thread(call: Callable[[], Result], cancel: Callable[[], object] = lambda: None) -> Result:
    """Run what blocks in a thread, to its end; `cancel` as for `to_the_end`."""
    try:
        future = asyncio.get_running_loop().run_in_executor(_worker.get(), copy_context().run, call)
    except RuntimeError as error:
        raise no_thread(error) from None
    return await to_the_end(future, cancel)


async def with_progress(call: Callable[[Progress], Result], progress: Progress | None) -> Result:
    """Run what reports its progress in a thread; it ends at its next report where this task is cancelled."""
    cancelled = threading.Event()

    def show(done: int, total: int) -> None:
        if cancelled.is_set():
            raise InterruptedError("cancelled")
        if progress is not None:
            progress(done, total)

    return await in_thread(lambda: call(show), cancelled.set)
