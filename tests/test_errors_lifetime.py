"""Errors of fragments that are used after they were closed, or in a forked child."""

import gc
import os
import sys
import traceback
from collections.abc import Callable

import pytest
import vmsnap
from independent import check_independently
from refusals import refused, row
from support import MIB, Place, pattern, read, run_python_well, write, write_in_pieces


def writer_calls(fragment: vmsnap.Fragment) -> list[Callable[[], object]]:
    return [
        lambda: fragment.write(b""),
        lambda: fragment.write(b"x"),
        lambda: fragment.write(pattern(5 * MIB)),
        fragment.tell,
        fragment.flush,
    ]


def reader_calls(fragment: vmsnap.FragmentReader) -> list[Callable[[], object]]:
    return [
        fragment.read,
        lambda: fragment.read(1),
        lambda: fragment.readinto(bytearray(1)),
        lambda: fragment.read_at(0, 1),
        lambda: fragment.read_at(0, MIB),
        lambda: fragment.readinto_at(0, bytearray(1)),
        fragment.readall,
        lambda: fragment.seek(0),
        fragment.tell,
    ]


@row("closed")
@pytest.mark.parametrize("end", ["close", "discard"])
def test_a_fragment_that_was_closed_is_not_written_to(place: Place, end: str) -> None:
    fragment = place.create().raw_fragment("mem")
    fragment.write(b"x")
    fragment.close() if end == "close" else fragment.discard()
    more: list[Callable[[], object]] = [fragment.writable, fragment.__enter__, lambda: fragment.writelines([b"x"])]
    for call in [*writer_calls(fragment), *more]:
        with refused("closed", "closed file", place.location):
            call()


@row("closed")
def test_a_fragment_that_was_closed_is_not_read(place: Place) -> None:
    write(place.create(), "mem", b"x")
    fragment = place.open().raw_fragment("mem")
    fragment.close()
    more: list[Callable[[], object]] = [
        fragment.readable,
        fragment.seekable,
        fragment.__enter__,
        fragment.flush,
        fragment.readline,
        lambda: fragment.size,
        lambda: fragment.stored_size,
        lambda: fragment.chunk_size_bytes,
    ]
    for call in [*reader_calls(fragment), *more]:
        with refused("closed", "closed file", place.location):
            call()


def in_forked_child(check: Callable[[], None]) -> None:
    """Run `check` in a process forked from this one, and fail as it fails."""
    from_child, to_parent = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            check()
            status = 0
        except BaseException:
            os.write(to_parent, traceback.format_exc().encode()[-60_000:])
        finally:
            os._exit(status)
    os.close(to_parent)
    with open(from_child, "rb") as stream:
        report = stream.read().decode()
    _, status = os.waitpid(child, 0)
    assert status == 0, report


@row("forked")
@pytest.mark.parametrize("before", [0, 10, 300_000, 5 * MIB])
def test_a_forked_child_cannot_use_a_fragment_and_the_parent_goes_on(place: Place, before: int) -> None:
    data = pattern(before + 700_000)
    writer = place.create(threads=2)
    # Threads of the parent still write to the file of the fragment, so it is not compared.
    writer.add_namespace("others")
    others = place.file("others")
    fragment = writer.raw_fragment("mem")
    write_in_pieces(fragment, data[:before], 50_000)
    fragment.flush()

    def child() -> None:
        for call in [*writer_calls(fragment), fragment.discard]:
            with refused("forked", "before this process was forked", others):
                call()
            assert place.file("mem").exists()

    def child_closes() -> None:
        with refused("forked", "before this process was forked", others):
            fragment.close()

    def child_drops() -> None:
        nonlocal fragment
        del fragment
        gc.collect()

    for check in (child, child_closes, child_drops):
        size = place.file("mem").stat().st_size
        in_forked_child(check)
        assert place.file("mem").stat().st_size >= size
    write_in_pieces(fragment, data[before:], 50_000)
    assert fragment.tell() == len(data)
    fragment.close()
    check_independently(place.location, place.key, {"mem": data})


@row("forked")
@pytest.mark.parametrize("length", [100, 2 * MIB])
def test_a_forked_child_cannot_read_a_fragment_and_the_parent_goes_on(place: Place, length: int) -> None:
    write(place.create(), "mem", pattern(length))
    fragment = place.open(threads=2).raw_fragment("mem")
    assert fragment.read(10) == pattern(length)[:10]  # the chunk it came from is at hand, and yet not for the child

    def child() -> None:
        for call in reader_calls(fragment):
            with refused("forked", "before this process was forked", place.location):
                call()
        fragment.close()
        # By the handle it reads as ever.
        assert read(place.open(), "mem") == pattern(length)

    in_forked_child(child)
    assert fragment.read() == pattern(length)[10:]


FORKING = """
import os, sys, vmsnap
root, key = sys.argv[1], bytes.fromhex(sys.argv[2]) or None
writer = vmsnap.SnapshotWriter(root, key=key)
fragments = [writer.raw_fragment(str(number)) for number in range(3)]
for fragment in fragments:
    for _ in range(40):
        fragment.write(bytes(range(250)) * 100)
reader = vmsnap.SnapshotReader(root, key=key)
if os.fork() == 0:
    if sys.argv[3] == "drops":
        del fragments[:]
    sys.exit()  # by way of the interpreter's end, not around it
assert os.wait()[1] == 0
for fragment in fragments:
    fragment.write(b"after")
    fragment.close()
"""


@pytest.mark.parametrize("how", ["drops", "ends"])
def test_the_end_of_a_forked_child_leaves_the_parents_fragments_alone(place: Place, how: str) -> None:
    run_python_well(FORKING, place.location, (place.key or b"").hex(), how)
    data = bytes(range(250)) * 4000 + b"after"
    check_independently(place.location, place.key, {str(number): data for number in range(3)})
