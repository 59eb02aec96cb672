"""Errors of fragments that are missing, changed, cut off or moved."""

import os
import shutil
import traceback
from pathlib import Path

import pytest
import vmsnap
from independent import check_independently
from refusals import refused, row
from support import HEADER_BYTES, MIB, Place, pattern, read, segment_offset, stored_size, write


@row("fragment-missing", "namespace-missing")
def test_what_is_not_there_is_missed_by_name(place: Place) -> None:
    writer = place.create()
    write(writer.add_namespace("disks").add_namespace("deep"), "sda", b"x")
    reader = place.open()
    with refused("fragment-missing", 'fragment "sdb" of .*vm1: does not exist', place.location):
        reader.raw_fragment("sdb")
    with refused(
        "fragment-missing", 'fragment "sdb" in namespace "disks/deep" of .*vm1: does not exist', place.location
    ):
        reader.namespace("disks").namespace("deep").raw_fragment("sdb")
    with refused("namespace-missing", 'namespace "disk" of .*vm1 does not exist', place.location):
        reader.namespace("disk")
    with refused("namespace-missing", 'namespace "disks/deeper" of .*vm1 does not exist', place.location):
        reader.namespace("disks").namespace("deeper")


@row("fragment-is-namespace", "namespace-is-fragment")
def test_fragments_and_namespaces_are_told_apart(place: Place) -> None:
    writer = place.create()
    inner = write(writer.add_namespace("disks"), "sda", b"x")
    inner.add_namespace("deep")
    reader = place.open()
    with refused("fragment-is-namespace", 'fragment "deep" in namespace "disks" of .*: is a namespace', place.location):
        reader.namespace("disks").raw_fragment("deep")
    with refused("fragment-is-namespace", 'fragment "disks" of .*vm1: is a namespace', place.location):
        reader.raw_fragment("disks")
    with refused("namespace-is-fragment", 'namespace "disks/sda" of .*vm1', place.location):
        reader.namespace("disks").namespace("sda")


@row("no-header")
@pytest.mark.parametrize("length", [0, 1, 40, 105, 106, 4096, 100_000])
def test_a_plain_file_in_an_encrypted_snapshot_is_refused(encrypted_place: Place, length: int) -> None:
    encrypted_place.create()
    encrypted_place.store("mem", pattern(length))
    message = 'fragment "mem" of .*vm1: .*plain file in an encrypted snapshot'
    with refused("no-header", message, encrypted_place.location):
        encrypted_place.open().raw_fragment("mem")


CHUNK = 32


@pytest.fixture
def segmented(encrypted_place: Place) -> Place:
    """A fragment of three segments, the last not full, in a namespace."""
    write(encrypted_place.create().add_namespace("disks"), "sda", pattern(2 * CHUNK + 6), CHUNK)
    assert encrypted_place.file("disks/sda").stat().st_size == stored_size(2 * CHUNK + 6, CHUNK)
    return encrypted_place


WHERE = 'fragment "sda" in namespace "disks" of .*vm1'
NOT_AUTHENTIC = f"{WHERE}: authentication failed: the key is wrong, or the file is damaged, truncated, renamed"


@row("no-header", "changed")
def test_a_fragment_cut_off_anywhere_does_not_open(segmented: Place) -> None:
    stored = segmented.stored("disks/sda")
    reader = segmented.open().namespace("disks")
    for length in range(len(stored)):
        segmented.store("disks/sda", stored[:length])
        if length < HEADER_BYTES + 32:
            with refused("no-header", f"{WHERE}: is {length} bytes long, shorter than any", segmented.location):
                reader.raw_fragment("sda")
        else:
            with refused("changed", NOT_AUTHENTIC, segmented.location):
                reader.raw_fragment("sda")


