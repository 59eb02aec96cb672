"""``vmsnap ls`` and ``vmsnap cat``: looking into a snapshot."""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import click

from vmsnap import FragmentReader, SnapshotReader
from vmsnap.cli.dump import PIECE_BYTES
from vmsnap.cli.failure import CommandError
from vmsnap.cli.keyfile import key_file_option
from vmsnap.cli.terminal import print_table, printable


def walk(snapshot: SnapshotReader) -> Iterator[tuple[str, FragmentReader]]:
    """Give every fragment of a snapshot with its path, those of a namespace before those of the namespaces in it."""
    pending = [snapshot]
    while pending:
        reader = pending.pop()
        prefix = f"{reader.namespace_path}/" if reader.namespace_path else ""
        for name in reader.list_fragments():
            with reader.raw_fragment(name) as fragment:
                yield prefix + name, fragment
        pending += [reader.namespace(name) for name in reversed(reader.list_namespaces())]


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@key_file_option
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list of objects.")
def ls(directory: Path, key: bytes | None, as_json: bool) -> None:
    r"""List the fragments of a snapshot and their sizes in bytes.

    Where the output is no terminal, a tab is between path and size. What cannot be printed in a name is shown escaped,
    as in \x1b; --json gives the exact names.
    """
    # All before the first line is printed: a list that an error cuts off looks whole to the next command in a pipe.
    fragments = [
        {
            "path": path,
            "size": fragment.size,
            "stored_size": fragment.stored_size,
            "chunk_size_bytes": fragment.chunk_size_bytes,
        }
        for path, fragment in walk(SnapshotReader(directory, key=key))
    ]
    if as_json:
        click.echo(json.dumps(fragments, indent=2))
        return
    if sys.stdout.isatty():
        print_table(((printable(str(f["path"])), f"{f['size']:,}") for f in fragments), right=frozenset({1}))
    else:
        click.echo("".join(f"{printable(str(f['path']))}\t{f['size']}\n" for f in fragments), nl=False)


@click.command()
@click.argument("directory", metavar="DIR", type=click.Path(path_type=Path))
@click.argument("path", metavar="PATH")
@key_file_option
@click.option("--offset", type=click.IntRange(min=0), default=0, help="Begin at this byte.")
@click.option("--size", type=click.IntRange(min=0), help="Bytes to write. [default: all to the end]")
def cat(directory: Path, path: str, key: bytes | None, offset: int, size: int | None) -> None:
    """Write a fragment, or a part of it, to standard output.

    PATH is the fragment's, with the namespaces it is in: a/b/name.
    """
    *namespaces, name = path.split("/")
    reader = SnapshotReader(directory, key=key)
    for namespace in namespaces:
        reader = reader.namespace(namespace)
    output = sys.stdout.buffer
    buffer = memoryview(bytearray(PIECE_BYTES))
    with reader.raw_fragment(name) as fragment:
        end = fragment.size if size is None else min(fragment.size, offset + size)
        while offset < end:
            count = fragment.readinto_at(offset, buffer[: end - offset])
            if not count:
                raise CommandError(f"{path}: became shorter while it was read")
            output.write(buffer[:count])
            offset += count
    output.flush()
