"""``vmsnap cat``: the bytes of a fragment, to standard output."""

import sys

import click

from vmsnap.cli.command import Command
from vmsnap.cli.io import batches, write_all
from vmsnap.cli.keys import OpeningKeys, opening_options
from vmsnap.cli.location import Snapshot, store_options
from vmsnap.cli.targets import fragment_argument, locate, snapshot_argument


@click.command(
    cls=Command, examples=["vmsnap cat vm1 disks/sda | sha256sum", "vmsnap cat vm1 mem --offset 4096 --size 512"]
)
@snapshot_argument
@fragment_argument
@opening_options
@click.option("--offset", type=click.IntRange(min=0), metavar="N", default=0, help="Start at this byte.  [default: 0]")
@click.option("--size", type=click.IntRange(min=0), metavar="N", help="Bytes to write.  [default: all up to the end]")
@store_options
def cat(snapshot: Snapshot, path: str, keys: OpeningKeys, offset: int, size: int | None) -> None:
    """Write a fragment, or a range of it, to standard output.

    Only the chunks in the range are read and decrypted. A range that reaches beyond the end is cut off there.
    """
    namespace, name = locate(keys.open(snapshot), path)
    output = sys.stdout.buffer
    with namespace.raw_fragment(name) as fragment:
        end = fragment.size if size is None else min(fragment.size, offset + size)
        for batch in batches(path, fragment, offset, end):
            write_all(output, batch)
        if offset > fragment.size:
            click.echo(
                f"vmsnap: warning: offset {offset} is beyond the end of {path}, which has {fragment.size} bytes",
                err=True,
            )
    output.flush()
