"""Errors of archives: packing, unpacking and opening what is not one, or not any more."""

import bz2
import gzip
import io
import os
import socket
import ssl
import tarfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import vmsnap
from refusals import refused, row
from support import Place, pattern, write


@pytest.fixture
def archive(place: Place, tmp_path: Path) -> Path:
    """An archive beside the directory that was packed."""
    with vmsnap.create(place.location, key=place.key) as snapshot:
        write(snapshot, "mem", pattern(100_000))
        write(snapshot.add_namespace("disks"), "sda", pattern(70_000))
        write(snapshot, "clock", b"12")
    vmsnap.pack(place.location, tmp_path / "vm1.vmsnap.tar", key=place.key)
    return tmp_path / "vm1.vmsnap.tar"


def readings(archive: Path, key: bytes | None) -> list[Callable[[], object]]:
    """Return the calls that open an archive, and unpack it from a path and from a file."""

    def from_file() -> None:
        with open(archive, "rb") as file:
            vmsnap.unpack(file, archive.parent / "vm2", key=key)

    return [
        lambda: vmsnap.open(archive, key=key),
        lambda: vmsnap.unpack(archive, archive.parent / "vm2", key=key),
        from_file,
    ]


# Reading -------------------------------------------------------------------------------------------------------------


@row("archive-foreign")
@pytest.mark.parametrize("what", ["a tar file", "text", "an empty file"])
def test_a_file_of_another_program_is_not_an_archive(archive: Path, place: Place, what: str) -> None:
    match what:
        case "a tar file":
            with tarfile.open(archive, "w") as tar:
                tar.add(place.location, ".")
            message = "it is a tar file of another program, not a vmsnap archive: unpack it with tar"
        case "text":
            archive.write_bytes(b"text " * 1000)
            message = "not a vmsnap archive"
        case _:
            archive.write_bytes(b"")
            message = "it is empty, so it is not a vmsnap archive"
    for call in readings(archive, place.key):
        with refused("archive-foreign", message, archive.parent):
            call()
    with refused("archive-foreign", message, archive.parent):
        vmsnap.inspect(archive)


