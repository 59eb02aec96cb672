"""A running guest into a snapshot."""

import asyncio
import os
import shutil
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from contextlib import ExitStack, asynccontextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from vmsnap.errors import InvalidArgumentError, QemuError
from vmsnap.keys import Keys, one_of
from vmsnap.memory import MemoryReport, Progress
from vmsnap.qemu.background import in_thread, run, to_the_end, with_progress
from vmsnap.qemu.devices import cancel, save_devices, without_shared_memory
from vmsnap.qemu.machine import Machine, survey
from vmsnap.qemu.monitor import Monitor, connected, connection_to
from vmsnap.staging import StagedSnapshot, create
from vmsnap.writer import SnapshotWriter

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, StrPath

    from vmsnap.keys import KeyProvider, Passphrase

MACHINE, DEVICE_STATE = "machine", "device_state"

_CHUNK_BYTES = 1 << 16

# Bytes a second: QEMU's own limit is for a network, and the guest stands still.
_MAX_BANDWIDTH = 1 << 40

# A QEMU that answers does so within milliseconds.
_PATIENCE_SECONDS = 30.0

_NOT_NOW = {
    "postmigrate": "was saved or migrated before and has not continued since: 'cont' it first",
    "finish-migrate": "is being migrated",
    "inmigrate": "waits for a migration to come in",
}


@dataclass(frozen=True)
class SaveReport:
    """How `save` went."""

    paused_seconds: float
    """How long the guest stood still: from before QEMU was told ``stop`` until after it did ``cont``.

    Where the guest did not run, or does not go on, until all of it was read.
    """
    seconds: float
    """How long all of it took, the sync included."""
    device_state_bytes: int
    memory: MemoryReport
    machine: Machine
    snapshot_id: bytes
    seal_digest: bytes
    """To pin the snapshot by, kept elsewhere."""


