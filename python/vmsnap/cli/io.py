"""Reading and writing files: new files that appear complete or not at all, and fragments batch by batch."""

import contextlib
import io
import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import click

import vmsnap
from vmsnap import FragmentReader
from vmsnap.cli.failure import CommandError
from vmsnap.cli.files import NamedFile
from vmsnap.cli.location import Snapshot, local_path

# Fits a second-level cache, and holds enough chunks for every thread.
COPY_BATCH_BYTES = 1 << 20


def batches(path: str, fragment: FragmentReader, offset: int, end: int) -> Iterator[memoryview]:
    """Give the bytes of a fragment from `offset` to `end`. Each batch overwrites the one before it."""
    buffer = memoryview(bytearray(COPY_BATCH_BYTES))
    while offset < end:
        count = fragment.readinto_at(offset, buffer[: end - offset])
        if not count:
            raise CommandError(f"{path}: the fragment became shorter while it was read")
        yield buffer[:count]
        offset += count


def refuse_terminal(stream: io.FileIO, stated: str) -> None:
    """Refuse a terminal as the place of binary data."""
    if stream.isatty():
        raise click.UsageError(f"{stated}: redirect it, or use a pipe")


def write_all(file: BinaryIO, data: memoryview) -> None:
    """Write all of `data`. An unbuffered file, such as standard output under PYTHONUNBUFFERED, may accept less."""
    while data:
        data = data[file.write(data) :]


def refuse_inside(target: str, location: Snapshot) -> None:
    """Refuse a file in a snapshot, or one that is a snapshot: that at `location`, or any that can be recognized."""
    if os.path.isfile(target) and _is_archive(target):
        raise CommandError(f"{target} is a snapshot in one file, which nothing overwrites")
    directory = Path(target).absolute().parent.resolve()
    snapshot = at.resolve() if (at := local_path(location)) else None
    for parent in (directory, *directory.parents):
        if parent == snapshot or any((parent / name).exists() for name in ("enc_metadata", "vmsnap_manifest")):
            raise CommandError(f"{target} is in the snapshot {parent}; add fragments with vmsnap put")


def _is_archive(path: str) -> bool:
    try:
        return vmsnap.inspect(path).sealed
    except (vmsnap.VmsnapError, OSError):
        return False


@contextmanager
def new_file(target: str, *, force: bool) -> Iterator[BinaryIO]:
    """Open a new file with mode 0600, and remove it if the block fails.

    With `force` an existing regular file is replaced once the block has succeeded.
    """
    if force and (mode := _mode_of(target)) is not None:
        if not stat.S_ISREG(mode):
            raise CommandError(f"{target} is not a regular file, and --force overwrites only regular files")
        descriptor, path = tempfile.mkstemp(prefix=".vmsnap-", dir=os.path.dirname(target) or ".")
    else:
        path = target
        try:
            descriptor = os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
        except FileExistsError as error:
            raise CommandError(f"{target}: {error.strerror}; --force overwrites a regular file") from None
    try:
        with NamedFile(descriptor, "wb", target) as file:
            yield file
        if path != target:
            _replace(path, target)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(path)
        raise


def _mode_of(path: str) -> int | None:
    """Return the mode of a file or link; None if nothing exists there."""
    try:
        return os.lstat(path).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None


def _replace(path: str, target: str) -> None:
    try:
        os.replace(path, target)
    except OSError as error:
        raise OSError(error.errno, f"cannot be replaced: {error.strerror}", target) from None
