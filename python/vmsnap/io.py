"""Fragments as raw binary streams of the standard library."""

import contextlib
import io
from types import TracebackType
from typing import TYPE_CHECKING, NoReturn, Self, SupportsIndex

from vmsnap.errors import StateError

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

    from vmsnap import _vmsnap

__all__ = ["Fragment", "FragmentReader"]


def _closed() -> ValueError:
    return ValueError("I/O operation on closed file.")


class Fragment(io.RawIOBase):
    """A fragment being written, front to back; from `SnapshotWriter.raw_fragment`.

    A large write is encrypted and written by several threads, straight from the caller's buffer, with the interpreter
    free for others; small ones are gathered. In a ``with`` statement the fragment is finished on success, and its file
    removed on an exception, even where something in the block had closed it, such as a `BufferedWriter` around it. (A
    ``with`` statement of such a wrapper alone only closes.) A fragment that is dropped without either is finished too,
    as in crosvm; in a snapshot of `create` it makes the commit fail.

    A write that fails or is interrupted poisons the fragment: every later call raises `StateError`, and its
    file is removed when it is closed.
    """

    def __init__(self, raw: "_vmsnap.Fragment", name: str) -> None:
        self._raw: _vmsnap.Fragment | None = raw
        self._entered: _vmsnap.Fragment | None = None
        self._name = name

    @property
    def name(self) -> str:
        """The fragment's name within its namespace."""
        return self._name

    def writable(self) -> bool:
        """Whether one can write: yes."""
        if self.closed:
            raise _closed()
        return True

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write all of `data`.

        Parameters
        ----------
        data
            Anything with the buffer protocol whose bytes lie in one piece: bytes, bytearray, memoryview, mmap, a numpy
            array. It must not be changed by other threads meanwhile.

        Returns
        -------
        int
            The length of `data` in bytes, always.

        Raises
        ------
        OSError
            For instance ``ENOSPC``. The fragment is poisoned then.
        StateError
            An earlier write failed, or this is a forked process.
        """
        return self._open.write(data)

    def tell(self) -> int:
        """Bytes written so far."""
        return self._open.tell()

    def flush(self) -> None:
        """Hand what was gathered of a plain fragment to the operating system.

        An encrypted one cannot be flushed: a segment is written when it is full, and the last one by `close`.
        """
        if self.closed:
            raise _closed()
        # None while the base class closes, which flushes once more.
        if self._raw is not None:
            self._raw.flush()

    def close(self) -> None:
        """Finish the fragment; where that fails, its file is removed."""
        raw = self._raw
        if raw is not None:
            try:
                raw.finish()
            except BaseException:
                # Still open where it could not even begin: another call is in progress.
                if raw.ended:
                    self._let_go()
                raise
        self._let_go()

    def discard(self) -> None:
        """Give the fragment up and remove its file. Nothing happens to one that is closed already."""
        raw = self._raw
        self._let_go()
        if raw is not None:
            raw.discard()

    def __del__(self) -> None:
        # The base class would close, and so finish, a fragment of a staged snapshot that nobody said is complete.
        raw = getattr(self, "_raw", None)
        if raw is not None:
            with contextlib.suppress(StateError):
                raw.drop_unclosed()
            self._let_go()

    def _let_go(self) -> None:
        self._raw = None
        # The base class flushes, which is an error where another thread has closed in the meantime: then it is done.
        with contextlib.suppress(ValueError):
            super().close()

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Refuse: a fragment that is being written cannot be read."""
        raise io.UnsupportedOperation("a fragment that is being written cannot be read")

    @property
    def _open(self) -> "_vmsnap.Fragment":
        if self._raw is None:
            raise _closed()
        return self._raw

    def __enter__(self) -> Self:
        """Return itself."""
        self._entered = self._open
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exception: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        """Finish on success, discard on an exception."""
        raw, self._entered = self._entered, None
        if kind is None:
            self.close()
        elif raw is not None:
            self._let_go()
            raw.discard()

    def __reduce_ex__(self, _protocol: SupportsIndex, /) -> NoReturn:
        """Refuse: two copies cannot write one file."""
        raise TypeError("a fragment being written cannot be copied or pickled; pickle the SnapshotWriter")

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<vmsnap.Fragment {self._name!r} {state}>"


