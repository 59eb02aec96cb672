"""``vmsnap cp``: a fragment out of a snapshot, or into one."""

import contextlib
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import click

from vmsnap import SnapshotWriter
from vmsnap.cli.dump import PIECE_BYTES, chunk_size_option
from vmsnap.cli.failure import CommandError
from vmsnap.cli.files import NamedFile
from vmsnap.cli.keys import OpeningKeys, WritingKeys, opening_options, recipient_options, threads_option
from vmsnap.cli.names import as_name
from vmsnap.cli.paths import TEXT_PATH
from vmsnap.cli.places import locate, pieces, write_all
from vmsnap.cli.streams import standard_input
from vmsnap.cli.terminal import printable, progress

_STREAM = "-"


def fragment_in(text: str) -> tuple[str, str] | None:
    """Return snapshot and path where `text` is SNAPSHOT:PATH with a snapshot that is there, None where it is a file."""
    # Folders and fragments may have colons in their names: the first folder counts.
    for position, character in enumerate(text):
        if character == ":" and os.path.isdir(text[:position]):
            return text[:position], text[position + 1 :]
    return None


def _new_fragment_in(text: str) -> tuple[str, str] | None:
    """Return snapshot and path where `text` is SNAPSHOT:PATH, whether the snapshot is there or not."""
    root, colon, path = text.partition(":")
    return fragment_in(text) or ((root, path) if root and colon else None)


def refuse_inside(target: str, root: str) -> None:
    """Refuse a file in a snapshot: in the one at `root`, or one that shows as such."""
    folder, snapshot = Path(target).absolute().parent.resolve(), Path(root).resolve()
    for parent in (folder, *folder.parents):
        if parent == snapshot or any((parent / name).exists() for name in ("enc_metadata", "vmsnap_manifest")):
            raise CommandError(f"{target}: is in the snapshot {parent}; what is copied into one is SNAPSHOT:PATH")


