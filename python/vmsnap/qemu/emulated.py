"""The live save of a guest that QEMU emulates (TCG), so without KVM.

QEMU learns from a bitmap which pages the guest has written. KVM reads and clears it atomically. For an emulated guest,
writes get lost in two ways, in QEMU 7.2 as in 10.0:

- The processor marks a page just before it writes to it. If QEMU reads and clears the bitmap between the two, the write
  is not seen again.
- After clearing the bitmap, QEMU makes the processor mark pages again, but only if it has found a page that it had not
  sent anyway (``cpu_physical_memory_sync_dirty_bitmap`` counts only these). If not, later writes are not seen.

So the guest stands still whenever QEMU reads the bitmap, and it does not run on after the second time. At the first
time, QEMU begins to track writes, and makes the processor mark all pages. Of 29 migrations of a busy guest by QEMU
alone, 11 were loaded with stale pages; see also "TCG is touchy due to race conditions on dirty bits" in its own tests.
"""

import asyncio
from collections.abc import Callable
from contextlib import ExitStack
from time import perf_counter
from typing import Any

from vmsnap.errors import QemuError
from vmsnap.memory import Progress
from vmsnap.migration import MigrationStream
from vmsnap.qemu.hold import Hold
from vmsnap.qemu.migration import Rounds, Work, receive, settled
from vmsnap.qemu.monitor import Monitor

# QEMU reads the bitmap when it expects to send the rest in this time, so when a MiB or two is left.
DOWNTIME_MILLISECONDS = 1

# The guest is stopped when the rest of a round would take so long, at the speed since the last look, or when so little
# of it is left. Pages of zeros take a tenth of the time, so the speed changes suddenly. If the guest was stopped too
# late, the next try takes the next numbers. With the last ones it stands still all the time.
_MARGINS = ((0.03, 16 << 20), (0.2, 256 << 20), (0.0, 1 << 60))

_POLL_SECONDS = 0.001

_FAILED = ("cancelling", "cancelled", "failing", "failed")

_TOO_LATE = "QEMU sent memory that the guest has written meanwhile: save the guest again"


class _TooLateError(QemuError):
    """QEMU has read the bitmap while the guest ran. Its stream cannot be trusted."""


class _EmulatedRounds:
    """The rounds of a live save: one in which the guest runs, and those after it, in which it stands still."""

    def __init__(self, rounds: Rounds, monitor: Monitor, hold: Hold, margin: tuple[float, int]) -> None:
        self._rounds, self._monitor, self._hold = rounds, monitor, hold
        self._margin_seconds, self._margin_bytes = margin
        self._last = (0.0, 0)
        self._read = 0
        self._runs = False

    async def migrate(self, uri: str) -> None:
        """Let QEMU begin to migrate, while the guest stands still. `watch` resumes it."""
        await self._hold.stop()
        await self._hold.migrate(uri)

    async def watch(self) -> None:
        """Let the guest run in the first round, and stop it before the end of that round.

        Raises
        ------
        _TooLateError
            The guest was stopped too late.
        QemuError
            The migration failed, or somebody has cancelled it.
        """
        while (memory := await self._memory()) is not None:
            read, left = memory.get("dirty-sync-count", 0), memory.get("remaining", 0)
            if self._runs:
                self._check(read)
                if self._ends_soon(left):
                    await self._hold.stop()
                    self._check((await self._memory() or {}).get("dirty-sync-count"))
                    self._runs = False
                else:
                    await self._hold.notice()
            elif read > self._read:
                self._read = read
                # If somebody else had stopped the guest before, it stands still all the time.
                if self._rounds.go_on(memory) and self._hold.runs and read == 1 and left > self._margin_bytes:
                    await self._hold.resume()
                    self._runs = True
                    self._last = (perf_counter(), left)
            await asyncio.sleep(_POLL_SECONDS)
        self.check_stopped()

    def check_stopped(self) -> None:
        """Check that the guest was stopped in time."""
        if self._runs:
            raise _TooLateError(_TOO_LATE)

    def _ends_soon(self, left: int) -> bool:
        (before, more), now = self._last, perf_counter()
        self._last = (now, left)
        rate = (more - left) / max(now - before, 1e-9)
        return left <= max(self._margin_bytes, rate * self._margin_seconds)

    async def _memory(self) -> dict[str, Any] | None:
        """Return the statistics of the memory, or None if the migration has ended.

        Raises
        ------
        QemuError
            The migration failed, or somebody has cancelled it. It must not be repeated.
        """
        found = await self._monitor.run("query-migrate")
        if found.get("status") in _FAILED:
            await self._monitor.migrated()
        return found.get("ram", {}) if found.get("status") in ("setup", "active") else None

    def _check(self, read: int | None) -> None:
        """Check that QEMU has not read the bitmap since the guest was resumed."""
        if read != self._read:
            raise _TooLateError(_TOO_LATE)


async def receive_emulated(
    monitor: Monitor,
    hold: Hold,
    call: Callable[[int, Progress], MigrationStream],
    progress: Progress | None,
    max_rounds: int,
    begin: Work,
) -> tuple[MigrationStream, Rounds]:
    """Let QEMU migrate an emulated guest that runs, with the parameters of `receive`.

    Before another try, `begin` makes a new snapshot for `call`.

    Returns
    -------
    tuple of MigrationStream and Rounds
        The stream, and the rounds in which it came.
    """
    for margin in _MARGINS:
        rounds = Rounds(max_rounds)
        emulated = _EmulatedRounds(rounds, monitor, hold, margin)
        try:
            with ExitStack() as stack:
                stream = stack.enter_context(await receive(monitor, call, emulated.migrate, progress, emulated.watch))
                emulated.check_stopped()
                stack.pop_all()
                return stream, rounds
        except _TooLateError:
            await settled(monitor)
            # QEMU may have completed the migration, and takes its disks back only so.
            await hold.resume()
            await begin()
    raise AssertionError("with the last margin, the guest stands still all the time")


async def is_emulated(monitor: Monitor) -> bool:
    """Return whether QEMU emulates the processors of the guest."""
    return not (await monitor.run("query-kvm"))["enabled"]
