"""Unbuffered files that wait for data instead of giving up, and whose errors name the file."""

import io
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


@contextmanager
def named(label: str | os.PathLike[str]) -> Iterator[None]:
    """Add the name of a file to an error of the operating system that does not have one."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(label)
        raise


class NamedFile(io.FileIO):
    """A file, given by its path or its descriptor.

    A descriptor may be in non-blocking mode, for example if it is shared with a program that set it so. Reads and
    writes wait nevertheless: a caller that takes "nothing yet" for the end would take a part of the data for the whole.

    Parameters
    ----------
    file, mode, closefd
        As for `io.FileIO`.
    label
        The name that errors use: the path, or a description.
    """

    def __init__(self, file: str | os.PathLike[str] | int, mode: str, label: str, *, closefd: bool = True) -> None:
        self._label = label
        with named(label):
            super().__init__(file if isinstance(file, int) else os.fspath(file), mode, closefd=closefd)

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Read available bytes into `buffer`, and return their number: 0 at the end."""
        with named(self._label):
            while (count := super().readinto(buffer)) is None:
                select.select([self], [], [])
        return count

    def read(self, size: int | None = -1) -> bytes:
        """Read available bytes, up to `size`; none at the end."""
        with named(self._label):
            while (content := super().read(size)) is None:
                select.select([self], [], [])
        return content

    def write(self, data: "ReadableBuffer") -> int:
        """Write some of `data`, and return the number of bytes written."""
        with named(self._label):
            while (count := super().write(data)) is None:
                select.select([], [self], [])
        return count
