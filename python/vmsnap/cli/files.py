"""A file without a buffer that does whole what it is asked, and whose errors say which file it is."""

import io
import os
import select
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer


@contextmanager
def named(what: str | os.PathLike[str]) -> Iterator[None]:
    """Say of an error of the operating system what it is an error of, where the error itself does not."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = os.fspath(what)
        raise


class NamedFile(io.FileIO):
    """A file, given by its path or its descriptor.

    Where a descriptor is set not to block, as those that are shared with a program of another kind may be, a read
    waits nevertheless: what takes nothing for the end would take a part of the data for the whole.

    Parameters
    ----------
    file, mode, closefd
        As for `io.FileIO`.
    what
        What errors call it: its path, or what it is to the user.
    """

    def __init__(self, file: str | os.PathLike[str] | int, mode: str, what: str, *, closefd: bool = True) -> None:
        self._what = what
        with named(what):
            super().__init__(file if isinstance(file, int) else os.fspath(file), mode, closefd=closefd)

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Read what is there into `buffer`, and return how many bytes that was: 0 at the end."""
        with named(self._what):
            while (count := super().readinto(buffer)) is None:
                select.select([self], [], [])
        return count

    def read(self, size: int | None = -1) -> bytes:
        """Read what is there, up to `size` bytes; none at the end."""
        with named(self._what):
            while (content := super().read(size)) is None:
                select.select([self], [], [])
        return content

    def write(self, data: "ReadableBuffer") -> int:
        """Write some of `data`, and return how many bytes that was."""
        with named(self._what):
            while (count := super().write(data)) is None:
                select.select([], [self], [])
        return count
