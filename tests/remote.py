"""Snapshots in the object stores of object_stores.py, for tests that use them with vmsnap."""

from pathlib import Path
from typing import Any

import vmsnap
from object_stores import Bucket
from support import MIB, Place, pattern, write

#: Two data ranges, one of them larger than a block. Together they are smaller than a part: fake-gcs-server knows none.
RAM = bytearray(pattern(3 * MIB)) + bytes(2 * MIB) + pattern(MIB, 1)
SDA = pattern(300_000, 2)


def at(bucket: Bucket, path: str = "vm1", **options: Any) -> vmsnap.Location:
    """Return the location of a snapshot in a bucket."""
    return vmsnap.Location(f"{bucket.url}/{path}", storage_options=bucket.storage_options, **options)


def environment(bucket: Bucket) -> dict[str, str]:
    """Return the variables by which a program of its own reaches the bucket."""
    return {name.upper(): value for name, value in bucket.storage_options.items()}


def make(location: Path, key: bytes | None = None, *, with_memory: bool = True) -> Place:
    """Make a sealed snapshot."""
    with vmsnap.create(location, key=key, durable=False) as writer:
        fill(writer, with_memory=with_memory)
    return Place(location, key)


def fill(writer: vmsnap.SnapshotWriter, *, with_memory: bool = True) -> None:
    """Write the fragments of such a snapshot."""
    writer.write_fragment("clock", 12)
    write(writer.add_namespace("disks"), "sda", SDA)
    write(writer, "empty", b"")
    writer.add_namespace("nothing in it")
    if with_memory:
        writer.write_memory([vmsnap.GuestRegion(0, RAM)])


def check(reader: vmsnap.SnapshotReader, *, with_memory: bool = True) -> None:
    """Check the contents of such a snapshot."""
    assert reader.list_namespaces() == ["disks", "nothing in it"]
    assert reader.read_fragment("clock") == 12
    with reader.namespace("disks").raw_fragment("sda") as fragment:
        assert fragment.read_at(100_000, 10) == SDA[100_000:100_010]
        assert fragment.read() == SDA
    with reader.raw_fragment("empty") as fragment:
        assert fragment.read() == b""
    if with_memory:
        assert reader.memory().read(3 * MIB - 4096, 8192) == RAM[3 * MIB - 4096 :][:8192]


def objects(bucket: Bucket, path: str = "vm1") -> set[str]:
    """Return the names of the objects below a prefix, as another client lists them."""
    store = bucket.store(path)
    import obstore

    return {each["path"] for each in obstore.list(store).collect()}


def files(directory: Path) -> dict[str, bytes]:
    """Return the files below a directory."""
    return {str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()}
