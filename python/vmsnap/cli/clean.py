"""``vmsnap clean``: removing unfinished snapshots of killed writers."""

from pathlib import Path

import click

import vmsnap
from vmsnap.cli.command import Command, argument
from vmsnap.cli.paths import PATH
from vmsnap.cli.targets import complete_directory
from vmsnap.cli.terminal import printable


@click.command(cls=Command, examples=["vmsnap clean .", "vmsnap clean /var/lib/snapshots"])
@argument(
    "parent",
    metavar="PARENT",
    description="The directory that contains the snapshots.",
    type=PATH,
    shell_complete=complete_directory,
)
def clean(parent: Path) -> None:
    """Remove unfinished snapshots that killed writers left.

    These are hidden directories in PARENT, named .vmsnap- and 16 hexadecimal digits. A directory that a living process
    uses is kept and reported.

    Nothing is removed on a file system that several hosts may write to (NFS, SMB, 9p, FUSE and others), because a lock
    does not show there whether another host uses a directory.
    """
    cleaned = vmsnap.clean(parent)
    for path in cleaned.removed:
        click.echo(f"removed {printable(str(path))}")
    for path in cleaned.held:
        click.echo(f"kept, in use: {printable(str(path))}", err=True)