def save(qmp: "StrPath", location: "StrPath", encrypt: bool = False, **options: Any) -> SaveReport:
    """Save a running guest. This is `save_async` for callers without an event loop, with the same parameters."""
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
    progress: Progress | None = None,
) -> SaveReport:
    """Save a running guest into a new snapshot: its memory, QEMU's state of its devices, and what it ran on.

    The guest stands still while its state is taken, and goes on before the snapshot is synced. After any error, and
    where this is cancelled, there is no snapshot, and the guest runs if it ran before.

    Parameters
    ----------
    qmp
        The Unix socket of QEMU's monitor: ``-qmp unix:PATH,server=on,wait=off``. No other client may be connected.
    location, encrypt, keys, key, recipients, passphrase, key_provider, threads, durable
        As for `vmsnap.create`.
    compress
        ``"lz4"``, or nothing: of the guest's memory.
    then
        What becomes of the guest: ``"as-before"`` goes on if it ran; ``"continue"`` goes on; ``"quit"`` ends QEMU once
        the snapshot is complete.
    pid
        QEMU's process; by default whoever listens at the socket.
    progress
        Called with the bytes of memory done and all bytes, from another thread.

    Raises
    ------
    QemuError
        QEMU refuses, fails or ends; the guest's memory is not in a shared file; another client is connected; the guest
        is being migrated.
    OSError
        There is no such socket, this user may not connect to it or look into QEMU, or the disk is full.
    FileExistsError, KeyUnavailableError, InvalidArgumentError
        As `vmsnap.create`. The guest was not stopped.
    """
    if then not in ("as-before", "continue", "quit"):
        raise InvalidArgumentError(f'then is "as-before", "continue" or "quit", not {then!r}')
    given = Keys(encrypt=encrypt, key=key, recipients=recipients, passphrase=passphrase, key_provider=key_provider)
    keys = one_of(keys, given)
    started = perf_counter()
    with ExitStack() as stack:
        connection = connection_to(Path(qmp))
        stack.callback(connection.close)
        async with connected(connection, os.fspath(qmp)) as monitor:
            ran = await _check_state(monitor)
            ram = await survey(monitor, monitor.peer_pid if pid is None else pid, stack, to_fill=False)
            staged = await _staged(lambda: create(location, keys=keys, threads=threads, durable=durable))
            async with _complete_or_absent(staged) as writer, _prepared(monitor):
                writer.write_fragment(MACHINE, ram.machine)
                async with _standing_still(monitor, ran, ran or then == "continue") as pause:
                    with writer.raw_fragment(DEVICE_STATE, chunk_size_bytes=_CHUNK_BYTES) as fragment:
                        device_state_bytes = await save_devices(monitor, fragment)
                    # After the devices: some of them leave something in the guest's memory when they are saved.
                    memory = await with_progress(
                        lambda show: writer.write_memory(ram.regions, compress=compress, progress=show), progress
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


async def _staged(make: Callable[[], StagedSnapshot]) -> StagedSnapshot:
    """Begin a snapshot; where this is cancelled meanwhile, it is given up."""
    made: list[StagedSnapshot] = []
    try:
        await in_thread(lambda: made.append(make()))
    except asyncio.CancelledError:
        for staged in made:
            staged.discard()
        raise
    return made[0]


async def _check_state(monitor: Monitor) -> bool:
    """Return whether the guest runs.

    Raises
    ------
    QemuError
        It cannot be saved now.
    """
    state = (await monitor.run("query-status"))["status"]
    if state not in ("running", "paused", "prelaunch"):
        raise QemuError(
            f"this guest {_NOT_NOW.get(state, f'is in the state {state!r}')}, so that it cannot be saved now"
        )
    if await monitor.migrates():
        raise QemuError("this guest is being migrated or saved already")
    if reasons := (await monitor.run("query-migrate")).get("blocked-reasons"):
        raise QemuError(f"QEMU cannot save this guest: {'; '.join(reasons)}")
    return bool(state == "running")


@asynccontextmanager
async def _complete_or_absent(staged: StagedSnapshot) -> AsyncIterator[SnapshotWriter]:
    """Commit a snapshot where the block succeeds, unless that did so itself; discard it otherwise."""
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
    """Commit; where this is cancelled meanwhile, there is no snapshot, as where it is cancelled before."""
    try:
        await in_thread(staged.commit)
    except asyncio.CancelledError:
        if staged.seal_digest is not None:
            await in_thread(lambda: shutil.rmtree(staged.path))
        raise


@asynccontextmanager
async def _prepared(monitor: Monitor) -> AsyncIterator[None]:
    """Set QEMU up to save all but shared memory, at full speed, and back again as it was."""
    found = await monitor.run("query-migrate-capabilities")
    wanted = without_shared_memory(found)
    bandwidth = (await monitor.run("query-migrate-parameters")).get("max-bandwidth")
    try:
        await _set(monitor, wanted, _MAX_BANDWIDTH)
        yield
    finally:
        # Where QEMU has ended this is no further error.
        with suppress(QemuError):
            await _in_time(_set(monitor, found, bandwidth))


async def _set(monitor: Monitor, capabilities: list[dict[str, Any]], bandwidth: int | None) -> None:
    if capabilities:
        await monitor.run("migrate-set-capabilities", capabilities=capabilities)
    if bandwidth is not None:
        await monitor.run("migrate-set-parameters", max_bandwidth=bandwidth)


class _Pause:
    """How long the guest stands still, and whether it goes on."""

    def __init__(self, goes_on: bool) -> None:
        self.goes_on = goes_on
        self.seconds = 0.0
        self._started = perf_counter()

    def ends(self) -> None:
        self.seconds = self.seconds or perf_counter() - self._started


@asynccontextmanager
async def _standing_still(monitor: Monitor, ran: bool, goes_on: bool) -> AsyncIterator[_Pause]:
    """Stop the guest, and let it go on at the end of the block; after an error where it ran before."""
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
    """Wait for what brings the guest back, to its end; but not for ever for a QEMU that does not answer."""
    with suppress(TimeoutError):
        await to_the_end(asyncio.wait_for(work, _PATIENCE_SECONDS))


async def _as_it_was(monitor: Monitor, ran: bool) -> None:
    """Let the guest go on after an error, which nothing that goes wrong here shall hide."""
    await cancel(monitor)
    with suppress(QemuError):
        if ran:
            await monitor.run("cont")
