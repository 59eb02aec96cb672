"""``vmsnap ls``: the fragments of a snapshot."""

import json
from dataclasses import asdict

import click

from vmsnap.cli.command import Command
from vmsnap.cli.entry import entries
from vmsnap.cli.keys import OpeningKeys, opening_options
from vmsnap.cli.location import Snapshot, store_options
from vmsnap.cli.options import json_option
from vmsnap.cli.targets import enter, expecting_snapshot, namespace_argument, snapshot_argument
from vmsnap.cli.terminal import print_table, to_terminal


@click.command(
    cls=Command, examples=["vmsnap ls vm1", "vmsnap ls vm1 disks -l", "vmsnap ls vm1 --json | jq '.[].path'"]
)
@snapshot_argument
@namespace_argument
@opening_options
@click.option("-l", "--long", is_flag=True, help="Also show the stored size, the chunk size and the time of each.")
@json_option
@store_options
def ls(snapshot: Snapshot, path: str, keys: OpeningKeys, long: bool, as_json: bool) -> None:
    r"""List the fragments of a snapshot with their sizes.

    If the output is not a terminal, each line is the path and the size in bytes, separated by a tab. -l adds the stored
    size, the chunk size ("-" in a plain snapshot) and the time of modification in UTC. Characters that cannot be
    printed are escaped, as in \x1b; --json has exact names and all columns.
    """
    # All before the first line is printed: a list that an error cuts off looks complete to the next command in a pipe.
    with expecting_snapshot(snapshot):
        found = entries(enter(keys.open(snapshot), path), snapshot)
    if as_json:
        click.echo(json.dumps([asdict(entry) for entry in found], indent=2))
    elif not to_terminal():
        click.echo("".join(entry.line(long) for entry in found), nl=False)
    elif long:
        header = ("size", "stored", "chunk", "modified", "path")
        print_table((entry.row(long) for entry in found), header=header, right=frozenset({0, 1, 2}))
    else:
        print_table((entry.row(long) for entry in found), right=frozenset({0}))
