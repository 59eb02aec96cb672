"""Archives in the reader in examples/readers/python: packed complete or absent, and refused where a byte is another."""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import vmsnap
from commands import write_private
from independent import READER_PROGRAM, vmsnap_packer, vmsnap_reader
from support import pattern, tree


def run_reader(*arguments: object) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-E", "-s", str(READER_PROGRAM), *map(str, arguments)]
    return subprocess.run(command, capture_output=True)


@pytest.fixture(params=["plain", "encrypted"])
def key(request: pytest.FixtureRequest) -> bytes | None:
    """A key, or None for a plain snapshot."""
    return vmsnap.generate_key() if request.param == "encrypted" else None


@pytest.fixture
def root(key: bytes | None, tmp_path: Path) -> Path:
    """A sealed snapshot with guest memory."""
    with vmsnap.create(tmp_path / "vm1", key=key) as writer:
        with writer.add_namespace("disks").raw_fragment("sda") as fragment:
            fragment.write(b"boot sector")
        with writer.raw_fragment("żółć") as fragment:
            fragment.write(pattern(70_000))
        writer.write_memory([vmsnap.GuestRegion(0x1000, bytes(4096) + pattern(4096))])
    return tmp_path / "vm1"


@pytest.fixture
def options(key: bytes | None, tmp_path: Path) -> list[str | Path]:
    """The options that open the snapshot."""
    return [] if key is None else ["--key-file", write_private(tmp_path / "key", key)]


def test_the_program_packs_a_snapshot_and_reads_the_archive(
    root: Path, options: list[str | Path], tmp_path: Path
) -> None:
    archive = tmp_path / "vm1.vmsnap.tar"
    done = run_reader(archive, *options, "pack", root)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert archive.stat().st_mode & 0o777 == 0o600
    assert archive.stat().st_nlink == 1
    for command in (["list"], ["check"], ["cat", "disks/sda"], ["cat", "nothing"], ["restore", tmp_path / "ram"]):
        results = []
        for snapshot in (root, archive):
            done = run_reader(snapshot, *options, *command)
            results.append((done.returncode, done.stdout, done.stderr))
            if command[0] == "restore":
                assert (tmp_path / "ram/0000000000001000").read_bytes() == bytes(4096) + pattern(4096)
                shutil.rmtree(tmp_path / "ram")
        assert results[0] == results[1]


def test_an_archive_is_there_as_a_whole_or_not_at_all(
    root: Path, key: bytes | None, options: list[str | Path], tmp_path: Path
) -> None:
    def refuses(archive: Path, source: Path, kind: str) -> None:
        before = tree(tmp_path)
        done = run_reader(archive, *options, "pack", source)
        assert done.returncode == 1, done
        assert done.stderr.startswith(f"refused: {kind}: ".encode()), done.stderr
        assert tree(tmp_path) == before

    (tmp_path / "taken").write_bytes(b"something")
    (tmp_path / "link").symlink_to("nothing")
    refuses(tmp_path / "taken", root, "io")
    refuses(tmp_path / "link", root, "io")
    refuses(root, root, "io")
    refuses(tmp_path / "no/where", root, "io")
    refuses(tmp_path / "archive", tmp_path / "nothing", "missing")
    with vmsnap.SnapshotWriter(tmp_path / "open", key=key).raw_fragment("mem") as fragment:
        fragment.write(b"x")
    refuses(tmp_path / "archive", tmp_path / "open", "missing")
    (root / "żółć").write_bytes((root / "żółć").read_bytes() + b"\0")
    refuses(tmp_path / "archive", root, "corrupt")
    (root / "żółć").unlink()
    refuses(tmp_path / "archive", root, "corrupt")


def test_zeros_become_holes(tmp_path: Path) -> None:
    with vmsnap.create(tmp_path / "vm1") as writer, writer.raw_fragment("mem") as fragment:
        fragment.write(bytes(8 << 20) + b"end")
    vmsnap_packer.pack(vmsnap_reader.open_snapshot(tmp_path / "vm1"), tmp_path / "archive")
    assert (tmp_path / "archive").stat().st_blocks * 512 < 1 << 20
    assert vmsnap_reader.open_snapshot(tmp_path / "archive").read("mem") == bytes(8 << 20) + b"end"


def test_an_archive_packed_again_is_the_same(root: Path, key: bytes | None, tmp_path: Path) -> None:
    vmsnap_packer.pack(vmsnap_reader.open_snapshot(root, key), tmp_path / "archive")
    vmsnap_packer.pack(vmsnap_reader.open_snapshot(tmp_path / "archive", key), tmp_path / "again")
    assert (tmp_path / "archive").read_bytes() == (tmp_path / "again").read_bytes()


def test_another_file_is_refused_with_advice(root: Path, options: list[str | Path], tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "foreign.tar", "w") as tar:
        tar.add(root, ".")
    (tmp_path / "empty").touch()
    for file in ("foreign.tar", "empty"):
        done = run_reader(tmp_path / file, *options, "list")
        assert done.returncode == 1
        assert done.stderr.startswith(b"refused: corrupt: ")
        assert done.stderr.endswith(b": not a vmsnap archive: unpack it with tar if it is a tar file\n")


def test_a_changed_byte_is_refused_or_is_read_by_nothing(tmp_path: Path) -> None:
    key, root, archive = bytes(32), tmp_path / "vm1", tmp_path / "archive"
    with vmsnap.create(root, key=key) as writer:
        for namespace in (writer, writer.add_namespace("ż")):
            with namespace.raw_fragment("note", chunk_size_bytes=32) as fragment:
                fragment.write(pattern(40))
    vmsnap_packer.pack(vmsnap_reader.open_snapshot(root, key), archive)
    expected = {"note": pattern(40), "ż/note": pattern(40)}

    def is_read() -> bool:
        try:
            snapshot = vmsnap_reader.open_snapshot(archive, key)
            found = {path: snapshot.read(path) for path in snapshot.fragments()}
        except vmsnap_reader.FormatError:
            return False
        assert found == expected
        return True

    # Only `verify` of vmsnap compares the headers of namespaces, the padding and the end blocks.
    data = archive.read_bytes()
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
    read = set(range(1024))
    for member in members:
        if not member.isdir():
            read.update(range(member.offset, member.offset_data + member.size))
    with open(archive, "r+b") as file:
        # Of the spaces before the manifest, some are enough.
        for at in (at for at in range(len(data)) if data[at] != ord(" ") or at % 997 == 0):
            os.pwrite(file.fileno(), bytes([data[at] ^ 0x55]), at)
            assert is_read() == (at not in read), at
            os.pwrite(file.fileno(), data[at : at + 1], at)
    assert is_read()
