"""``vmsnap rm``: removing a snapshot."""

import sys

import click

import vmsnap
from vmsnap.cli.command import Command
from vmsnap.cli.failure import CommandError
from vmsnap.cli.location import Snapshot, new_store_options
from vmsnap.cli.targets import snapshot_argument
from vmsnap.cli.terminal import human_size, printable


@click.command(cls=Command, examples=["vmsnap rm vm1", "vmsnap rm s3://bucket/vm1 --yes"])
@snapshot_argument
@click.option("-y", "--yes", is_flag=True, help="Do not ask.")
@new_store_options
def rm(snapshot: Snapshot, yes: bool) -> None:
    """Remove a snapshot.

    A reader finds the whole snapshot or none: a directory gets another name first, and in an object store the manifest
    is removed first. No key is needed. A directory that has neither enc_metadata nor vmsnap_manifest is refused,
    because it may be something else.

    The remains of a push that was killed are not a snapshot: "vmsnap clean" removes them.
    """
    if not yes:
        found = vmsnap.inspect(snapshot)
        size = human_size(sum(fragment.stored_size for fragment in found.fragments))
        count = len(found.fragments)
        told = f"{printable(str(snapshot))}, {count} fragment{'' if count == 1 else 's'} with {size}"
        if not sys.stdin.isatty():
            raise CommandError(f"there is no terminal to ask on: --yes removes {told}")
        if not click.confirm(f"Remove {told}?", err=True):
            raise CommandError("nothing was removed")
    vmsnap.remove(snapshot)
