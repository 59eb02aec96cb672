"""``vmsnap qemu save`` and ``vmsnap qemu load``: a running QEMU guest, saved into a snapshot and resumed from one."""

import json
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Literal

import click

from vmsnap.cli.command import Command, argument
from vmsnap.cli.failure import CommandError
from vmsnap.cli.keys import OpeningKeys, WritingKeys, asked, opening_options, writing_options
from vmsnap.cli.location import Snapshot, new_store_options, store_options
from vmsnap.cli.options import (
    archive_option,
    compress_option,
    encrypt_option,
    json_option,
    no_durable_option,
    threads_option,
)
from vmsnap.cli.paths import PATH
from vmsnap.cli.targets import new_snapshot_argument, snapshot_argument
from vmsnap.cli.terminal import human_size, progress_so_far

if TYPE_CHECKING:
    from vmsnap.qemu import LoadReport


def _library() -> ModuleType:
    try:
        import vmsnap.qemu
    except ModuleNotFoundError as missing:
        if missing.name != "qemu.qmp":
            raise
        raise CommandError("vmsnap qemu needs the package qemu.qmp: pip install 'vmsnap[qemu]'") from None
    return vmsnap.qemu


@click.group()
def qemu() -> None:
    """Save a running QEMU guest, and resume it.

    QEMU must have a monitor:

    \b
    qemu-system-x86_64 -m 4G \\
      -qmp unix:/run/vm1.qmp,server=on,wait=off ...
    """  # noqa: D301  the \\b is for click: it leaves the lines after it as they are


@qemu.command(
    cls=Command,
    examples=[
        "vmsnap qemu save --qmp /run/vm1.qmp vm1 --live --encrypt",
        "vmsnap qemu save --qmp /run/vm1.qmp vm1 --compress lz4 --quit",
        "vmsnap qemu save --qmp /run/vm1.qmp vm1 --live --while-paused 'cp --reflink=auto disk.qcow2 vm1.qcow2'",
    ],
)
@click.option("--qmp", required=True, metavar="SOCKET", type=PATH, help="The Unix socket of QEMU's monitor.")
@new_snapshot_argument
@encrypt_option
@writing_options()
@compress_option
@click.option("--live", is_flag=True, help="Let the guest run while its memory is saved, and pause it only at the end.")
@click.option(
    "--while-paused",
    metavar="COMMAND",
    help="Run COMMAND with sh -c while the guest stands still and its disks are flushed, for example to copy a disk.",
)
@click.option(
    "--continue", "then", flag_value="continue", help="Let the guest run afterwards, even if it was paused before."
)
@click.option("--quit", "then", flag_value="quit", help="End QEMU when the snapshot is complete.")
@click.option(
    "--pid",
    type=click.IntRange(min=1),
    metavar="PID",
    help="The process ID of QEMU.  [default: the process that has SOCKET open]",
)
@threads_option
@archive_option
@no_durable_option
@json_option
@new_store_options
def save(
    qmp: Path,
    new_snapshot: Snapshot,
    new_keys: WritingKeys,
    compress: str,
    live: bool,
    while_paused: str | None,
    then: Literal["continue", "quit"] | None,
    pid: int | None,
    threads: int | None,
    archive: bool | None,
    no_durable: bool,
    as_json: bool,
) -> None:
    """Save a running QEMU guest in a new snapshot.

    The snapshot contains the memory, the device state, and a description of the machine. The guest is paused during
    the save, or with --live only for a moment at the end. It continues afterwards if it was running before,
    even if vmsnap is killed.

    NEW-SNAPSHOT appears when it is complete, and is sealed. A save that fails leaves nothing behind, and does not
    change whether the guest runs.

    Needs the package qemu.qmp: pip install 'vmsnap[qemu]'.
    """
    library = _library()
    arguments = asked(new_keys.arguments)
    with progress_so_far("save") as show:
        report = library.save(
            qmp,
            new_snapshot,
            **arguments,
            compress="lz4" if compress == "lz4" else None,
            live=live,
            while_paused=None if while_paused is None else lambda: library.run_command(while_paused),
            then=then or "as-before",
            pid=pid,
            threads=threads,
            durable=not no_durable,
            archive=archive,
            progress=show,
        )
    memory = report.memory
    if report.interrupted:
        click.echo(f"vmsnap: warning: {report.interrupted}", err=True)
    if as_json:
        told = {
            "paused_seconds": report.paused_seconds,
            "seconds": report.seconds,
            "way": report.way,
            "rounds": report.rounds,
            "repeated_bytes": report.repeated_bytes,
            "device_state_bytes": report.device_state_bytes,
            "logical_bytes": memory.logical_bytes,
            "data_bytes": memory.data_bytes,
            "stored_bytes": memory.stored_bytes,
            "machine_type": report.machine.machine_type,
            "qemu_version": report.machine.qemu_version,
            "snapshot_id": report.snapshot_id.hex(),
            "seal_digest": report.seal_digest.hex(),
            "interrupted": report.interrupted,
        }
        click.echo(json.dumps(told))
        return
    sent = f" in {report.rounds} rounds while it ran" if report.way == "live" else ""
    click.echo(
        f"vmsnap: saved {report.machine.machine_type} of QEMU {report.machine.qemu_version} in {report.seconds:.2f} s"
        f"{sent}; the guest was paused for {report.paused_seconds:.3f} s: {human_size(memory.data_bytes)} of "
        f"{human_size(memory.logical_bytes)} of memory, {human_size(memory.stored_bytes)} on disk, and "
        f"{human_size(report.device_state_bytes)} of device state",
        err=True,
    )


