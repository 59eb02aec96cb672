"""`save`: storing a running QEMU guest in a snapshot."""

import asyncio
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from vmsnap._removal import remove_snapshot
from vmsnap.errors import InvalidArgumentError, QemuError
from vmsnap.keys import Keys, one_of
from vmsnap.memory import MemoryReport, Progress
from vmsnap.qemu.background import in_thread, run, to_the_end, with_progress
from vmsnap.qemu.hold import Hold
from vmsnap.qemu.machine import Machine, survey
from vmsnap.qemu.mark import recover
from vmsnap.qemu.migration import save_devices
from vmsnap.qemu.monitor import Monitor, connected, connection_to
from vmsnap.qemu.settings import differing
from vmsnap.staging import StagedSnapshot, create
from vmsnap.writer import SnapshotWriter

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, StrPath

    from vmsnap.keys import KeyProvider, Passphrase

MACHINE, DEVICE_STATE = "machine", "device_state"

_CHUNK_BYTES = 1 << 16

_NOT_NOW = {
    "postmigrate": "it was saved or migrated before and has not run since; resume it with 'cont' first",
    "finish-migrate": "it is being migrated",
    "inmigrate": "it waits for an incoming migration",
}


@dataclass(frozen=True)
class SaveReport:
    """Sizes, times and identifiers of a save."""

    paused_seconds: float
    """How long the guest stood still, by the times of QEMU's events ``STOP`` and ``RESUME``.

    If the guest was paused before, or does not go on, it is the time in which its state was read.
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
    interrupted: str | None = None
    """A sentence about an earlier save that was killed and whose changes to QEMU were undone first, or None."""


def save(qmp: "StrPath", location: "StrPath", encrypt: bool = False, **options: Any) -> SaveReport:
    """Save a running guest in a new snapshot. The parameters are the same as for `save_async`.

    After an exception from a signal handler, such as KeyboardInterrupt, there is no snapshot. If QEMU has already ended
    for ``then="quit"``, the snapshot is kept, and the report is returned instead of the exception.
    """

    def undo(_report: SaveReport) -> bool:
        if options.get("then") != "quit":
            remove_snapshot(Path(location))
        return options.get("then") == "quit"

    return run(save_async(qmp, location, encrypt, **options), undo)


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
        The process ID of QEMU. The default is the process that created the socket.
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
    async with _Snapshot(
        lambda: create(location, keys=keys, threads=threads, durable=durable, archive=archive)
    ) as snapshot:
        with ExitStack() as stack:
            connection = connection_to(Path(qmp))
            stack.callback(connection.close)
            async with connected(connection, os.fspath(qmp)) as monitor:
                interrupted = await recover(monitor)
                ran = await _check_state(monitor)
                ram = await survey(monitor, monitor.peer_pid if pid is None else pid, stack, to_fill=False)
                writer = await snapshot.begin()
                found, wanted = await differing(monitor, {"x-ignore-shared"}, {})
                writer.write_fragment(MACHINE, ram.machine)
                async with Hold(monitor, os.fspath(qmp), ran, found, wanted) as hold:
                    pause = await hold.stop()
                    with writer.raw_fragment(DEVICE_STATE, chunk_size_bytes=_CHUNK_BYTES) as fragment:
                        device_state_bytes = await save_devices(monitor, fragment, hold.migrate)
                    # The memory comes after the devices, because saving some devices changes the guest memory.
                    memory = await with_progress(
                        lambda show: writer.write_memory(ram.regions, compress=compress, progress=show), progress
                    )
                    await hold.check(pause)
                    if then == "quit":
                        await snapshot.commit()
                        await to_the_end(monitor.quit())
                    else:
                        await pause.end(ran or then == "continue")
        await snapshot.commit()
    return SaveReport(
        paused_seconds=pause.seconds,
        seconds=perf_counter() - started,
        device_state_bytes=device_state_bytes,
        memory=memory,
        machine=ram.machine,
        snapshot_id=snapshot.identifier,
        seal_digest=snapshot.seal_digest,
        interrupted=interrupted,
    )


class _Snapshot:
    """A snapshot that is complete when its ``with`` block ends, or absent if the block fails."""

    def __init__(self, make: Callable[[], StagedSnapshot]) -> None:
        self._make = make
        self._staged: StagedSnapshot | None = None
        self.identifier = self.seal_digest = b""

    async def begin(self) -> SnapshotWriter:
        """Create it."""

        def create_staged() -> None:
            self._staged = self._make()

        await in_thread(create_staged)
        assert self._staged is not None
        return self._staged.writer

    async def commit(self) -> None:
        """Complete it, if that has not been done. If this is cancelled meanwhile, the snapshot is removed."""
        staged = self._staged
        assert staged is not None
        if staged.seal_digest is None:
            try:
                await in_thread(staged.commit)
            except asyncio.CancelledError:
                if staged.seal_digest is not None:
                    self._staged = None
                    await in_thread(lambda: remove_snapshot(staged.path))
                raise
        assert staged.snapshot_id is not None
        assert staged.seal_digest is not None
        self.identifier, self.seal_digest = staged.snapshot_id, staged.seal_digest

    async def __aenter__(self) -> "_Snapshot":
        return self

    async def __aexit__(self, _kind: object, error: BaseException | None, _trace: object) -> bool:
        if error is None or self._staged is None:
            return False
        if self.seal_digest:
            # The snapshot is all that is left of the guest. A cancellation came too late.
            task = asyncio.current_task()
            assert task is not None
            return isinstance(error, asyncio.CancelledError) and task.uncancel() == 0
        try:
            self._staged.discard()
        except OSError as left:
            error.add_note(f"{left.strerror or left}; vmsnap.clean removes it")
        return False


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
