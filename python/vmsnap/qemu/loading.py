"""`load`: starting QEMU with a guest from a snapshot."""

import subprocess
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any, Self

from vmsnap.errors import CorruptSnapshotError, InvalidArgumentError, QemuError
from vmsnap.keys import Keys, one_of
from vmsnap.location import SnapshotLocation
from vmsnap.memory import Progress
from vmsnap.qemu.background import in_thread, run, to_the_end, with_progress
from vmsnap.qemu.filling import Filling, plan
from vmsnap.qemu.incoming import load_stream
from vmsnap.qemu.machine import Machine
from vmsnap.qemu.monitor import Monitor
from vmsnap.qemu.saving import DEVICE_STATE, MACHINE
from vmsnap.qemu.started import StartedQemu, end
from vmsnap.qemu.survey import Ram, survey
from vmsnap.reader import SnapshotReader
from vmsnap.verification import Verification
from vmsnap.verification import verify as verify_snapshot

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

    from vmsnap.keys import Identity, KeyProvider, Passphrase

_SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class LoadReport:
    """The QEMU process that `load` started, and the sizes and times of the load."""

    process: subprocess.Popen[bytes]
    """The command. The caller waits for it or ends it. Its standard error is copied to that of this process."""
    seconds: float
    """Time from the call until the guest was resumed."""
    restored_bytes: int
    """Size of the data ranges of the guest memory, in bytes."""
    streamed_bytes: int
    """Size of the stream that QEMU loaded: the device state, and all memory that vmsnap cannot write into a file."""
    paused: bool
    """Whether the guest is paused: because the caller wants it, or because it was paused when it was saved."""
    machine: Machine
    """The machine that the guest was saved on."""
    pid: int
    """The process ID of QEMU. It differs from that of `process` if the command is a wrapper that starts QEMU."""
    monitor_path: str = field(repr=False)
    """The path that QEMU connected to. It identifies QEMU among all processes, and no longer exists."""

    def end(self) -> None:
        """End QEMU, and the command that started it."""
        end(self.process, self.monitor_path)


def load(location: SnapshotLocation, command: Sequence[str], **options: Any) -> LoadReport:
    """Start QEMU with a saved guest, and resume the guest. The parameters are the same as for `load_async`."""
    return run(load_async(location, command, **options), undo=lambda report: report.end())


async def load_async(
    location: SnapshotLocation,
    command: Sequence[str],
    *,
    keys: Keys | None = None,
    key: "ReadableBuffer | None" = None,
    identities: "Identity | Iterable[Identity] | None" = None,
    passphrase: "Passphrase | None" = None,
    key_provider: "KeyProvider | None" = None,
    threads: int | None = None,
    expect_seal_digest: "ReadableBuffer | str | None" = None,
    verify: bool = True,
    paused: bool = False,
    overwrite: bool = False,
    ignore_differences: bool = False,
    pid: int | None = None,
    progress: Progress | None = None,
) -> LoadReport:
    """Start QEMU with the memory and the device state of a saved guest, and resume the guest.

    QEMU starts and waits. vmsnap checks that the machine is the saved one before it writes anything. It writes the
    memory into the files of shared memory, and lets QEMU load the device state and all other memory from a stream. A
    guest that was paused when it was saved stays paused. After any error QEMU is ended, and files that it created are
    removed.

    Parameters
    ----------
    location
        The snapshot: a directory, or an archive.
    command
        The command that starts QEMU, with the arguments of the saved guest: the same machine type, devices, and memory
        size. The memory backend may be another one. The command may be a wrapper that starts QEMU. vmsnap adds ``-S``,
        ``-incoming`` and its own monitor. A ``memory-backend-file`` is filled with the memory; with ``share=off`` the
        guest does not change the file afterwards.
    keys, key, identities, passphrase, key_provider, threads, expect_seal_digest
        Keyword arguments of `vmsnap.open`.
    verify
        Whether the snapshot must be sealed. A plain one is also read and verified completely before QEMU starts. An
        encrypted one is verified while it is read, always. With ``verify=False``, QEMU may load data that somebody
        changed.
    paused
        Whether the guest stays paused until the monitor command ``cont``.
    overwrite
        Whether the memory may overwrite a file that is not empty. Another guest may be using such a file.
    ignore_differences
        Whether the started QEMU may have another processor or other devices than the saved guest.
    pid
        The process ID of QEMU. By default it is the process that connects to vmsnap.
    progress
        Called from another thread with the number of bytes of memory done and the total.

    Raises
    ------
    QemuError
        The snapshot does not contain a QEMU guest, or no device state. The started QEMU is another machine, or older.
        QEMU ended or failed, and the text contains its standard error.
    CorruptSnapshotError, AuthenticationError, NotSealedError
        The snapshot is damaged, was changed, or is not sealed. The guest did not run.
    FileExistsError
        The file for the memory is not empty.
    BlockingIOError
        Another load is filling the file for the memory.
    InvalidArgumentError
        The command is empty, or contains ``-incoming`` or ``-daemonize``.
    FileNotFoundError
        The snapshot or the command does not exist.
    KeyUnavailableError
        The key is missing, as for `vmsnap.open`.
    """
    started = perf_counter()
    _check_command(command)
    given = Keys(key=key, identities=identities, passphrase=passphrase, key_provider=key_provider)
    keys = one_of(keys, given)
    keys = keys if keys.given else None
    pinned: dict[str, Any] = {"threads": threads, "expect_seal_digest": expect_seal_digest}
    with await in_thread(lambda: _Saved(location, verify, keys, pinned)) as saved:
        machine, restored_bytes = saved.machine, saved.memory.data_bytes
        goes_on = not paused and machine.state != "paused"
        async with StartedQemu(command) as qemu:
            with ExitStack() as stack:
                async with qemu.monitor() as monitor:
                    try:
                        ram = await survey(monitor, stack, pid, to_fill=True)
                        filling = await _plan(ram, saved, qemu, overwrite, ignore_differences)
                        streamed_bytes = await _fill(monitor, saved, filling, qemu, progress)
                        if goes_on:
                            await monitor.run("cont")
                    except BaseException:
                        # QEMU is asked to quit first, because the process may be a shell that runs QEMU.
                        await to_the_end(monitor.quit())
                        raise
            qemu.runs()
    return LoadReport(
        process=qemu.process,
        pid=qemu.process.pid if ram.pid is None else ram.pid,
        seconds=perf_counter() - started,
        restored_bytes=restored_bytes,
        streamed_bytes=streamed_bytes,
        paused=not goes_on,
        machine=machine,
        monitor_path=qemu.monitor_path,
    )