@qemu.command(
    cls=Command,
    examples=[
        "vmsnap qemu load vm1 -- qemu-system-x86_64 -m 4G -machine q35 ...",
        "vmsnap qemu load vm1 -i id.txt --paused -- qemu-system-x86_64 -m 4G -machine q35 ...",
    ],
)
@snapshot_argument
@argument(
    "command",
    metavar="-- QEMU [ARGUMENT]...",
    description="The command that starts QEMU, as the guest was started before: the same machine type, devices and "
    "memory size. It may be a wrapper, such as sudo or a script. vmsnap adds -S, -incoming and a monitor.",
    nargs=-1,
    required=True,
    type=click.UNPROCESSED,
)
@opening_options
@click.option(
    "--no-verify", is_flag=True, help="Load a snapshot that is not sealed, or that changed since it was sealed."
)
@click.option("--paused", is_flag=True, help="Leave the guest paused. The monitor command cont resumes it.")
@click.option(
    "--force",
    is_flag=True,
    help="Overwrite the file of the memory backend even if it is not empty, and allow another processor and other "
    "devices.",
)
@click.option(
    "--pid",
    type=click.IntRange(min=1),
    metavar="PID",
    help="The process ID of QEMU.  [default: the process that connects to vmsnap]",
)
@threads_option
@store_options
def load(
    snapshot: Snapshot,
    command: tuple[str, ...],
    keys: OpeningKeys,
    no_verify: bool,
    paused: bool,
    force: bool,
    pid: int | None,
    threads: int | None,
) -> None:
    """Start QEMU with a saved guest, and resume the guest.

    The memory backend may be another one than that of the saved guest: a shared file is filled directly, and all other
    memory is sent to QEMU. A guest that was paused when it was saved stays paused.

    A plain snapshot is verified first, an encrypted one while it is read. QEMU keeps the terminal, and vmsnap exits
    with the exit status of QEMU. If the load fails or is killed, QEMU is ended; an error contains its output.

    Needs the package qemu.qmp: pip install 'vmsnap[qemu]'.
    """
    library = _library()
    arguments = asked(keys.arguments(snapshot))
    with progress_so_far("load") as show:
        report = library.load(
            snapshot,
            list(command),
            **arguments,
            verify=not no_verify,
            paused=paused,
            overwrite=force,
            ignore_differences=force,
            pid=pid,
            threads=threads,
            progress=show,
        )
    told = (
        f"vmsnap: {'the guest is paused' if report.paused else 'the guest continues'} after {report.seconds:.2f} s, "
        f"with {human_size(report.restored_bytes)} of memory; QEMU is process {report.pid}"
    )
    sys.exit(_status_of(report, told))


def _status_of(report: "LoadReport", told: str) -> int:
    """Wait for QEMU, and end it if this process is interrupted."""
    try:
        click.echo(told, err=True)
        status = report.process.wait()
    except BaseException:
        report.end()
        raise
    return status if status >= 0 else 128 - status
