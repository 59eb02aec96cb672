"""``vmsnap clean``: removing unfinished snapshots of killed writers."""

import re
from datetime import timedelta

import click

import vmsnap
from vmsnap.cli.command import Command, StoreOption, argument
from vmsnap.cli.location import SNAPSHOT, Snapshot, new_store_options
from vmsnap.cli.targets import complete_directory
from vmsnap.cli.terminal import printable

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class _Age(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.4 only
    """A time such as 12h or 2d."""

    name = "age"

    def convert(self, value: object, parameter: click.Parameter | None, context: click.Context | None) -> timedelta:
        if isinstance(value, timedelta):
            return value
        found = re.fullmatch(r"([0-9]{1,6})([smhd])", str(value))
        if not found:
            self.fail(f"{value!r} is not a time such as 90m, 12h or 2d", parameter, context)
        return timedelta(seconds=int(found[1]) * _UNITS[found[2]])


@click.command(cls=Command, examples=["vmsnap clean .", "vmsnap clean s3://bucket/fleet --older-than 2d"])
@argument(
    "parent",
    metavar="PARENT",
    description="The directory that contains the snapshots, or a URL.",
    type=SNAPSHOT,
    shell_complete=complete_directory,
)
@click.option(
    "--older-than",
    cls=StoreOption,
    type=_Age(),
    metavar="AGE",
    default="1d",
    show_default=True,
    help="Keep everything to which something was added within this time: 90m, 12h, 2d.",
)
@new_store_options
def clean(parent: Snapshot, older_than: timedelta) -> None:
    """Remove unfinished snapshots that killed writers left.

    These are hidden directories in PARENT, named .vmsnap- and 16 hexadecimal digits. A directory that a living process
    uses is kept and reported.

    Nothing is removed on a file system that several hosts may write to (NFS, SMB, 9p, FUSE and others), because a lock
    does not show there whether another host uses a directory.

    At a URL, and everywhere below it, these are the objects of snapshots that were begun and never completed. Whether
    another host still writes one cannot be seen, so one that is younger than --older-than is kept and reported.
    """
    cleaned = vmsnap.clean(parent, older_than=older_than)
    for path in cleaned.removed:
        click.echo(f"removed {printable(str(path))}")
    for path in cleaned.held:
        click.echo(f"kept, in use: {printable(str(path))}", err=True)
