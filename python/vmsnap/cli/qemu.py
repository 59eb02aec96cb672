"""``vmsnap qemu save`` and ``vmsnap qemu load``: a running QEMU guest into a snapshot, and out of one."""

import json
import sys
from pathlib import Path
from subprocess import Popen
from types import ModuleType
from typing import Any, Literal

import click

from vmsnap.cli.failure import CommandError
from vmsnap.cli.keys import (
    OpeningKeys,
    WritingKeys,
    no_durable_option,
    opening_options,
    threads_option,
    writing_options,
)
from vmsnap.cli.memory import compress_option
from vmsnap.cli.paths import PATH
from vmsnap.cli.places import directory_argument, json_option
from vmsnap.cli.terminal import human_size, progress_so_far


def _library() -> ModuleType:
    try:
        import vmsnap.qemu
    except ModuleNotFoundError as missing:
        if missing.name != "qemu.qmp":
            raise
        raise CommandError("vmsnap qemu needs the package qemu.qmp: pip install 'vmsnap[qemu]'") from None
    return vmsnap.qemu


def _asked(arguments: dict[str, Any]) -> dict[str, Any]:
    """Ask for a passphrase now: in this thread, which Ctrl-C interrupts, and before a progress bar is drawn."""
    passphrase = arguments.get("passphrase")
    return arguments | {"passphrase": passphrase()} if callable(passphrase) else arguments


@click.group()
def qemu() -> None:
    """Save a running QEMU guest, and bring it back.

    Its memory has to lie in a shared file or memfd, and QEMU to have a monitor:

    \b
    qemu-system-x86_64 -m 4G \\
      -object memory-backend-memfd,id=mem,size=4G,share=on \\
      -machine q35,memory-backend=mem \\
      -qmp unix:/run/vm1.qmp,server=on,wait=off ...
    """  # noqa: D301  the \\b is for click: it leaves the lines after it as they are


@qemu.command()
@click.option("--qmp", required=True, metavar="SOCKET", type=PATH, help="The Unix socket of QEMU's monitor.")
@click.argument("directory", metavar="DIR", type=PATH)
@click.option("--encrypt", is_flag=True, help="Encrypt it; for your own identity, where nothing else is said.")
@writing_options()
@compress_option
@click.option("--continue", "then", flag_value="continue", help="Let the guest go on, even if it was paused.")
@click.option("--quit", "then", flag_value="quit", help="End QEMU, once the snapshot is complete.")
@click.option("--pid", type=click.IntRange(min=1), help="QEMU's process. [default: who listens at SOCKET]")
@threads_option
@no_durable_option
@json_option
def save(
    qmp: Path,
    directory: Path,
    new_keys: WritingKeys,
    compress: str,
    then: Literal["continue", "quit"] | None,
    pid: int | None,
    threads: int | None,
    no_durable: bool,
    as_json: bool,
) -> None:
    """Save a running guest in a new folder DIR: its memory, the state of its devices, and what it ran on.

    The guest stands still meanwhile, and goes on if it ran before. DIR appears when the snapshot is complete, and is
    sealed. A save that fails leaves nothing behind, and the guest as it was.
    """
    library = _library()
    arguments = _asked(new_keys.arguments)
    with progress_so_far("save") as show:
        report = library.save(
            qmp,
            directory,
            **arguments,
            compress="lz4" if compress == "lz4" else None,
            then=then or "as-before",
            pid=pid,
            threads=threads,
            durable=not no_durable,
            progress=show,
        )
    memory = report.memory
    if as_json:
        told = {
            "paused_seconds": report.paused_seconds,
            "seconds": report.seconds,
            "device_state_bytes": report.device_state_bytes,
            "logical_bytes": memory.logical_bytes,
            "data_bytes": memory.data_bytes,
            "stored_bytes": memory.stored_bytes,
            "machine_type": report.machine.machine_type,
            "qemu_version": report.machine.qemu_version,
            "snapshot_id": report.snapshot_id.hex(),
            "seal_digest": report.seal_digest.hex(),
        }
        click.echo(json.dumps(told))
        return
    click.echo(
        f"vmsnap: saved {report.machine.machine_type} of QEMU {report.machine.qemu_version} in {report.seconds:.2f} s; "
        f"it stood still for {report.paused_seconds:.2f} s: {human_size(memory.data_bytes)} of "
        f"{human_size(memory.logical_bytes)} of memory, {human_size(memory.stored_bytes)} on disk, and "
        f"{human_size(report.device_state_bytes)} of devices",
        err=True,
    )


@qemu.command()
@directory_argument
@click.argument("command", metavar="-- QEMU [ARGUMENT]...", nargs=-1, required=True, type=click.UNPROCESSED)
@opening_options
@click.option("--no-verify", is_flag=True, help="Load even what is not sealed, or is not what was saved.")
@click.option("--paused", is_flag=True, help="Do not let the guest go on: it waits for cont.")
@click.option("--force", is_flag=True, help="Fill a file for the memory even if it holds something.")
@threads_option
def load(
    directory: Path,
    command: tuple[str, ...],
    keys: OpeningKeys,
    no_verify: bool,
    paused: bool,
    force: bool,
    threads: int | None,
) -> None:
    """Start QEMU with the memory and the devices of a saved guest, and let the guest go on.

    QEMU and its arguments are given as the guest was started, with the same machine type, devices, and memory backend.
    They follow after "--"; -incoming is added.

    A plain snapshot is verified before, an encrypted one as it is read. QEMU keeps the terminal; the exit status is its
    own. A load that fails ends it, and says what it said.
    """
    library = _library()
    arguments = _asked(keys.arguments(directory))
    with progress_so_far("load") as show:
        report = library.load(
            directory,
            list(command),
            **arguments,
            verify=not no_verify,
            paused=paused,
            overwrite=force,
            threads=threads,
            progress=show,
        )
    told = (
        f"vmsnap: {'loaded' if paused else 'the guest goes on'} after {report.seconds:.2f} s, with "
        f"{human_size(report.restored_bytes)} of memory; QEMU is process {report.process.pid}"
    )
    sys.exit(_status_of(report.process, told))


def _status_of(process: "Popen[bytes]", told: str) -> int:
    """Wait for QEMU, and end it where this is to end."""
    try:
        click.echo(told, err=True)
        status = process.wait()
    except BaseException:
        process.terminate()
        process.wait()
        raise
    return status if status >= 0 else 128 - status
