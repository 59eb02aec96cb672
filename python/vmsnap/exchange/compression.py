"""Programs that decompress, as libvirt uses them: one process that reads a file and writes into a pipe."""

import os
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager

from vmsnap.errors import UnsupportedFormatError
from vmsnap.exchange.thread import started

#: The command for each compression. The limit for xz bounds the memory that a hostile file can make it use; the other
#: programs have a limit of their own.
PROGRAMS = {
    "gzip": ("gzip", "-dc"),
    "bzip2": ("bzip2", "-dc"),
    "xz": ("xz", "-dc", "--memlimit-decompress=1GiB"),
    "lzop": ("lzop", "-dc", "--ignore-warn"),
    "zstd": ("zstd", "-dc"),
    "lz4": ("lz4", "-dc"),
}

# The last bytes of a program's standard error that an error quotes.
_QUOTED_BYTES = 1000
_EXIT_SECONDS = 10.0


@contextmanager
def decompressed(compression: str, descriptor: int, label: str) -> Iterator[int]:
    """Decompress the bytes that a descriptor gives, and give the descriptor of a pipe with the result.

    The block reads the pipe to its end. The program is killed if it does not.

    Raises
    ------
    UnsupportedFormatError
        The program failed. Its status and its standard error are in the text.
    FileNotFoundError
        The program is not installed.
    """
    command = PROGRAMS[compression]
    reading, writing = os.pipe2(os.O_CLOEXEC)
    try:
        try:
            # In a session of its own: Ctrl-C ends it through this process, and its terminal cannot be asked.
            process = subprocess.Popen(
                command, stdin=descriptor, stdout=writing, stderr=subprocess.PIPE, start_new_session=True
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(
                error.errno, f"is compressed by {compression}, and there is no program {command[0]}: install it", label
            ) from None
        finally:
            os.close(writing)
        with process, _Said(process) as said:
            try:
                yield reading
            except Exception as error:
                # If the program ended early, that is the reason.
                if _at_end(reading) and (failure := _failure(process, said, compression, label)):
                    raise failure from error
                raise
            else:
                if failure := _failure(process, said, compression, label):
                    raise failure
            finally:
                process.kill()
    finally:
        os.close(reading)


def _at_end(reading: int) -> bool:
    """Return whether the program has closed the pipe, and everything in it was read."""
    os.set_blocking(reading, False)
    try:
        return not os.read(reading, 1)
    except BlockingIOError:
        return False


def _failure(
    process: "subprocess.Popen[bytes]", said: "_Said", compression: str, label: str
) -> UnsupportedFormatError | None:
    """Wait for a program that has closed its output, and return the error if it failed."""
    try:
        status = process.wait(_EXIT_SECONDS)
    except subprocess.TimeoutExpired:
        return UnsupportedFormatError(f"{label} cannot be decompressed: {compression} does not end")
    if status == 0:
        return None
    how = f"was ended by {signal.Signals(-status).name}" if status < 0 else f"failed with status {status}"
    text = said.text()
    return UnsupportedFormatError(f"{label} cannot be decompressed: {compression} {how}{f': {text}' if text else ''}")


class _Said:
    """A thread that reads the standard error of a program, and keeps the end of it."""

    def __init__(self, process: "subprocess.Popen[bytes]") -> None:
        self._process = process
        self._kept = b""

    def _listen(self) -> None:
        assert self._process.stderr is not None
        while batch := os.read(self._process.stderr.fileno(), _QUOTED_BYTES):
            self._kept = (self._kept + batch)[-_QUOTED_BYTES:]

    def text(self) -> str:
        self._thread.join(_EXIT_SECONDS)
        return " ".join(self._kept.decode("utf-8", "replace").split())

    def __enter__(self) -> "_Said":
        try:
            self._thread = started(self._listen)
        except BaseException:
            self._process.kill()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.join()
