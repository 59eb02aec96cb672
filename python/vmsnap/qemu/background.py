"""Blocking calls in threads, work that cancellation does not interrupt, and an event loop for synchronous callers.

An error refers to its traceback, and so to the variables of all functions that it has passed. If the task or future
that failed is in one of these variables, the error refers to itself, and only a garbage collection frees it, with all
that these functions have open. So a function that an error of a task may pass deletes its variables for both.
"""

import asyncio
import threading
from collections.abc import Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from contextvars import ContextVar, copy_context
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from vmsnap.errors import QemuError
from vmsnap.memory import Progress

Result = TypeVar("Result")

# Ctrl-C must work within 200 ms.
_SIGNAL_INTERVAL_SECONDS = 0.05

# The thread for blocking calls, started before the guest is paused. In a caller's event loop it is that loop's pool.
_worker: ContextVar[ThreadPoolExecutor | None] = ContextVar("_worker", default=None)


def run(work: Coroutine[Any, Any, Result], undo: Callable[[Result], object] = lambda _: None) -> Result:
    """Run a coroutine in a thread with its own event loop, and wait for the result.

    An exception from a signal handler in this thread (Ctrl-C, or SIGTERM on the command line) cancels the coroutine,
    and is raised when the coroutine has ended. If it were raised in the thread of the event loop, it would destroy the
    loop and the connection to QEMU. If the coroutine completes in spite of the cancellation, `undo` is called with its
    result. If that cannot be undone and `undo` returns True, the result is returned, and the exception is not raised.
    """
    begun = threading.Event()
    running: list[tuple[asyncio.AbstractEventLoop, asyncio.Task[Any]]] = []

    async def main() -> _Outcome[Result]:
        task = asyncio.current_task()
        assert task is not None
        _worker.set(worker)
        running.append((asyncio.get_running_loop(), task))
        begun.set()
        return await _outcome_of(work)

    def cancel() -> None:
        for loop, task in running:
            with suppress(RuntimeError):  # the loop has ended, and this error is the result of the coroutine
                loop.call_soon_threadsafe(task.cancel)

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
            # The system may deliver a signal to any thread, and only a signal to this thread would end a wait for a
            # lock. So this wakes up regularly, and Python checks for signals then.
            while not future.done():
                wait([future], timeout=_SIGNAL_INTERVAL_SECONDS)
            return future.result().take()
        except BaseException:
            begun.wait()
            cancel()
            with suppress(Exception, asyncio.CancelledError):
                if undo(result := future.result().take()) is True:
                    return result
            raise
        finally:
            running.clear()
            del future


@dataclass
class _Outcome(Generic[Result]):
    """The result of a coroutine, or its error. An error that is raised instead would be kept by `asyncio.run`."""

    results: list[Result]
    error: BaseException | None = None

    def take(self) -> Result:
        """Return the result; or raise the error, and IndexError if that was raised before."""
        error, self.error = self.error, None
        try:
            if error is not None:
                raise error
            return self.results[0]
        finally:
            del error


async def _outcome_of(work: Awaitable[Result]) -> _Outcome[Result]:
    try:
        return _Outcome([await work])
    except BaseException as error:
        return _Outcome([], error)


def no_thread(error: RuntimeError) -> QemuError:
    """Return the error for a thread that Python cannot start."""
    return QemuError(f"{error}: the system allows no more threads; raise ulimit -u, or pids.max of the control group")


async def to_the_end(work: Awaitable[Result], cancel: Callable[[], object] = lambda: None) -> Result:
    """Wait for work to end, even if this task is cancelled meanwhile. The cancellation is raised afterwards.

    Parameters
    ----------
    work
        Work that must not be interrupted.
    cancel
        Called when this task is cancelled, so that the work can end sooner.
    """
    task = asyncio.ensure_future(work)
    cancelled: asyncio.CancelledError | None = None
    while not task.done():
        try:
            await asyncio.wait([task])
        except asyncio.CancelledError as error:
            cancelled = error
            cancel()
    try:
        if cancelled is None:
            return task.result()
        # The exception is retrieved only because asyncio would report it as never retrieved.
        if not task.cancelled():
            task.exception()
        raise cancelled
    finally:
        del work, task, cancelled


async def in_thread(call: Callable[[], Result], cancel: Callable[[], object] = lambda: None) -> Result:
    """Run a blocking call in a thread, and wait for its end. `cancel` is the same as for `to_the_end`."""
    try:
        future = asyncio.get_running_loop().run_in_executor(_worker.get(), copy_context().run, call)
    except RuntimeError as error:
        raise no_thread(error) from None
    try:
        return await to_the_end(future, cancel)
    finally:
        del future


async def with_progress(call: Callable[[Progress], Result], progress: Progress | None) -> Result:
    """Run a call that reports its progress in a thread. If this task is cancelled, the call ends at its next report."""
    cancelled = threading.Event()

    def show(done: int, total: int) -> None:
        if cancelled.is_set():
            raise InterruptedError("cancelled")
        if progress is not None:
            progress(done, total)

    return await in_thread(lambda: call(show), cancelled.set)
