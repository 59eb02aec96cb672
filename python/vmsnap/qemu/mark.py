"""The mark that a save leaves in QEMU while it works: the lock between two saves, and the record of its changes.

It is an object of QEMU that does nothing, ``authz-simple`` with the id ``vmsnap-save``, whose identity is JSON text.
QEMU adds it atomically and keeps it when a connection ends, so the next client can undo the changes of a save that was
killed: the guard process of that save (`guard`), or the next save.
"""

import json
import os
import secrets
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vmsnap.errors import QemuError
from vmsnap.qemu.migration import cancel, finished
from vmsnap.qemu.monitor import Monitor
from vmsnap.qemu.settings import Settings

_ID = "vmsnap-save"
_PATH = f"/objects/{_ID}"
_VERSION = 1
# A longer text is not the mark of a save.
_MARK_BYTES = 1 << 16
# PROC_PID_INIT_INO of Linux: the PID namespace that contains all others.
_FIRST_NAMESPACE = 0xEFFFFFFC

# The settings that vmsnap 0.1 used, and the defaults of QEMU: 0.1 did not record those that it had found.
_OLD_BANDWIDTH, _DEFAULT_BANDWIDTH = 1 << 40, 128 << 20

# The marks of this process whose saves are not over.
_held: set[str] = set()


@dataclass(frozen=True)
class Holder:
    """A process, told from all others of this host since it started."""

    pid: int
    start: int
    """The time of its start, from ``/proc/PID/stat``."""
    namespace: int
    """The inode of its PID namespace."""
    boot: str
    """The boot of the kernel that it runs on."""

    @classmethod
    def here(cls) -> "Holder":
        """Return this process."""
        return cls(os.getpid(), _start("self") or 0, _namespace(), _boot())

    def is_alive(self) -> bool | None:
        """Return whether the process runs, or None if that cannot be told from here."""
        if self.boot != _boot():
            return None
        if self.namespace == _namespace():
            if (start := _start(str(self.pid))) is not None:
                return start == self.start
            try:
                os.kill(self.pid, 0)
            except ProcessLookupError:
                return False
            except OSError:
                return None  # it belongs to another user, and /proc hides it
            return None if _start("self") is None else False  # a zombie
        if any(_is_in(each, self) for each in os.listdir("/proc") if each.isdecimal()):
            return True
        return False if _namespace() == _FIRST_NAMESPACE and os.geteuid() == 0 else None


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _namespace() -> int:
    try:
        return os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        return 0


def _start(process: str) -> int | None:
    """Return when a process started, in ticks since the boot; None if it has ended or cannot be seen."""
    try:
        # The name of the program is in parentheses, and may contain any byte.
        fields = Path("/proc", process, "stat").read_bytes().rpartition(b")")[2].split()
        return None if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return None


def _is_in(process: str, holder: Holder) -> bool:
    """Return whether a process of this PID namespace is `holder`, which belongs to a namespace inside it."""
    try:
        if os.stat(f"/proc/{process}/ns/pid").st_ino != holder.namespace or _start(process) is None:
            return False
        status = Path("/proc", process, "status").read_text("utf-8", "replace")
        return any(line.split()[-1] == str(holder.pid) for line in status.splitlines() if line.startswith("NSpid:"))
    except OSError:
        return False


@dataclass(frozen=True)
class Mark:
    """The changes of a save in QEMU: everything as it was before."""

    holder: Holder
    """The process that saves."""
    ran: bool
    """Whether the guest ran."""
    found: Settings
    """The migration settings that it changes."""
    stops: bool = False
    """Whether this save may have stopped the guest."""
    migrates: bool = False
    """Whether this save may have let QEMU migrate the guest."""
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    """The identifier of the save."""
    version: int = _VERSION

    async def place(self, monitor: Monitor) -> None:
        """Add the mark to QEMU.

        Raises
        ------
        QemuError
            Another save of this guest is in progress.
        """
        _held.add(self.id)
        version = (await monitor.run("query-version"))["qemu"]
        properties = {"identity": json.dumps(asdict(self))}
        nested: dict[str, Any] = properties if version["major"] >= 6 else {"props": properties}
        try:
            await monitor.run("object-add", qom_type="authz-simple", id=_ID, **nested)
        except QemuError:
            if found := await _find(monitor):
                raise found._in_use() from None
            raise

    async def put(self, monitor: Monitor, **changed: Any) -> "Mark":
        """Change the mark in QEMU, and return it."""
        mark = replace(self, **changed)
        await monitor.run("qom-set", path=_PATH, property="identity", value=json.dumps(asdict(mark)))
        return mark

    async def _remove(self, monitor: Monitor) -> None:
        """Remove the mark from QEMU, unless another client has done that, and perhaps placed the mark of its save."""
        if (found := await _find(monitor)) is None or found.id != self.id:
            return
        try:
            await monitor.run("object-del", id=_ID)
        except QemuError:
            if await _find(monitor) is not None:
                raise

    def over(self) -> None:
        """Say that the save is over. Its changes may be undone from now on."""
        _held.discard(self.id)

    async def is_in_use(self, monitor: Monitor) -> bool:
        """Return whether the save that left the mark may be in progress."""
        if self.holder == Holder.here():
            return self.id in _held
        alive = self.holder.is_alive()
        return alive if alive is not None else self.stops or await monitor.migrates()

    def _in_use(self) -> QemuError:
        return QemuError(
            f"another vmsnap, process {self.holder.pid}, saves this guest: wait until it has ended; if it was killed "
            f"in a container, run the monitor command 'object-del' with the id {_ID!r}, and 'cont'"
        )


