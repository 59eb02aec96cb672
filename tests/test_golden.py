"""Snapshots that this version and earlier ones wrote are read, value for value and byte for byte.

They lie in ``tests/golden/<version>/``; `make_golden.py` writes those of a version.
"""

import hashlib
import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import vmsnap
from independent import all_fragments, check_independently
from make_golden import GOLDEN, WRAPPINGS, described, written_values

VERSIONS = sorted(folder.name for folder in GOLDEN.iterdir() if folder.is_dir())


@cache
def expected(version: str) -> dict[str, Any]:
    """The expected contents of the snapshots of a version."""
    found: dict[str, Any] = json.loads((GOLDEN / version / "expected.json").read_text(encoding="utf-8"))
    return found


SNAPSHOTS = [(version, name) for version in VERSIONS for name in expected(version)["snapshots"]]
snapshots = pytest.mark.parametrize(("version", "name"), SNAPSHOTS)


def key_of(version: str, name: str) -> bytes | None:
    key = expected(version)["snapshots"][name]["key"]
    return None if key is None else bytes.fromhex(key)


def check(root: Path, version: str, name: str) -> None:
    """The snapshot has exactly the contents that its expected.json lists."""
    holds = expected(version)["snapshots"][name]
    found = all_fragments(vmsnap.SnapshotReader(root, key=key_of(version, name)))
    assert sorted(found) == sorted(holds["fragments"])
    contents = {}
    for path, fragment in holds["fragments"].items():
        reader, last = found[path], path.rpartition("/")[2]
        with reader.raw_fragment(last) as opened:
            assert (opened.size, opened.chunk_size_bytes) == (fragment["size"], fragment.get("chunk_size_bytes")), path
            contents[path] = opened.read()
            # The end alone, as somebody reads who knows what is where.
            start = max(0, fragment["size"] - 33)
            assert opened.read_at(start, 33) == contents[path][start:], path
        assert hashlib.sha256(contents[path]).hexdigest() == fragment["sha256"], path
    for value, reads_as in expected(version)["values"][holds["format"]].items():
        for format in (None, holds["format"]):
            seen = described(found[f"values/{value}"].read_fragment(value, format=format))
            # As text, for 1 == 1.0 == True.
            assert json.dumps(seen) == json.dumps(reads_as), value
    check_independently(root, key_of(version, name), contents)


def test_this_version_has_golden_snapshots() -> None:
    assert vmsnap.__version__ in VERSIONS, "python tests/make_golden.py makes them"


@snapshots
def test_a_golden_snapshot_holds_what_was_written(version: str, name: str) -> None:
    check(GOLDEN / version / name, version, name)


@snapshots
def test_the_modes_of_its_files_do_not_matter(version: str, name: str, tmp_path: Path) -> None:
    # git keeps none but the bit for execution; other copies are read-only.
    root = tmp_path / "copy"
    shutil.copytree(GOLDEN / version / name, root)
    paths = [root, *root.rglob("*")]
    for file_mode, folder_mode in ((0o644, 0o755), (0o444, 0o555), (0o600, 0o700)):
        for path in paths:
            path.chmod(folder_mode if path.is_dir() else file_mode)
        check(root, version, name)


@snapshots
def test_an_encrypted_one_opens_with_its_key_alone(version: str, name: str) -> None:
    root, key = GOLDEN / version / name, key_of(version, name)
    if key is None:
        with pytest.raises(vmsnap.NotEncryptedError):
            vmsnap.SnapshotReader(root, require_encrypted=True)
        return
    with pytest.raises(vmsnap.KeyUnavailableError):
        vmsnap.SnapshotReader(root)
    with pytest.raises(vmsnap.AuthenticationError):
        vmsnap.SnapshotReader(root, key=key[::-1])


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_golden_key_opens_however_it_is_wrapped(version: str, wrapping: str, tmp_path: Path) -> None:
    root = tmp_path / "copy"
    shutil.copytree(GOLDEN / version / "encrypted", root)
    (root / "enc_metadata").unlink()
    shutil.copy(GOLDEN / version / "wrappings" / wrapping, root / "enc_metadata")
    reader = vmsnap.SnapshotReader(root, **WRAPPINGS[wrapping][1])
    holds = expected(version)["snapshots"]["encrypted"]["fragments"]
    for path, found in all_fragments(reader).items():
        with found.raw_fragment(path.rpartition("/")[2]) as opened:
            assert hashlib.sha256(opened.read()).hexdigest() == holds[path]["sha256"]


@pytest.mark.parametrize("format", ["cbor", "json"])
def test_the_values_are_still_written_as_the_same_bytes(format: str) -> None:
    name = {"cbor": "plain", "json": "plain-json"}[format]
    for value, (written, _) in written_values(format).items():
        golden = (GOLDEN / vmsnap.__version__ / name / "values" / value).read_bytes()
        assert vmsnap.serialization.encode(written, format=format) == golden, value
