"""`save`: storing a running QEMU guest in a snapshot."""

import asyncio
import functools
import inspect
import mmap
import os
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Any, Literal

from vmsnap._removal import remove_snapshot
from vmsnap.errors import InvalidArgumentError, QemuError
from vmsnap.keys import Keys, one_of
from vmsnap.memory import GuestRegion, MemoryReport, Progress
from vmsnap.migration import BlockRegion, MigrationStream
from vmsnap.qemu.background import in_thread, run, to_the_end, with_progress
from vmsnap.qemu.emulated import DOWNTIME_MILLISECONDS, is_emulated, receive_emulated
from vmsnap.qemu.hold import Hold
from vmsnap.qemu.machine import Machine
from vmsnap.qemu.mark import recover
from vmsnap.qemu.migration import Rounds, keep_to, receive
from vmsnap.qemu.monitor import Monitor, connected, connection_to, migrates
from vmsnap.qemu.survey import Block, Ram, layout, survey
from vmsnap.staging import StagedSnapshot, create
from vmsnap.writer import SnapshotWriter

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, StrPath

    from vmsnap.keys import KeyProvider, Passphrase

MACHINE, DEVICE_STATE = "machine", "device_state"

# QEMU stops the guest when it expects to send the rest in this time. Its default is 300.
_DOWNTIME_MILLISECONDS = 20

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
    way: Literal["files", "stream", "live"]
    """How the memory was saved: read from shared files, or sent by QEMU, or sent by QEMU while the guest ran."""
    rounds: int
    """How many times QEMU went through the memory: 0 if it was read from files, 1 if the guest stood still."""
    repeated_bytes: int
    """Bytes of memory that QEMU sent again, because the guest had changed them."""
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
    live: bool = False,
    max_rounds: int = 10,
    then: Literal["as-before", "continue", "quit"] = "as-before",
    while_paused: Callable[[], object] | None = None,
    pid: int | None = None,
    threads: int | None = None,
    durable: bool = True,
    archive: bool | None = None,
    progress: Progress | None = None,
) -> SaveReport:
    """Save a running guest in a new snapshot: its memory, its device state, and a description of the machine.

    The guest is paused while its state is read, and resumed as soon as possible; with `live` it runs meanwhile, and is
    paused for some milliseconds at the end. If the save fails or is cancelled, there is no snapshot, and the guest runs
    if it ran before. A small process sees to that even if this process is killed.

    A guest that was paused before is paused afterwards. It runs for some milliseconds at most, in which QEMU takes
    back its disks.

    Parameters
    ----------
    qmp
        The Unix socket of the QEMU monitor: ``-qmp unix:PATH,server=on,wait=off``. No other client may be connected.
    location, encrypt, keys, key, recipients, passphrase, key_provider, threads, durable, archive
        Arguments of `vmsnap.create`.
    compress
        The compression of the guest memory: ``"lz4"``, or None.
    live
        Whether the guest runs while its memory is saved. QEMU sends the memory in rounds: all of it, and then the
        pages that the guest has changed since. A guest that is paused is saved as without this option.
    max_rounds
        The number of rounds after which a guest that changes its memory faster than it is saved is stopped. It is also
        stopped after three rounds that left as much to send as the one before.
    then
        The state of the guest afterwards: ``"as-before"`` resumes it if it ran before, ``"continue"`` always resumes
        it, and ``"quit"`` ends QEMU when the snapshot is complete.
    while_paused
        Called from another thread while the guest stands still and its disks are flushed, for example to copy a disk.
        An awaitable result is awaited. An exception ends the save, and the guest goes on.
    pid
        The process ID of QEMU. The default is the process at the other end of the socket.
    progress
        Called from another thread with the number of bytes done and the total. Memory that QEMU sends counts twice,
        when it is received and when it is written, unless it is written as it comes.

    Raises
    ------
    QemuError
        QEMU refused a command, failed, ended or does not answer; another client is connected, or has resumed the guest
        during the save; another save is in progress; or the guest is being migrated.
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
                await _check_state(monitor)
                before = await layout(monitor)
                ram = await survey(monitor, stack, pid)
                writer = await snapshot.begin()
                # Deriving a key takes time, in which other clients may change everything.
                ran = await _check_state(monitor)
                if (now := await layout(monitor)) != before:
                    before, ram = now, await survey(monitor, stack, pid)
                names = [each.name for each in ram.blocks if each.migrated]
                emulated = live and ran and await is_emulated(monitor)
                # QEMU 10 aborts in a live migration of an emulated guest with several blocks of memory: it confuses
                # their addresses (tlb_reset_dirty_range_all).
                lively = live and ran and not (emulated and len(names) > 1)
                files = not lively and _in_files(ram.blocks)
                downtime = DOWNTIME_MILLISECONDS if emulated else _DOWNTIME_MILLISECONDS
                capabilities = {"x-ignore-shared"} if files else set[str]()
                parameters = {"downtime-limit": downtime} if lively else {}
                # QEMU sends a guest that stands still in the order of its memory.
                straight = len(names) == len(ram.blocks) and not (lively or files or compress)
                places = ram.places() if straight else []
                at = [BlockRegion(each.guest_base, block.name, each.offset, each.size) for each, block in places]
                shown = _Shown(progress, receives=not files, twice=not straight)

                def call(pipe: int, show: Progress) -> MigrationStream:
                    return writer.receive_migration(pipe, names, regions=at, progress=show)

                async def begin() -> None:
                    nonlocal writer
                    writer = await snapshot.begin()

                rounds = Rounds(max_rounds)
                async with Hold(monitor, os.fspath(qmp), ran, capabilities, parameters) as hold:
                    if lively and emulated:
                        stream, rounds = await receive_emulated(monitor, hold, call, shown.received, max_rounds, begin)
                    elif lively:
                        watch = functools.partial(keep_to, rounds, monitor, hold.notice, hold.stop)
                        stream = await receive(monitor, call, hold.migrate, shown.received, watch)
                        await hold.notice()
                    else:
                        await hold.stop()
                        stream = await receive(monitor, call, hold.migrate, shown.received)
                    stack.callback(stream.close)
                    if await layout(monitor) != before:
                        raise QemuError(
                            "the machine was changed while it was saved: another client of QEMU has added or removed "
                            "memory or a device; save it again"
                        )
                    regions, from_files = ([], []) if stream.written else _regions(ram, stream)
                    # Memory in a file changes as soon as the guest runs; pages that QEMU sent do not. Of an emulated
                    # guest that runs, QEMU may send stale pages.
                    hold.stands_still(again=lively and not emulated and not from_files)
                    if while_paused is not None:
                        await _call(while_paused)
                    memory = await _write(writer, regions, compress, shown) if from_files else stream.written
                    await hold.check()
                    if then != "quit":
                        await hold.go_on(hold.runs or then == "continue")
                    if lively:
                        # QEMU may have gone through the memory once more since the last look.
                        rounds.go_on((await monitor.run("query-migrate")).get("ram", {}))
                    machine = replace(ram.machine, state="running" if hold.runs else "paused")
                    writer.write_fragment(MACHINE, machine)
                    if memory is None:
                        memory = await _write(writer, regions, compress, shown)
                    if then == "quit":
                        await snapshot.commit()
                        hold.give_up()
                        await to_the_end(monitor.quit())
        await snapshot.commit()
    assert memory is not None
    are_files = 0 < len(from_files) == len(regions)
    return SaveReport(
        paused_seconds=hold.paused_seconds,
        seconds=perf_counter() - started,
        way="live" if lively else "files" if are_files else "stream",
        rounds=max(rounds.done, 1) if lively else 0 if are_files else 1,
        repeated_bytes=stream.repeated_bytes,
        device_state_bytes=stream.device_state_bytes,
        memory=memory,
        machine=machine,
        snapshot_id=snapshot.identifier,
        seal_digest=snapshot.seal_digest,
        interrupted=interrupted,
    )


def _in_files(blocks: list[Block]) -> bool:
    """Return whether QEMU should leave shared memory out of its stream, because it can be read from files.

    QEMU leaves out all shared memory, or none. Since version 8.1 it still sends shared memory that has no name.
    """
    shared = [each for each in blocks if each.shared]
    return bool(shared) and all(each.file is not None for each in shared)


def _regions(ram: Ram, stream: MigrationStream) -> tuple[list[GuestRegion], list[GuestRegion]]:
    """Return the regions of ``mem``, and those of them that are read from files.

    Raises
    ------
    QemuError, PermissionError
        A block is neither in the stream nor in a file.
    """
    taken = {each.name: each.records for each in stream.blocks if each.taken}
    regions, from_files = [], []
    for each, block in ram.places():
        if taken.get(block.name) or (block.name in taken and not stream.ignores_shared):
            regions.append(GuestRegion(each.guest_base, stream.memory(block.name, each.offset, each.size)))
        elif block.file is not None:
            offset = block.file.offset + each.offset
            from_files.append(GuestRegion(each.guest_base, block.file.descriptor, offset=offset, size=each.size))
            regions.append(from_files[-1])
        elif block.name in taken and not block.shared:
            # The guest uses nothing of it: a virtio-mem device with nothing plugged in.
            regions.append(GuestRegion(each.guest_base, mmap.mmap(-1, each.size, mmap.MAP_PRIVATE, mmap.PROT_READ)))
        else:
            raise block.why_no_file or QemuError(
                f"QEMU did not send the memory block {block.name!r}, and it is not in a file that vmsnap can open"
            )
    return regions, from_files


class _Shown:
    """The progress of both steps, receiving and writing, as one."""

    def __init__(self, progress: Progress | None, receives: bool, twice: bool) -> None:
        self._progress, self._receives, self._twice = progress, receives, twice
        self._received = 0

    def received(self, done: int, total: int) -> None:
        """Show the progress of receiving. It is not shown if the memory should be in files."""
        if self._progress is not None and self._receives:
            self._received = total
            self._progress(min(done, total), 2 * total if self._twice else total)

    def written(self, done: int, total: int) -> None:
        """Show the progress of writing."""
        if self._progress is not None:
            self._progress(self._received + done, self._received + total)


async def _write(
    writer: SnapshotWriter, regions: list[GuestRegion], compress: Literal["lz4"] | None, shown: _Shown
) -> MemoryReport:
    return await with_progress(
        lambda show: writer.write_memory(regions, compress=compress, progress=show), shown.written
    )


async def _call(while_paused: Callable[[], object]) -> None:
    """Run the caller's function in a thread, and wait for its result if that is awaitable."""
    called: list[object] = []
    await in_thread(lambda: called.append(while_paused()))
    if inspect.isawaitable(called[0]):
        await called[0]


class _Snapshot:
    """A snapshot that is complete when its ``with`` block ends, or absent if the block fails."""

    def __init__(self, make: Callable[[], StagedSnapshot]) -> None:
        self._make = make
        self._staged: StagedSnapshot | None = None
        self.identifier = self.seal_digest = b""

    async def begin(self) -> SnapshotWriter:
        """Create it. If it was created before, it is created again."""

        def create_staged() -> None:
            if self._staged is not None:
                self._staged.discard()
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
    found = await monitor.run("query-migrate")
    if migrates(found):
        raise QemuError("the guest is already being migrated or saved: wait until that has ended")
    if reasons := found.get("blocked-reasons"):
        raise QemuError(f"QEMU cannot save the guest: {'; '.join(reasons)}")
    return bool(state == "running")
