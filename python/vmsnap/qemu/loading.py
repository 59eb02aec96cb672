"""`load`: starting QEMU with a guest from a snapshot."""

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
from vmsnap.qemu.machine import Machine
from vmsnap.qemu.monitor import Monitor, connected
from vmsnap.qemu.saving import DEVICE_STATE, MACHINE, regions_of
from vmsnap.qemu.started import StartedQemu, end
from vmsnap.qemu.survey import Ram, survey
from vmsnap.reader import SnapshotReader
from vmsnap.verification import Verification
from vmsnap.verification import verify as verify_snapshot

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, StrPath

    from vmsnap.keys import Identity, KeyProvider, Passphrase

_BATCH_BYTES = 1 << 20
_SHOWN_PROBLEMS = 3


@dataclass(frozen=True)
class LoadReport:
    """The QEMU process that `load` started, and the sizes and times of the load."""

    process: subprocess.Popen[bytes]
    """QEMU. The caller waits for it or ends it. Its standard error is copied to the standard error of this process."""
    seconds: float
    """Time from the call until the guest was resumed."""
    restored_bytes: int
    """Size of the data ranges of the guest memory, in bytes."""
    machine: Machine
    """The machine that the guest was saved on."""


def load(location: "StrPath", command: Sequence[str], **options: Any) -> LoadReport:
    """Start QEMU with a saved guest, and resume the guest. The parameters are the same as for `load_async`."""
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
    """Start QEMU with the memory and the device state of a saved guest, and resume the guest.

    QEMU starts and waits. vmsnap checks that the machine is the saved one before it writes anything, then restores the
    memory, and lets QEMU load the device state. After any error QEMU is ended.

    Parameters
    ----------
    location
        The snapshot: a directory, or an archive.
    command
        The command that starts QEMU, with the arguments of the saved guest: the same machine type, devices, and memory
        backends (ids and sizes). vmsnap adds ``-incoming`` and its own monitor. A ``memory-backend-file`` is filled
        with the memory; with ``share=off`` the guest does not change the file afterwards.
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
                    ram = await survey(monitor, stack, to_fill=True)
                    names = machine.check_against(ram.machine, ignore_differences=overwrite)
                    for saved, found in names.items():
                        if saved != found:
                            raise QemuError(f"backend {saved!r} of the saved guest is {found!r} in the started QEMU")
                    regions = regions_of(ram)
                    _check_empty(ram, overwrite)
                    qemu.fills(ram)
                    await with_progress(lambda show: memory.restore(regions, progress=show), progress)
                    await _set_capabilities(monitor)
                    await load_devices(monitor, devices, qemu.process.kill)
                    if not paused:
                        await monitor.run("cont")
                except BaseException:
                    # QEMU is asked to quit first, because the process may be a shell that runs QEMU.
                    await to_the_end(monitor.quit())
                    raise
        qemu.runs()
    return LoadReport(qemu.process, perf_counter() - started, memory.data_bytes, machine)


def _check_command(command: Sequence[str]) -> None:
    if not command:
        raise InvalidArgumentError("the command to start QEMU is empty: pass qemu-system-x86_64 and its arguments")
    for argument in command:
        option = argument.replace("--", "-", 1)
        if option == "-incoming":
            raise InvalidArgumentError("the command must not contain -incoming: vmsnap adds it")
        if option == "-daemonize":
            raise InvalidArgumentError("the command must not contain -daemonize: vmsnap has to watch the process")


def _machine_of(reader: SnapshotReader) -> Machine:
    names = reader.list_fragments()
    for name, what in ((MACHINE, "does not contain a QEMU guest"), (DEVICE_STATE, "contains no device state")):
        if name not in names:
            raise QemuError(f"{reader.location} {what}: it has no fragment {name!r}")
    machine = reader.read_fragment(MACHINE, type=Machine)
    machine.check_format(reader.path)
    return machine


def _check(report: Verification, location: "StrPath") -> None:
    if not report.ok:
        texts = [f"{problem.path}: {problem.text}" for problem in report.problems] or report.not_checked
        more = f"; and {len(texts) - _SHOWN_PROBLEMS} more" if len(texts) > _SHOWN_PROBLEMS else ""
        raise CorruptSnapshotError(
            f"{os.fspath(location)} is damaged or was changed: {'; '.join(texts[:_SHOWN_PROBLEMS])}{more}"
        )


def _check_empty(ram: Ram, overwrite: bool) -> None:
    for block in ram.blocks:
        file = block.file
        if file and file.path and not overwrite and _holds_something(file.descriptor, file.offset, block.size):
            raise FileExistsError(
                errno.EEXIST,
                "is not empty, and another guest may use it: remove it, or pass overwrite=True (--force)",
                file.path,
            )


def _holds_something(descriptor: Any, offset: int, size: int | None) -> bool:
    """Return whether a range of a file has nonzero bytes. QEMU may have allocated pages of zeros already."""
    assert size is not None
    end = offset + size
    while offset < end:
        try:
            offset = os.lseek(descriptor, offset, os.SEEK_DATA)
        except OSError:
            return False  # no data up to the end
        batch = os.pread(descriptor, min(_BATCH_BYTES, end - offset), offset)
        if not batch or offset >= end:
            return False
        if batch.count(0) != len(batch):
            return True
        offset += len(batch)
    return False


async def _set_capabilities(monitor: Monitor) -> None:
    found = await monitor.run("query-migrate-capabilities")
    await monitor.run("migrate-set-capabilities", capabilities=without_shared_memory(found))
