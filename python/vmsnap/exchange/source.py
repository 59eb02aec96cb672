"""The file, pipe or socket that `import_file` reads."""

import io
import os
import select
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from vmsnap.errors import InvalidArgumentError, UnsupportedFormatError
from vmsnap.exchange.foreign import HEAD_BYTES
from vmsnap.exchange.thread import started

if TYPE_CHECKING:
    from _typeshed import FileDescriptorLike, StrPath

_BATCH_BYTES = 1 << 20


class Source:
    """A file whose first bytes were looked at, and which can still be read from its beginning.

    Attributes
    ----------
    label
        The name for errors.
    head
        The first bytes, at most `HEAD_BYTES`.
    descriptor
        A descriptor in blocking mode. Its position is the beginning of the file.
    """

    def __init__(self, label: str, head: bytes, descriptor: int, pump: "_Pump | None") -> None:
        self.label = label
        self.head = head
        self.descriptor = descriptor
        self._pump = pump

    def check(self) -> None:
        """Raise the error that ended the input early, if there was one. A reader cannot tell it from the end."""
        if self._pump is not None and self._pump.error is not None:
            raise self._pump.error

    def read_exactly(self, size: int, what: str) -> bytes:
        """Read a part of the file.

        Raises
        ------
        UnsupportedFormatError
            The file ends before.
        """
        content = bytearray()
        while len(content) < size:
            batch = os.read(self.descriptor, size - len(content))
            if not batch:
                self.check()
                raise UnsupportedFormatError(f"{self.label} is truncated: it ends within {what}")
            content += batch
        return bytes(content)


@contextmanager
def opened(file: "StrPath | FileDescriptorLike") -> Iterator[Source]:
    """Open a file by its path, or use an open one from its present position on."""
    if isinstance(file, (str, os.PathLike)):
        label = os.fspath(file)
        mode = os.stat(label).st_mode
        for is_kind, kind in ((stat.S_ISDIR, "a directory"), (stat.S_ISCHR, "a character device")):
            if is_kind(mode):
                raise InvalidArgumentError(f"{label} is {kind}: import reads a file or a pipe")
        with open(label, "rb", buffering=0) as stream, _begun(stream.fileno(), label) as source:
            yield source
        return
    descriptor = file if isinstance(file, int) else file.fileno()
    label = "standard input" if descriptor == 0 else f"file descriptor {descriptor}"
    with _begun(descriptor, label) as source:
        yield source


@contextmanager
def _begun(descriptor: int, label: str) -> Iterator[Source]:
    try:
        start = os.lseek(descriptor, 0, os.SEEK_CUR)
    except OSError:
        with _Pump(descriptor, label) as pump:
            yield Source(label, pump.head, pump.reading, pump)
        return
    yield Source(label, os.pread(descriptor, HEAD_BYTES, start), descriptor, None)


class _Pump:
    """A thread that copies a pipe or socket into another pipe, so that its first bytes can be looked at before.

    The original may be in non-blocking mode, and may not send anything for a long time. The end of the ``with`` block
    ends the thread nevertheless.
    """

    def __init__(self, descriptor: int, label: str) -> None:
        self._descriptor = descriptor
        self._label = label
        self.error: OSError | None = None
        self.head = b""
        self.reading = self._writing = self._stop = self._stopped = -1

    def __enter__(self) -> "_Pump":
        self._stopped, self._stop = os.pipe2(os.O_CLOEXEC)
        try:
            while len(self.head) < HEAD_BYTES and (batch := self._read(HEAD_BYTES - len(self.head))):
                self.head += batch
            self.reading, self._writing = os.pipe2(os.O_CLOEXEC)
            self._thread = started(self._copy)
        except BaseException:
            self._close(self._stopped, self._stop, self.reading, self._writing)
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._close(self._stop, self.reading)
        self._thread.join()
        self._close(self._stopped)

    @staticmethod
    def _close(*descriptors: int) -> None:
        for each in descriptors:
            if each >= 0:
                os.close(each)

    def _copy(self) -> None:
        with io.FileIO(self._writing, "w") as pipe, suppress(BrokenPipeError):
            batch = self.head
            while batch:
                rest = memoryview(batch)
                while rest:
                    rest = rest[pipe.write(rest) :]
                try:
                    batch = self._read(_BATCH_BYTES)
                except OSError as error:
                    self.error = OSError(error.errno, error.strerror, self._label)
                    return

    def _read(self, size: int) -> bytes:
        """Read available bytes; none at the end, or when the reader is gone."""
        while True:
            poll = select.poll()
            poll.register(self._descriptor, select.POLLIN)
            poll.register(self._stopped, 0)  # reports only that its other end was closed
            if any(ready == self._stopped for ready, _ in poll.poll()):
                return b""
            with suppress(BlockingIOError):
                return os.read(self._descriptor, size)
