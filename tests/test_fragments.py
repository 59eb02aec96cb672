"""Fragments: written data is read back, for every way of writing and reading, and files follow the format."""

import array
import contextlib
import ctypes
import gc
import io
import mmap
import os
import shutil
import stat
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vmsnap
from hypothesis import given, settings
from hypothesis import strategies as st
from independent import check_independently
from support import (
    HEADER_BYTES,
    MIB,
    SEGMENT_OVERHEAD_BYTES,
    Place,
    pattern,
    read,
    segment_offset,
    stored_size,
    temporary_place,
    write,
)

# The batch of one thread, and the size from which a write is encrypted in the caller's buffer: src/fragment/.
STRIP_BYTES = 256 << 10
DIRECT_BYTES = 4 * MIB


# Round trips ---------------------------------------------------------------------------------------------------------


def lengths(chunk_size_bytes: int) -> list[int]:
    chunk = chunk_size_bytes
    around_chunks = [0, 1, chunk - 1, chunk, chunk + 1, 2 * chunk, 7 * chunk + 5]
    around_limits = [STRIP_BYTES - 1, STRIP_BYTES, STRIP_BYTES + 1, MIB, MIB + 1]
    if chunk >= 4096:
        around_limits += [DIRECT_BYTES - 1, DIRECT_BYTES, DIRECT_BYTES + chunk + 3]
    return sorted({*around_chunks, *around_limits})


CASES = [(None, length) for length in lengths(4096)] + [
    (chunk, length) for chunk in (32, 33, 4096, 65536, MIB, MIB + 1) for length in lengths(chunk)
]


@pytest.mark.parametrize(("chunk", "length"), CASES)
def test_what_is_written_is_read_back_here_and_by_the_independent_reader(
    tmp_path: Path, key: bytes, chunk: int | None, length: int
) -> None:
    place = Place(tmp_path / "vm1", None if chunk is None else key)
    data = pattern(length)
    write(place.create(), "sda", data, chunk)

    with place.open().raw_fragment("sda") as fragment:
        assert fragment.read() == data
        assert fragment.size == length
        assert fragment.chunk_size_bytes == chunk
        assert fragment.stored_size == stored_size(length, chunk) == place.file("sda").stat().st_size
    check_independently(place.location, place.key, {"sda": data})


@st.composite
def written_pieces(draw: st.DrawFn) -> tuple[int | None, list[int]]:
    """A chunk size, or None for a plain fragment, and the sizes of the writes."""
    chunk = draw(st.none() | st.integers(32, 300) | st.sampled_from([4096, 65535, 65536, 300_000, MIB, 5 * MIB]))
    edges = [2047, 2048, 2049, 65535, 65536]
    if chunk is None or chunk >= 4096:
        edges += [STRIP_BYTES - 1, STRIP_BYTES, STRIP_BYTES + 1, MIB, DIRECT_BYTES - 1, DIRECT_BYTES, DIRECT_BYTES + 1]
    if chunk is not None:
        edges += [chunk - 1, chunk, chunk + 1]
    return chunk, draw(st.lists(st.integers(0, 700) | st.sampled_from(edges), max_size=8))


@given(written_pieces())
@settings(max_examples=80)
def test_writes_split_in_any_way_make_one_fragment(pieces: tuple[int | None, list[int]]) -> None:
    chunk, sizes = pieces
    data = memoryview(pattern(8 * (5 * MIB + 1)))[: sum(sizes)]
    with temporary_place(encrypted=chunk is not None) as place:
        with place.create().raw_fragment("sda", chunk_size_bytes=chunk or 4096) as fragment:
            written = 0
            for size in sizes:
                assert fragment.write(data[written : written + size]) == size
                written += size
                assert fragment.tell() == written
        assert place.file("sda").stat().st_size == stored_size(len(data), chunk)
        check_independently(place.location, place.key, {"sda": bytes(data)})


