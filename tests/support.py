"""Helpers of several test modules: known bytes, places for snapshots, the state of a directory, other processes."""

import functools
import os
import random
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import vmsnap

MIB = 1 << 20

# docs/format.md, section 2.
HEADER_BYTES = 74
SEGMENT_OVERHEAD_BYTES = 32


@functools.cache
def pattern(length: int, seed: int = 0) -> bytes:
    """Bytes that are the same in every run, and do not repeat."""
    return random.Random(seed).randbytes(length)


def stored_size(length: int, chunk_size_bytes: int | None) -> int:
    """Return the size of the file of a fragment: header, plaintext, and the overhead of at least one segment."""
    if chunk_size_bytes is None:
        return length
    return HEADER_BYTES + length + SEGMENT_OVERHEAD_BYTES * max(1, -(-length // chunk_size_bytes))


def segment_offset(index: int, chunk_size_bytes: int) -> int:
    return HEADER_BYTES + index * (chunk_size_bytes + SEGMENT_OVERHEAD_BYTES)


@dataclass(frozen=True)
class Place:
    """The location of a snapshot that exists or will exist, and its key. Without a key it is plain."""

    location: Path
    key: bytes | None

    def create(self, threads: int | None = None) -> vmsnap.SnapshotWriter:
        return vmsnap.SnapshotWriter(self.location, key=self.key, threads=threads)

    def open(self, threads: int | None = None) -> vmsnap.SnapshotReader:
        return vmsnap.SnapshotReader(self.location, key=self.key, threads=threads)

    def file(self, path: str) -> Path:
        """Return the file of a fragment, or another file of the snapshot."""
        return self.location / path

    def stored(self, path: str) -> bytes:
        """Return the contents of the file of a fragment, or of another file of the snapshot."""
        return self.file(path).read_bytes()

    def store(self, path: str, content: bytes | bytearray) -> None:
        """Replace the contents of a file."""
        self.file(path).write_bytes(content)

    def damage(self, path: str, at: int, bit: int = 0) -> None:
        """Flip one bit of a file, in the byte at `at`. A second call repairs it."""
        changed = bytearray(self.stored(path))
        changed[at] ^= 1 << bit
        self.store(path, changed)


@contextmanager
def temporary_place(encrypted: bool) -> Iterator[Place]:
    """For tests that hypothesis calls many times, which a pytest fixture would not survive."""
    with tempfile.TemporaryDirectory(prefix="vmsnap-test-") as folder:
        yield Place(Path(folder, "vm1"), vmsnap.generate_key() if encrypted else None)


def write(
    writer: vmsnap.SnapshotWriter, name: str, data: bytes, chunk_size_bytes: int | None = None
) -> vmsnap.SnapshotWriter:
    """Write a whole fragment; returns the writer."""
    with writer.raw_fragment(name, chunk_size_bytes=chunk_size_bytes or 4096) as fragment:
        assert fragment.write(data) == len(data)
    return writer


def write_in_pieces(fragment: vmsnap.Fragment, data: bytes, piece: int) -> None:
    """Write to an open fragment, by calls of at most `piece` bytes."""
    for at in range(0, len(data), piece):
        fragment.write(data[at : at + piece])


def read(reader: vmsnap.SnapshotReader, name: str) -> bytes:
    with reader.raw_fragment(name) as fragment:
        return fragment.read()


def let_others_in(path: Path) -> None:
    """Let other users access a path below a directory of pytest."""
    for parent in path.parents:
        if parent == Path(tempfile.gettempdir()):
            break
        parent.chmod(parent.stat().st_mode | 0o011)


Entry = tuple[int, int, bytes]


def tree(folder: Path) -> dict[str, Entry]:
    """Return the tree below a directory: kind, mode, inode, and contents or link target. Opens only regular files."""
    entries: dict[str, Entry] = {}
    for place, folders, files in os.walk(folder):
        for name in folders + files:
            path = os.path.join(place, name)
            status = os.lstat(path)
            contents = b""
            if stat.S_ISREG(status.st_mode):
                contents = Path(path).read_bytes()
            elif stat.S_ISLNK(status.st_mode):
                contents = os.fsencode(os.readlink(path))
            entries[os.path.relpath(path, folder)] = (status.st_mode, status.st_ino, contents)
    return entries


def run_python(script: str, *arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a script in an interpreter of its own."""
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


def run_python_well(script: str, *arguments: object, **environment: str) -> str:
    """Run a script that must succeed, and return its output."""
    result = run_python(script, *arguments, **environment)
    assert result.returncode == 0, result.stderr
    return result.stdout
