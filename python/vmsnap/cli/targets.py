"""The arguments SNAPSHOT and PATH: opening the snapshot, namespace or fragment, and completing them in a shell."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime

import click
from click.shell_completion import CompletionItem

import vmsnap
from vmsnap import CorruptSnapshotError, FragmentReader, GuestMemory, SnapshotReader
from vmsnap.cli.command import argument
from vmsnap.cli.failure import CommandError
from vmsnap.cli.keys import OpeningKeys
from vmsnap.cli.location import SNAPSHOT, Snapshot
from vmsnap.cli.names import NAME
from vmsnap.cli.terminal import printable
from vmsnap.inspection import is_marked
from vmsnap.location import is_url

_MARKERS = ("enc_metadata", "vmsnap_manifest")
_MEMORY_METADATA = "mem_metadata"


def doubt(location: Snapshot) -> None:
    """Report on standard error that a directory may not be a snapshot, if it has no file that only snapshots have."""
    if not is_marked(location):
        text = f"{printable(str(location))} has neither {_MARKERS[0]} nor {_MARKERS[1]}: it is a plain snapshot that "
        click.echo(f"vmsnap: warning: {text}is not sealed, or not a snapshot", err=True)


@contextmanager
def expecting_snapshot(location: Snapshot) -> Iterator[None]:
    """Report an error in the block as "not a snapshot" if the directory has no file that only snapshots have."""
    try:
        yield
    except CorruptSnapshotError as error:
        if is_marked(location):
            raise
        raise CorruptSnapshotError(
            f"{location} is not a vmsnap snapshot: it contains neither {' nor '.join(_MARKERS)}, "
            f"and it has other contents: {error}"
        ) from error


def enter(snapshot: SnapshotReader, path: str) -> SnapshotReader:
    """Return the reader of the namespace at a path. The empty path is the snapshot itself."""
    return _follow(snapshot, path.split("/") if path else [])


def locate(snapshot: SnapshotReader, path: str) -> tuple[SnapshotReader, str]:
    """Return the namespace that contains the fragment at a path, and the fragment's name in it."""
    *namespaces, name = path.split("/")
    return _follow(snapshot, namespaces), name


def _follow(snapshot: SnapshotReader, names: list[str]) -> SnapshotReader:
    for name in names:
        snapshot = snapshot.namespace(name)
    return snapshot


def open_memory(location: Snapshot, namespace: str, keys: OpeningKeys, threads: int | None) -> GuestMemory:
    """Open the guest memory of a snapshot, or of a namespace in it."""
    with expecting_snapshot(location):
        reader = enter(keys.open(location, threads=threads), namespace)
        if _MEMORY_METADATA not in reader.list_fragments():
            where = f"namespace {namespace} of {location}" if namespace else str(location)
            raise CommandError(
                f"{where} contains no guest memory: it has no fragment {_MEMORY_METADATA}"
                + (
                    ""
                    if is_marked(location)
                    else f", and it may not be a snapshot: it has no {' and no '.join(_MARKERS)}"
                )
            )
        return reader.memory()


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


def times(location: Snapshot) -> dict[str, datetime | None]:
    """Return when each fragment was last written."""
    return {fragment.path: fragment.modified for fragment in vmsnap.inspect(location).fragments}


def complete_directory(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete to directories."""
    return [CompletionItem(begun, type="dir")]


def complete_file(_context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    """Complete to files and directories."""
    return [CompletionItem(begun, type="file")]


def _complete(context: click.Context, begun: str, *, namespaces: bool) -> list[CompletionItem]:
    """Return the paths in SNAPSHOT with this beginning. Names are visible without the key, so no key is asked for.

    Nothing is asked of an object store: the shell would wait for it.
    """
    try:
        if is_url(context.params["snapshot"]):
            return []
        found = vmsnap.inspect(context.params["snapshot"])
    except (vmsnap.VmsnapError, OSError, KeyError):
        return []
    paths = found.namespaces if namespaces else [fragment.path for fragment in found.fragments]
    # The shell's protocol has one candidate a line, so a name with a newline cannot be offered.
    return [CompletionItem(path) for path in paths if path.startswith(begun) and path.isprintable()]


def _complete_fragment(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    return _complete(context, begun, namespaces=False)


def _complete_namespace(context: click.Context, _parameter: click.Parameter, begun: str) -> list[CompletionItem]:
    return _complete(context, begun, namespaces=True)


snapshot_argument = argument(
    "snapshot",
    metavar="SNAPSHOT",
    description="The snapshot: a directory, an archive, or a URL such as s3://bucket/vm1.",
    type=SNAPSHOT,
    shell_complete=complete_file,
)
new_snapshot_argument = argument(
    "new_snapshot",
    metavar="NEW-SNAPSHOT",
    description="The snapshot to create. It must not exist, but its parent directory must. Or a URL, such as "
    "s3://bucket/vm1.",
    type=SNAPSHOT,
    shell_complete=complete_file,
)
fragment_argument = argument(
    "path",
    metavar="PATH",
    description="The fragment, with the namespaces that contain it, as in pci/00:1f.2/state.",
    type=NAME,
    shell_complete=_complete_fragment,
)
namespace_argument = argument(
    "path",
    metavar="[PATH]",
    description="The namespace. Without it, the whole snapshot.",
    type=NAME,
    default="",
    shell_complete=_complete_namespace,
)
namespace_option = click.option(
    "--namespace",
    metavar="PATH",
    type=NAME,
    default="",
    shell_complete=_complete_namespace,
    help="The namespace that contains the guest memory.  [default: the snapshot itself]",
)
