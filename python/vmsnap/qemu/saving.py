"""`save`: storing a running QEMU guest in a snapshot."""

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from vmsnap._removal import remove_snapshot
from vmsnap.errors import InvalidArgumentError, QemuError
from vmsnap.keys import Keys, one_of
from vmsnap.memory import GuestRegion, MemoryReport, Progress
from vmsnap.qemu.background import in_thread, run, to_the_end, with_progress
from vmsnap.qemu.devices import cancel, save_devices, without_shared_memory
from vmsnap.qemu.machine import Machine
from vmsnap.qemu.monitor import Monitor, connected, connection_to
from vmsnap.qemu.survey import Ram, survey
from vmsnap.staging import StagedSnapshot, create
from vmsnap.writer import SnapshotWriter

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, StrPath

    from vmsnap.keys import KeyProvider, Passphrase

MACHINE, DEVICE_STATE = "machine", "device_state"

_CHUNK_BYTES = 1 << 16

# Bytes per second. The default limit of QEMU is for a network, and would keep the guest paused for longer.
_MAX_BANDWIDTH = 1 << 40

# QEMU normally answers within milliseconds.
_PATIENCE_SECONDS = 30.0

_NOT_NOW = {
    "postmigrate": "it was saved or migrated before and has not run since; resume it with 'cont' first",
    "finish-migrate": "it is being migrated",
    "inmigrate": "it waits for an incoming migration",
}


@dataclass(frozen=True)
class SaveReport:
    """Sizes, times and identifiers of a save."""

    paused_seconds: float
    """How long the guest was paused: from before the command ``stop`` until after ``cont``.

    If the guest was paused before, or stays paused, the time ends when its memory has been read.
    """
    seconds: float
    """Duration of the whole save, including the sync."""
    device_state_bytes: int
    """Size of the device state, in bytes."""
    memory: MemoryReport
    """Sizes of the guest memory."""
    machine: Machine
    """The machine that the guest runs on."""
    snapshot_id: bytes
    """The identifier of the snapshot."""
    seal_digest: bytes
    """The digest of the seal. Keep it elsewhere to recognize this snapshot later."""


def save(qmp: "StrPath", location: "StrPath", encrypt: bool = False, **options: Any) -> SaveReport:
    """Save a running guest in a new snapshot. The parameters are the same as for `save_async`."""
    return run(save_async(qmp, location, encrypt, **options))


async def save_async(
    qmp: "StrPath",
    location: "StrPath",
    encrypt: bool = False,
    *,
    keys: Keys | None = None,
    key: "ReadableBuffer | None" = None,
    recipients: str | Iterable[str] | None = None,
    passphrase: "Passphrase | None" = None,
    key_provider: "KeyProvider | None" = None,
    compress: Literal["lz4"] | None = None,
    then: Literal["as-before", "continue", "quit"] = "as-before",
    pid: int | None = None,
    threads: int | None = None,
    durable: bool = True,
    archive: bool | None = None,
    progress: Progress | None = None,
) -> SaveReport:
    """Save a running guest in a new snapshot: its memory, its device state, and a description of the machine.

    The guest is paused while its state is read, and resumed before the snapshot is synced. If the save fails or is
    cancelled, there is no snapshot, and the guest runs if it ran before.

    Parameters
    ----------
    qmp
        The Unix socket of the QEMU monitor: ``-qmp unix:PATH,server=on,wait=off``. No other client may be connected.
    location, encrypt, keys, key, recipients, passphrase, key_provider, threads, durable, archive
        Arguments of `vmsnap.create`.
    compress
        The compression of the guest memory: ``"lz4"``, or None.
    then
        The state of the guest afterwards: ``"as-before"`` resumes it if it ran before, ``"continue"`` always resumes
        it, and ``"quit"`` ends QEMU when the snapshot is complete.
    pid
        The process ID of QEMU, which must have the socket open. By default it is found.
    progress
        Called from another thread with the number of bytes of memory done and the total.

    Raises
    ------
    QemuError
        QEMU refused a command, failed or ended; the guest memory is not in a shared file; another client is connected;
        or the guest is being migrated.
    OSError
        There is no such socket, this user may not connect to it or access QEMU, or the disk is full.
    FileExistsError, KeyUnavailableError, InvalidArgumentError
        The snapshot cannot be created, as for `vmsnap.create`. The guest was not paused.
    """
    if then not in ("as-before", "continue", "quit"):
        raise InvalidArgumentError(f'then must be "as-before", "continue" or "quit", not {then!r}')
    given = Keys(encrypt=encrypt, key=key, recipients=recipients, passphrase=passphrase, key_provider=key_provider)
    keys = one_of(keys, given)
    keys = keys if keys.given else None
    started = perf_counter()
    with ExitStack() as stack:
        connection = connection_to(Path(qmp))
        stack.callback(connection.close)
        async with connected(connection, os.fspath(qmp)) as monitor:
            ran = await _check_state(monitor)
            ram = await survey(monitor, stack, pid)
            regions = regions_of(ram)
            staged = await _staged(
                lambda: create(location, keys=keys, threads=threads, durable=durable, archive=archive)
            )
            async with _complete_or_absent(staged) as writer, _prepared(monitor):
                writer.write_fragment(MACHINE, ram.machine)
                async with _standing_still(monitor, ran, ran or then == "continue") as pause:
                    with writer.raw_fragment(DEVICE_STATE, chunk_size_bytes=_CHUNK_BYTES) as fragment:
                        device_state_bytes = await save_devices(monitor, fragment)
                    # The memory comes after the devices, because saving some devices changes the guest memory.
                    memory = await with_progress(
                        lambda show: writer.write_memory(regions, compress=compress, progress=show), progress
                    )
                    if then == "quit":
                        pause.ends()
                        await _commit(staged)
                        pause.goes_on = False
                        await to_the_end(monitor.quit())
    assert staged.snapshot_id is not None
    assert staged.seal_digest is not None
    return SaveReport(
        paused_seconds=pause.seconds,
        seconds=perf_counter() - started,
        device_state_bytes=device_state_bytes,
        memory=memory,
        machine=ram.machine,
        snapshot_id=staged.snapshot_id,
        seal_digest=staged.seal_digest,
    )


