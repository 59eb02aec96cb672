"""Fragments as raw binary streams (`io.RawIOBase`)."""

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
    """A fragment that is being written, from start to end. `SnapshotWriter.raw_fragment` returns it.

    Several threads encrypt and write a large write, directly from the caller's buffer and without the interpreter lock.
    Small writes are collected.

    A ``with`` statement finishes the fragment on success, and removes its file on an exception. The file is removed
    even if something in the block closed the fragment before, such as a `BufferedWriter` around it. (A ``with``
    statement for the wrapper alone only closes the fragment.) A fragment that is garbage-collected without being closed
    is finished too, as in crosvm; in a snapshot from `create` it makes the commit fail.

    A write that fails or is interrupted poisons the fragment: every later call raises `StateError`, and `close`
    removes the file.
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
        """Return True: a fragment that is being written is writable."""
        if self.closed:
            raise _closed()
        return True

    def write(self, data: "ReadableBuffer", /) -> int:
        """Write all of `data`.

        Parameters
        ----------
        data
            A contiguous buffer: bytes, bytearray, memoryview, mmap, a numpy array. No other thread may change it during
            the call.

        Returns
        -------
        int
            The length of `data` in bytes. It is always written as a whole.

        Raises
        ------
        OSError
            The write failed, for example with ``ENOSPC``. The fragment is poisoned.
        StateError
            An earlier write failed, or the process was forked after the fragment was opened.
        """
        return self._open.write(data)

    def tell(self) -> int:
        """Return the number of bytes written so far."""
        return self._open.tell()

    def flush(self) -> None:
        """Pass collected bytes of a plain fragment to the operating system.

        An encrypted fragment cannot be flushed: a segment is written when it is full, and `close` writes the last one.
        """
        if self.closed:
            raise _closed()
        # It is None while the base class closes, because that flushes once more.
        if self._raw is not None:
            self._raw.flush()

    def close(self) -> None:
        """Finish the fragment. If that fails, the file is removed."""
        raw = self._raw
        if raw is not None:
            try:
                raw.finish()
            except BaseException:
                # The fragment is still open if finishing did not begin because another call is in progress.
                if raw.ended:
                    self._let_go()
                raise
        self._let_go()

    def discard(self) -> None:
        """Abandon the fragment and remove its file. A fragment that is already closed does not change."""
        raw = self._raw
        self._let_go()
        if raw is not None:
            raw.discard()

    def __del__(self) -> None:
        # The base class would close and so finish the fragment, although in a staged snapshot it may be incomplete.
        raw = getattr(self, "_raw", None)
        if raw is not None:
            with contextlib.suppress(StateError):
                raw.drop_unclosed()
            self._let_go()

    def _let_go(self) -> None:
        self._raw = None
        # The base class flushes, which fails if another thread closed the fragment in the meantime.
        with contextlib.suppress(ValueError):
            super().close()

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Raise `io.UnsupportedOperation`: a fragment that is being written cannot be read."""
        raise io.UnsupportedOperation("a fragment that is being written cannot be read")

    @property
    def _open(self) -> "_vmsnap.Fragment":
        if self._raw is None:
            raise _closed()
        return self._raw

    def __enter__(self) -> Self:
        """Return the fragment itself."""
        self._entered = self._open
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exception: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        """Finish the fragment on success, discard it on an exception."""
        raw, self._entered = self._entered, None
        if kind is None:
            self.close()
        elif raw is not None:
            self._let_go()
            raw.discard()

    def __reduce_ex__(self, _protocol: SupportsIndex, /) -> NoReturn:
        """Raise TypeError: two copies cannot write the same file."""
        raise TypeError("a fragment being written cannot be copied or pickled; pickle the SnapshotWriter")

    def __repr__(self) -> str:
        state = "closed" if self.closed else "open"
        return f"<vmsnap.Fragment {self._name!r} {state}>"


class FragmentReader(io.RawIOBase):
    """A fragment that is being read, in order or at random. `SnapshotReader.raw_fragment` returns it.

    Opening an encrypted fragment verifies the header and the last segment, and therefore the size. Every other segment
    is verified before any of its bytes is returned. Many threads may call `read_at` and `readinto_at` at the same time.
    A large read uses several threads, without the interpreter lock.
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
        """Size of the plaintext, in bytes."""
        return self._open.size

    @property
    def stored_size(self) -> int:
        """Size of the file, in bytes."""
        return self._open.stored_size

    @property
    def chunk_size_bytes(self) -> int | None:
        """Size of a chunk in bytes, the least that a read decrypts; None for a plain fragment."""
        return self._open.chunk_size_bytes

    def readable(self) -> bool:
        """Return True: an open fragment is readable."""
        return self._open is not None

    def seekable(self) -> bool:
        """Return True: an open fragment is seekable."""
        return self._open is not None

    def read_at(self, offset: int, size: int) -> bytes:
        """Read `size` bytes from `offset` without moving the position.

        Parameters
        ----------
        offset
            The offset in the plaintext, in bytes.
        size
            The number of bytes. Fewer are returned only at the end of the fragment.

        Raises
        ------
        AuthenticationError
            A segment is not authentic. None of its bytes is returned.
        """
        return self._open.read_at(offset, size)

    def readinto_at(self, offset: int, buffer: "WriteableBuffer") -> int:
        """Fill `buffer` from `offset` without moving the position.

        Returns
        -------
        int
            The number of bytes read. It is less than the size of the buffer only at the end of the fragment.

        Raises
        ------
        AuthenticationError
            A segment is not authentic. The buffer is filled with zeros.
        """
        return self._open.readinto_at(offset, buffer)

    def readinto(self, buffer: "WriteableBuffer", /) -> int:
        """Fill `buffer` from the position, and return the number of bytes as `readinto_at` does."""
        return self._open.readinto(buffer)

    def read(self, size: int | None = -1, /) -> bytes:
        """Read `size` bytes from the position, fewer only at the end; without a size, everything up to the end."""
        return self._open.read(None if size is None or size < 0 else size)

    def readall(self) -> bytes:
        """Read everything from the position to the end."""
        return self._open.read(None)

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        """Move the position and return it. A position beyond the end is allowed; reads there return nothing."""
        return self._open.seek(offset, whence)

    def tell(self) -> int:
        """Return the position in bytes of plaintext."""
        return self._open.tell()

    def write(self, data: "ReadableBuffer", /) -> int:
        """Raise `io.UnsupportedOperation`: a fragment that is being read cannot be written."""
        raise io.UnsupportedOperation("a fragment that is being read cannot be written")

    def __reduce_ex__(self, _protocol: SupportsIndex, /) -> NoReturn:
        """Raise TypeError: a copy would share the position."""
        raise TypeError("an open fragment cannot be copied or pickled; pickle the SnapshotReader")

    def close(self) -> None:
        """Close the fragment. Calls that other threads have begun are completed."""
        self._raw = None
        super().close()

    @property
    def _open(self) -> "_vmsnap.FragmentReader":
        if self._raw is None:
            raise _closed()
        return self._raw

    def __enter__(self) -> Self:
        """Return the fragment itself."""
        if self.closed:
            raise _closed()
        return self

    def __repr__(self) -> str:
        state = "closed" if self._raw is None else f"of {self._raw.size} bytes"
        return f"<vmsnap.FragmentReader {self._name!r} {state}>"
