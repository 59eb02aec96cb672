"""``vmsnap get``: a fragment out of a snapshot, into a file."""

import contextlib
import os
import sys

import click

from vmsnap.cli.command import Command, argument
from vmsnap.cli.io import batches, new_file, refuse_inside, write_all
from vmsnap.cli.keys import OpeningKeys, opening_options
from vmsnap.cli.location import Snapshot, store_options
from vmsnap.cli.options import force_option, threads_option
from vmsnap.cli.paths import TEXT_PATH
from vmsnap.cli.targets import complete_file, fragment_argument, locate, snapshot_argument
from vmsnap.cli.terminal import progress

_STANDARD_OUTPUT = "-"


@click.command(
    cls=Command,
    examples=[
        "vmsnap get vm1 disks/sda",
        "vmsnap get vm1 disks/sda sda.img --force",
        "vmsnap get vm1 mem - | sha256sum",
    ],
)
@snapshot_argument
@fragment_argument
@argument(
    "file",
    metavar="[FILE]",
    description='The file to write, a directory to put it into, or "-" for standard output.  '
    "[default: the fragment's name, in the current directory]",
    type=TEXT_PATH,
    required=False,
    shell_complete=complete_file,
)
@opening_options
@force_option
@threads_option
@store_options
def get(snapshot: Snapshot, path: str, file: str | None, keys: OpeningKeys, force: bool, threads: int | None) -> None:
    """Copy a fragment out of a snapshot into a file.

    FILE is created with mode 0600. An existing FILE is refused, unless it is a regular file and --force is given.
    Files inside a snapshot are never written. A copy that fails leaves nothing behind.
    """
    namespace, name = locate(keys.open(snapshot, threads=threads), path)
    target = "." if file is None else file
    if target != _STANDARD_OUTPUT:
        if os.path.isdir(target):
            # In every locale the file has the name whose bytes are the fragment's.
            target = os.path.join("" if file is None else target, os.fsdecode(name.encode()))
        refuse_inside(target, snapshot)
    with (
        namespace.raw_fragment(name) as fragment,
        contextlib.nullcontext(sys.stdout.buffer)
        if target == _STANDARD_OUTPUT
        else new_file(target, force=force) as output,
        progress("get", fragment.size) as advance,
    ):
        for batch in batches(path, fragment, 0, fragment.size):
            write_all(output, batch)
            advance(len(batch))
        output.flush()