@contextmanager
def new_file(target: str, *, force: bool) -> Iterator[BinaryIO]:
    """Open a new file that is its owner's alone, and is removed again if the block fails.

    With `force` an existing file is replaced once the block has succeeded.
    """
    if force and os.path.lexists(target):
        if not stat.S_ISREG(os.lstat(target).st_mode):
            raise CommandError(f"{target}: is no plain file, so that --force does not replace it")
        descriptor, path = tempfile.mkstemp(prefix=".vmsnap-", dir=os.path.dirname(target) or ".")
    else:
        path = target
        descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        with NamedFile(descriptor, "wb", target) as file:
            yield file
        if path != target:
            _replace(path, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def _replace(path: str, target: str) -> None:
    try:
        os.replace(path, target)
    except OSError as error:
        raise OSError(error.errno, f"cannot be replaced: {error.strerror}", target) from None


@contextmanager
def new_snapshot(root: Path, keys: WritingKeys, *, threads: int | None) -> Iterator[SnapshotWriter]:
    """Make a snapshot in place, so that more can be copied into it; removed again if the block fails."""
    writer = keys.create(root, threads=threads)
    try:
        yield writer
    except BaseException:
        shutil.rmtree(writer.path, ignore_errors=True)
        if writer.path.exists():
            click.echo(f"vmsnap: half-written, and cannot be removed: {printable(str(root))}", err=True)
        raise


@contextmanager
def namespaces_for(writer: SnapshotWriter, names: list[str]) -> Iterator[SnapshotWriter]:
    """Enter namespaces one in the other, making those that are not there; if the block fails those are removed."""
    made: list[Path] = []
    try:
        for name in names:
            try:
                writer = writer.namespace(name)
            except FileNotFoundError:
                writer = writer.add_namespace(name)
                made.append(writer.path / writer.namespace_path)
        yield writer
    except BaseException:
        with contextlib.suppress(OSError):
            for folder in reversed(made):
                folder.rmdir()
        raise


def copy_out(root: str, path: str, target: str, keys: OpeningKeys, *, threads: int | None, force: bool) -> None:
    """Write a fragment to a file, or to standard output."""
    if not path:
        raise click.UsageError(f"name the fragment: {root}:PATH")
    path = as_name(path)
    namespace, name = locate(keys.open(root, threads=threads), path)
    if target != _STREAM and os.path.isdir(target):
        target = os.path.join(target, os.fsdecode(name.encode()))
    if target != _STREAM:
        refuse_inside(target, root)
    with (
        namespace.raw_fragment(name) as fragment,
        contextlib.nullcontext(sys.stdout.buffer) if target == _STREAM else new_file(target, force=force) as file,
        progress("copy", fragment.size) as advance,
    ):
        for piece in pieces(path, fragment, 0, fragment.size):
            write_all(file, piece)
            advance(len(piece))
        file.flush()


def copy_in(
    source: str, root: str, path: str, keys: OpeningKeys | WritingKeys, *, threads: int | None, chunk_size: int
) -> None:
    """Write a new fragment from a file, or from standard input."""
    if not path or path.endswith("/"):
        if source == _STREAM:
            raise click.UsageError("name the fragment that standard input becomes: SNAPSHOT:PATH")
        path += os.path.basename(source)
    *names, name = as_name(path).split("/")
    buffer = memoryview(bytearray(PIECE_BYTES))
    with standard_input() if source == _STREAM else NamedFile(source, "rb", source) as file:
        status = os.fstat(file.fileno())
        with (
            new_snapshot(Path(root), keys, threads=threads)
            if isinstance(keys, WritingKeys)
            else contextlib.nullcontext(keys.append(root, threads=threads)) as writer,
            namespaces_for(writer, names) as namespace,
            namespace.raw_fragment(name, chunk_size_bytes=chunk_size) as fragment,
            progress("copy", status.st_size if stat.S_ISREG(status.st_mode) else None) as advance,
        ):
            while count := file.readinto(buffer):
                fragment.write(buffer[:count])
                advance(count)


@click.command()
@click.argument("source", type=TEXT_PATH)
@click.argument("target", type=TEXT_PATH)
@opening_options
@recipient_options
@click.option("--force", is_flag=True, help="Replace an existing plain file outside of the snapshot.")
@click.option("--create", is_flag=True, help="Copy into a new snapshot, which -r and -R encrypt.")
@chunk_size_option
@threads_option
def cp(
    source: str,
    target: str,
    keys: OpeningKeys,
    recipients: tuple[str, ...] | None,
    force: bool,
    create: bool,
    chunk_size: int,
    threads: int | None,
) -> None:
    """Copy a fragment out of a snapshot into a file, or a file into a snapshot as a new fragment.

    \b
    vmsnap cp vm1:disks/sda sda.img     out; "-" is standard output
    vmsnap cp sda.img vm1:disks/sda     in; "-" is standard input

    A fragment is SNAPSHOT:PATH, anything else a file. On the way out, a target that exists is refused, unless it is a
    plain file and --force is given; in a folder the fragment's name is the file's. On the way in, namespaces are made
    as needed; a fragment is never written over another; where PATH is left out, or ends with a slash, the file's name
    is the fragment's.

    A copy that fails leaves nothing behind.
    """  # noqa: D301  the \\b is for click: it leaves the lines after it as they are
    outward, inward = fragment_in(source), fragment_in(target)
    if outward and inward:
        raise click.UsageError("both are fragments: one has to be a file, or - for standard input and output")
    if outward and (create or recipients is not None):
        raise click.UsageError("--create, -r and -R are for a copy into a snapshot")
    if outward:
        copy_out(*outward, target, keys, threads=threads, force=force)
        return
    inward = inward or _new_fragment_in(target)
    if inward:
        if force:
            raise click.UsageError("--force is for a copy out: a fragment is never written over another")
        if recipients is not None and not create:
            raise click.UsageError("recipients are for a new snapshot: --create")
        new = keys.for_new(recipients) if create else keys
        copy_in(source, *inward, new, threads=threads, chunk_size=chunk_size)
        return
    if missing := _new_fragment_in(source):
        raise CommandError(f"{missing[0]}: there is no such snapshot")
    raise click.UsageError("one of both has to be a fragment: SNAPSHOT:PATH")
