"""`save`: storing a running QEMU guest in a snapshot."""

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

from vmsnap.errors import InvalidArgumentError, QemuError
from vmsnap.keys import Keys, one_of
from vmsnap.location import SnapshotLocation
from vmsnap.memory import GuestRegion, MemoryReport, Progress
from vmsnap.migration import BlockRegion, MigrationStream
from vmsnap.qemu.background import in_thread, run, to_the_end, with_progress
from vmsnap.qemu.emulated import receive_emulated
from vmsnap.qemu.hold import Hold
from vmsnap.qemu.machine import Machine
from vmsnap.qemu.mark import recover
from vmsnap.qemu.migration import Rounds, keep_to, receive
from vmsnap.qemu.monitor import Monitor, connected, connection_to
from vmsnap.qemu.plan import Plan
from vmsnap.qemu.snapshot import NewSnapshot
from vmsnap.qemu.survey import Ram, layout
from vmsnap.removal import remove_snapshot
from vmsnap.staging import create

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, StrPath

    from vmsnap.keys import KeyProvider, Passphrase

MACHINE, DEVICE_STATE = "machine", "device_state"


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


def save(qmp: "StrPath", location: SnapshotLocation, encrypt: bool = False, **options: Any) -> SaveReport:
    """Save a running guest in a new snapshot. The parameters are the same as for `save_async`.

    After an exception from a signal handler, such as KeyboardInterrupt, there is no snapshot. If QEMU has already ended
    for ``then="quit"``, the snapshot is kept, and the report is returned instead of the exception.
    """

    def undo(_report: SaveReport) -> bool:
        if options.get("then") != "quit":
            remove_snapshot(location)
        return options.get("then") == "quit"

    return run(save_async(qmp, location, encrypt, **options), undo)