def regions_of(ram: Ram) -> list[GuestRegion]:
    """Return the regions of ``mem``, whose memory is in the files of QEMU."""
    regions = []
    for each, block in ram.places():
        if block.file is None:
            assert block.why_no_file is not None
            raise block.why_no_file
        offset = block.file.offset + each.offset
        regions.append(GuestRegion(each.guest_base, block.file.descriptor, offset=offset, size=each.size))
    return regions


async def _staged(make: Callable[[], StagedSnapshot]) -> StagedSnapshot:
    """Begin a snapshot. If this is cancelled meanwhile, the snapshot is discarded."""
    made: list[StagedSnapshot] = []
    try:
        await in_thread(lambda: made.append(make()))
    except asyncio.CancelledError:
        for staged in made:
            staged.discard()
        raise
    return made[0]


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
    if await monitor.migrates():
        raise QemuError("the guest is already being migrated or saved: wait until that has ended")
    if reasons := (await monitor.run("query-migrate")).get("blocked-reasons"):
        raise QemuError(f"QEMU cannot save the guest: {'; '.join(reasons)}")
    return bool(state == "running")


@asynccontextmanager
async def _complete_or_absent(staged: StagedSnapshot) -> AsyncIterator[SnapshotWriter]:
    """Commit a snapshot if the block succeeds and has not done so itself; otherwise discard it."""
    try:
        yield staged.writer
        if staged.seal_digest is None:
            await _commit(staged)
    except BaseException as error:
        try:
            staged.discard()
        except OSError as left:
            error.add_note(f"{left.strerror or left}; vmsnap.clean removes it")
        raise


async def _commit(staged: StagedSnapshot) -> None:
    """Commit a snapshot. If this is cancelled meanwhile, the snapshot is removed."""
    try:
        await in_thread(staged.commit)
    except asyncio.CancelledError:
        if staged.seal_digest is not None:
            await in_thread(lambda: remove_snapshot(staged.path))
        raise


@asynccontextmanager
async def _prepared(monitor: Monitor) -> AsyncIterator[None]:
    """Set up QEMU to save everything except shared memory at full speed; restore its settings afterwards."""
    found = await monitor.run("query-migrate-capabilities")
    wanted = without_shared_memory(found)
    bandwidth = (await monitor.run("query-migrate-parameters")).get("max-bandwidth")
    try:
        await _set(monitor, wanted, _MAX_BANDWIDTH)
        yield
    finally:
        # If QEMU has ended, the first error is enough.
        with suppress(QemuError):
            await _in_time(_set(monitor, found, bandwidth))


async def _set(monitor: Monitor, capabilities: list[dict[str, Any]], bandwidth: int | None) -> None:
    if capabilities:
        await monitor.run("migrate-set-capabilities", capabilities=capabilities)
    if bandwidth is not None:
        await monitor.run("migrate-set-parameters", max_bandwidth=bandwidth)


class _Pause:
    """A pause of the guest: its duration, and whether the guest is resumed afterwards."""

    def __init__(self, goes_on: bool) -> None:
        self.goes_on = goes_on
        self.seconds = 0.0
        self._started = perf_counter()

    def ends(self) -> None:
        self.seconds = self.seconds or perf_counter() - self._started


@asynccontextmanager
async def _standing_still(monitor: Monitor, ran: bool, goes_on: bool) -> AsyncIterator[_Pause]:
    """Pause the guest during the block, and resume it afterwards; after an error only if it ran before."""
    pause = _Pause(goes_on)
    try:
        await monitor.run("stop")
        yield pause
    except BaseException:
        await _in_time(_as_it_was(monitor, ran))
        raise
    if pause.goes_on:
        await to_the_end(monitor.run("cont"))
    pause.ends()


async def _in_time(work: Coroutine[Any, Any, None]) -> None:
    """Wait until work that restores the guest has ended, with a limit in case QEMU does not answer."""
    with suppress(TimeoutError):
        await to_the_end(asyncio.wait_for(work, _PATIENCE_SECONDS))


async def _as_it_was(monitor: Monitor, ran: bool) -> None:
    """Resume the guest after an error if it ran before. Failures here must not hide that error."""
    await cancel(monitor)
    with suppress(QemuError):
        if ran:
            await monitor.run("cont")
