"""``vmsnap ls`` and ``vmsnap cat``: the fragments of a snapshot, and their bytes."""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from vmsnap import SnapshotReader
from vmsnap.cli.keys import OpeningKeys, opening_options
from vmsnap.cli.places import (
    directory_argument,
    enter,
    fragment_argument,
    json_option,
    locate,
    namespace_argument,
    pieces,
    times,
    walk,
    write_all,
)
from vmsnap.cli.terminal import human_size, iso_time, print_table, printable, to_terminal


@dataclass(frozen=True)
class Entry:
    """A fragment as lists show it; the fields are what ``--json`` prints."""

    path: str
    size: int
    stored_size: int
    chunk_size_bytes: int | None
    modified: str | None

    def line(self, long: bool) -> str:
        """Return the line for a program: exact, with tabs between the columns."""
        columns = [printable(self.path), self.size]
        if long:
            columns += [self.stored_size, self.chunk_size_bytes or "-", self.modified or "-"]
        return "\t".join(map(str, columns)) + "\n"

    def row(self, long: bool) -> list[str]:
        """Return the cells for a person."""
        path = printable(self.path)
        if not long:
            return [f"{self.size:,}", path]
        chunk = "-" if self.chunk_size_bytes is None else human_size(self.chunk_size_bytes)
        return [human_size(self.size), human_size(self.stored_size), chunk, self.modified or "-", path]


def entries(snapshot: SnapshotReader) -> list[Entry]:
    """Return all fragments in a namespace, and in those within it, sorted."""
    modified = times(snapshot.path)
    return [
        Entry(path, fragment.size, fragment.stored_size, fragment.chunk_size_bytes, iso_time(modified.get(path)))
        for path, fragment in walk(snapshot)
    ]


@click.command()
@directory_argument
@namespace_argument
@opening_options
@click.option("-l", "--long", is_flag=True, help="Show stored sizes, chunk sizes and times as well.")
@json_option
def ls(directory: Path, path: str, keys: OpeningKeys, long: bool, as_json: bool) -> None:
    r"""List the fragments of a snapshot, or of the namespace PATH in it, and their sizes in bytes.

    Where the output is no terminal, a line is the path and the size with a tab between; with -l also the stored size,
    the chunk size ("-" in a plain snapshot) and the time of modification in UTC. What cannot be printed in a name is
    shown escaped, as in \x1b; --json gives the exact names, and everything that -l does.
    """
    # All before the first line is printed: a list that an error cuts off looks whole to the next command in a pipe.
    found = entries(enter(keys.open(directory), path))
    if as_json:
        click.echo(json.dumps([asdict(entry) for entry in found], indent=2))
    elif not to_terminal():
        click.echo("".join(entry.line(long) for entry in found), nl=False)
    elif long:
        header = ("size", "stored", "chunk", "modified", "path")
        print_table((entry.row(long) for entry in found), header=header, right=frozenset({0, 1, 2}))
    else:
        print_table((entry.row(long) for entry in found), right=frozenset({0}))


@click.command()
@directory_argument
@fragment_argument
@opening_options
@click.option("--offset", type=click.IntRange(min=0), default=0, help="Begin at this byte.")
@click.option("--size", type=click.IntRange(min=0), help="Bytes to write. [default: all to the end]")
def cat(directory: Path, path: str, keys: OpeningKeys, offset: int, size: int | None) -> None:
    """Write a fragment, or a part of it, to standard output.

    PATH is the fragment's, with the namespaces it is in: a/b/name.
    """
    namespace, name = locate(keys.open(directory), path)
    output = sys.stdout.buffer
    with namespace.raw_fragment(name) as fragment:
        end = fragment.size if size is None else min(fragment.size, offset + size)
        for piece in pieces(path, fragment, offset, end):
            write_all(output, piece)
    output.flush()
