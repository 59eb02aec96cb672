"""A snapshot into a running guest."""

import errno
import os
import subprocess
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from time import perf_counter
from typing import TYPE_CHECKING, Any

from vmsnap.errors import CorruptSnapshotError, InvalidArgumentError, QemuError
from vmsnap.keys import Keys, one_of
from vmsnap.memory import GuestMemory, Progress
from vmsnap.qemu.background import in_thread, run, to_the_end, with_progress
from vmsnap.qemu.devices import load_devices, without_shared_memory
from vmsnap.qemu.machine import Machine, Ram, survey
from vmsnap.qemu.monitor import Monitor, connected
from vmsnap.qemu.saving import DEVICE_STATE, MACHINE
from vmsnap.qemu.started import StartedQemu, end
from vmsnap.reader import SnapshotReader
from vmsnap.verification import Verification
from vmsnap.verification import verify as verify_snapshot

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, StrPath

    from vmsnap.keys import Identity, KeyProvider, Passphrase

_PIECE_BYTES = 1 << 20
_SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class LoadReport:
    """How `load` went, and the QEMU that runs the guest now."""

    process: subprocess.Popen[bytes]
    """It is the caller's to wait for or to end. What it writes to standard error is passed on to this process' own."""
    seconds: float
    """From the call until the guest went on."""
    restored_bytes: int
    """Bytes of data of the guest's memory."""
    machine: Machine


def load(location: "StrPath", command: Sequence[str], **options: Any) -> LoadReport:
    """Bring a saved guest back. This is `load_async` for callers without an event loop, with the same parameters."""
    return run(load_async(location, command, **options), undo=lambda report: end(report.process))


async def load_async(
    location: "StrPath",
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
    progress: Progress | None = None,
) -> LoadReport:
    """Start QEMU with the memory and the devices of a saved guest, and let the guest go on.

    QEMU is started waiting. That it is the machine which was saved is checked before anything of the guest's is
    written; then its memory is filled, and its devices are loaded. After any error QEMU is ended.

    Parameters
    ----------
    location
        The directory of the snapshot.
    command
        QEMU and its arguments, as the guest was started: the same machine type, devices, and memory backends by id and
        size. ``-incoming`` is added, and a monitor of vmsnap's own. Memory in a ``memory-backend-memfd`` is QEMU's
        alone; with a ``memory-backend-file`` the file is filled. With ``share=off`` the guest changes nothing in it.
    keys, key, identities, passphrase, key_provider, threads, expect_seal_digest
        As for `vmsnap.open`.
    verify
        Whether the snapshot has to be sealed, and a plain one is read and verified before. What is encrypted is never
        used where its tag does not verify. Without, QEMU may get what anybody has changed.
    paused
        Let the guest wait for ``cont``.
    overwrite
        Whether memory may go into a file that holds something: another guest may run on it.
    progress
        Called with the bytes of memory done and all bytes, from another thread.

    Raises
    ------
    QemuError
        The snapshot is of no QEMU guest, or has no device state; the QEMU that was started is another machine, or
        older; it ended or failed, and the text has what it wrote to standard error.
    CorruptSnapshotError, AuthenticationError, NotSealedError
        The snapshot is not what was saved. QEMU was not started, or the guest has not run.
    FileExistsError
        The file for the memory holds something.
    InvalidArgumentError
        ``-incoming`` or ``-daemonize`` is among the arguments, or there are none.
    FileNotFoundError, KeyUnavailableError
        As `vmsnap.open`; or there is no such command.
    """
    started = perf_counter()
    _check_command(command)
    given = Keys(key=key, identities=identities, passphrase=passphrase, key_provider=key_provider)
    keys = one_of(keys, given)
    pinned: dict[str, Any] = {"threads": threads, "expect_seal_digest": expect_seal_digest}

    def open_snapshot() -> tuple[SnapshotReader, Machine, GuestMemory]:
        reader = SnapshotReader(location, require_sealed=verify, keys=keys, **pinned)
        machine = _machine_of(reader)
        if verify and not reader.encrypted:
            _check(verify_snapshot(location, keys=keys, **pinned), location)
        return reader, machine, reader.memory()

    reader, machine, memory = await in_thread(open_snapshot)
    async with StartedQemu(command) as qemu:
        with reader.raw_fragment(DEVICE_STATE) as devices, ExitStack() as stack:
            async with connected(qemu.connection, command[0]) as monitor:
                try:
                    ram = await survey(monitor, qemu.process.pid, stack, to_fill=True)
                    machine.check_against(ram.machine)
                    _check_empty(ram, overwrite)
                    qemu.fills(ram)
                    await with_progress(lambda show: memory.restore(ram.regions, progress=show), progress)
                    await _set_capabilities(monitor)
                    await load_devices(monitor, devices, qemu.process.kill)
                    if not paused:
                        await monitor.run("cont")
                except BaseException:
                    # Asked first: the process may be a shell that runs QEMU.
                    await to_the_end(monitor.quit())
                    raise
        qemu.runs()
    return LoadReport(qemu.process, perf_counter() - started, memory.data_bytes, machine)


def _check_command(command: Sequence[str]) -> None:
    if not command:
        raise InvalidArgumentError("there is no command to start QEMU with: qemu-system-x86_64 ...")
    for argument in command:
        option = argument.replace("--", "-", 1)
        if option == "-incoming":
            raise InvalidArgumentError("-incoming is vmsnap's to give: leave it out")
        if option == "-daemonize":
            raise InvalidArgumentError("a QEMU that goes to the background cannot be watched: leave -daemonize out")


def _machine_of(reader: SnapshotReader) -> Machine:
    names = reader.list_fragments()
    for name, what in ((MACHINE, "is of no QEMU guest"), (DEVICE_STATE, "has no state of devices")):
        if name not in names:
            raise QemuError(f"{reader.location}: this snapshot {what}: it has no fragment {name!r}")
    machine = reader.read_fragment(MACHINE, type=Machine)
    machine.check_format(reader.path)
    return machine


def _check(report: Verification, location: "StrPath") -> None:
    if not report.ok:
        texts = [f"{problem.path}: {problem.text}" for problem in report.problems] or report.not_checked
        more = f"; and {len(texts) - _SHOWN_PROBLEMS} more" if len(texts) > _SHOWN_PROBLEMS else ""
        raise CorruptSnapshotError(
            f"{os.fspath(location)}: is not what was saved: {'; '.join(texts[:_SHOWN_PROBLEMS])}{more}"
        )


def _check_empty(ram: Ram, overwrite: bool) -> None:
    for region, path in zip(ram.regions, ram.files, strict=True):
        if path and not overwrite and _holds_something(region.source, region.offset, region.size):
            raise FileExistsError(
                errno.EEXIST,
                "holds something, and another guest may run on it: remove it, or say that it may be overwritten",
                path,
            )


def _holds_something(descriptor: Any, offset: int, size: int | None) -> bool:
    """Whether there is anything but zeros: QEMU may have made the pages resident already."""
    assert size is not None
    end = offset + size
    while offset < end:
        try:
            offset = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError:
            return False  # no data up to the end
        piece = os.pread(descriptor, min(_PIECE_BYTES, end - offset), offset)
        if not piece or offset >= end:
            return False
        if piece.count(0) != len(piece):
            return True
        offset += len(piece)
    return False


async def _set_capabilities(monitor: Monitor) -> None:
    found = await monitor.run("query-migrate-capabilities")
    await monitor.run("migrate-set-capabilities", capabilities=without_shared_memory(found))
