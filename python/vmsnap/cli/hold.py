"""Work that is done while a process is stopped, and that never waits for that very process."""

import threading
from collections.abc import Callable
from typing import Generic, TypeAlias, TypeVar

from vmsnap.cli.failure import CommandError
from vmsnap.cli.process import Process

# A disk may be slow. Work that makes no progress for longer than this waits for the process itself.
_PATIENCE_SECONDS = 30.0
_TICK_SECONDS = 0.1

Moved: TypeAlias = Callable[[int], None]
Result = TypeVar("Result")


class _CancelledError(Exception):
    """The work was cancelled."""


class _Work(Generic[Result]):
    """Work in a thread of its own: its caller stays free to watch the time and handle signals."""

    def __init__(self, work: Callable[[Moved], Result]) -> None:
        self._work = work
        self._place = -1
        self._cancelled = False
        self._done = threading.Event()
        self._outcome: tuple[Result | None, BaseException | None] = (None, None)
        try:
            threading.Thread(target=self._run, name="vmsnap-work", daemon=True).start()
        except RuntimeError as error:
            raise CommandError(f"cannot start a thread to read the stopped process ({error}): try --no-stop") from error

    def _run(self) -> None:
        try:
            self._outcome = self._work(self._moved), None
        except BaseException as error:
            self._outcome = None, error
        finally:
            self._done.set()

    def _moved(self, place: int) -> None:
        if self._cancelled:
            raise _CancelledError
        self._place = place

    def await_end(self) -> bool:
        """Wait until the work is done, or made no progress for long; return whether it is done."""
        seen, idle = self._place, 0.0
        # Ticks are counted, not the time: this process may have been stopped itself, or the machine suspended.
        while not self._done.wait(_TICK_SECONDS):
            idle = 0.0 if self._place != seen else idle + _TICK_SECONDS
            seen = self._place
            if idle >= _PATIENCE_SECONDS:
                return False
        return True

    def cancel(self) -> None:
        """Make the work end, and wait for that, but not forever."""
        self._cancelled = True
        self._done.wait(_PATIENCE_SECONDS)

    def succeeded(self) -> bool:
        return self._outcome[1] is None

    def result(self) -> Result:
        result, error = self._outcome
        if error is not None:
            raise error
        return result  # type: ignore[return-value]


def while_stopped(process: Process, work: Callable[[Moved], Result]) -> Result:
    """Stop a process, run `work`, let the process continue, and return the result of `work`.

    `work` gets a function, and calls it again and again with its position. If the position does not change for long,
    the work may be waiting for the process itself: then the process continues, and that is an error.

    Raises
    ------
    CommandError
        If the work made no progress, or the process did not stay stopped.
    """
    with process.stopped() as let_go:
        doing = _Work(work)
        try:
            done = doing.await_end()
            if done and doing.succeeded():
                process.check_still_stopped()
        finally:
            # First, so that nothing below waits for the process.
            let_go()
            doing.cancel()
    if not done:
        raise CommandError(
            f"process {process.pid}: no progress for {_PATIENCE_SECONDS:g} s while it was stopped. Its memory or the "
            "snapshot may depend on the process itself (userfaultfd, FUSE, a terminal): try --no-stop"
        )
    return doing.result()