def _check_command(command: Sequence[str]) -> None:
    if not command:
        raise InvalidArgumentError("the command to start QEMU is empty: pass qemu-system-x86_64 and its arguments")
    for argument in command:
        option = argument.replace("--", "-", 1)
        if option == "-incoming":
            raise InvalidArgumentError("the command must not contain -incoming: vmsnap adds it")
        if option == "-daemonize":
            raise InvalidArgumentError("the command must not contain -daemonize: vmsnap has to watch the process")


class _Saved:
    """The snapshot, open until the ``with`` block ends.

    An error that the caller keeps, or `asyncio.run`, keeps the variables of all functions that it has passed: see
    `background`. So these functions have this object, and not the reader, which has the key.
    """

    def __init__(self, location: SnapshotLocation, verify: bool, keys: Keys | None, pinned: dict[str, Any]) -> None:
        self.reader = SnapshotReader(location, require_sealed=verify, keys=keys, **pinned)
        try:
            self.machine = _machine_of(self)
            if verify and not self.reader.encrypted:
                _check(verify_snapshot(location, keys=keys, **pinned), self.reader.location)
            self.memory = self.reader.memory()
            self.front = self.reader.migration_front(DEVICE_STATE)
        except BaseException:
            del self.reader
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        del self.reader, self.memory


def _machine_of(saved: _Saved) -> Machine:
    names = saved.reader.list_fragments()
    for name, what in ((MACHINE, "does not contain a QEMU guest"), (DEVICE_STATE, "contains no device state")):
        if name not in names:
            raise QemuError(f"{saved.reader.location} {what}: it has no fragment {name!r}")
    machine = saved.reader.read_fragment(MACHINE, type=Machine)
    machine.check_format(saved.reader.location)
    return machine


def _check(report: Verification, location: str) -> None:
    if not report.ok:
        texts = [f"{problem.path}: {problem.text}" for problem in report.problems] or report.not_checked
        more = f"; and {len(texts) - _SHOWN_PROBLEMS} more" if len(texts) > _SHOWN_PROBLEMS else ""
        raise CorruptSnapshotError(f"{location} is damaged or was changed: {'; '.join(texts[:_SHOWN_PROBLEMS])}{more}")


async def _plan(ram: Ram, saved: _Saved, qemu: StartedQemu, overwrite: bool, ignore_differences: bool) -> Filling:
    """Check that QEMU has the saved machine, and find out how its memory is filled. Its files are locked then."""
    if ram.pid is not None:
        qemu.owns(ram.pid)
    qemu.has(each.file for each in ram.blocks if each.file)
    names = saved.machine.check_against(ram.machine, ignore_differences=ignore_differences)
    filling = await in_thread(lambda: plan(saved.machine, ram, names, saved.front, overwrite=overwrite, lock=qemu.lock))
    for file in filling.files:
        qemu.fills(file)
    return filling


async def _fill(monitor: Monitor, saved: _Saved, filling: Filling, qemu: StartedQemu, progress: Progress | None) -> int:
    """Write the memory into the files, let QEMU load everything else, and return the size of the stream."""
    total_bytes = filling.file_bytes + filling.stream_bytes

    def fill(show: Progress) -> None:
        saved.memory.restore(
            filling.destinations,
            keep_allocated=filling.keep_allocated,
            progress=lambda done, _: show(done, total_bytes),
        )

    if filling.file_bytes:
        await with_progress(fill, progress)

    def shown(done: int, of: int) -> None:
        if progress is not None and filling.stream_bytes:
            progress(filling.file_bytes + filling.stream_bytes * done // max(of, 1), total_bytes)

    def send(pipe: int) -> int:
        return saved.reader.send_migration(pipe, filling.sent, progress=shown)

    found = await monitor.run("query-migrate-capabilities")
    # They are for a network, or change the format.
    wanted = [{**each, "state": False} for each in found]
    await monitor.run("migrate-set-capabilities", capabilities=wanted)
    size = await load_stream(monitor, send, qemu.kill)
    # A capability that stays on would change how QEMU migrates the guest later.
    await monitor.run("migrate-set-capabilities", capabilities=found)
    return size