OPERATIONS = st.one_of(
    st.tuples(st.just("seek"), st.integers(-400, 3000), st.sampled_from([os.SEEK_SET, os.SEEK_CUR, os.SEEK_END])),
    st.tuples(st.sampled_from(["read", "readinto"]), st.integers(0, 700), st.just(0)),
    st.tuples(st.sampled_from(["read_at", "readinto_at"]), st.integers(0, 700), st.integers(0, 3000)),
    st.tuples(st.just("readall"), st.just(0), st.just(0)),
)


@given(
    chunk=st.none() | st.integers(32, 300),
    length=st.integers(0, 2500),
    operations=st.lists(OPERATIONS, max_size=25),
)
@settings(max_examples=150)
def test_any_seeks_and_reads_give_what_a_bytesio_gives(
    chunk: int | None, length: int, operations: list[tuple[str, int, int]]
) -> None:
    data = pattern(length)
    model = io.BytesIO(data)
    with temporary_place(encrypted=chunk is not None) as place:
        write(place.create(), "sda", data, chunk)
        with place.open().raw_fragment("sda") as fragment:
            for kind, number, other in operations:
                if kind == "seek":
                    target = number + {os.SEEK_SET: 0, os.SEEK_CUR: model.tell(), os.SEEK_END: length}[other]
                    if target < 0:
                        with pytest.raises(ValueError, match=r"offset cannot be|before its start"):
                            fragment.seek(number, other)
                    else:
                        assert fragment.seek(number, other) == model.seek(target)
                elif kind == "read":
                    assert fragment.read(number) == model.read(number)
                elif kind == "readall":
                    assert fragment.readall() == model.read()
                elif kind == "readinto":
                    ours, theirs = bytearray(b"\xaa" * number), bytearray(b"\xaa" * number)
                    assert fragment.readinto(ours) == model.readinto(theirs)
                    assert ours == theirs
                elif kind == "read_at":
                    assert fragment.read_at(other, number) == data[other : other + number]
                else:
                    ours = bytearray(b"\xaa" * number)
                    there = data[other : other + number]
                    assert fragment.readinto_at(other, ours) == len(there)
                    assert ours == there + b"\xaa" * (number - len(there))
                assert fragment.tell() == model.tell()


@pytest.mark.parametrize("threads", [1, 2, 5])
@pytest.mark.parametrize("chunk", [33, 4096, 65536])
def test_a_large_read_from_any_offset_is_the_same_by_any_number_of_threads(
    encrypted_place: Place, threads: int, chunk: int
) -> None:
    data = pattern(2 * MIB + 77)
    write(encrypted_place.create(threads), "sda", data, chunk)
    with encrypted_place.open(threads).raw_fragment("sda") as fragment:
        for offset in (0, 1, chunk - 1, chunk, STRIP_BYTES - 1, STRIP_BYTES, MIB + 5):
            for length in (STRIP_BYTES, MIB, 2 * MIB + 77):
                assert fragment.read_at(offset, length) == data[offset : offset + length]


# Buffers -------------------------------------------------------------------------------------------------------------


def mapped(data: bytes) -> mmap.mmap:
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    return memory


