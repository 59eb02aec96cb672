"""Sources and destinations of guest memory in Python: buffers, descriptors, open files and paths."""

import io
import os
import stat
import tempfile
from contextlib import ExitStack, suppress
from numbers import Integral
from types import TracebackType
from typing import IO, Any, Self, TypeAlias, cast

from vmsnap._vmsnap import ProcessMemory, SpooledMemory
from vmsnap.errors import InvalidArgumentError

OpenFile: TypeAlias = io.FileIO | IO[bytes] | IO[str]

# The layers of an open file from the outside in, each with the attribute that holds the next layer.
_LAYERS = (
    (io.TextIOWrapper, "buffer"),
    *((kind, "raw") for kind in (io.BufferedReader, io.BufferedWriter, io.BufferedRandom)),
)

# If a class overrides one of these methods, its data may differ from that of its descriptor.
_OF_BYTES = (
    *("fileno", "seek", "tell", "truncate", "write"),
    *("read", "read1", "readall", "readinto", "readinto1", "readline"),
)


def refuse_special(path: str, mode: int) -> None:
    """Refuse a file without a size before it is opened: opening a FIFO blocks, opening a device has side effects."""
    for is_kind, kind in (
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a FIFO or a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISCHR, "a character device"),
    ):
        if is_kind(mode):
            raise InvalidArgumentError(f"{path} is {kind}; guest memory must be in a file, a memfd or a block device")


def _is(found: object, kind: type) -> bool:
    return isinstance(found, kind) and all(
        getattr(type(found), name, None) is getattr(kind, name, None) for name in _OF_BYTES
    )


def is_file(found: object) -> bool:
    """Return whether an object is a `FileIO`, or buffers one, without changing its data."""
    for kind, inner in _LAYERS:
        if _is(found, kind):
            found = getattr(found, inner)
    return _is(found, io.FileIO)


def unwrapped(given: object) -> object:
    """Return the open file in an object from `tempfile`, and any other object unchanged."""
    if isinstance(given, tempfile.SpooledTemporaryFile):
        if not getattr(given, "_rolled", False):
            raise TypeError("a SpooledTemporaryFile is in memory until its rollover(): call that first")
        return getattr(given, "_file", None)
    return given.file if isinstance(given, tempfile._TemporaryFileWrapper) else given


class Handles:
    """Descriptors and buffers for the core, open and alive until the end of a ``with`` block.

    A path that is given several times is opened once. If the block fails, files that it created are removed.

    Parameters
    ----------
    writable
        Whether the guest memory is restored instead of read.
    """

    def __init__(self, *, writable: bool) -> None:
        self._writable = writable
        self._stack = ExitStack()
        # Descriptors by path.
        self._opened: dict[str, int] = {}
        # Files that this object created, with their descriptors.
        self._made: list[tuple[str, int]] = []
        # Open files by identity. Without a reference here a file could close, and another one get its descriptor.
        self._files: dict[int, tuple[object, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            for path, descriptor in self._made:
                with suppress(OSError):
                    # A file that another process has put there in the meantime stays.
                    if os.path.samestat(os.lstat(path), os.fstat(descriptor)):
                        os.unlink(path)
        self._stack.__exit__(kind, error, trace)

    def of(self, given: object) -> object:
        """Return a descriptor for a path or a file, and a buffer, `ProcessMemory` or `SpooledMemory` as it is.

        Raises
        ------
        TypeError
            The object cannot hold guest memory.
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
                        "guest memory cannot be restored into a process: use a memfd that both processes map"
                    )
                return given
            case SpooledMemory() if not self._writable:
                return given
            case bytes() if self._writable:
                raise BufferError("bytes are not writable: pass a bytearray, or a path as a str or an os.PathLike")
        if id(given) in self._files:
            return self._files[id(given)][1]
        if is_file(unwrapped(given)):
            return self._file(cast("IO[Any]", given))
        try:
            memoryview(given).release()  # type: ignore[arg-type]
        except TypeError:
            self._refuse(given)
        return given

    def _refuse(self, given: object) -> None:
        name = "None" if given is None else f"an object of type {type(given).__name__}"
        role = "a destination of guest memory" if self._writable else "a source of guest memory"
        accepted = "a buffer, a path, a file descriptor, or an open file from open() or tempfile"
        more = ""
        if isinstance(given, io.BytesIO):
            more = "; for this object, pass its getbuffer()"
        elif hasattr(given, "fileno") or hasattr(given, "read"):
            more = "; this object may not return the bytes of a file as they are: copy them into a file first"
        raise TypeError(f"{name} is not {role}: pass {accepted}{more}") from None

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
            # For a dangling symbolic link, the file that it leads to is created.
            made = os.path.realpath(path) if os.path.islink(path) else path
            descriptor = os.open(made, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            self._made.append((made, descriptor))
        self._stack.callback(os.close, descriptor)
        return descriptor

    def _file(self, file: IO[Any]) -> int:
        # Otherwise buffered bytes would be missing from a dump, or would overwrite restored memory later.
        file.flush()
        if self._writable and file.seekable():
            self._stack.callback(drop_read_ahead, file, file.tell())
        descriptor = file.fileno()
        self._files[id(file)] = (file, descriptor)
        return descriptor


def drop_read_ahead(file: IO[Any], position: int) -> None:
    # A seek to the current position would keep the read-ahead buffer.
    file.seek(0, os.SEEK_END)
    file.seek(position)
