"""Errors of a full or read-only disk: the call fails, and nothing is left behind."""

import errno
import functools
import gc
import io
import itertools
import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import vmsnap
from independent import check_independently
from refusals import refused, row
from support import MIB, Place, pattern, tree, write, write_in_pieces


def until_full(step: Callable[[], object]) -> None:
    def forever() -> None:
        while True:
            step()

    with pytest.raises(OSError, match="No space left"):
        forever()


def fill(disk: Path) -> None:
    """Use up all the room."""
    with open(disk / "filler", "wb", buffering=0) as filler:
        for piece in (bytes(1 << 16), bytes(1 << 12), bytes(1)):
            until_full(functools.partial(filler.write, piece))


def use_all_inodes(disk: Path) -> None:
    numbers = itertools.count()
    until_full(lambda: (disk / f"empty {next(numbers)}").touch())


@pytest.fixture(params=["plain", "encrypted"])
def small_place(request: pytest.FixtureRequest, small_disk: Path) -> Place:
    return Place(small_disk / "vm1", vmsnap.generate_key() if request.param == "encrypted" else None)


@row("after-failed-write")
@pytest.mark.parametrize("piece", [100, 3000, 60_000, MIB, 6 * MIB])
@pytest.mark.parametrize("chunk", [33, 4096, 65536])
def test_a_disk_that_gets_full_fails_the_write_and_poisons_the_fragment(
    small_place: Place, piece: int, chunk: int
) -> None:
    writer = small_place.create()
    write(writer.add_namespace("others"), "kept", pattern(1000))
    before = tree(small_place.location)
    fragment = writer.raw_fragment("mem", chunk_size_bytes=chunk)
    with pytest.raises(OSError, match=r'fragment "mem" of .*vm1: cannot be written: No space left on device') as caught:
        write_in_pieces(fragment, pattern(6 * MIB), piece)
    assert caught.value.errno == errno.ENOSPC

    message = 'fragment "mem" of .*vm1: an earlier write failed'
    for call in (lambda: fragment.write(b"x"), lambda: fragment.write(pattern(MIB)), fragment.flush):
        with refused("after-failed-write", message, small_place.file("others")):
            call()
    with pytest.raises(vmsnap.StateError, match=message):
        fragment.close()
    assert fragment.closed
    assert tree(small_place.location) == before

    # There is room again, and the name is free.
    write(writer, "mem", b"anew")
    check_independently(small_place.location, small_place.key, {"others/kept": pattern(1000), "mem": b"anew"})


@row("after-failed-write")
def test_a_fragment_whose_write_failed_does_not_tell_a_position(small_place: Place) -> None:
    writer = small_place.create()
    writer.add_namespace("others")
    with writer.raw_fragment("mem") as fragment:
        with pytest.raises(OSError, match="No space left"):
            fragment.write(pattern(6 * MIB))
        with refused("after-failed-write", "an earlier write failed", small_place.file("others")):
            fragment.tell()
        fragment.discard()


def ends_by_with(writer: vmsnap.SnapshotWriter, piece: int) -> None:
    with writer.raw_fragment("mem") as fragment:
        write_in_pieces(fragment, pattern(6 * MIB), piece)


def ends_by_discard(writer: vmsnap.SnapshotWriter, piece: int) -> None:
    fragment = writer.raw_fragment("mem")
    try:
        write_in_pieces(fragment, pattern(6 * MIB), piece)
    finally:
        fragment.discard()


def ends_by_drop(writer: vmsnap.SnapshotWriter, piece: int) -> None:
    fragment = writer.raw_fragment("mem")
    failure = None
    try:
        write_in_pieces(fragment, pattern(6 * MIB), piece)
    except OSError as error:
        failure = error.with_traceback(None)  # which holds on to the fragment
    del fragment
    gc.collect()
    if failure:
        raise failure


@row("disk-full")
@pytest.mark.parametrize("end", [ends_by_with, ends_by_discard, ends_by_drop])
@pytest.mark.parametrize("piece", [60_000, 6 * MIB])
def test_a_fragment_that_a_full_disk_cut_off_goes_however_it_ends(
    small_place: Place, piece: int, end: Callable[[vmsnap.SnapshotWriter, int], None]
) -> None:
    writer = small_place.create()
    with refused("disk-full", "No space left", small_place.location):
        end(writer, piece)


@pytest.mark.parametrize("length", [5000, 60_000])
def test_a_disk_that_is_full_at_the_end_fails_the_close(small_place: Place, length: int) -> None:
    fragment = small_place.create().raw_fragment("mem")
    fragment.write(pattern(length))
    fill(small_place.location.parent)
    with pytest.raises(OSError, match=r'fragment "mem" of .*vm1: cannot be written: No space left') as caught:
        fragment.close()
    assert caught.value.errno == errno.ENOSPC
    assert fragment.closed
    assert not small_place.file("mem").exists()


