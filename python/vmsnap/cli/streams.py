"""The standard streams as the command line needs them.

A number from 0 to 2 that is closed would be the next file's that is opened, and what was meant for a terminal would go
into it: `take_standard_streams` is called before anything else opens a file. What is said on standard error accompanies
the work and is not part of it, so that it never fails. What goes to standard output is the work: its first failure is
an error.
"""

import codecs
import errno
import io
import os
import sys
from contextlib import suppress
from typing import TYPE_CHECKING, TextIO

from vmsnap.cli.files import NamedFile

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

STDIN, STDOUT, STDERR = 0, 1, 2


class ReaderGoneError(Exception):
    """Whoever read the output went away, as ``head`` does."""


class _Output(NamedFile):
    """Standard output. Once it has failed, the error was raised, and the rest that buffers still hold is dropped."""

    def __init__(self, *, missing: bool) -> None:
        super().__init__(STDOUT, "wb", "standard output", closefd=False)
        self._missing = missing
        self._failed = False

    def write(self, data: "ReadableBuffer") -> int:
        if self._failed:
            return memoryview(data).nbytes
        try:
            if self._missing:
                raise OSError(errno.EBADF, "standard output is closed")
            return super().write(data)
        except BrokenPipeError:
            self._failed = True
            raise ReaderGoneError from None
        except BaseException:
            self._failed = True
            raise


class _Messages(io.FileIO):
    """Standard error. What cannot be written there is lost, and no command fails for that."""

    def __init__(self, *, missing: bool) -> None:
        super().__init__(STDERR, "wb", closefd=False)
        self._missing = missing

    def write(self, data: "ReadableBuffer") -> int:
        with suppress(OSError):
            if not self._missing and (count := super().write(data)):
                return count
        return memoryview(data).nbytes


def take_standard_streams() -> None:
    """Put ``/dev/null`` where a standard stream is closed, and make `sys.stdout` and `sys.stderr` as described above.

    A program that put other objects in their places keeps those.
    """
    streams = {STDIN: sys.stdin, STDOUT: sys.stdout, STDERR: sys.stderr}
    # Where Python found none at its start, what has the number now is somebody else's.
    missing = {number for number, stream in streams.items() if stream is None or not _is_open(number)}
    for number in streams:
        if not _is_open(number):
            # The lowest free number, and so this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is None or isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _text(_Output(missing=STDOUT in missing), sys.stdout)
    if sys.stderr is None or isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _text(_Messages(missing=STDERR in missing), sys.stderr)


def standard_input() -> NamedFile:
    """Return standard input, to be read.

    Raises
    ------
    OSError
        It was closed: nothing is not what somebody wanted to store.
    """
    if sys.stdin is None:
        raise OSError(errno.EBADF, "standard input is closed")
    return NamedFile(STDIN, "rb", "standard input", closefd=False)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError as error:
        return error.errno != errno.EBADF
    return True


def _text(raw: io.FileIO, before: TextIO | None) -> io.TextIOWrapper:
    """Return `raw` for text, encoded as before."""
    encoding = "utf-8" if before is None else before.encoding
    # The C locale says nothing of what a terminal can show; names are UTF-8, and as arguments they are these bytes.
    if codecs.lookup(encoding).name == "ascii":
        encoding = "utf-8"
    by_line = raw.fileno() == STDERR or raw.isatty()
    # A character that the encoding has not is shown escaped.
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", newline="\n", line_buffering=by_line
    )
