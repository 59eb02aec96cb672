"""DIR and PATH as commands take them: how they lead into a snapshot, and what a shell may complete them to."""

from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import BinaryIO

import click
from click.shell_completion import CompletionItem

import vmsnap
from vmsnap import FragmentReader, SnapshotReader
from vmsnap.cli.dump import PIECE_BYTES
from vmsnap.cli.failure import CommandError
from vmsnap.cli.names import NAME
from vmsnap.cli.paths import PATH


def enter(snapshot: SnapshotReader, path: str) -> SnapshotReader:
    """Return the reader of the namespace at a path; the empty path is the root's."""
    return _follow(snapshot, path.split("/") if path else [])


def locate(snapshot: SnapshotReader, path: str) -> tuple[SnapshotReader, str]:
    """Return the namespace that the fragment at a path is in, and its name there."""
    *namespaces, name = path.split("/")
    return _follow(snapshot, namespaces), name


def _follow(snapshot: SnapshotReader, names: list[str]) -> SnapshotReader:
    for name in names:
        snapshot = snapshot.namespace(name)
    return snapshot


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


def pieces(path: str, fragment: FragmentReader, offset: int, end: int) -> Iterator[memoryview]:
    """Give the bytes of a fragment, or of a part of it, in pieces that are overwritten by the next."""
    buffer = memoryview(bytearray(PIECE_BYTES))
    while offset < end:
        count = fragment.readinto_at(offset, buffer[: end - offset])
        if not count:
            raise CommandError(f"{path}: became shorter while it was read")
        yield buffer[:count]
        offset += count


def write_all(file: BinaryIO, data: memoryview) -> None:
    """Write all of `data`: a file without a buffer, such as standard output under PYTHONUNBUFFERED, may take a part."""
    while data:
        data = data[file.write(data) :]


def times(root: Path) -> dict[str, datetime | None]:
    """Return when each fragment was last written to."""
    return {fragment.path: fragment.modified for fragment in vmsnap.inspect(root).fragments}


def _complete_folder(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    return [CompletionItem(begun, type="dir")]


def _complete(context: click.Context, begun: str, *, namespaces: bool) -> list[CompletionItem]:
    """Return the paths in DIR that begin so. Names show without the key, so that none is asked for."""
    try:
        found = vmsnap.inspect(context.params["directory"])
    except (vmsnap.VmsnapError, OSError, KeyError):
        return []
    paths = found.namespaces if namespaces else [fragment.path for fragment in found.fragments]
    # A line of the shell's protocol ends where a name with a newline does not.
    return [CompletionItem(path) for path in paths if path.startswith(begun) and path.isprintable()]


def _complete_fragment(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    return _complete(context, begun, namespaces=False)


def _complete_namespace(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    return _complete(context, begun, namespaces=True)


directory_argument = click.argument("directory", metavar="DIR", type=PATH, shell_complete=_complete_folder)
fragment_argument = click.argument("path", metavar="PATH", type=NAME, shell_complete=_complete_fragment)
namespace_argument = click.argument("path", metavar="[PATH]", type=NAME, default="", shell_complete=_complete_namespace)
namespace_option = click.option(
    "--namespace",
    metavar="PATH",
    type=NAME,
    default="",
    shell_complete=_complete_namespace,
    help="The namespace that the memory is in, where it is not the snapshot itself.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
