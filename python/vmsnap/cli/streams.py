"""The standard streams as the command line needs them.

If a descriptor from 0 to 2 is closed, the next file that is opened gets its number, and text meant for a terminal goes
into that file. So `take_standard_streams` is called before anything else opens a file. Messages on standard error
accompany the work and are not part of it, so writing them never fails. Standard output is the work: its first failure
is an error.
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
    """The pipe that standard output goes to was closed by its reader, as ``head`` does."""


class _Output(NamedFile):
    """Standard output. After its first error, which is raised, the rest of the buffers is dropped."""

    def __init__(self, *, missing: bool) -> None:
        super().__init__(STDOUT, "wb", "standard output", closefd=False)
        self.missing = missing
        self._failed = False

    def write(self, data: "ReadableBuffer") -> int:
        if self._failed:
            return memoryview(data).nbytes
        try:
            if self.missing:
                raise OSError(errno.EBADF, "standard output is closed")
            return super().write(data)
        except BrokenPipeError:
            self._failed = True
            raise ReaderGoneError from None
        except BaseException:
            self._failed = True
            raise


class _Messages(io.FileIO):
    """Standard error. Messages that cannot be written are lost, and no command fails because of them."""

    def __init__(self, *, missing: bool) -> None:
        super().__init__(STDERR, "wb", closefd=False)
        self._missing = missing

    def write(self, data: "ReadableBuffer") -> int:
        with suppress(OSError):
            if not self._missing and (count := super().write(data)):
                return count
        return memoryview(data).nbytes


def take_standard_streams() -> None:
    """Open ``/dev/null`` for closed standard streams, and replace `sys.stdout` and `sys.stderr` as described above.

    If a program replaced these objects before, they are kept.
    """
    streams = {STDIN: sys.stdin, STDOUT: sys.stdout, STDERR: sys.stderr}
    # If Python found no stream at its start, another file may have the number now.
    missing = {number for number, stream in streams.items() if stream is None or not _is_open(number)}
    for number in streams:
        if not _is_open(number):
            # open returns the lowest free number, which is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is None or isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout = _text(_Output(missing=STDOUT in missing), sys.stdout)
    if sys.stderr is None or isinstance(sys.stderr, io.TextIOWrapper):
        sys.stderr = _text(_Messages(missing=STDERR in missing), sys.stderr)


def standard_input() -> NamedFile:
    """Return standard input for reading.

    Raises
    ------
    OSError
        If it is closed. Storing an empty fragment would hide the mistake.
    """
    if sys.stdin is None:
        raise OSError(errno.EBADF, "standard input is closed")
    return NamedFile(STDIN, "rb", "standard input", closefd=False)


def binary_input() -> io.FileIO:
    """Return standard input as a file whose descriptor can be read.

    Raises
    ------
    OSError
        If it is closed.
    """
    if sys.stdin is None:
        raise OSError(errno.EBADF, "standard input is closed")
    return io.FileIO(STDIN, "rb", closefd=False)


def binary_output() -> io.FileIO:
    """Return standard output as a file whose descriptor can be written.

    Raises
    ------
    OSError
        If it is closed.
    """
    sys.stdout.flush()
    raw = getattr(sys.stdout.buffer, "raw", None)
    if isinstance(raw, _Output) and raw.missing:
        raise OSError(errno.EBADF, "standard output is closed")
    return io.FileIO(STDOUT, "wb", closefd=False)


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError as error:
        return error.errno != errno.EBADF
    return True


def _text(raw: io.FileIO, before: TextIO | None) -> io.TextIOWrapper:
    """Return `raw` for text, encoded as before."""
    encoding = "utf-8" if before is None else before.encoding
    # The C locale does not tell what a terminal can show. Names are UTF-8, in arguments as well.
    if codecs.lookup(encoding).name == "ascii":
        encoding = "utf-8"
    by_line = raw.fileno() == STDERR or raw.isatty()
    # A character that the encoding lacks is escaped.
    return io.TextIOWrapper(
        io.BufferedWriter(raw), encoding=encoding, errors="backslashreplace", newline="\n", line_buffering=by_line
    )