class FragmentReader(io.RawIOBase):
    """A fragment being read, in order or at random; from `SnapshotReader.raw_fragment`.

    Of an encrypted fragment, opening verified the header and the last segment, and hence the size; every other segment
    is verified before any byte of it is given out. `read_at` and `readinto_at` may be called by many threads at once;
    a large read uses several threads by itself, with the interpreter free for others.
    """

    def __init__(self, raw: "_vmsnap.FragmentReader", name: str) -> None:
        self._raw: _vmsnap.FragmentReader | None = raw
        self._name = name

    @property
    def name(self) -> str:
        """The fragment's name within its namespace."""
        return self._name

    @property
    def size(self) -> int:
        """Plaintext bytes."""
        return self._open.size

    @property
    def stored_size(self) -> int:
        """Bytes of the file."""
        return self._open.stored_size

    @property
    def chunk_size_bytes(self) -> int | None:
        """Plaintext bytes of a segment, the least that a read decrypts; None for a plain fragment."""
        return self._open.chunk_size_bytes

    def readable(self) -> bool:
        """Whether one can read: yes."""
        return self._open is not None

    def seekable(self) -> bool:
        """Whether one can seek: yes."""
        return self._open is not None

    def read_at(self, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset`, without moving the position.

        Parameters
        ----------
        offset
            Bytes of plaintext from the start.
        size
            Bytes. Fewer are returned only where the fragment ends.

        Raises
        ------
        AuthenticationError
            A segment did not verify; nothing of it is given out.
        """
        return self._open.read_at(offset, size)

    def readinto_at(self, offset: int, buffer: "WriteableBuffer") -> int:
        """Fill `buffer` from `offset`, without moving the position.

        Returns
        -------
        int
            Bytes read: fewer than the buffer has only where the fragment ends.

        Raises
        ------
        AuthenticationError
            A segment did not verify; the buffer is all zeros then.
        """
        return self._open.readinto_at(offset, buffer)

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Fill `buffer` from the position, as `readinto_at`."""
        return self._open.readinto(buffer)

    def read(self, size: int | None = -1, /) -> bytes:
        """Read `size` bytes from the position, or all to the end: fewer only where the fragment ends."""
        return self._open.read(None if size is None or size < 0 else size)

    def readall(self) -> bytes:
        """Read all from the position to the end."""
        return self._open.read(None)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move the position; beyond the end is allowed, and reads nothing."""
        return self._open.seek(offset, whence)

    def tell(self) -> int:
        """Return the position in bytes of plaintext."""
        return self._open.tell()

    def write(self, data: "ReadableBuffer", /) -> int:
        """Refuse: a fragment is written once."""
        raise io.UnsupportedOperation("a fragment that is being read cannot be written")

    def __reduce_ex__(self, _protocol: SupportsIndex, /) -> NoReturn:
        """Refuse: a copy would share the position."""
        raise TypeError("an open fragment cannot be copied or pickled; pickle the SnapshotReader")

    def close(self) -> None:
        """Close the fragment; calls of other threads that have begun are completed."""
        self._raw = None
        super().close()

    @property
    def _open(self) -> "_vmsnap.FragmentReader":
        if self._raw is None:
            raise _closed()
        return self._raw

    def __enter__(self) -> Self:
        """Return itself."""
        if self.closed:
            raise _closed()
        return self

    def __repr__(self) -> str:
        state = "closed" if self._raw is None else f"of {self._raw.size} bytes"
        return f"<vmsnap.FragmentReader {self._name!r} {state}>"
