"""How a guest is saved: by its state, its memory and its processors."""

from contextlib import ExitStack
from dataclasses import dataclass

from vmsnap.errors import QemuError
from vmsnap.qemu.emulated import DOWNTIME_MILLISECONDS, is_emulated
from vmsnap.qemu.monitor import Monitor, migrates
from vmsnap.qemu.survey import Ram, layout, survey

# QEMU stops the guest when it expects to send the rest in this time. Its default is 300.
_DOWNTIME_MILLISECONDS = 20

_NOT_NOW = {
    "postmigrate": "it was saved or migrated before and has not run since; resume it with 'cont' first",
    "finish-migrate": "it is being migrated",
    "inmigrate": "it waits for an incoming migration",
}


@dataclass(frozen=True)
class Plan:
    """The guest that is saved, and how. Nothing has been changed yet."""

    ran: bool
    """Whether the guest runs."""
    layout: object
    """Its memory blocks and devices."""
    ram: Ram
    """Its machine and memory."""
    live: bool
    """Whether the guest runs while its memory is saved."""
    emulated: bool
    """Whether QEMU emulates the processors. It is only known of a guest that runs, for a live save."""

    @classmethod
    async def of(
        cls, monitor: Monitor, stack: ExitStack, pid: int | None, live: bool, earlier: "Plan | None" = None
    ) -> "Plan":
        """Look at the guest, and decide how it is saved. `stack` closes the files of its memory.

        The memory is not looked for again if an `earlier` plan has the same layout.
        """
        ran = await _check_state(monitor)
        before = await layout(monitor)
        if earlier is not None and earlier.layout == before:
            ram = earlier.ram
        else:
            ram = await survey(monitor, stack, pid)
        emulated = live and ran and await is_emulated(monitor)
        # QEMU 10 aborts in a live migration of an emulated guest with several blocks of memory: it confuses their
        # addresses (tlb_reset_dirty_range_all).
        several = sum(each.migrated for each in ram.blocks) > 1
        return cls(ran, before, ram, live and ran and not (emulated and several), emulated)

    @property
    def names(self) -> list[str]:
        """The blocks of guest memory that are in the stream of QEMU."""
        return [each.name for each in self.ram.blocks if each.migrated]

    @property
    def files(self) -> bool:
        """Whether QEMU should leave shared memory out of its stream, because it can be read from files.

        QEMU leaves out all shared memory, or none. Since version 8.1 it still sends shared memory that has no name.
        """
        shared = [each for each in self.ram.blocks if each.shared]
        return not self.live and bool(shared) and all(each.file is not None for each in shared)

    @property
    def is_straight(self) -> bool:
        """Whether QEMU sends all memory, in its order: that of a guest that stands still."""
        return not self.live and not self.files and all(each.migrated for each in self.ram.blocks)

    @property
    def capabilities(self) -> set[str]:
        """The capabilities of a migration that are on meanwhile."""
        return {"x-ignore-shared"} if self.files else set()

    @property
    def parameters(self) -> dict[str, int]:
        """The parameters of a migration that are set meanwhile."""
        downtime = DOWNTIME_MILLISECONDS if self.emulated else _DOWNTIME_MILLISECONDS
        return {"downtime-limit": downtime} if self.live else {}


async def _check_state(monitor: Monitor) -> bool:
    """Return whether the guest is running.

    Raises
    ------
    QemuError
        The guest cannot be saved now.
    """
    state = (await monitor.run("query-status"))["status"]
    if state not in ("running", "paused", "prelaunch"):
        raise QemuError(f"the guest cannot be saved now: {_NOT_NOW.get(state, f'it is in the state {state!r}')}")
    found = await monitor.run("query-migrate")
    if migrates(found):
        raise QemuError("the guest is already being migrated or saved: wait until that has ended")
    if reasons := found.get("blocked-reasons"):
        raise QemuError(f"QEMU cannot save the guest: {'; '.join(reasons)}")
    return bool(state == "running")
