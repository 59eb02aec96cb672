"""``vmsnap pack`` and ``vmsnap unpack``: a snapshot as one file, or through a pipe."""

from pathlib import Path
from typing import Any

import click

import vmsnap
from vmsnap import SealId
from vmsnap.cli.command import Command, argument
from vmsnap.cli.io import refuse_terminal
from vmsnap.cli.keys import OpeningKeys, opening_options
from vmsnap.cli.location import Snapshot
from vmsnap.cli.options import expect_seal_digest_option, no_durable_option, threads_option
from vmsnap.cli.paths import TEXT_PATH
from vmsnap.cli.streams import ReaderGoneError, binary_input, binary_output
from vmsnap.cli.targets import complete_directory, complete_file, snapshot_argument

_STREAM = "-"


def _tell(seal: SealId) -> None:
    click.echo(f"vmsnap: seal digest: {seal.seal_digest.hex()}", err=True)


@click.command(
    cls=Command,
    examples=["vmsnap pack vm1 vm1.vmsnap.tar", "vmsnap pack vm1 - | ssh host 'cat > vm1.vmsnap.tar'"],
)
@snapshot_argument
@argument(
    "file",
    metavar="FILE",
    description='The archive to create, or "-" for standard output. The name usually ends in .vmsnap.tar.',
    type=TEXT_PATH,
    shell_complete=complete_file,
)
@opening_options
@expect_seal_digest_option
@threads_option
@no_durable_option
def pack(
    snapshot: Snapshot,
    file: str,
    keys: OpeningKeys,
    expect_seal_digest: str | None,
    threads: int | None,
    no_durable: bool,
) -> None:
    """Pack a sealed snapshot into one file.

    The file is an archive: an uncompressed tar file, which every command that reads a snapshot accepts as SNAPSHOT. It
    has the seal digest of the snapshot, which is printed on standard error. Packing a snapshot again gives the same
    bytes. Each fragment is checked while it is copied.

    FILE appears when it is complete. A file that exists is never overwritten. SNAPSHOT stays as it is.
    """
    more: dict[str, Any] = {"threads": threads, "durable": not no_durable, "expect_seal_digest": expect_seal_digest}
    if file != _STREAM:
        _tell(vmsnap.pack(snapshot, file, **keys.arguments(snapshot), **more))
        return
    output = binary_output()
    refuse_terminal(output, "an archive is binary, and standard output is a terminal")
    try:
        _tell(vmsnap.pack(snapshot, output, **keys.arguments(snapshot), **more))
    except BrokenPipeError:
        raise ReaderGoneError from None


@click.command(
    cls=Command,
    examples=["vmsnap unpack vm1.vmsnap.tar vm1", "ssh host cat vm1.vmsnap.tar | vmsnap unpack - vm1"],
)
@argument(
    "file",
    metavar="FILE",
    description='The archive, a pipe, or "-" for standard input.',
    type=TEXT_PATH,
    shell_complete=complete_file,
)
@argument(
    "directory",
    metavar="DIRECTORY",
    description="The directory to create. It must not exist, but its parent directory must.",
    type=TEXT_PATH,
    shell_complete=complete_directory,
)
@opening_options
@expect_seal_digest_option
@threads_option
@no_durable_option
def unpack(
    file: str,
    directory: str,
    keys: OpeningKeys,
    expect_seal_digest: str | None,
    threads: int | None,
    no_durable: bool,
) -> None:
    """Unpack an archive into a directory.

    DIRECTORY is the snapshot that was packed, byte for byte, and has the same seal digest, which is printed on standard
    error. Each fragment is checked while it is copied.

    DIRECTORY appears when it is complete. If unpacking fails, nothing is left behind.
    """
    more: dict[str, Any] = {"threads": threads, "durable": not no_durable, "expect_seal_digest": expect_seal_digest}
    if file != _STREAM and not Path(file).is_fifo():
        _tell(vmsnap.unpack(file, directory, **keys.arguments(Path(file)), **more))
        return
    with binary_input() if file == _STREAM else open(file, "rb", buffering=0) as source:
        refuse_terminal(source, "an archive is binary, and standard input is a terminal")
        _tell(vmsnap.unpack(source, directory, **keys.arguments(None), **more))