@row("archive-cut-off")
def test_an_archive_that_ends_too_early_is_refused(archive: Path, place: Place) -> None:
    whole = archive.read_bytes()
    message = "it is truncated|ends before its|bytes long, but its manifest"
    for length in (1024, 1500, 65_536, 66_000, len(whole) // 2, len(whole) - 1024, len(whole) - 1):
        archive.write_bytes(whole[:length])
        for call in readings(archive, place.key):
            with refused("archive-cut-off", message, archive.parent):
                call()


@row("archive-too-long")
@pytest.mark.parametrize("more", [1, 512, 10_240])
def test_an_archive_with_more_bytes_is_refused(archive: Path, place: Place, more: int) -> None:
    with open(archive, "ab") as file:
        file.write(bytes(more))
    for call in readings(archive, place.key):
        with refused("archive-too-long", "something was (added|appended) to it", archive.parent):
            call()


@row("archive-changed")
def test_an_archive_with_a_changed_header_is_refused(archive: Path, place: Place) -> None:
    with tarfile.open(archive) as tar:
        header = tar.getmember("disks/sda").offset_data - 512
    content = bytearray(archive.read_bytes())
    content[header + 108] ^= 1  # a digit of its owner
    archive.write_bytes(content)
    disks = vmsnap.open(archive, key=place.key).namespace("disks")
    with refused("archive-changed", "sda", archive.parent):
        disks.raw_fragment("sda")
    for call in readings(archive, place.key)[1:]:
        with refused("archive-changed", "header|another program|changed", archive.parent):
            call()
    report = vmsnap.verify(archive, key=place.key)
    assert not report.ok


@row("sealed")
def test_nothing_is_added_to_an_archive(archive: Path, place: Place) -> None:
    with refused("sealed", "vm1.vmsnap.tar is an archive, which is always sealed", archive.parent):
        vmsnap.SnapshotWriter.open(archive, key=place.key)
    with refused("sealed", "sealed", archive.parent):
        vmsnap.seal(archive, key=place.key)


@row("no-key")
def test_an_encrypted_archive_needs_its_key(encrypted_place: Place, tmp_path: Path) -> None:
    archive = tmp_path / "vm1.vmsnap.tar"
    vmsnap.create(encrypted_place.location, key=encrypted_place.key).commit()
    with refused("no-key", "pass the key", tmp_path):
        vmsnap.pack(encrypted_place.location, archive)
    vmsnap.pack(encrypted_place.location, archive, key=encrypted_place.key)
    for call in readings(archive, None):
        with refused("no-key", "pass the key", tmp_path):
            call()


# Unpacking -----------------------------------------------------------------------------------------------------------


@row("archive-is-directory")
def test_a_directory_is_not_unpacked(archive: Path, place: Place) -> None:
    with refused("archive-is-directory", "vm1: it is a directory, not an archive: open it as it is", archive.parent):
        vmsnap.unpack(place.location, archive.parent / "vm2", key=place.key)


@row("archive-is-special")
def test_a_fifo_is_not_opened_for_an_archive(archive: Path, place: Place) -> None:
    os.mkfifo(archive.parent / "fifo")
    with refused("archive-is-special", "fifo: it is not a regular file", archive.parent):
        vmsnap.unpack(archive.parent / "fifo", archive.parent / "vm2", key=place.key)


@row("root-exists")
@pytest.mark.parametrize("what", ["a directory", "a file", "a link"])
def test_nothing_is_unpacked_over(archive: Path, place: Place, what: str) -> None:
    target = archive.parent / "vm2"
    match what:
        case "a directory":
            target.mkdir()
        case "a file":
            target.touch()
        case _:
            target.symlink_to("nowhere")
    for call in readings(archive, place.key)[1:]:
        with refused("root-exists", "the path already exists", archive.parent):
            call()


@row("parent-missing")
def test_the_parent_of_an_archive_must_exist(archive: Path, place: Place) -> None:
    absent = archive.parent / "absent/vm2"
    with refused("parent-missing", "the parent directory does not exist", archive.parent):
        vmsnap.unpack(archive, absent, key=place.key)
    with refused("parent-missing", "the parent directory does not exist", archive.parent):
        vmsnap.pack(place.location, absent, key=place.key)


@row("root-missing")
def test_an_archive_that_is_not_there_is_missed(archive: Path, place: Place) -> None:
    none = archive.parent / "none"
    with refused("root-missing", "none", archive.parent):
        vmsnap.unpack(none, archive.parent / "vm2", key=place.key)
    with refused("root-missing", "none", archive.parent):
        vmsnap.pack(none, archive.parent / "vm2", key=place.key)


# Packing -------------------------------------------------------------------------------------------------------------


@row("archive-exists")
@pytest.mark.parametrize("what", ["the archive", "a directory", "a link"])
def test_nothing_is_packed_over(archive: Path, place: Place, what: str) -> None:
    target = archive
    if what == "a directory":
        target = place.location
    elif what == "a link":
        target = archive.parent / "link"
        target.symlink_to("nowhere")
    with refused("archive-exists", "the path already exists", archive.parent):
        vmsnap.pack(place.location, target, key=place.key)


@row("archive-inside")
def test_an_archive_is_not_written_into_its_snapshot(archive: Path, place: Place) -> None:
    (archive.parent / "link").symlink_to(place.location)
    for target in (place.file("packed"), place.file("disks/packed"), archive.parent / "link/packed"):
        with refused("archive-inside", "is in the snapshot .*vm1", archive.parent):
            vmsnap.pack(place.location, target, key=place.key)


@row("archive-of-unsealed")
def test_a_snapshot_that_is_not_sealed_is_not_packed(place: Place, tmp_path: Path) -> None:
    write(place.create(), "mem", b"x")
    with refused("archive-of-unsealed", "vm1 is not sealed", tmp_path):
        vmsnap.pack(place.location, tmp_path / "packed", key=place.key)
    vmsnap.seal(place.location, key=place.key)
    vmsnap.pack(place.location, tmp_path / "packed", key=place.key)


@row("archive-of-damaged")
@pytest.mark.parametrize("what", ["longer", "one more"])
def test_a_damaged_snapshot_is_not_packed(archive: Path, place: Place, what: str) -> None:
    match what:
        case "longer":
            place.store("disks/sda", place.stored("disks/sda") + b"x")
        case _:
            place.store("disks/sdb", b"")
    for target in (archive.parent / "packed", io.FileIO(os.open(os.devnull, os.O_WRONLY), "wb")):
        with refused("archive-of-damaged", "sd[ab]", archive.parent):
            vmsnap.pack(place.location, target, key=place.key)


@row("archive-of-damaged", "changed")
def test_a_snapshot_with_a_changed_fragment_is_not_packed(archive: Path, place: Place) -> None:
    place.damage("disks/sda", 50_000)
    if place.key:
        with refused("changed", 'fragment "sda" in namespace "disks".*: authentication failed', archive.parent):
            vmsnap.pack(place.location, archive.parent / "packed", key=place.key)
    else:
        with refused(
            "archive-of-damaged", 'fragment "sda" in namespace "disks".*: its contents have changed', archive.parent
        ):
            vmsnap.pack(place.location, archive.parent / "packed", key=place.key)


@row("archive-in-place")
def test_an_archive_cannot_be_written_in_place(place: Place, tmp_path: Path) -> None:
    with refused("archive-in-place", "cannot be created in place: an archive is written as a whole", tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "vm1.vmsnap.tar", key=place.key)


@row("archive-reader-gone")
def test_a_reader_that_goes_away_ends_the_packing(archive: Path, place: Place) -> None:
    ours, theirs = os.pipe()
    os.close(ours)
    with open(theirs, "wb", buffering=0) as target, refused("archive-reader-gone", "Broken pipe", archive.parent):
        vmsnap.pack(place.location, target, key=place.key)


@row("disk-full")
def test_a_disk_that_gets_full_leaves_no_archive(small_disk: Path, place: Place) -> None:
    with vmsnap.create(place.location, key=place.key) as snapshot:
        write(snapshot, "mem", pattern(700_000))
    for target in (small_disk / "vm1.vmsnap.tar", small_disk / "vm2.vmsnap.tar"):
        # The first has room, and fills the disk for the second.
        with suppress(OSError):
            vmsnap.pack(place.location, target, key=place.key)
    assert os.listdir(small_disk) == ["vm1.vmsnap.tar"]
    with refused("disk-full", "cannot pack the snapshot .*vm1.*No space left", small_disk):
        vmsnap.pack(place.location, small_disk / "vm2.vmsnap.tar", key=place.key)
    with refused("disk-full", "No space left", small_disk):
        vmsnap.unpack(small_disk / "vm1.vmsnap.tar", small_disk / "vm2", key=place.key)
    message = "cannot pack the snapshot .*vm1.*No space left"
    with open("/dev/full", "wb") as full, refused("disk-full", message, small_disk):
        vmsnap.pack(place.location, full, key=place.key)


@row("disk-full")
def test_a_disk_without_room_for_the_last_block_leaves_nothing(small_disk: Path, place: Place) -> None:
    with vmsnap.create(place.location, key=place.key) as snapshot:
        write(snapshot, "mem", pattern(200_000))
    free = os.statvfs(small_disk).f_bavail
    vmsnap.pack(place.location, small_disk / "packed", key=place.key)
    status = os.statvfs(small_disk)
    needed = free - status.f_bavail
    (small_disk / "packed").unlink()
    # A block less than it takes.
    (small_disk / "filler").write_bytes(bytes((free - needed + 1) * status.f_frsize))
    with refused("disk-full", "No space left", small_disk):
        vmsnap.pack(place.location, small_disk / "packed", key=place.key)


@row("archive-object")
def test_a_file_that_changes_its_bytes_is_not_an_archive(archive: Path, place: Place, tmp_path: Path) -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs, open(tmp_path / "file", "w+") as text, gzip.open(tmp_path / "gz", "wb") as zipped:
        tls = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        tls.check_hostname = False
        wrapped = tls.wrap_socket(ours, do_handshake_on_connect=False)
        bz2_file = bz2.BZ2File(tmp_path / "bz2", "wb")
        with wrapped, bz2_file, wrapped.makefile("wb") as over_tls:
            others: list[Any] = [io.BytesIO(), text, zipped, bz2_file, over_tls, None, 1, b"x".join]
            for other in others:
                for call in (
                    lambda file=other: vmsnap.pack(place.location, file, key=place.key),
                    lambda file=other: vmsnap.unpack(file, tmp_path / "vm2", key=place.key),
                ):
                    with refused("archive-object", "is not an archive: pass a path, or a binary file", tmp_path):
                        call()