async def recover(monitor: Monitor, only: Mark | str | None = None) -> str | None:
    """Undo the changes of a save in QEMU, if one has been killed or has failed.

    Parameters
    ----------
    monitor
        The connection to QEMU.
    only
        The save: its identifier or its mark. The mark counts if another client has removed it from QEMU. The default
        is any save whose process has ended.

    Returns
    -------
    str or None
        A sentence about a save that was found to be interrupted, or None.

    Raises
    ------
    QemuError
        Another save is in progress; or QEMU ended or does not answer.
    """
    mark = await _find(monitor)
    if mark is None and isinstance(only, Mark):
        mark = only
    if mark is None:
        return None if only else await _recover_old(monitor)
    if only is None and await mark.is_in_use(monitor):
        raise mark._in_use()
    if only is not None and mark.id != (only.id if isinstance(only, Mark) else only):
        return None
    if mark.migrates:
        await cancel(monitor)
    if mark.stops:
        await as_it_was(monitor, mark.ran)
    await mark.found.put(monitor)
    await mark._remove(monitor)
    goes_on = "; the guest, which it had stopped, was resumed" if mark.stops and mark.ran else ""
    return (
        f"an earlier save, by process {mark.holder.pid}, was interrupted: the settings of QEMU were restored{goes_on}"
    )


async def as_it_was(monitor: Monitor, ran: bool) -> None:
    """Let the guest run again if it ran; otherwise make it ``paused`` again if QEMU has migrated it.

    QEMU gives its disks away when it migrates, and takes them back when the guest runs. So a guest that was paused runs
    for the moment between two commands.
    """
    state = await finished(monitor)
    if ran and state in ("paused", "postmigrate", "prelaunch"):
        await monitor.run("cont")
    elif state == "postmigrate":
        await monitor.run_both("cont", "stop")


async def _find(monitor: Monitor) -> Mark | None:
    """Return the mark in QEMU, or None if there is not one.

    Raises
    ------
    QemuError
        An object has the id of the mark, but is not one that this version of vmsnap knows.
    """
    if _ID not in [each["name"] for each in await monitor.run("qom-list", path="/objects")]:
        return None
    try:
        text = await monitor.run("qom-get", path=_PATH, property="identity")
    except QemuError:
        if _ID not in [each["name"] for each in await monitor.run("qom-list", path="/objects")]:
            return None  # removed meanwhile
        raise
    try:
        if len(text) > _MARK_BYTES:
            raise ValueError
        told = json.loads(text)
        mark = Mark(**{**told, "holder": Holder(**told["holder"]), "found": Settings(**told["found"])})
        sound = (
            mark.version == _VERSION
            and all(isinstance(each, int) for each in (mark.holder.pid, mark.holder.start, mark.holder.namespace))
            and all(
                isinstance(each, bool)
                for each in (mark.ran, mark.stops, mark.migrates, *mark.found.capabilities.values())
            )
            and isinstance(mark.found.parameters, dict)
        )
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        sound = False
    if not sound:
        raise QemuError(
            f"QEMU has an object {_ID!r} that this version of vmsnap does not understand: if no other vmsnap saves "
            f"this guest, run the monitor command 'object-del' with the id {_ID!r}"
        )
    return mark


async def _recover_old(monitor: Monitor) -> str | None:
    """Put the defaults of QEMU back if a save of vmsnap 0.1 was killed."""
    capabilities = await monitor.run("query-migrate-capabilities")
    on = {each["capability"] for each in capabilities if each["state"]}
    bandwidth = (await monitor.run("query-migrate-parameters")).get("max-bandwidth")
    if on != {"x-ignore-shared"} or bandwidth != _OLD_BANDWIDTH or await monitor.migrates():
        return None
    await Settings({"x-ignore-shared": False}, {"max-bandwidth": _DEFAULT_BANDWIDTH}).put(monitor)
    return "an earlier save, by vmsnap 0.1, was interrupted: the defaults of QEMU were restored"