def test_a_fragment_that_is_dropped_on_a_full_disk_leaves_nothing(small_place: Place) -> None:
    fragment = small_place.create().raw_fragment("mem")
    fragment.write(pattern(60_000))
    fill(small_place.location.parent)
    del fragment
    gc.collect()
    assert not small_place.file("mem").exists()


def test_a_buffered_writer_over_a_full_disk_leaves_nothing(small_place: Place) -> None:
    stream = io.BufferedWriter(small_place.create().raw_fragment("mem"), buffer_size=1 << 17)
    stream.write(pattern(100_000))
    fill(small_place.location.parent)
    with pytest.raises((OSError, vmsnap.StateError)):
        stream.close()
    assert not small_place.file("mem").exists()


@row("disk-full")
def test_a_full_disk_has_no_room_for_a_fragment(small_place: Place) -> None:
    writer = small_place.create()
    fill(small_place.location.parent)
    if small_place.key:  # which begins with a header
        with refused("disk-full", 'fragment "mem" of .*vm1: cannot be written: No space', small_place.location.parent):
            writer.raw_fragment("mem")
    (small_place.location.parent / "filler").unlink()
    use_all_inodes(small_place.location.parent)
    with refused("disk-full", 'fragment "mem" of .*vm1 cannot be created: No space', small_place.location.parent):
        writer.raw_fragment("mem")
    with refused("disk-full", 'namespace "disks" of .*vm1 cannot be created: No space', small_place.location.parent):
        writer.add_namespace("disks")


@row("disk-full")
def test_a_full_disk_has_no_room_for_a_snapshot(small_disk: Path, key: bytes) -> None:
    fill(small_disk)
    with refused("disk-full", "cannot write enc_metadata of .*vm1: No space", small_disk):
        vmsnap.SnapshotWriter(small_disk / "vm1", key=key)
    (small_disk / "filler").unlink()
    use_all_inodes(small_disk)
    for each in (None, key):
        with refused("disk-full", "cannot create the snapshot .*vm1: .*No space", small_disk):
            vmsnap.SnapshotWriter(small_disk / "vm1", key=each)
    # Room for the directory, but not for the file in it.
    (small_disk / "empty 0").unlink()
    with refused("disk-full", "cannot write enc_metadata of .*vm1: No space", small_disk):
        vmsnap.SnapshotWriter(small_disk / "vm1", key=key)


@row("disk-full")
@pytest.mark.parametrize("encrypted", [False, True])
def test_a_disk_that_is_full_at_the_commit_leaves_nothing(small_disk: Path, key: bytes, encrypted: bool) -> None:
    staged = vmsnap.create(small_disk / "vm1", key=key if encrypted else None)
    staged.writer.write_fragment("clock", 1)
    use_all_inodes(small_disk)
    with refused("disk-full", "cannot commit the snapshot .*vm1: .*No space", small_disk):
        staged.commit()
    (small_disk / "empty 0").unlink()
    staged.commit()
    assert vmsnap.verify(small_disk / "vm1", key=key if encrypted else None).ok


def test_what_cannot_be_staged_on_a_full_disk_leaves_nothing(small_disk: Path, key: bytes) -> None:
    fill(small_disk)
    for each in (None, key):
        names = set(os.listdir(small_disk))
        with pytest.raises(OSError, match="No space"), vmsnap.create(small_disk / "vm1", key=each) as snap:
            snap.write_fragment("mem", bytes(5000))
        assert set(os.listdir(small_disk)) == names


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_read_only_disk_is_read_and_nothing_else(small_disk: Path, key: bytes, encrypted: bool) -> None:
    given = key if encrypted else None
    vmsnap.SnapshotWriter(small_disk / "unsealed", key=given).write_fragment("clock", 1)
    with vmsnap.create(small_disk / "vm1", key=given) as snap:
        snap.write_fragment("clock", 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert vmsnap.verify(small_disk / "vm1", key=given).ok
    assert vmsnap.open(small_disk / "vm1", key=given, require_sealed=True).read_fragment("clock") == 1
    assert vmsnap.clean(small_disk) == vmsnap.Cleaned([], [])
    with pytest.raises(OSError, match=r"cannot create the snapshot .*vm2: .*Read-only"):
        vmsnap.create(small_disk / "vm2", key=given)
    with pytest.raises(OSError, match="Read-only"):
        vmsnap.seal(small_disk / "unsealed", key=given)
