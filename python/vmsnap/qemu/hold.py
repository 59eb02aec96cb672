"""The time in which QEMU is not as it was: its settings are changed, and the guest may stand still."""

import asyncio
from collections.abc import Iterable, Iterator, Set
from time import perf_counter
from typing import Any

from vmsnap.errors import QemuError
from vmsnap.qemu.background import in_thread, to_the_end
from vmsnap.qemu.guard import Guard
from vmsnap.qemu.mark import Holder, Mark, as_it_was, recover
from vmsnap.qemu.monitor import Event, Monitor
from vmsnap.qemu.settings import Settings, differing

# The limit for undoing everything. If QEMU does not answer in time, that is left to the guard.
_UNDO_SECONDS = 30.0


class Hold:
    """Changed settings of QEMU. QEMU is as it was before when the ``with`` block ends, also after an error."""

    def __init__(
        self, monitor: Monitor, qmp: str, ran: bool, capabilities: Set[str], parameters: dict[str, Any]
    ) -> None:
        self._monitor, self._qmp = monitor, qmp
        self._mark = Mark(Holder.here(), ran, Settings())
        self._capabilities, self._parameters = capabilities, parameters
        self._placed = False
        self._guard: Guard | None = None
        self._stopped = perf_counter()
        self._seen, self._begun = 0, False
        self._noticed = 0
        self.paused_seconds = 0.0

    @property
    def runs(self) -> bool:
        """Whether the guest ran before, and nobody else has stopped it since."""
        return self._mark.ran

    async def __aenter__(self) -> "Hold":
        def start_guard() -> None:
            self._guard = Guard(self._qmp, self._mark.id)

        try:
            await in_thread(start_guard)
            await self._mark.place(self._monitor)
            self._placed = True
            # Not before: another save may hold QEMU until now, and its settings are not those of the user.
            found, wanted = await differing(self._monitor, self._capabilities, self._parameters)
            await self._note(found=found)
            await wanted.put(self._monitor)
        except BaseException:
            await self.release()
            raise
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.release()

    async def stop(self) -> None:
        """Stop the guest, which runs unless somebody else has stopped it."""
        await self.notice()
        if not self._mark.stops:
            await self._note(stops=True)
        self.stands_still(again=True)
        await self._monitor.run("stop")

    async def resume(self) -> None:
        """Let the guest be as it was before `stop`, while QEMU migrates it or when that has ended."""
        if self._mark.ran:
            await self._monitor.run("cont")
        else:
            await as_it_was(self._monitor, ran=False)

    async def migrate(self, uri: str) -> None:
        """Let QEMU begin to migrate. At the end QEMU stops the guest if it runs.

        Raises
        ------
        QemuError
            QEMU refuses, for example because somebody else has begun another migration, which goes on.
        """
        if not self._mark.stops:
            await self.notice()
        before = self._mark
        await self._note(stops=True, migrates=True)
        try:
            await self._monitor.run("migrate", uri=uri)
        except QemuError:
            await self._note(stops=before.stops, migrates=before.migrates)
            raise

    async def notice(self) -> None:
        """Notice whether somebody else has stopped or resumed the guest, which this save has not stopped.

        When QEMU has stopped it at the end of a migration, only the events tell that somebody has resumed it before.
        """
        state = (await self._monitor.run("query-status"))["status"]
        events = self._monitor.events
        if state in ("running", "paused", "prelaunch"):
            ran = state == "running"
        else:
            ran = self._mark.ran or any(each.name == "RESUME" for each in events[self._noticed :])
        self._noticed = len(events)
        if ran != self._mark.ran:
            await self._note(ran=ran)

    def stands_still(self, *, again: bool) -> None:
        """Begin a time in which the guest has to stand still.

        Parameters
        ----------
        again
            Whether a time that has begun before does not matter any more.
        """
        if again or not self._begun:
            self._begun = True
            self._seen = len(self._monitor.events)

    async def check(self) -> None:
        """Check that the guest has stood still until now, after it was migrated.

        Raises
        ------
        QemuError
            Somebody else has let the guest run, so that the parts of the snapshot do not fit together.
        """
        state = (await self._monitor.run("query-status"))["status"]
        resumed = any(each.name == "RESUME" for each in self._monitor.events[self._seen :])
        if resumed:
            await self._note(stops=False)  # it is theirs now, whether it runs or not
        if resumed or state != "postmigrate":
            raise QemuError(
                "the guest did not stand still while it was saved: another client of QEMU has resumed or reset it; "
                "save it again"
            )
        self.paused_seconds = perf_counter() - self._stopped

    async def go_on(self, runs: bool) -> None:
        """Let the guest run, or make it ``paused`` again; and let QEMU be as it was before."""
        if runs:
            await self._monitor.run("cont")
        else:
            await as_it_was(self._monitor, ran=False)
        self.paused_seconds = perf_counter() - self._stopped
        if runs and (pauses := list(_pauses(self._monitor.events))):
            self.paused_seconds = sum(pauses)
        await self._note(stops=False, migrates=False)
        await self.release()

    def give_up(self) -> None:
        """Leave QEMU as it is, because it will be ended."""
        if self._guard is not None:
            self._guard.dismiss()
            self._guard = None
            self._mark.over()

    async def release(self) -> None:
        """Let QEMU be as it was before."""
        if self._guard is not None:
            guard, self._guard = self._guard, None
            await to_the_end(self._undo(guard))

    async def _note(self, **changed: Any) -> None:
        self._mark = await self._mark.put(self._monitor, **changed)

    async def _undo(self, guard: Guard) -> None:
        try:
            async with asyncio.timeout(_UNDO_SECONDS):
                # If the mark was placed, and is not in QEMU now, another client has removed it.
                await recover(self._monitor, self._mark if self._placed else self._mark.id)
        except (QemuError, TimeoutError):
            # The error that led here is the one to report. If QEMU has ended, the guard finds nothing to do.
            guard.take_over()
        else:
            guard.dismiss()
        finally:
            self._mark.over()


def _pauses(events: Iterable[Event]) -> Iterator[float]:
    """Yield how long the guest stood still each time, in seconds."""
    stopped = None
    for each in events:
        if each.name == "STOP":
            stopped = each.seconds
        elif each.name == "RESUME" and stopped is not None:
            yield max(0.0, each.seconds - stopped)
            stopped = None