async def save_async(
    qmp: "StrPath",
    location: SnapshotLocation,
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
    paused for a moment at the end. If the save fails or is cancelled, there is no snapshot, and the guest runs
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
    async with NewSnapshot(
        location, lambda: create(location, keys=keys, threads=threads, durable=durable, archive=archive)
    ) as snapshot:
        with ExitStack() as stack:
            connection = connection_to(Path(qmp))
            stack.callback(connection.close)
            async with connected(connection, os.fspath(qmp)) as monitor:
                interrupted = await recover(monitor)
                plan = await Plan.of(monitor, stack, pid, live)
                await snapshot.begin()
                # Deriving a key takes time, in which other clients may change everything.
                plan = await Plan.of(monitor, stack, pid, live, plan)
                async with Hold(monitor, os.fspath(qmp), plan.ran, plan.capabilities, plan.parameters) as hold:
                    straight = plan.is_straight and compress is None
                    shown = _Shown(progress, receives=not plan.files, twice=not straight)
                    steps = _Steps(monitor, hold, snapshot, plan, compress, shown)
                    await steps.receive(stack, max_rounds, straight)
                    await steps.while_it_stands_still(while_paused)
                    await steps.go_on(then)
                    await steps.store()
                    if then == "quit":
                        await snapshot.commit()
                        hold.give_up()
                        await to_the_end(monitor.quit())
        await snapshot.commit()
    return steps.report(seconds=perf_counter() - started, interrupted=interrupted)


class _Steps:
    """The steps of a save while QEMU is held, in their order. docs/qemu.md describes them."""

    def __init__(
        self,
        monitor: Monitor,
        hold: Hold,
        snapshot: NewSnapshot,
        plan: Plan,
        compress: Literal["lz4"] | None,
        shown: "_Shown",
    ) -> None:
        self._monitor, self._hold, self._snapshot, self._plan = monitor, hold, snapshot, plan
        self._compress, self._shown = compress, shown
        self._stream: MigrationStream
        self._rounds: Rounds
        self._machine: Machine
        self._memory: MemoryReport | None = None
        # The regions of `mem`, and those of them that are read from files.
        self._regions = self._from_files = list[GuestRegion]()

    async def receive(self, stack: ExitStack, max_rounds: int, straight: bool) -> None:
        """Receive the stream of QEMU. The guest stands still afterwards; without `live`, it stands still from now on.

        With `straight`, the memory is written as it comes, if it comes in order.

        Raises
        ------
        QemuError
            Another client of QEMU has plugged something in or out meanwhile.
        """
        monitor, hold, plan, received = self._monitor, self._hold, self._plan, self._shown.received

        regions = [
            BlockRegion(each.guest_base, block.name, each.offset, each.size)
            for each, block in (plan.ram.places() if straight else [])
        ]

        def call(pipe: int, show: Progress) -> MigrationStream:
            return self._snapshot.writer.receive_migration(pipe, plan.names, regions=regions, progress=show)

        rounds = Rounds(max_rounds)
        if plan.live and plan.emulated:
            begin = self._snapshot.begin
            stream, rounds = await receive_emulated(monitor, hold, call, received, max_rounds, begin)
        elif plan.live:
            watch = functools.partial(keep_to, rounds, monitor, hold.notice, hold.stop)
            stream = await receive(monitor, call, hold.migrate, received, watch)
            await hold.notice()
        else:
            await hold.stop()
            stream = await receive(monitor, call, hold.migrate, received)
        stack.callback(stream.close)
        if await layout(monitor) != plan.layout:
            raise QemuError(
                "the machine was changed while it was saved: another client of QEMU has added or removed memory or a "
                "device; save it again"
            )
        self._stream, self._rounds, self._memory = stream, rounds, stream.written
        if self._memory is None:
            self._regions, self._from_files = _regions(plan.ram, stream)

    async def while_it_stands_still(self, while_paused: Callable[[], object] | None) -> None:
        """Call the function of the caller, and read the memory that is in files.

        Raises
        ------
        QemuError
            Another client of QEMU has let the guest run.
        """
        plan, hold = self._plan, self._hold
        # Memory in a file changes as soon as the guest runs; pages that QEMU sent do not. Of an emulated guest that
        # runs, QEMU may send stale pages.
        hold.stands_still(again=plan.live and not plan.emulated and not self._from_files)
        if while_paused is not None:
            await _call(while_paused)
        if self._from_files:
            self._memory = await self._write_memory()
        await hold.check()

    async def go_on(self, then: Literal["as-before", "continue", "quit"]) -> None:
        """Let the guest go on, unless QEMU will be ended."""
        if then != "quit":
            await self._hold.go_on(self._hold.runs or then == "continue")
        if self._plan.live:
            # QEMU may have gone through the memory once more since the last look.
            self._rounds.go_on((await self._monitor.run("query-migrate")).get("ram", {}))

    async def store(self) -> None:
        """Store the machine, and the memory if QEMU has sent all of it."""
        self._machine = replace(self._plan.ram.machine, state="running" if self._hold.runs else "paused")
        self._snapshot.writer.write_fragment(MACHINE, self._machine)
        if self._memory is None:
            self._memory = await self._write_memory()

    async def _write_memory(self) -> MemoryReport:
        writer, regions, compress = self._snapshot.writer, self._regions, self._compress
        return await with_progress(
            lambda show: writer.write_memory(regions, compress=compress, progress=show), self._shown.written
        )

    def report(self, *, seconds: float, interrupted: str | None) -> SaveReport:
        """Return the report, when the snapshot is complete."""
        assert self._memory is not None
        live, sent = self._plan.live, not self._regions or len(self._from_files) < len(self._regions)
        return SaveReport(
            paused_seconds=self._hold.paused_seconds,
            seconds=seconds,
            way="live" if live else "stream" if sent else "files",
            rounds=max(self._rounds.done, 1) if live else int(sent),
            repeated_bytes=self._stream.repeated_bytes,
            device_state_bytes=self._stream.device_state_bytes,
            memory=self._memory,
            machine=self._machine,
            snapshot_id=self._snapshot.identifier,
            seal_digest=self._snapshot.seal_digest,
            interrupted=interrupted,
        )


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


async def _call(while_paused: Callable[[], object]) -> None:
    """Run the caller's function in a thread, and wait for its result if that is awaitable."""
    called: list[object] = []
    await in_thread(lambda: called.append(while_paused()))
    if inspect.isawaitable(called[0]):
        await called[0]
