"""``vmsnap put``: a file into a snapshot, as a new fragment."""

import contextlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click

from vmsnap import SnapshotWriter
from vmsnap.cli.command import Command, argument
from vmsnap.cli.files import NamedFile
from vmsnap.cli.io import COPY_BATCH_BYTES
from vmsnap.cli.keys import OpeningKeys, WritingKeys, opening_options, recipient_options
from vmsnap.cli.location import Snapshot
from vmsnap.cli.names import NAME, as_name
from vmsnap.cli.options import chunk_size_option, threads_option
from vmsnap.cli.paths import TEXT_PATH
from vmsnap.cli.streams import standard_input
from vmsnap.cli.targets import complete_file, snapshot_argument
from vmsnap.cli.terminal import printable, progress
from vmsnap.removal import remove_snapshot

_STANDARD_INPUT = "-"
_ARCHIVE_SUFFIX = ".vmsnap.tar"


@contextmanager
def new_snapshot(location: Snapshot, keys: WritingKeys, *, threads: int | None) -> Iterator[SnapshotWriter]:
    """Create a snapshot in place, so that fragments can be added later. It is removed if the block fails."""
    writer = keys.create(location, threads=threads)
    try:
        yield writer
    except BaseException:
        try:
            remove_snapshot(writer.location)
        except FileNotFoundError:
            pass
        except OSError:
            click.echo(f"vmsnap: cannot remove the incomplete snapshot {printable(str(location))}", err=True)
        raise


@contextmanager
def namespaces_for(writer: SnapshotWriter, names: list[str]) -> Iterator[SnapshotWriter]:
    """Enter nested namespaces, creating those that do not exist. The created ones are removed if the block fails."""
    made: list[Path] = []
    try:
        for name in names:
            try:
                writer = writer.namespace(name)
            except FileNotFoundError:
                writer = writer.add_namespace(name)
                made.append(Path(writer.location, writer.namespace_path))
        yield writer
    except BaseException:
        with contextlib.suppress(OSError):
            for directory in reversed(made):
                directory.rmdir()
        raise


def _fragment_path(file: str, path: str | None) -> str:
    """Return the path of the new fragment. A path that is left out or ends with a slash gets the name of the file."""
    if path is not None and not path.endswith("/"):
        if not path:
            raise click.UsageError("PATH is empty: name the fragment")
        return path
    if file == _STANDARD_INPUT:
        raise click.UsageError("standard input has no name: name the fragment, as in vmsnap put - SNAPSHOT PATH")
    return (path or "") + as_name(os.path.basename(file))


@click.command(
    cls=Command,
    examples=[
        "vmsnap put sda.img vm1 disks/sda",
        "vmsnap put sda.img vm2 disks/sda --create --key-file vm.key",
        "zcat sda.gz | vmsnap put - vm1 disks/sda",
    ],
)
@argument(
    "file",
    metavar="FILE",
    description='The file to store, a pipe, or "-" for standard input.',
    type=TEXT_PATH,
    shell_complete=complete_file,
)
@snapshot_argument
@argument(
    "path",
    metavar="[PATH]",
    description="The new fragment, with its namespaces. If PATH is left out or ends with a slash, the fragment gets "
    "the file's name.",
    type=NAME,
    required=False,
)
@opening_options
@recipient_options
@click.option("--create", is_flag=True, help="Create SNAPSHOT first. -r and -R, or a key option, encrypt it.")
@chunk_size_option
@threads_option
def put(
    file: str,
    snapshot: Snapshot,
    path: str | None,
    keys: OpeningKeys,
    recipients: tuple[str, ...] | None,
    create: bool,
    chunk_size: int,
    threads: int | None,
) -> None:
    """Copy a file into a snapshot as a new fragment.

    Namespaces are created as needed. A fragment is never overwritten, and nothing can be added to a sealed snapshot.
    A copy that fails leaves nothing behind.

    A snapshot is created only with --create, so a mistyped name is an error. More fragments can be added to the new
    snapshot, until "vmsnap seal" seals it.
    """
    if recipients is not None and not create:
        raise click.UsageError("-r and -R are for a new snapshot: add --create")
    if create and str(snapshot).endswith(_ARCHIVE_SUFFIX):
        raise click.UsageError(
            f"--create makes a directory, so that more can be added, and {_ARCHIVE_SUFFIX} is for one file: choose "
            "another name, then vmsnap seal and vmsnap pack"
        )
    *names, name = _fragment_path(file, path).split("/")
    buffer = memoryview(bytearray(COPY_BATCH_BYTES))
    with standard_input() if file == _STANDARD_INPUT else NamedFile(file, "rb", file) as source:
        status = os.fstat(source.fileno())
        with (
            new_snapshot(snapshot, keys.for_new(recipients), threads=threads)
            if create
            else contextlib.nullcontext(keys.append(snapshot, threads=threads)) as writer,
            namespaces_for(writer, names) as namespace,
            namespace.raw_fragment(name, chunk_size_bytes=chunk_size) as fragment,
            progress("put", status.st_size if stat.S_ISREG(status.st_mode) else None) as advance,
        ):
            while count := source.readinto(buffer):
                fragment.write(buffer[:count])
                advance(count)
