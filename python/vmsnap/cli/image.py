"""The raw RAM file that ``vmsnap dump`` stores."""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from vmsnap._backing import refuse_special
from vmsnap.cli.failure import CommandError
from vmsnap.exchange.foreign import HEAD_BYTES, recognize


@contextmanager
def open_image(path: str, form: str) -> Iterator[io.FileIO]:
    """Open a file, and refuse one that has no size or is not raw: before anything is created.

    Parameters
    ----------
    path
        The file.
    form
        ``"raw"`` to accept any contents, ``"auto"`` to refuse those of another format.
    """
    mode = os.stat(path).st_mode
    if stat.S_ISFIFO(mode):
        raise CommandError(
            f"{path} is a FIFO or a pipe, and guest memory needs a size: copy the data to a file first, or store it "
            "as an ordinary fragment with vmsnap put"
        )
    refuse_special(path, mode)
    with open(path, "rb", buffering=0) as file:
        with _named(path):
            size = _size(file)
            head = os.pread(file.fileno(), HEAD_BYTES, 0) if size else b""
        if size == 0:
            raise CommandError(
                f"{path} has a size of 0: it is empty, or a file of /proc, which does not report its size; "
                "for a process, give its ID"
            )
        if form == "auto" and (foreign := _foreign(path, head)):
            name, remedy = foreign
            raise CommandError(
                f"{path} is {name}, not a raw image of memory: {remedy}; --format raw stores it as it is"
            )
        yield file


@contextmanager
def _named(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(f"{path} cannot be read: {error.strerror}") from error


def _foreign(path: str, head: bytes) -> tuple[str, str] | None:
    """Return the name of a file's format if it is not raw, and the remedy."""
    # A fragment is recognized by its place: an encrypted one begins with a few bytes that memory may begin with, too,
    # and plain guest memory is stored without its holes.
    directory = Path(path).absolute().parent
    encrypted = any(os.path.exists(parent / "enc_metadata") for parent in (directory, *directory.parents))
    if encrypted or (os.path.basename(path) == "mem" and os.path.exists(directory / "mem_metadata")):
        return (
            "a fragment of a snapshot",
            "make one with vmsnap restore (guest memory) or vmsnap get (other fragments)",
        )
    found = recognize(head)
    return (found.name, found.remedy) if found else None


def _size(file: io.FileIO) -> int:
    status = os.fstat(file.fileno())
    if stat.S_ISREG(status.st_mode):
        return status.st_size
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    return size