@row("changed")
@pytest.mark.parametrize("length", [0, 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_a_fragment_that_was_extended_does_not_open(encrypted_place: Place, length: int) -> None:
    write(encrypted_place.create(), "sda", pattern(length), CHUNK)
    stored = encrypted_place.stored("sda")
    for more in range(1, 2 * (CHUNK + 32) + 2):
        for addition in (bytes(more), stored[-more:], b"\xff" * more):
            encrypted_place.store("sda", stored + addition)
            with refused("changed", "authentication failed", encrypted_place.location):
                encrypted_place.open().raw_fragment("sda")


@row("no-header", "changed")
def test_any_changed_bit_of_a_fragment_is_found_and_other_segments_still_read(segmented: Place) -> None:
    data = pattern(2 * CHUNK + 6)
    stored = segmented.stored("disks/sda")
    reader = segmented.open().namespace("disks")
    for position in range(len(stored)):
        for bit in range(8):
            segmented.damage("disks/sda", position, bit)
            before_last = HEADER_BYTES <= position < segment_offset(2, CHUNK)
            chunk_size = int.from_bytes(segmented.stored("disks/sda")[2:6], "big") - 32
            if position < 10 and not (2 <= position < 6 and 32 <= chunk_size <= 64 * MIB):
                with refused("no-header", f"{WHERE}: not encrypted by vmsnap", segmented.location):
                    reader.raw_fragment("sda")
            elif not before_last:
                with refused("changed", NOT_AUTHENTIC, segmented.location):
                    reader.raw_fragment("sda")
            else:
                bad = (position - HEADER_BYTES) // (CHUNK + 32)
                with reader.raw_fragment("sda") as fragment:
                    buffer = bytearray(b"\xaa" * len(data))
                    with refused("changed", NOT_AUTHENTIC, segmented.location):
                        fragment.readinto_at(0, buffer)
                    assert buffer == bytes(len(data))
                    for index in range(3):
                        at = index * CHUNK
                        if index != bad:
                            assert fragment.read_at(at, CHUNK) == data[at : at + CHUNK]
                            continue
                        # Neither whole nor in part, neither in place nor in order.
                        for offset, size in ((at, CHUNK), (at + 5, 1)):
                            with refused("changed", NOT_AUTHENTIC, segmented.location):
                                fragment.read_at(offset, size)
                            fragment.seek(offset)
                            with refused("changed", NOT_AUTHENTIC, segmented.location):
                                fragment.read(size)
            segmented.damage("disks/sda", position, bit)  # which repairs it
    assert segmented.stored("disks/sda") == stored
    assert read(reader, "sda") == data


@row("changed")
@pytest.mark.parametrize("start", [0, 1, CHUNK - 1])
def test_a_read_that_fails_gives_nothing_out_and_keeps_the_position(segmented: Place, start: int) -> None:
    segmented.damage("disks/sda", segment_offset(1, CHUNK) + 20)
    with segmented.open().namespace("disks").raw_fragment("sda") as fragment:
        fragment.seek(start)
        buffer = bytearray(b"\xaa" * (2 * CHUNK))
        with refused("changed", NOT_AUTHENTIC, segmented.location):
            fragment.readinto(buffer)
        assert buffer == bytes(len(buffer))
        assert fragment.tell() == start
        with refused("changed", NOT_AUTHENTIC, segmented.location):
            fragment.read()
        assert fragment.tell() == start


@row("changed")
def test_a_large_read_of_a_damaged_fragment_fails_by_any_number_of_threads(encrypted_place: Place) -> None:
    write(encrypted_place.create(), "mem", pattern(3 * MIB))
    encrypted_place.damage("mem", segment_offset(500, 4096) + 1000, bit=7)
    for threads in (1, 2, 8):
        with encrypted_place.open(threads).raw_fragment("mem") as fragment:
            buffer = bytearray(b"\xaa" * (3 * MIB))
            with refused("changed", "authentication failed", encrypted_place.location):
                fragment.readinto_at(0, buffer)
            assert not any(buffer)
            with refused("changed", "authentication failed", encrypted_place.location):
                fragment.readall()
            assert fragment.read_at(501 * 4096, MIB) == pattern(3 * MIB)[501 * 4096 :][:MIB]


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


@row("misplaced")
def test_fragments_open_nowhere_but_in_their_own_place(encrypted_place: Place) -> None:
    writer = write(encrypted_place.create(), "sda", pattern(100))
    inner = write(writer.add_namespace("disks"), "sda", pattern(100, seed=1))
    write(inner, "sdb", pattern(100, seed=2))
    file = encrypted_place.file

    def refuse(path: str) -> None:
        reader = encrypted_place.open()
        namespace, _, name = path.rpartition("/")
        with refused("misplaced", f'fragment "{name}".*: authentication failed', encrypted_place.location):
            (reader.namespace(namespace) if namespace else reader).raw_fragment(name)

    for one, other in (("disks/sda", "disks/sdb"), ("sda", "disks/sda")):
        swap(file(one), file(other))
        refuse(one)
        refuse(other)
        swap(file(one), file(other))
    for one, other in (("sda", "SDA"), ("sda", "sda "), ("disks/sda", "sdb"), ("sda", "disks/sdc")):
        file(one).rename(file(other))
        refuse(other)
        file(other).rename(file(one))
    file("disks").rename(file("disk"))
    refuse("disk/sda")
    file("disk").rename(file("disks"))
    shutil.copy(file("sda"), file("copy"))
    refuse("copy")
    file("copy").unlink()
    check_independently(
        encrypted_place.location,
        encrypted_place.key,
        {"sda": pattern(100), "disks/sda": pattern(100, seed=1), "disks/sdb": pattern(100, seed=2)},
    )


@row("misplaced")
def test_fragments_and_key_metadata_of_another_snapshot_are_refused(tmp_path: Path, key: bytes) -> None:
    places = [Place(tmp_path / name, key) for name in ("vm1", "vm2")]
    for number, place in enumerate(places):
        write(place.create(), "mem", pattern(100, seed=number))
    swap(places[0].file("mem"), places[1].file("mem"))
    for place in places:
        with refused("misplaced", 'fragment "mem" of .*: authentication failed', tmp_path):
            place.open().raw_fragment("mem")
    # With the key metadata moved too, each is a whole snapshot again, if not the one that the path says.
    swap(places[0].file("enc_metadata"), places[1].file("enc_metadata"))
    assert [read(place.open(), "mem") for place in places] == [pattern(100, seed=1), pattern(100)]
    swap(places[0].file("mem"), places[1].file("mem"))
    for place in places:
        with refused("misplaced", 'fragment "mem" of .*: authentication failed', tmp_path):
            place.open().raw_fragment("mem")


@row("misplaced")
def test_an_older_version_of_a_fragment_under_another_data_key_is_refused(encrypted_place: Place) -> None:
    write(encrypted_place.create(), "mem", b"old")
    old = encrypted_place.stored("mem")
    shutil.rmtree(encrypted_place.location)
    write(encrypted_place.create(), "mem", b"new")
    encrypted_place.store("mem", old)
    with refused("misplaced", "authentication failed", encrypted_place.location):
        encrypted_place.open().raw_fragment("mem")


@row("segments-misplaced", "misplaced")
def test_segments_open_nowhere_but_in_their_own_place(encrypted_place: Place) -> None:
    data = pattern(4 * CHUNK)
    write(encrypted_place.create(), "mem", data, CHUNK)
    other_place = Place(encrypted_place.location.with_name("vm2"), encrypted_place.key)
    write(other_place.create(), "mem", data, CHUNK)
    stored, other = encrypted_place.stored("mem"), other_place.stored("mem")
    header, first, second, third, last = stored[:74], *(stored[74 + 64 * index :][:64] for index in range(4))

    for segments, bad in (
        ([second, first, third, last], [0, 1]),
        ([first, third, second, last], [1, 2]),
        ([first, first, third, last], [1]),
        ([first, other[74 + 64 : 74 + 128], third, last], [1]),
    ):
        encrypted_place.store("mem", header + b"".join(segments))
        with encrypted_place.open().raw_fragment("mem") as fragment:
            for index in range(4):
                at = index * CHUNK
                if index not in bad:
                    assert fragment.read_at(at, CHUNK) == data[at : at + CHUNK]
                    continue
                with refused("segments-misplaced", "authentication failed", encrypted_place.location):
                    fragment.read_at(at, CHUNK)
    # A change that moves the last one shows immediately.
    for segments in ([first, second, third], [first, second, third, third], [first, second, last], [last]):
        encrypted_place.store("mem", header + b"".join(segments))
        with refused("segments-misplaced", "authentication failed", encrypted_place.location):
            encrypted_place.open().raw_fragment("mem")
    encrypted_place.store("mem", other[:74] + stored[74:])
    with refused("misplaced", "authentication failed", encrypted_place.location):
        encrypted_place.open().raw_fragment("mem")


@row("cut-while-open", "plain-cut-while-open")
@pytest.mark.parametrize("keep", [0, 50_000])
def test_a_fragment_that_gets_shorter_while_it_is_open_fails_the_read(place: Place, keep: int) -> None:
    write(place.create(), "mem", pattern(100_000))
    with place.open().raw_fragment("mem") as fragment:
        os.truncate(place.file("mem"), keep)
        buffer = bytearray(b"\xaa" * 100_000)
        if place.key:
            with refused("cut-while-open", 'fragment "mem" of .*vm1: became shorter', place.location):
                fragment.readinto_at(0, buffer)
        else:
            with refused("plain-cut-while-open", 'fragment "mem" of .*vm1: became shorter', place.location):
                fragment.readinto_at(0, buffer)
        assert not any(buffer)
        # Data that still exists can be read.
        if keep:
            assert fragment.read_at(0, 40_000) == pattern(100_000)[:40_000]


@row("no-header")
def test_a_header_that_asks_for_gigabytes_is_refused_before_anything_is_allocated(encrypted_place: Place) -> None:
    write(encrypted_place.create(), "mem", b"x")
    stored = bytearray(encrypted_place.stored("mem"))
    for segment_length in (0, 31, 32, 63, (64 << 20) + 33, 0xFFFFFFFF):
        stored[2:6] = segment_length.to_bytes(4, "big")
        encrypted_place.store("mem", stored)
        with refused("no-header", "not encrypted by vmsnap", encrypted_place.location):
            encrypted_place.open().raw_fragment("mem")


def test_no_error_shows_plaintext_or_keys(segmented: Place) -> None:
    assert segmented.key is not None
    segmented.damage("disks/sda", 80)
    shown = []
    with (
        segmented.open().namespace("disks").raw_fragment("sda") as fragment,
        pytest.raises(vmsnap.AuthenticationError) as caught,
    ):
        fragment.read()
    shown += [str(caught.value), repr(caught.value), "".join(traceback.format_exception(caught.value))]
    for secret in (segmented.key, pattern(2 * CHUNK + 6)[:CHUNK]):
        for form in (secret.hex(), repr(secret)[2:-1], str(list(secret))[1:-1]):
            assert not [text for text in shown if form[:20] in text]
