"""The raw RAM file that ``vmsnap dump`` and ``dump-memory`` store."""

import io
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import click

from vmsnap._backing import refuse_special
from vmsnap.cli.failure import CommandError
from vmsnap.cli.foreign import HEAD_BYTES, recognize

format_option = click.option(
    "--format",
    "form",
    type=click.Choice(["auto", "raw"]),
    default="auto",
    show_default=True,
    help="What FILE is: raw, whatever it begins with; or raw unless it begins as another format, which is refused.",
)


def refuse_format(form: str) -> None:
    """Refuse the option of a file where it is given for a process."""
    if form != "auto":
        raise click.UsageError("--format is for a file: of a process there is nothing to choose")


@dataclass(frozen=True)
class Image:
    """A file that may be stored."""

    file: io.FileIO
    size: int | None
    """Bytes; of a pipe, None."""
    head: bytes
    """Of a pipe: what had to be read from it."""

    def read_into(self, buffer: memoryview) -> int:
        """Read what follows into a buffer; returns how much that is, 0 at the end."""
        with _named(self.file.name):
            return self.file.readinto(buffer)


@contextmanager
def open_image(path: str, form: str, *, may_be_pipe: bool = False) -> Iterator[Image]:
    """Open a file, and refuse it where it has nothing to store or is not raw: before anything is made.

    Parameters
    ----------
    path
        The file.
    form
        ``"raw"`` where it is not to be looked at, ``"auto"`` otherwise.
    may_be_pipe
        Whether it may be a pipe, read to its end.
    """
    mode = os.stat(path).st_mode
    is_pipe = may_be_pipe and stat.S_ISFIFO(mode)
    if not is_pipe:
        refuse_special(path, mode)
    with open(path, "rb", buffering=0) as file:
        with _named(path):
            size = None if is_pipe else _size(file)
            head = _read_head(file) if is_pipe else os.pread(file.fileno(), HEAD_BYTES, 0) if size else b""
        if size == 0:
            raise CommandError(
                f"{path}: has a size of 0: it is empty, or like files of /proc does not tell its size; "
                "for a process, give its number"
            )
        if is_pipe and not head:
            raise CommandError(f"{path}: is a pipe that gave nothing")
        if form == "auto" and (foreign := _foreign(path, head)):
            name, remedy = foreign
            raise CommandError(
                f"{path}: is {name}, not a raw image of memory: {remedy}; --format raw stores it as it is"
            )
        yield Image(file, size, head if is_pipe else b"")


@contextmanager
def _named(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CommandError(f"{path}: cannot be read: {error.strerror}") from error


def _foreign(path: str, head: bytes) -> tuple[str, str] | None:
    """Return what a file is if it is not raw, and the remedy."""
    # Fragments are told by where they are: encrypted ones begin with a few bytes that memory may have, too, and plain
    # memory is stored without its holes.
    folder = Path(path).absolute().parent
    encrypted = any(os.path.exists(parent / "enc_metadata") for parent in (folder, *folder.parents))
    if encrypted or (os.path.basename(path) == "mem" and os.path.exists(folder / "mem_metadata")):
        return (
            "a fragment of a snapshot",
            "vmsnap restore-memory makes one of guest memory, vmsnap cp of what dump stored",
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


def _read_head(file: io.FileIO) -> bytes:
    head = b""
    while len(head) < HEAD_BYTES and (more := file.read(HEAD_BYTES - len(head))):
        head += more
    return head
