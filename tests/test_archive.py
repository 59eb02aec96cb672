"""A snapshot in one file: packed, unpacked, created, and read as the directory is read."""

import io
import multiprocessing
import os
import pickle
import random
import socket
import struct
import subprocess
import sys
import threading
from dataclasses import dataclass
from pathlib import Path

import pytest
import vmsnap
from independent import all_fragments, check_independently
from support import MIB, Place, pattern, tree, write

RAM = pattern(MIB // 2) + bytes(MIB // 2)
HIGH = 1 << 32
SIZES = (0, 1, 4095, 4096, 65_535, 65_536, 200_001)
NAMES = ["żółć ☃", "a" * 255, "new\nline"]


def fill(snapshot: vmsnap.SnapshotWriter) -> None:
    """Write a guest as `vmsnap.qemu.save` does, and fragments of many sizes and names."""
    snapshot.write_fragment("machine", {"version": 1})
    write(snapshot, "device_state", pattern(150_000), 65536)
    regions = [vmsnap.GuestRegion(0, RAM), vmsnap.GuestRegion(HIGH, RAM[::-1])]
    snapshot.write_memory(regions, compress="lz4")
    disks = snapshot.add_namespace("disks")
    for size in SIZES:
        write(disks, f"{size} bytes", pattern(size))
    for name in NAMES:
        write(snapshot.add_namespace(f"{name[:80]} namespace"), name, name.encode())
    disks.add_namespace("holds nothing")


def fill_twice(snapshot: vmsnap.SnapshotWriter) -> None:
    """Fail after a part is written."""
    fill(snapshot)
    fill(snapshot)


@dataclass(frozen=True)
class Pair:
    """A sealed snapshot as a directory and as an archive."""

    directory: Place
    archive: Place
    seal: vmsnap.SealId

    @property
    def key(self) -> bytes | None:
        return self.directory.key

    def readers(self) -> tuple[vmsnap.SnapshotReader, vmsnap.SnapshotReader]:
        return self.directory.open(), self.archive.open()


@pytest.fixture
def pair(place: Place, tmp_path: Path) -> Pair:
    with vmsnap.create(place.location, key=place.key) as snapshot:
        fill(snapshot)
    archive = Place(tmp_path / "vm1.vmsnap.tar", place.key)
    return Pair(place, archive, vmsnap.pack(place.location, archive.location, key=place.key))


def files(location: Path) -> dict[str, tuple[int, bytes]]:
    """Return the modes and contents of everything below a directory."""
    return {path: (mode, contents) for path, (mode, _, contents) in tree(location).items()}


# Packing and unpacking -----------------------------------------------------------------------------------------------


def test_an_archive_unpacks_into_the_directory_that_was_packed(pair: Pair, tmp_path: Path) -> None:
    assert pair.archive.location.is_file()
    assert pair.archive.location.stat().st_mode & 0o777 == 0o600
    seal = vmsnap.unpack(pair.archive.location, tmp_path / "vm2", key=pair.key)
    assert seal == pair.seal
    assert files(tmp_path / "vm2") == files(pair.directory.location)
    report = vmsnap.verify(tmp_path / "vm2", key=pair.key, expect_seal_digest=seal.seal_digest)
    assert report.ok, report.problems
    assert report.snapshot_id == seal.snapshot_id
    check_independently(tmp_path / "vm2", pair.key)


def test_packing_again_gives_the_same_bytes(pair: Pair, tmp_path: Path) -> None:
    expected = pair.archive.location.read_bytes()
    vmsnap.unpack(str(pair.archive.location), os.fsencode(tmp_path / "vm2"), key=pair.key)
    for source in (pair.directory.location, tmp_path / "vm2", pair.archive.location):
        again = tmp_path / "again"
        assert vmsnap.pack(source, again, key=pair.key, threads=1) == pair.seal
        assert again.read_bytes() == expected
        again.unlink()
        with open(again, "xb") as file:
            assert vmsnap.pack(source, file, key=pair.key) == pair.seal
        assert again.read_bytes() == expected
        again.unlink()


def test_an_archive_without_durability_is_the_same(pair: Pair, tmp_path: Path) -> None:
    vmsnap.pack(pair.directory.location, tmp_path / "again", key=pair.key, durable=False)
    assert (tmp_path / "again").read_bytes() == pair.archive.location.read_bytes()
    vmsnap.unpack(tmp_path / "again", tmp_path / "vm2", key=pair.key, durable=False)
    assert files(tmp_path / "vm2") == files(pair.directory.location)


def test_the_seal_digest_may_be_required(pair: Pair, tmp_path: Path) -> None:
    right, wrong = pair.seal.seal_digest.hex(), bytes(32)
    vmsnap.pack(pair.directory.location, tmp_path / "packed", key=pair.key, expect_seal_digest=right)
    vmsnap.unpack(tmp_path / "packed", tmp_path / "unpacked", key=pair.key, expect_seal_digest=right)
    before = tree(tmp_path)
    with pytest.raises(vmsnap.AuthenticationError):
        vmsnap.pack(pair.directory.location, tmp_path / "vm3", key=pair.key, expect_seal_digest=wrong)
    with pytest.raises(vmsnap.AuthenticationError):
        vmsnap.unpack(pair.archive.location, tmp_path / "vm3", key=pair.key, expect_seal_digest=wrong)
    assert tree(tmp_path) == before


def test_an_empty_snapshot_is_packed(place: Place, tmp_path: Path) -> None:
    vmsnap.create(place.location, key=place.key).commit()
    vmsnap.pack(place.location, tmp_path / "packed", key=place.key)
    assert vmsnap.open(tmp_path / "packed", key=place.key).list_fragments() == []
    vmsnap.unpack(tmp_path / "packed", tmp_path / "vm2", key=place.key)
    assert files(tmp_path / "vm2") == files(place.location)


# Files, pipes and sockets --------------------------------------------------------------------------------------------


def test_an_archive_begins_at_the_position_of_a_file(pair: Pair, tmp_path: Path) -> None:
    path = tmp_path / "bundle"
    with open(path, "w+b") as file:
        file.write(b"before ")  # still in the buffer
        vmsnap.pack(pair.directory.location, file, key=pair.key)
        assert file.tell() == 7 + len(pair.archive.location.read_bytes())
        # In a buffer that has read ahead, as in one that has not.
        for unread in (7, 5):
            file.seek(0)
            assert file.read(unread) == b"before "[:unread]
            file.seek(7)
            vmsnap.unpack(file, tmp_path / f"vm{unread}", key=pair.key)
            assert file.read() == b""
    assert path.read_bytes() == b"before " + pair.archive.location.read_bytes()
    with open(path, "rb") as reading:
        assert reading.read(7) == b"before "
        vmsnap.unpack(reading, tmp_path / "vm2", key=pair.key)
        assert reading.tell() == path.stat().st_size
    for name in ("vm7", "vm5", "vm2"):
        assert files(tmp_path / name) == files(pair.directory.location)


def test_an_archive_passes_through_a_pipe(pair: Pair, tmp_path: Path) -> None:
    ours, theirs = os.pipe()
    seals: list[vmsnap.SealId] = []

    def write_it() -> None:
        with open(theirs, "wb") as target:
            seals.append(vmsnap.pack(pair.directory.location, target, key=pair.key))

    thread = threading.Thread(target=write_it)
    thread.start()
    with open(ours, "rb") as source:
        seals.append(vmsnap.unpack(source, tmp_path / "vm2", key=pair.key))
    thread.join()
    assert seals == [pair.seal] * 2
    assert files(tmp_path / "vm2") == files(pair.directory.location)


def test_an_archive_passes_through_a_socket(pair: Pair, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    # With a timeout, its descriptor does not block.
    ours.settimeout(60)
    theirs.settimeout(60)

    def write_it() -> None:
        with theirs, theirs.makefile("wb") as target:
            vmsnap.pack(pair.directory.location, target, key=pair.key)

    thread = threading.Thread(target=write_it)
    thread.start()
    with ours, ours.makefile("rb") as source:
        vmsnap.unpack(source, tmp_path / "vm2", key=pair.key)
    thread.join()
    assert files(tmp_path / "vm2") == files(pair.directory.location)


def test_an_archive_goes_to_a_process(pair: Pair) -> None:
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        found: list[bytes] = []
        thread = threading.Thread(target=lambda: found.append(process.stdout.read()))  # type: ignore[union-attr]
        thread.start()
        vmsnap.pack(pair.directory.location, process.stdin, key=pair.key)
        process.stdin.close()
        thread.join()
    assert found == [pair.archive.location.read_bytes()]


def test_a_file_that_is_closed_or_opened_otherwise_is_refused(pair: Pair, tmp_path: Path) -> None:
    source, target = pair.archive.location, tmp_path / "target"
    before = tree(tmp_path)

    with open(source, "rb") as file, pytest.raises(io.UnsupportedOperation, match="not open for writing"):
        vmsnap.pack(pair.directory.location, file, key=pair.key)
    with pytest.raises(ValueError, match="closed file"):
        vmsnap.pack(pair.directory.location, file, key=pair.key)
    with pytest.raises(ValueError, match="closed file"):
        vmsnap.unpack(file, target, key=pair.key)
    with open(os.devnull, "wb") as null, pytest.raises(io.UnsupportedOperation, match="not open for reading"):
        vmsnap.unpack(null, target, key=pair.key)
    assert tree(tmp_path) == before


# Creating ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "archive", "made"),
    [
        ("vm2.vmsnap.tar", None, True),
        ("vm2", True, True),
        ("vm2", None, False),
        ("vm2.tar", None, False),
        ("vm2.vmsnap.tar", False, False),
    ],
)
def test_a_snapshot_is_created_as_one_file(
    place: Place, tmp_path: Path, name: str, archive: bool | None, made: bool
) -> None:
    location = tmp_path / name
    staged = vmsnap.create(location, key=place.key, archive=archive)
    with staged as snapshot:
        fill(snapshot)
        assert not location.exists()
    assert os.listdir(tmp_path) == [name]
    assert staged.location == str(location)
    assert location.is_file() == made
    report = vmsnap.verify(location, key=place.key, expect_seal_digest=staged.seal_digest)
    assert report.ok, report.problems
    if made:
        assert location.stat().st_mode & 0o777 == 0o600
        vmsnap.unpack(location, tmp_path / "unpacked", key=place.key)
        vmsnap.pack(tmp_path / "unpacked", tmp_path / "packed", key=place.key)
        assert (tmp_path / "packed").read_bytes() == location.read_bytes()
    check_independently(location, place.key)


def test_an_archive_is_complete_or_absent(place: Place, tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), vmsnap.create(tmp_path / "vm2", key=place.key, archive=True) as snapshot:
        fill_twice(snapshot)
    assert os.listdir(tmp_path) == []
    staged = vmsnap.create(tmp_path / "vm2.vmsnap.tar", key=place.key)
    fill(staged.writer)
    staged.discard()
    assert os.listdir(tmp_path) == []


# Reading -------------------------------------------------------------------------------------------------------------


def test_an_archive_lists_what_the_directory_lists(pair: Pair) -> None:
    directory, archive = pair.readers()
    assert archive.location == str(pair.archive.location)
    assert archive.path == pair.archive.location
    assert (archive.snapshot_id, archive.seal_digest) == (pair.seal.snapshot_id, pair.seal.seal_digest)
    assert archive.encrypted == directory.encrypted
    assert all_fragments(archive).keys() == all_fragments(directory).keys()
    assert archive.list_namespaces() == directory.list_namespaces()
    assert archive.namespace("disks").list_namespaces() == ["holds nothing"]
    assert archive.namespace("disks").namespace("holds nothing").list_fragments() == []
    for name in ("none", "disks"):
        with pytest.raises(OSError, match=name):
            archive.raw_fragment(name)
    with pytest.raises(OSError, match="mem"):
        archive.namespace("mem")


def test_an_archive_reads_what_the_directory_reads(pair: Pair) -> None:
    directory, archive = pair.readers()
    assert archive.read_fragment("machine") == directory.read_fragment("machine") == {"version": 1}
    chance = random.Random(5)
    readers = all_fragments(archive)
    for path, namespace in all_fragments(directory).items():
        name = path.rpartition("/")[2]
        with namespace.raw_fragment(name) as one, readers[path].raw_fragment(name) as other:
            assert other.size == one.size
            assert other.stored_size == one.stored_size
            assert other.chunk_size_bytes == one.chunk_size_bytes
            assert other.read() == one.read()
            for _ in range(20):
                offset, size = chance.randrange(one.size + 10), chance.randrange(10_000)
                assert other.read_at(offset, size) == one.read_at(offset, size)


def test_an_archive_has_the_memory_of_the_directory(pair: Pair) -> None:
    memory = pair.archive.open().memory()
    assert memory.regions == [range(MIB), range(HIGH, HIGH + MIB)]
    chance = random.Random(6)
    for _ in range(50):
        offset = chance.randrange(MIB)
        assert memory.read(offset, min(5000, MIB - offset)) == RAM[offset : offset + 5000]
    low, high = bytearray(MIB), bytearray(MIB)
    memory.restore([low, high])
    assert low == RAM
    assert high == RAM[::-1]


def test_an_archive_is_verified(pair: Pair) -> None:
    one = vmsnap.verify(pair.directory.location, key=pair.key)
    assert vmsnap.verify(pair.archive.location, key=pair.key) == one
    assert one.ok
    if pair.key:
        blind = vmsnap.verify(pair.archive.location)
        assert not blind.ok
        assert blind.not_checked


def test_an_archive_is_inspected_without_its_key(pair: Pair) -> None:
    one, other = vmsnap.inspect(pair.directory.location), vmsnap.inspect(pair.archive.location)
    assert other.location == str(pair.archive.location)
    assert (other.encrypted, other.key_wrapping, other.sealed) == (one.encrypted, one.key_wrapping, True)
    assert sorted(other.namespaces) == sorted(one.namespaces)
    sizes = [{each.path: each.stored_size for each in found.fragments} for found in (one, other)]
    assert sizes[0] == sizes[1]
    assert len({each.modified for each in other.fragments}) == 1


def test_a_reader_of_an_archive_travels_to_another_process(pair: Pair) -> None:
    reader = pair.archive.open().namespace("disks")
    script = (
        "import pickle, sys, vmsnap\n"
        "reader = pickle.load(sys.stdin.buffer)\n"
        "sys.stdout.buffer.write(reader.raw_fragment('200001 bytes').read())"
    )
    done = subprocess.run([sys.executable, "-c", script], input=pickle.dumps(reader), capture_output=True)
    assert (done.returncode, done.stdout) == (0, pattern(200_001)), done.stderr


def test_a_reader_of_an_archive_crosses_a_fork(pair: Pair) -> None:
    reader = pair.archive.open()
    assert reader.memory().read(0, 4096) == RAM[:4096]
    context = multiprocessing.get_context("fork")
    with context.Pool(2) as pool:
        pages = pool.starmap(_page, [(reader, offset) for offset in range(0, MIB, MIB // 8)])
    assert pages == [RAM[offset : offset + 4096] for offset in range(0, MIB, MIB // 8)]


def _page(reader: vmsnap.SnapshotReader, offset: int) -> bytes:
    return reader.memory().read(offset, 4096)


def test_the_key_of_an_archive_is_changed(tmp_path: Path, key: bytes) -> None:
    location = tmp_path / "vm1.vmsnap.tar"
    staged = vmsnap.create(location, key=key)
    with staged as snapshot:
        fill(snapshot)
    new = vmsnap.generate_key()
    vmsnap.rekey(location, key=key, new_key=new)
    with pytest.raises(vmsnap.AuthenticationError):
        vmsnap.open(location, key=key)
    assert vmsnap.verify(location, key=new, expect_seal_digest=staged.seal_digest).ok
    # To a passphrase, whose metadata has another size.
    vmsnap.rekey(location, key=new, new_passphrase="hunter2")
    assert vmsnap.verify(location, passphrase="hunter2", expect_seal_digest=staged.seal_digest).ok
    assert vmsnap.unpack(location, tmp_path / "vm2", passphrase="hunter2").seal_digest == staged.seal_digest
    assert sorted(os.listdir(tmp_path)) == ["vm1.vmsnap.tar", "vm2"]


# An access list of acl(5): the owner and the user 1000 read and write, the group and others nothing. The mask makes it
# look like mode 0660.
ACCESS_LIST = struct.pack(
    "<I" + "HHI" * 5,
    *(2, 1, 6, 2**32 - 1, 2, 6, 1000, 4, 0, 2**32 - 1, 16, 6, 2**32 - 1, 32, 0, 2**32 - 1),
)
ATTRIBUTE = "system.posix_acl_access"


@pytest.mark.parametrize("listed", [False, True])
def test_a_change_of_the_key_keeps_owner_mode_and_access_list(tmp_path: Path, key: bytes, listed: bool) -> None:
    path = tmp_path / "vm1.vmsnap.tar"
    with vmsnap.create(path, key=key) as snapshot:
        snapshot.write_fragment("clock", 12)
    os.chmod(path, 0o640)
    if os.geteuid() == 0:
        os.chown(path, 1234, 2345)
    if listed:
        try:
            os.setxattr(path, ATTRIBUTE, ACCESS_LIST)
        except OSError as error:
            pytest.skip(f"the file system has no access lists: {error}")
    before = path.stat()

    vmsnap.rekey(path, key=key, new_key=vmsnap.generate_key())

    after = path.stat()
    assert after.st_ino != before.st_ino
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)
    if listed:
        assert os.getxattr(path, ATTRIBUTE) == ACCESS_LIST


def test_a_damaged_archive_keeps_its_key(tmp_path: Path, key: bytes) -> None:
    path = tmp_path / "vm1.vmsnap.tar"
    with vmsnap.create(path, key=key) as snapshot:
        snapshot.write_fragment("clock", 12)
    path.write_bytes(path.read_bytes()[:-1])
    damaged = path.read_bytes()
    with pytest.raises(vmsnap.CorruptSnapshotError, match="truncated"):
        vmsnap.rekey(path, key=key, new_key=vmsnap.generate_key())
    assert path.read_bytes() == damaged


def test_a_fifo_in_place_of_an_archive_is_refused_at_once(pair: Pair) -> None:
    reader = pickle.dumps(pair.archive.open())
    pair.archive.location.unlink()
    os.mkfifo(pair.archive.location)
    with pytest.raises(vmsnap.InvalidArgumentError, match="not a regular file"):
        pickle.loads(reader).raw_fragment("machine")
