"""``vmsnap import`` and ``vmsnap export``: guests in files of other programs."""

import io
import json
from pathlib import Path
from typing import Any, Literal

import click

from vmsnap.cli.command import Command, argument
from vmsnap.cli.io import refuse_inside, refuse_terminal
from vmsnap.cli.keys import OpeningKeys, WritingKeys, asked, opening_options, writing_options
from vmsnap.cli.location import Snapshot, new_store_options, store_options
from vmsnap.cli.options import (
    archive_option,
    compress_option,
    encrypt_option,
    expect_seal_digest_option,
    json_option,
    no_durable_option,
    threads_option,
)
from vmsnap.cli.paths import PATH, TEXT_PATH
from vmsnap.cli.streams import ReaderGoneError, binary_input, binary_output
from vmsnap.cli.targets import complete_file, new_snapshot_argument, snapshot_argument
from vmsnap.cli.terminal import human_size, printable, progress_so_far
from vmsnap.exchange import export_file, import_file

_STREAM = "-"


@click.command(
    "import",
    cls=Command,
    examples=[
        "vmsnap import vm1.save vm1 --encrypt",
        "ssh host cat vm1.qemu.zst | vmsnap import - vm1 --compress lz4",
    ],
)
@argument(
    "file",
    metavar="FILE",
    description='The file of virsh save or of QEMU, a pipe, or "-" for standard input.',
    type=TEXT_PATH,
    shell_complete=complete_file,
)
@new_snapshot_argument
@encrypt_option
@writing_options()
@compress_option
@threads_option
@archive_option
@no_durable_option
@json_option
@new_store_options
def import_command(
    file: str,
    new_snapshot: Snapshot,
    new_keys: WritingKeys,
    compress: str,
    threads: int | None,
    archive: bool | None,
    no_durable: bool,
    as_json: bool,
) -> None:
    """Store a guest that libvirt or QEMU saved in a file.

    FILE is a file of virsh save, or a migration stream that QEMU wrote to a file (migrate file:PATH, or exec:cat). Both
    may be compressed: the program gzip, bzip2, xz, lzop, zstd or lz4 decompresses them. vmsnap qemu load loads the
    snapshot, and vmsnap export makes such a file again.

    NEW-SNAPSHOT appears when it is complete, and is sealed. An import that fails leaves nothing behind.
    """
    arguments: dict[str, Any] = {
        "compress": "lz4" if compress == "lz4" else None,
        "threads": threads,
        "durable": not no_durable,
        "archive": archive,
    }
    source: str | io.FileIO = file
    if file == _STREAM:
        source = binary_input()
        refuse_terminal(source, "the file is binary, and standard input is a terminal")
    arguments |= asked(new_keys.arguments)
    with progress_so_far("import") as show:
        report = import_file(source, new_snapshot, **arguments, progress=show)
    memory = report.memory
    if as_json:
        told = {
            "format": report.format,
            "compression": report.compression,
            "seconds": report.seconds,
            "device_state_bytes": report.device_state_bytes,
            "logical_bytes": memory.logical_bytes,
            "data_bytes": memory.data_bytes,
            "stored_bytes": memory.stored_bytes,
            "machine_type": report.machine.machine_type,
            "state": report.machine.state,
            "snapshot_id": report.snapshot_id.hex(),
            "seal_digest": report.seal_digest.hex(),
        }
        click.echo(json.dumps(told))
        return
    click.echo(
        f"vmsnap: imported {printable(report.machine.machine_type) or 'a guest'} in {report.seconds:.2f} s: "
        f"{human_size(memory.data_bytes)} of {human_size(memory.logical_bytes)} of memory, "
        f"{human_size(memory.stored_bytes)} on disk, and {human_size(report.device_state_bytes)} of device state",
        err=True,
    )
    if not all(each.mapped for each in report.machine.ram):
        click.echo(
            "vmsnap: warning: the file does not tell where the guest sees its memory: its regions have addresses from "
            "0x10000000000000 on",
            err=True,
        )


@click.command(
    cls=Command,
    examples=[
        "vmsnap export vm1 vm1.save --format libvirt",
        "vmsnap export vm1 - --format qemu | ssh host 'cat > vm1.qemu'",
    ],
)
@snapshot_argument
@argument(
    "file",
    metavar="FILE",
    description='The file to create, or "-" for standard output.',
    type=TEXT_PATH,
    shell_complete=complete_file,
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["libvirt", "qemu"]),
    required=True,
    help="libvirt makes a file for virsh restore; qemu makes a migration stream, for -incoming file:FILE.",
)
@click.option(
    "--xml",
    type=PATH,
    metavar="FILE",
    help="The XML of the libvirt domain, from virsh dumpxml --security-info --migratable.  [default: that of the file "
    "which was imported]",
)
@opening_options
@expect_seal_digest_option
@threads_option
@no_durable_option
@json_option
@store_options
def export(
    snapshot: Snapshot,
    file: str,
    form: Literal["libvirt", "qemu"],
    xml: Path | None,
    keys: OpeningKeys,
    expect_seal_digest: str | None,
    threads: int | None,
    no_durable: bool,
    as_json: bool,
) -> None:
    """Write a QEMU guest to a file for libvirt or QEMU.

    The file is neither encrypted nor compressed. It contains all of the guest memory; a zero page takes 9 bytes.

    FILE is created with mode 0600, and appears when it is complete. An existing FILE is never overwritten. An export
    that fails leaves nothing behind.
    """
    target: str | io.FileIO = file
    if file == _STREAM:
        target = binary_output()
        refuse_terminal(target, "the file is binary, and standard output is a terminal")
        if as_json:
            raise click.UsageError("--json prints to standard output, which is FILE already")
    else:
        refuse_inside(file, snapshot)
    arguments = asked(keys.arguments(snapshot))
    try:
        with progress_so_far("export") as show:
            report = export_file(
                snapshot,
                target,
                form,
                **arguments,
                threads=threads,
                expect_seal_digest=expect_seal_digest,
                durable=not no_durable,
                xml=xml,
                progress=show,
            )
    except BrokenPipeError:
        raise ReaderGoneError from None
    if as_json:
        click.echo(json.dumps({"written_bytes": report.written_bytes, "seconds": report.seconds}))
        return
    click.echo(
        f"vmsnap: exported {printable(report.machine.machine_type) or 'a guest'} in {report.seconds:.2f} s: "
        f"{human_size(report.written_bytes)}",
        err=True,
    )
