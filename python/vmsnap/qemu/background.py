"""What blocks, run in a thread while the event loop goes on."""

import asyncio
import threading
from collections.abc import Callable
from typing import TypeVar

from vmsnap.memory import Progress

Result = TypeVar("Result")


async def in_thread(call: Callable[[], Result], cancel: Callable[[], object] = lambda: None) -> Result:
    """Run what blocks in a thread, and return only when it has ended, even where this task is cancelled.

    `cancel` is called then, to let it end sooner.
    """
    task = asyncio.ensure_future(asyncio.to_thread(call))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        cancel()
        await asyncio.wait([task])
        # Looked at, or it would be reported as lost: what counts is that this was cancelled.
        if not task.cancelled():
            task.exception()
        raise


async def with_progress(call: Callable[[Progress], Result], progress: Progress | None) -> Result:
    """Run what reports its progress in a thread; it ends at its next report where this task is cancelled."""
    cancelled = threading.Event()

    def show(done: int, total: int) -> None:
        if cancelled.is_set():
            raise InterruptedError("cancelled")
        if progress is not None:
            progress(done, total)

    return await in_thread(lambda: call(show), cancelled.set)
