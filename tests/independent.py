"""The reader in examples/readers/python, which was written from docs/format.md and knows nothing of vmsnap's code."""

import sys
from pathlib import Path

import vmsnap

READER_PROGRAM = Path(__file__).resolve().parents[1] / "examples/readers/python/vmsnap_reader.py"
sys.path.insert(0, str(READER_PROGRAM.parent))

# Where they lie is known only now.
import vmsnap_packer  # noqa: E402
import vmsnap_reader  # noqa: E402
import vmsnap_snapshot  # noqa: E402

__all__ = [
    "READER_PROGRAM",
    "all_fragments",
    "check_independently",
    "vmsnap_packer",
    "vmsnap_reader",
    "vmsnap_snapshot",
]


def all_fragments(reader: vmsnap.SnapshotReader) -> dict[str, vmsnap.SnapshotReader]:
    """The path of every fragment in and below a namespace, with the reader of the namespace it lies in."""
    found = {"/".join(filter(None, [reader.namespace_path, name])): reader for name in reader.list_fragments()}
    for name in reader.list_namespaces():
        found |= all_fragments(reader.namespace(name))
    return found


def check_independently(root: Path, key: bytes | None, expected: dict[str, bytes] | None = None) -> None:
    """The independent reader finds the same fragments as vmsnap, with the same bytes.

    Where `expected` is given, those are also all the fragments there are, with these bytes.
    """
    snapshot = vmsnap_reader.open_snapshot(root, key)
    theirs = {path: snapshot.read(path) for path in snapshot.fragments()}
    found = all_fragments(vmsnap.SnapshotReader(root, key=key))
    assert sorted(theirs) == sorted(found)
    for path, reader in found.items():
        with reader.raw_fragment(path.rpartition("/")[2]) as fragment:
            assert fragment.read() == theirs[path], path
            assert fragment.chunk_size_bytes == snapshot.chunk_size(path)
    if expected is not None:
        # Compared one by one: a message with megabytes in it helps nobody.
        assert sorted(theirs) == sorted(expected)
        assert not [path for path in expected if theirs[path] != expected[path]]
