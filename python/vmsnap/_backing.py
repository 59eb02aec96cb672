"""What guest memory is read from and restored to, as Python has it: buffers, descriptors, open files and paths."""

import io
import os
import stat
import tempfile
from contextlib import ExitStack, suppress
from numbers import Integral
from types import TracebackType
from typing import IO, Any, Self, TypeAlias, cast

from vmsnap._vmsnap import ProcessMemory
from vmsnap.errors import InvalidArgumentError

OpenFile: TypeAlias = io.FileIO | IO[bytes] | IO[str]

# What an open file consists of, from the outside in, and where each has the next.
_LAYERS = (
    (io.TextIOWrapper, "buffer"),
    *((kind, "raw") for kind in (io.BufferedReader, io.BufferedWriter, io.BufferedRandom)),
)

# Where a class brings its own of these, what it reads and writes may be other bytes than those of its descriptor.
_OF_BYTES = (
    *("fileno", "seek", "tell", "truncate", "write"),
    *("read", "read1", "readall", "readinto", "readinto1", "readline"),
)


def refuse_special(path: str, mode: int) -> None:
    """Refuse what has no size, before it is opened: to open a FIFO waits, and to open a device may do anything."""
    for is_kind, kind in (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a FIFO or a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
    ):
        if is_kind(mode):
            raise InvalidArgumentError(f"{path}: is {kind}; guest memory is in a file, a memfd or a block device")


def _is(found: object, kind: type) -> bool:
    return isinstance(found, kind) and all(
        getattr(type(found), name, None) is getattr(kind, name, None) for name in _OF_BYTES
    )


def _is_file(found: object) -> bool:
    """Whether an object is a `FileIO`, or buffers one, and has no bytes but those of the file."""
    for kind, inner in _LAYERS:
        if _is(found, kind):
            found = getattr(found, inner)
    return _is(found, io.FileIO)


def _unwrapped(given: object) -> object:
    """Return the open file in what `tempfile` returns, and anything else as it is."""
    if isinstance(given, tempfile.SpooledTemporaryFile):
        if not getattr(given, "_rolled", False):
            raise TypeError("a SpooledTemporaryFile is not a file before its rollover()")
        return getattr(given, "_file", None)
    return given.file if isinstance(given, tempfile._TemporaryFileWrapper) else given


class Handles:
    """What the core takes for what a caller gave, open and alive as long as the block is.

    A path is opened once however often it is given. A file that did not exist is removed again if the block fails.

    Parameters
    ----------
    writable
        Whether guest memory is restored, not read.
    """

    def __init__(self, *, writable: bool) -> None:
        self._writable = writable
        self._stack = ExitStack()
        # By path.
        self._opened: dict[str, int] = {}
        # New files, and their descriptors.
        self._made: list[tuple[str, int]] = []
        # By identity. They are held: a file that nobody holds closes its descriptor, and another gets the number.
        self._files: dict[int, tuple[object, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for path, descriptor in self._made:
                with suppress(OSError):
                    # Whatever somebody else has put there meanwhile stays.
                    if os.path.samestat(os.lstat(path), os.fstat(descriptor)):
                        os.unlink(path)
        self._stack.__exit__(kind, error, trace)

    def of(self, given: object) -> object:
        """Return a descriptor, or the buffer or `ProcessMemory` that was given.

        Raises
        ------
        TypeError
            It holds no guest memory.
        """
        match given:
            case bool():
                raise TypeError(f"{given} is not a file descriptor")
            case Integral():
                return int(given)
            case str() | os.PathLike():
                return self._path(os.fsdecode(given))
            case ProcessMemory():
                if self._writable:
                    raise InvalidArgumentError(
                        "guest memory is not restored into a process: give it a memfd that both map"
                    )
                return given
            case bytes() if self._writable:
                raise BufferError("bytes cannot be written to; a path is a str or an os.PathLike")
        if id(given) in self._files:
            return self._files[id(given)][1]
        if _is_file(_unwrapped(given)):
            return self._file(cast("IO[Any]", given))
        try:
            memoryview(given).release()  # type: ignore[arg-type]
        except TypeError:
            self._refuse(given)
        return given

    def _refuse(self, given: object) -> None:
        name = "None" if given is None else f"an object of type {type(given).__name__}"
        role = "a destination of guest memory" if self._writable else "a source of guest memory"
        accepted = "a buffer, a path, a file descriptor, or an open file as open() and tempfile return it"
        more = ""
        if isinstance(given, io.BytesIO):
            more = "; give its getbuffer()"
        elif hasattr(given, "fileno") or hasattr(given, "read"):
            more = "; its bytes need not be those of a file: copy them through one"
        raise TypeError(f"{name} is not {role}: that is {accepted}{more}") from None

    def _path(self, path: str) -> int:
        if path not in self._opened:
            self._opened[path] = self._open(path)
        return self._opened[path]

    def _open(self, path: str) -> int:
        try:
            refuse_special(path, os.stat(path).st_mode)
            descriptor = os.open(path, (os.O_RDWR if self._writable else os.O_RDONLY) | os.O_CLOEXEC)
        except FileNotFoundError:
            if not self._writable:
                raise
            # A link that leads nowhere makes the file that it leads to.
            made = os.path.realpath(path) if os.path.islink(path) else path
            descriptor = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._made.append((made, descriptor))
        self._stack.callback(os.close, descriptor)
        return descriptor

    def _file(self, file: IO[Any]) -> int:
        # What Python still holds back would be missing, or be written over what was restored.
        file.flush()
        if self._writable and file.seekable():
            self._stack.callback(_drop_read_ahead, file, file.tell())
        descriptor = file.fileno()
        self._files[id(file)] = (file, descriptor)
        return descriptor


def _drop_read_ahead(file: IO[Any], position: int) -> None:
    # A seek to where it is would keep what was read before.
    file.seek(0, os.SEEK_END)
    file.seek(position)
