"""Work that is done while a process stands still, and that never waits for that very process."""

import threading
from collections.abc import Callable
from typing import Generic, TypeAlias, TypeVar

from vmsnap.cli.failure import CommandError
from vmsnap.cli.process import Process

# A disk may be slow; what takes longer than this waits for the process itself.
_PATIENCE_SECONDS = 30.0
_TICK_SECONDS = 0.1

Moved: TypeAlias = Callable[[int], None]
Result = TypeVar("Result")


class _CancelledError(Exception):
    """The work is not wanted any more."""


class _Work(Generic[Result]):
    """Work in a thread of its own: its caller stays free to look at the time, and at signals."""

    def __init__(self, work: Callable[[Moved], Result]) -> None:
        self._work = work
        self._place = -1
        self._cancelled = False
        self._done = threading.Event()
        self._outcome: tuple[Result | None, BaseException | None] = (None, None)
        try:
            threading.Thread(target=self._run, name="vmsnap-work", daemon=True).start()
        except RuntimeError as error:
            raise CommandError(f"no thread can be had to read a stopped process ({error}): try --no-stop") from error

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
        """Wait until it is done, or nothing has moved for long; return whether it is done."""
        seen, idle = self._place, 0.0
        # Ticks are counted, not the time: this process may have been stopped itself, or the machine suspended.
        while not self._done.wait(_TICK_SECONDS):
            idle = 0.0 if self._place != seen else idle + _TICK_SECONDS
            seen = self._place
            if idle >= _PATIENCE_SECONDS:
                return False
        return True

    def cancel(self) -> None:
        """Have it end, within reason."""
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
    """Return what `work` returns, done while the process stands still.

    `work` is given a function, to be told again and again how far it is. Where it does not get any further for long, it
    may be the process itself that is waited for: it goes on, and that is an error.

    Raises
    ------
    CommandError
        If nothing moved, or the process was not stopped all the time.
    """
    with process.stopped() as let_go:
        doing = _Work(work)
        try:
            done = doing.await_end()
            if done and doing.succeeded():
                process.check_still_stopped()
        finally:
            # First of all, so that nothing that comes now waits for it.
            let_go()
            doing.cancel()
    if not done:
        raise CommandError(
            f"process {process.pid}: nothing could be read or stored for {_PATIENCE_SECONDS:g} s while it was stopped. "
            "What is read or written may depend on the process itself (userfaultfd, FUSE, a terminal): try --no-stop"
        )
    return doing.result()
