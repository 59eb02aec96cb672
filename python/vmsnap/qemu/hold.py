"""The time in which QEMU is not as it was: its settings are changed, and the guest may stand still."""

import asyncio
from time import perf_counter

from vmsnap.errors import QemuError
from vmsnap.qemu.background import in_thread, to_the_end
from vmsnap.qemu.guard import Guard
from vmsnap.qemu.mark import Holder, Mark, as_it_was, recover
from vmsnap.qemu.monitor import Monitor
from vmsnap.qemu.settings import Settings

# The limit for undoing everything. If QEMU does not answer in time, that is left to the guard.
_UNDO_SECONDS = 30.0


class Hold:
    """Changed settings of QEMU. When the ``with`` block ends, in whatever way, QEMU is as it was before."""

    def __init__(self, monitor: Monitor, qmp: str, ran: bool, found: Settings, wanted: Settings) -> None:
        self._monitor, self._qmp = monitor, qmp
        self._mark = Mark(Holder.here(), ran, found)
        self._wanted = wanted
        self._guard: Guard | None = None

    async def __aenter__(self) -> "Hold":
        def start_guard() -> None:
            self._guard = Guard(self._qmp, self._mark.id)

        try:
            await in_thread(start_guard)
            await self._mark.place(self._monitor)
            await self._wanted.put(self._monitor)
        except BaseException:
            await self.release()
            raise
        return self

    async def __aexit__(self, *_error: object) -> None:
        await self.release()

    async def stop(self) -> "Pause":
        """Stop the guest."""
        await self._note(stops=True)
        pause = Pause(self._monitor)
        await self._monitor.run("stop")
        return pause

    async def migrate(self, uri: str) -> None:
        """Let QEMU begin to migrate.

        Raises
        ------
        QemuError
            QEMU refuses, for example because somebody else has begun another migration, which goes on.
        """
        await self._note(migrates=True)
        try:
            await self._monitor.run("migrate", uri=uri)
        except QemuError:
            await self._note(migrates=False)
            raise

    async def check(self, pause: "Pause") -> None:
        """Check that the guest has stood still until now.

        Raises
        ------
        QemuError
            Somebody else has let the guest run, so that what was saved does not fit together.
        """
        try:
            await pause.check()
        except QemuError:
            if pause.is_broken:
                await self._note(stops=False)  # it is theirs now, whether it runs or not
            raise

    async def _note(self, **changed: bool) -> None:
        self._mark = await self._mark.put(self._monitor, **changed)

    async def release(self) -> None:
        """Let QEMU be as it was before."""
        if self._guard is not None:
            guard, self._guard = self._guard, None
            await to_the_end(self._undo(guard))

    async def _undo(self, guard: Guard) -> None:
        try:
            await asyncio.wait_for(recover(self._monitor, self._mark.id), _UNDO_SECONDS)
        except (QemuError, TimeoutError):
            # The error that led here is the one to report. If QEMU has ended, the guard finds nothing to do.
            guard.take_over()
        else:
            guard.dismiss()
        finally:
            self._mark.over()


class Pause:
    """A time in which the guest has to stand still."""

    def __init__(self, monitor: Monitor) -> None:
        self._monitor = monitor
        self._begun = perf_counter()
        self._seen = len(monitor.events)
        self.seconds = 0.0

    @property
    def is_broken(self) -> bool:
        """Whether somebody has let the guest run meanwhile."""
        return any(each.name == "RESUME" for each in self._monitor.events[self._seen :])

    async def check(self) -> None:
        """Check that the guest has stood still until now, after it was migrated."""
        state = (await self._monitor.run("query-status"))["status"]
        if self.is_broken or state != "postmigrate":
            raise QemuError(
                "the guest did not stand still while it was saved: another client of QEMU has resumed or reset it; "
                "save it again"
            )
        self.seconds = perf_counter() - self._begun

    async def end(self, goes_on: bool) -> None:
        """Let the guest run, or make it ``paused`` again."""
        if goes_on:
            await self._monitor.run("cont")
        else:
            await as_it_was(self._monitor, ran=False)
        times = {each.name: each.seconds for each in self._monitor.events[self._seen :]}
        if goes_on and "STOP" in times and "RESUME" in times:
            self.seconds = times["RESUME"] - times["STOP"]