WHOLE_BUFFERS: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "memoryview of a slice": lambda data: memoryview(b"before" + data + b"after")[6:-5],
    "memoryview of doubles": lambda data: memoryview(data).cast("d"),
    "memoryview, 2-d": lambda data: memoryview(data).cast("B", [len(data) // 8, 8]),
    "mmap": mapped,
    "array of longs": lambda data: array.array("q", data),
    "ctypes array": lambda data: (ctypes.c_uint16 * (len(data) // 2)).from_buffer_copy(data),
    "ctypes array in an mmap": lambda data: (ctypes.c_char * len(data)).from_buffer(mapped(data)),
    "numpy bytes": lambda data: np.frombuffer(data, np.uint8),
    "numpy complex": lambda data: np.frombuffer(data, np.complex128),
    "numpy 2-d floats": lambda data: np.frombuffer(data, np.float32).reshape(-1, 4),
    "numpy big-endian": lambda data: np.frombuffer(data, ">i4"),
    "numpy records": lambda data: np.frombuffer(data, [("a", "u1"), ("b", "<u4"), ("c", "S3")]),
    "numpy rows of a larger one": lambda data: np.frombuffer(b"x" * 64 + data, np.uint64).reshape(-1, 8)[1:],
    "numpy 0-d": lambda data: np.frombuffer(data, f"V{len(data)}").reshape(()),
}


@pytest.mark.parametrize("length", [64, 8192, 2 * MIB])
@pytest.mark.parametrize("kind", WHOLE_BUFFERS)
def test_any_buffer_in_one_piece_can_be_written(place: Place, kind: str, length: int) -> None:
    data = pattern(length)
    with place.create().raw_fragment("sda") as fragment:
        assert fragment.write(WHOLE_BUFFERS[kind](data)) == length
        assert fragment.tell() == length
    assert read(place.open(), "sda") == data


TARGETS: dict[str, Callable[[int], Any]] = {
    "bytearray": bytearray,
    "memoryview of a slice": lambda length: memoryview(bytearray(length + 11))[6:-5],
    "mmap": lambda length: mmap.mmap(-1, length),
    "array of longs": lambda length: array.array("q", bytes(length)),
    "ctypes array": lambda length: (ctypes.c_uint16 * (length // 2))(),
    "numpy 2-d floats": lambda length: np.zeros((length // 16, 4), np.float32),
    "numpy rows of a larger one": lambda length: np.zeros((length // 64 + 2, 8), np.uint64)[1:-1],
}


@pytest.mark.parametrize("kind", TARGETS)
def test_any_writable_buffer_in_one_piece_can_be_read_into(place: Place, kind: str) -> None:
    data = pattern(MIB)
    write(place.create(), "sda", data)
    with place.open().raw_fragment("sda") as fragment:
        for length in (64, 8192, MIB):
            target = TARGETS[kind](length)
            assert fragment.readinto_at(0, target) == length
            assert memoryview(target).tobytes() == data[:length]
            target = TARGETS[kind](length)
            fragment.seek(0)
            assert fragment.readinto(target) == length
            assert memoryview(target).tobytes() == data[:length]


def test_reading_into_a_slice_leaves_what_is_around_it(place: Place) -> None:
    write(place.create(), "sda", pattern(200))
    around = bytearray(b"\xaa" * 300)
    with place.open().raw_fragment("sda") as fragment:
        assert fragment.readinto_at(150, memoryview(around)[100:200]) == 50
    assert around == b"\xaa" * 100 + pattern(200)[150:] + b"\xaa" * 150


@pytest.mark.parametrize("length", [8, 4096, 2 * MIB])
def test_a_buffer_in_several_pieces_is_refused_and_nothing_is_lost(place: Place, length: int) -> None:
    scattered: list[Any] = [
        memoryview(pattern(2 * length))[::2],
        memoryview(pattern(length))[::-1],
        np.asfortranarray(np.frombuffer(pattern(length), np.uint8).reshape(2, -1)),
    ]
    with place.create().raw_fragment("sda") as fragment:
        fragment.write(b"before")
        for buffer in scattered:
            with pytest.raises(BufferError, match="contiguous"):
                fragment.write(buffer)
            assert fragment.tell() == 6
        fragment.write(b" and after")
    assert read(place.open(), "sda") == b"before and after"


def test_what_is_no_buffer_is_refused_and_nothing_is_lost(place: Place) -> None:
    with place.create().raw_fragment("sda") as fragment:
        fragment.write(b"before")
        for nothing in ("text", 12, None, [1, 2]):
            with pytest.raises(TypeError, match="bytes-like"):
                fragment.write(nothing)  # type: ignore[arg-type]
        fragment.write(b" and after")
    assert read(place.open(), "sda") == b"before and after"


def test_a_buffer_that_cannot_be_read_into_is_refused_and_stays_as_it_was(place: Place) -> None:
    write(place.create(), "sda", pattern(4096))
    behind = bytearray(b"\xaa" * 64)
    buffers: list[Any] = [bytes(64), memoryview(bytes(64)), memoryview(behind)[::2], memoryview(behind).toreadonly()]
    with place.open().raw_fragment("sda") as fragment:
        fragment.seek(10)
        for buffer in buffers:
            with pytest.raises(BufferError, match=r"written to|contiguous"):
                fragment.readinto(buffer)
            with pytest.raises(BufferError, match=r"written to|contiguous"):
                fragment.readinto_at(0, buffer)
        assert fragment.tell() == 10
    assert behind == b"\xaa" * 64


# As streams of the standard library ----------------------------------------------------------------------------------


def test_they_are_raw_binary_streams(place: Place) -> None:
    with place.create().raw_fragment("sda") as fragment:
        assert isinstance(fragment, io.RawIOBase)
        assert (fragment.readable(), fragment.writable(), fragment.seekable()) == (False, True, False)
        assert (fragment.name, fragment.closed) == ("sda", False)
    assert fragment.closed
    with place.open().raw_fragment("sda") as reader:
        assert isinstance(reader, io.RawIOBase)
        assert (reader.readable(), reader.writable(), reader.seekable()) == (True, False, True)
        assert (reader.name, reader.closed) == ("sda", False)
    assert reader.closed


def test_what_one_direction_cannot_do_is_an_unsupported_operation(place: Place) -> None:
    with place.create().raw_fragment("sda") as fragment:
        fragment.write(b"kept")
        for call in (lambda: fragment.read(1), lambda: fragment.readinto(bytearray(1)), lambda: fragment.seek(0)):
            with pytest.raises(io.UnsupportedOperation):
                call()
    with place.open().raw_fragment("sda") as reader:
        for call in (lambda: reader.write(b"x"), lambda: reader.truncate(0)):
            with pytest.raises(io.UnsupportedOperation):
                call()
    assert read(place.open(), "sda") == b"kept"


@pytest.mark.parametrize("length", [0, 1, 100_000, 3 * MIB + 1])
def test_copyfileobj_writes_and_reads(place: Place, length: int) -> None:
    data = pattern(length)
    with place.create().raw_fragment("sda") as fragment:
        shutil.copyfileobj(io.BytesIO(data), fragment)
    back = io.BytesIO()
    with place.open().raw_fragment("sda") as reader:
        shutil.copyfileobj(reader, back)
    assert back.getvalue() == data


def test_buffered_streams_write_and_read(place: Place) -> None:
    data = pattern(100_000)
    with io.BufferedWriter(place.create().raw_fragment("sda"), buffer_size=1000) as stream:
        for at in range(0, len(data), 777):
            stream.write(data[at : at + 777])
    with io.BufferedReader(place.open().raw_fragment("sda"), buffer_size=1000) as stream:
        assert stream.read(5) == data[:5]
        assert stream.peek(1)[:1] == data[5:6]
        stream.seek(-50, os.SEEK_END)
        assert stream.read() == data[-50:]
        stream.seek(70_000)
        assert stream.read(20_000) == data[70_000:90_000]


def test_lines_can_be_iterated_over(place: Place) -> None:
    lines = [b"line %d\n" % number for number in range(2000)] + [b"and one without an end"]
    with place.create().raw_fragment("log") as fragment:
        fragment.writelines(lines)
    with io.BufferedReader(place.open().raw_fragment("log")) as stream:
        assert list(stream) == lines
    with io.TextIOWrapper(io.BufferedReader(place.open().raw_fragment("log")), "ascii") as text:
        assert [line.encode() for line in text] == lines
    with place.open().raw_fragment("log") as raw:
        assert raw.readline() == lines[0]
        assert next(iter(raw)) == lines[1]


def test_a_tar_archive_is_written_in_one_go_and_read_in_order_and_at_random(place: Place) -> None:
    files = {f"folder/{number}": pattern(number * 1000, seed=number) for number in range(40)}
    with (
        place.create().raw_fragment("backup.tar") as fragment,
        tarfile.open(fileobj=fragment, mode="w|") as archive,
    ):
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))

    def contents(archive: tarfile.TarFile, entry: tarfile.TarInfo) -> bytes:
        stream = archive.extractfile(entry)
        assert stream is not None
        return stream.read()

    with place.open().raw_fragment("backup.tar") as reader, tarfile.open(fileobj=reader, mode="r|") as archive:
        assert {entry.name: contents(archive, entry) for entry in archive} == files
    with place.open().raw_fragment("backup.tar") as reader, tarfile.open(fileobj=reader, mode="r:") as archive:
        for name in reversed(files):
            assert contents(archive, archive.getmember(name)) == files[name]


def test_a_zip_archive_is_written_and_read(place: Place) -> None:
    files = {f"{number}.txt": pattern(number * 300, seed=number) for number in range(30)}
    with (
        place.create().raw_fragment("backup.zip") as fragment,
        zipfile.ZipFile(fragment, "w", zipfile.ZIP_DEFLATED) as archive,
    ):
        for name, data in files.items():
            archive.writestr(name, data)
    with place.open().raw_fragment("backup.zip") as reader, zipfile.ZipFile(reader) as archive:
        assert archive.testzip() is None
        assert {name: archive.read(name) for name in reversed(files)} == files


def test_numpy_saves_and_loads(place: Place) -> None:
    values = np.arange(100_000, dtype=np.float64).reshape(100, 1000)
    with place.create().raw_fragment("array.npy") as fragment:
        np.save(fragment, values)
    with place.open().raw_fragment("array.npy") as reader:
        assert np.array_equal(np.load(reader), values)


# Files on disk --------------------------------------------------------------------------------------------------------


def test_a_plain_fragment_is_the_bytes_themselves(tmp_path: Path) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
    for length in (0, 1, 65535, 65536, 3 * MIB):
        write(writer, f"of {length}", pattern(length))
        assert (tmp_path / "vm1" / f"of {length}").read_bytes() == pattern(length)
    assert sorted(path.name for path in (tmp_path / "vm1").iterdir()) == sorted(
        f"of {length}" for length in (0, 1, 65535, 65536, 3 * MIB)
    )


@pytest.mark.parametrize(
    ("length", "body"),
    [
        (0, [32]),
        (1, [33]),
        (31, [63]),
        (32, [64]),  # a full last segment
        (33, [64, 33]),
        (64, [64, 64]),  # and after others
        (100, [64, 64, 64, 36]),
    ],
)
def test_an_encrypted_fragment_is_a_header_and_segments_of_which_the_last_says_its_length(
    encrypted_place: Place, length: int, body: list[int]
) -> None:
    write(encrypted_place.create(), "sda", pattern(length), 32)
    stored = encrypted_place.file("sda").read_bytes()
    assert stored[:10] == bytes.fromhex("0000 00000040 00000020")
    assert len(stored) == HEADER_BYTES + sum(body)
    marks = [stored[segment_offset(index, 32) :][:4] for index in range(len(body))]
    assert marks == [b"\xff" * 4] * (len(body) - 1) + [body[-1].to_bytes(4, "big")]
    # Nothing of the plaintext shows.
    assert length < 16 or pattern(length)[:8] not in stored


@pytest.mark.parametrize("chunk", [32, 4096, 64 * MIB])
def test_the_header_says_the_chunk_size(encrypted_place: Place, chunk: int) -> None:
    write(encrypted_place.create(), "sda", b"x", chunk)
    stored = encrypted_place.file("sda").read_bytes()
    assert int.from_bytes(stored[2:6], "big") == chunk + SEGMENT_OVERHEAD_BYTES
    with encrypted_place.open().raw_fragment("sda") as fragment:
        assert fragment.chunk_size_bytes == chunk
        assert fragment.read() == b"x"


def test_no_nonce_comes_twice_within_a_fragment_nor_an_iv_within_a_snapshot(encrypted_place: Place) -> None:
    writer = encrypted_place.create()
    chunk, count = 32, 30_000
    with writer.raw_fragment("sda", chunk_size_bytes=chunk) as fragment:
        for _ in range(0, 10_000 * chunk, 100):
            fragment.write(bytes(100))
        fragment.write(bytes(count * chunk - 10_000 * chunk))
    stored = encrypted_place.file("sda").read_bytes()
    nonces = {stored[segment_offset(index, chunk) + 4 :][:12] for index in range(count)}
    assert len(nonces) == count

    for number in range(200):
        write(writer, str(number), b"the same")
    ivs = {encrypted_place.file(str(number)).read_bytes()[10:42] for number in range(200)}
    assert len(ivs) == 200


def test_the_same_bytes_are_never_the_same_file(encrypted_place: Place) -> None:
    writer = encrypted_place.create()
    write(writer, "a", bytes(4096), 64)
    write(writer, "b", bytes(4096), 64)
    a, b = (encrypted_place.file(name).read_bytes() for name in "ab")
    assert a[HEADER_BYTES:] != b[HEADER_BYTES:]
    segments = {a[segment_offset(index, 64) + 16 :][:64] for index in range(64)}
    assert len(segments) == 64


def test_only_the_owner_can_read_even_where_the_umask_hides_nothing(place: Place) -> None:
    before = os.umask(0)
    try:
        writer = place.create()
        write(writer.add_namespace("disks").add_namespace("deep"), "sda", b"x")
        write(writer, "mem", b"x")
    finally:
        os.umask(before)
    modes = {
        path.relative_to(place.location.parent).as_posix(): stat.S_IMODE(path.stat().st_mode)
        for path in [place.location, *place.location.rglob("*")]
    }
    expected = {"vm1": 0o700, "vm1/disks": 0o700, "vm1/disks/deep": 0o700}
    expected |= {"vm1/disks/deep/sda": 0o600, "vm1/mem": 0o600}
    if place.key:
        expected["vm1/enc_metadata"] = 0o600
    assert modes == expected


# How a fragment ends -------------------------------------------------------------------------------------------------


def test_flushing_a_plain_fragment_shows_its_bytes_to_others(tmp_path: Path) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
    with writer.raw_fragment("log") as fragment:
        fragment.write(b"first")
        fragment.flush()
        assert (tmp_path / "vm1/log").read_bytes() == b"first"
        fragment.write(b" second")
        fragment.flush()
        assert (tmp_path / "vm1/log").read_bytes() == b"first second"


def test_flushing_an_encrypted_fragment_changes_nothing(encrypted_place: Place) -> None:
    with encrypted_place.create().raw_fragment("log", chunk_size_bytes=32) as fragment:
        for at in range(100):
            fragment.write(pattern(100)[at : at + 1])
            fragment.flush()
    assert encrypted_place.file("log").stat().st_size == stored_size(100, 32)
    check_independently(encrypted_place.location, encrypted_place.key, {"log": pattern(100)})


def test_an_unfinished_encrypted_fragment_does_not_open(encrypted_place: Place) -> None:
    fragment = encrypted_place.create().raw_fragment("sda", chunk_size_bytes=32)
    fragment.write(pattern(5 * MIB))
    with pytest.raises((vmsnap.AuthenticationError, vmsnap.CorruptSnapshotError)):
        encrypted_place.open().raw_fragment("sda")
    fragment.close()
    assert read(encrypted_place.open(), "sda") == pattern(5 * MIB)


@pytest.mark.parametrize("length", [0, 10, 100_000, 5 * MIB])
@pytest.mark.parametrize("exception", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_a_with_statement_discards_the_fragment(
    place: Place, exception: type[BaseException], length: int
) -> None:
    writer = place.create()
    fragment = writer.raw_fragment("sda")

    def fail() -> None:
        with fragment:
            fragment.write(pattern(length))
            raise exception("stop")

    with pytest.raises(exception, match="stop"):
        fail()
    assert fragment.closed
    assert place.open().list_fragments() == []
    write(writer, "sda", b"the name is free again")
    assert read(place.open(), "sda") == b"the name is free again"


@pytest.mark.parametrize("length", [0, 10, 100_000])
def test_an_exception_discards_the_fragment_though_a_stream_around_it_was_closed(place: Place, length: int) -> None:
    fragment = place.create().raw_fragment("sda")

    def fail() -> None:
        with fragment, io.BufferedWriter(fragment) as stream:
            stream.write(pattern(length))
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert fragment.closed
    assert place.open().list_fragments() == []


@pytest.mark.parametrize("length", [0, 10, 100_000, 5 * MIB])
def test_a_fragment_that_is_dropped_is_finished(place: Place, length: int) -> None:
    fragment = place.create().raw_fragment("sda")
    fragment.write(pattern(length))
    del fragment
    gc.collect()
    assert read(place.open(), "sda") == pattern(length)
    check_independently(place.location, place.key, {"sda": pattern(length)})


@pytest.mark.parametrize("length", [0, 10, 100_000, 5 * MIB])
def test_a_discarded_fragment_leaves_nothing(place: Place, length: int) -> None:
    writer = place.create()
    fragment = writer.raw_fragment("sda")
    fragment.write(pattern(length))
    assert place.file("sda").exists()
    fragment.discard()
    assert fragment.closed
    assert not place.file("sda").exists()
    fragment.discard()
    fragment.close()
    assert place.open().list_fragments() == []


def test_closing_again_or_discarding_after_it_changes_nothing(place: Place) -> None:
    fragment = place.create().raw_fragment("sda")
    fragment.write(b"finished")
    fragment.close()
    before = place.file("sda").read_bytes()
    fragment.close()
    fragment.discard()
    assert place.file("sda").read_bytes() == before
    with place.open().raw_fragment("sda") as reader:
        assert reader.read() == b"finished"
        reader.close()
        reader.close()


@pytest.mark.parametrize("end", ["close", "discard"])
def test_no_thread_holds_the_file_of_a_fragment_that_has_ended(place: Place, end: str) -> None:
    # Else its room would not be free yet, and its file system could not be unmounted.
    writer = place.create(threads=2)
    for number in range(100):
        fragment = writer.raw_fragment(str(number), chunk_size_bytes=33)
        for _ in range(20):
            fragment.write(bytes(60_000))
        fragment.close() if end == "close" else fragment.discard()
        opened = set()
        for link in os.listdir("/proc/self/fd"):
            with contextlib.suppress(FileNotFoundError):  # closed meanwhile
                opened.add(os.readlink(f"/proc/self/fd/{link}"))
        assert not [path for path in opened if path.startswith(str(place.location))]


def test_discarding_removes_the_fragments_own_file_and_no_other(place: Place) -> None:
    fragment = place.create().raw_fragment("sda")
    place.file("sda").rename(place.location.parent / "taken away")
    place.file("sda").write_bytes(b"somebody else's")
    fragment.discard()
    assert place.file("sda").read_bytes() == b"somebody else's"


def test_a_fragment_that_is_open_for_reading_stays_readable_when_its_file_is_removed(place: Place) -> None:
    data = pattern(300_000)
    write(place.create(), "sda", data)
    with place.open().raw_fragment("sda") as fragment:
        assert fragment.read(10) == data[:10]
        shutil.rmtree(place.location)
        assert fragment.read() == data[10:]
