"""Many at once: processes with a handle each, threads on one handle and on one fragment, and signals in long calls."""

import functools
import gc
import multiprocessing
import os
import pickle
import random
import re
import signal
import threading
from collections.abc import Callable
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import vmsnap
from independent import check_independently
from refusals import refused_elsewhere, row
from support import (
    MIB,
    Place,
    pattern,
    read,
    run_python,
    run_python_well,
    segment_offset,
    stored_size,
    write,
)

METHODS = ["fork", "spawn", "forkserver"]


# Processes -----------------------------------------------------------------------------------------------------------

# Enough for the pool of threads; partly in large writes, which all threads seal at once, partly in small ones, which
# are sealed behind the caller's back.
PART_BYTES = 5 * MIB + 321


def write_part(writer: vmsnap.SnapshotWriter, number: int) -> int:
    data = pattern(PART_BYTES, seed=number)
    namespace = writer if number % 2 else writer.add_namespace(f"namespace {number}")
    with namespace.raw_fragment(f"part {number}") as fragment:
        fragment.write(data[: 4 * MIB + 5])
        for at in range(4 * MIB + 5, len(data), 10_000):
            fragment.write(data[at : at + 10_000])
    return os.getpid()


def read_part(reader: vmsnap.SnapshotReader, number: int) -> bool:
    data = pattern(PART_BYTES, seed=number)
    namespace = reader if number % 2 else reader.namespace(f"namespace {number}")
    with namespace.raw_fragment(f"part {number}") as fragment:
        return fragment.read() == data and fragment.read_at(MIB + 1, 9999) == data[MIB + 1 : MIB + 10_000]


def parts(numbers: range) -> dict[str, bytes]:
    return {
        f"part {number}" if number % 2 else f"namespace {number}/part {number}": pattern(PART_BYTES, seed=number)
        for number in numbers
    }


@pytest.mark.parametrize("method", METHODS)
def test_processes_write_their_own_fragments_into_one_snapshot(place: Place, method: str) -> None:
    writer = place.create()
    write_part(writer, 0)  # the parent's pool has its threads by now, which a forked child has not
    context: Any = multiprocessing.get_context(method)
    workers = [context.Process(target=write_part, args=(writer, number)) for number in range(1, 4)]
    for worker in workers:
        worker.start()
    write_part(writer, 4)  # the parent goes on meanwhile
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0, 0]
    check_independently(place.location, place.key, parts(range(5)))


@pytest.mark.parametrize("method", METHODS)
def test_processes_read_by_their_own_handles(place: Place, method: str) -> None:
    write_part(place.create(), 1)
    reader = place.open()
    assert read_part(reader, 1)
    with multiprocessing.get_context(method).Pool(2) as pool:
        assert pool.starmap(read_part, [(reader, 1)] * 4) == [True] * 4


EXECUTORS: dict[str, Callable[[], Executor]] = {
    "threads": lambda: ThreadPoolExecutor(4),
    **{
        f"processes by {method}": functools.partial(
            lambda method: ProcessPoolExecutor(2, mp_context=multiprocessing.get_context(method)), method
        )
        for method in METHODS
    },
}


@pytest.mark.parametrize("kind", EXECUTORS)
def test_executors_write_and_read_fragments(place: Place, kind: str) -> None:
    writer = place.create()
    write_part(writer, 0)
    with EXECUTORS[kind]() as executor:
        written_by = set(executor.map(functools.partial(write_part, writer), range(1, 4)))
        assert (written_by == {os.getpid()}) == (kind == "threads")
        assert all(executor.map(functools.partial(read_part, place.open()), range(4)))
    check_independently(place.location, place.key, parts(range(4)))


def forked(work: Callable[[], object]) -> None:
    """Run `work` in a forked process, to its end."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0


def test_no_nonce_and_no_iv_is_drawn_in_two_processes(tmp_path: Path, key: bytes) -> None:
    place = Place(tmp_path / "vm1", key)
    writer = place.create()
    chunk, count = 32, 1000

    def work(name: str) -> None:
        write(writer, name, bytes(chunk * count), chunk)

    # Every child inherits the state of the libraries after the first.
    work("parent")
    names = [f"child {number}" for number in range(8)]
    for name in names:
        forked(functools.partial(work, name))
    work("parent again")

    ivs, nonces = set(), set()
    for name in [*names, "parent", "parent again"]:
        stored = place.file(name).read_bytes()
        ivs.add(stored[10:42])
        nonces |= {stored[segment_offset(index, chunk) + 4 :][:12] for index in range(count)}
    assert len(ivs) == len(names) + 2
    assert len(nonces) == (len(names) + 2) * count
    check_independently(place.location, key)


def test_a_child_forked_from_a_child_works_too(place: Place) -> None:
    writer = place.create()
    write_part(writer, 1)

    def child() -> None:
        write_part(writer, 3)
        forked(functools.partial(write_part, writer, 5))

    forked(child)
    check_independently(
        place.location, place.key, {f"part {number}": pattern(PART_BYTES, seed=number) for number in (1, 3, 5)}
    )


def test_a_fork_while_threads_are_sealing_harms_nobody(place: Place) -> None:
    writer = place.create(threads=2)
    data = pattern(3 * MIB)
    fragments = [writer.raw_fragment(str(number)) for number in range(4)]

    def child() -> None:
        del fragments[:]
        gc.collect()
        write(writer, f"child of {os.getppid()} {os.getpid()}", data)

    # Writes that fill one batch after the other, so that the pool works during each fork.
    for at in range(0, len(data), 100_000):
        for fragment in fragments:
            fragment.write(data[at : at + 100_000])
        if at % 500_000 == 0:
            forked(child)
    for fragment in fragments:
        fragment.close()
    reader = place.open()
    names = reader.list_fragments()
    assert len(names) == 4 + 7
    assert all(read(reader, name) == data for name in names)


# Threads -------------------------------------------------------------------------------------------------------------


def in_threads(count: int, work: Callable[[int], object]) -> None:
    """Run `work` in as many threads, all from the same moment on; fail where one fails."""
    barrier = threading.Barrier(count)

    def run(number: int) -> None:
        barrier.wait()
        work(number)

    with ThreadPoolExecutor(count) as executor:
        for result in [executor.submit(run, number) for number in range(count)]:
            result.result()


def test_many_threads_read_one_fragment(place: Place) -> None:
    data = pattern(2 * MIB + 17)
    write(place.create(), "mem", data, 4096)
    with place.open(threads=2).raw_fragment("mem") as fragment:

        def work(number: int) -> None:
            chance = random.Random(number)
            for _ in range(60):
                offset = chance.randrange(len(data))
                size = chance.choice([1, 100, 4096, 70_000, MIB])
                buffer = bytearray(size)
                expected = data[offset : offset + size]
                match chance.randrange(4):
                    case 0:
                        assert fragment.read_at(offset, size) == expected
                    case 1:
                        assert fragment.readinto_at(offset, buffer) == len(expected)
                        assert buffer[: len(expected)] == expected
                    case 2:
                        # Other threads move the position too. At any position, the returned bytes are contiguous.
                        fragment.seek(offset)
                        assert fragment.read(size) in data
                    case 3:
                        read = fragment.readinto(buffer)
                        assert buffer[:read] in data

        in_threads(16, work)
        fragment.seek(0)
        assert fragment.read() == data


def test_reads_in_order_by_many_threads_share_the_fragment_out(place: Place) -> None:
    record = 1000
    data = b"".join(number.to_bytes(4, "big") * (record // 4) for number in range(3000))
    write(place.create(), "log", data, 333)
    taken: list[bytes] = []
    with place.open().raw_fragment("log") as fragment:

        def work(_: int) -> None:
            buffer = bytearray(record)
            while fragment.readinto(buffer):
                taken.append(bytes(buffer))

        in_threads(8, work)
    assert b"".join(sorted(taken)) == data


def test_many_threads_write_through_one_writer(place: Place) -> None:
    writer = place.create(threads=2)
    lengths = [number * 50_000 + number for number in range(16)]

    def work(number: int) -> None:
        data = pattern(lengths[number], seed=number)
        with writer.add_namespace(str(number)).raw_fragment("mem") as fragment:
            for at in range(0, len(data), 7777):
                fragment.write(data[at : at + 7777])

    in_threads(16, work)
    check_independently(
        place.location, place.key, {f"{number}/mem": pattern(lengths[number], seed=number) for number in range(16)}
    )


def test_one_of_many_threads_creates_a_fragment(place: Place) -> None:
    writer = place.create()
    created: list[int] = []
    refused: list[int] = []

    def work(number: int) -> None:
        for name in map(str, range(20)):
            try:
                with writer.raw_fragment(name) as fragment:
                    fragment.write(name.encode())
                created.append(number)
            except FileExistsError:
                refused.append(number)

    in_threads(16, work)
    assert (len(created), len(refused)) == (20, 15 * 20)
    check_independently(place.location, place.key, {name: name.encode() for name in map(str, range(20))})


# Below and above the sizes that are copied with the interpreter lock, and that are encrypted in the caller's buffer.
@pytest.mark.parametrize("record", [100, 3000, 300_000, 4 * MIB + 8])
def test_each_write_of_many_threads_to_one_fragment_is_in_one_piece(place: Place, record: int) -> None:
    threads, each = 8, max(1, min(200, 6 * MIB // record // 8))
    with place.create(threads=2).raw_fragment("log") as fragment:

        def work(number: int) -> None:
            for index in range(each):
                fragment.write((number * each + index).to_bytes(4, "big") * (record // 4))

        in_threads(threads, work)
        assert fragment.tell() == threads * each * record
    data = read(place.open(), "log")
    records = [data[at : at + record] for at in range(0, len(data), record)]
    assert sorted(records) == [number.to_bytes(4, "big") * (record // 4) for number in range(threads * each)]


def test_a_fragment_closed_while_others_write_has_every_write_that_succeeded(place: Place) -> None:
    record = 5000
    fragment = place.create(threads=2).raw_fragment("log")
    succeeded: list[bytes] = []
    enough = threading.Event()

    def work(number: int) -> None:
        if number == 0:
            enough.wait()
            fragment.close()
            return
        for index in range(1_000_000):
            data = (number << 20 | index).to_bytes(4, "big") * (record // 4)
            try:
                assert fragment.write(data) == record
            except ValueError as error:
                assert "closed" in str(error)  # noqa: PT017 (success is as good)
                return
            succeeded.append(data)
            if len(succeeded) > 200:
                enough.set()
        raise AssertionError("it was never closed")

    in_threads(8, work)
    data = read(place.open(), "log")
    assert sorted(data[at : at + record] for at in range(0, len(data), record)) == sorted(succeeded)


def test_a_fragment_closed_while_others_read_fails_or_gives_the_right_bytes(place: Place) -> None:
    data = pattern(MIB)
    write(place.create(), "mem", data)
    fragment = place.open(threads=2).raw_fragment("mem")
    reads = threading.Semaphore(0)

    def work(number: int) -> None:
        if number == 0:
            for _ in range(50):
                reads.acquire()
            fragment.close()
            return
        chance = random.Random(number)
        while True:
            offset, size = chance.randrange(MIB), chance.choice([10, 5000, MIB])
            try:
                if number % 2:
                    assert fragment.read_at(offset, size) == data[offset : offset + size]
                else:
                    fragment.seek(offset)
                    assert fragment.read(size) in data
            except ValueError as error:
                assert "closed" in str(error)  # noqa: PT017 (success is as good)
                return
            reads.release()

    in_threads(8, work)
    assert fragment.closed


def test_threads_that_close_one_fragment_at_once_do_it_once(place: Place) -> None:
    writer = place.create()
    for name in map(str, range(50)):
        fragment = writer.raw_fragment(name)
        fragment.write(pattern(10_000))
        in_threads(4, lambda _, fragment=fragment: fragment.close())  # type: ignore[misc]
        assert fragment.closed
    check_independently(place.location, place.key, {name: pattern(10_000) for name in map(str, range(50))})


# Signals -------------------------------------------------------------------------------------------------------------

# In all of these a thread of the process itself watches the long call begin, which shows that the interpreter is free
# meanwhile, and then sends the signal. The calls are long because chunks are small or data many, and the provider the
# slower one; the assertion is about the progress of a call, not how long it took.
LONG_CALLS = """
import mmap, os, pickle, signal, sys, threading, vmsnap
handle, number = pickle.loads(bytes.fromhex(sys.argv[1])), signal.Signals[sys.argv[2]]
path = handle.path / "mem"
ones = b"\\1" * (128 << 20)

def send_when(begun):
    def watch():
        while not begun():
            pass
        os.kill(os.getpid(), number)
    threading.Thread(target=watch, daemon=True).start()

def stop(*_):
    raise KeyboardInterrupt("by a handler")
"""
SLOWER = {"VMSNAP_AEAD": "aes-gcm", "VMSNAP_THREADS": "1"}


@row("interrupted-write")
@pytest.mark.parametrize("handler", ["", "signal.signal(number, stop)\n"])
def test_ctrl_c_stops_a_long_write_in_the_middle_and_the_fragment_goes(place: Place, handler: str) -> None:
    script = """
zeros = mmap.mmap(-1, 4 << 30)  # pages that nobody writes to take no memory
with handle.raw_fragment("mem", chunk_size_bytes=65536) as fragment:
    send_when(lambda: os.stat(path).st_size > 1 << 20)
    try:
        fragment.write(zeros)
    finally:
        print("size", os.stat(path).st_size)
        try:
            fragment.write(b"more")
        except vmsnap.StateError as error:
            print("then", error)
"""
    handle = pickle.dumps(write(place.create(threads=1), "other", b"kept")).hex()
    number = "SIGUSR1" if handler else "SIGINT"
    printed = refused_elsewhere(
        "interrupted-write",
        "by a handler" if handler else "",
        place.location,
        LONG_CALLS + handler + script,
        handle,
        number,
        **SLOWER,
    )
    size = re.search(r"^size (\d+)$", printed, re.MULTILINE)
    assert size, printed
    assert 1 << 20 < int(size[1]) < 4 << 30
    assert "an earlier write failed" in printed
    check_independently(place.location, place.key, {"other": b"kept"})


def test_ctrl_c_stops_a_long_read_in_the_middle_and_the_buffer_is_emptied(tmp_path: Path, key: bytes) -> None:
    script = """
with handle.raw_fragment("mem", chunk_size_bytes=32) as fragment:
    fragment.write(ones)
with vmsnap.SnapshotReader(handle.path, key=bytes.fromhex(sys.argv[3]), threads=1).raw_fragment("mem") as fragment:
    for read in (lambda into: fragment.readinto_at(0, into), fragment.readinto):
        into = bytearray(len(ones))
        send_when(lambda: into[0])
        try:
            read(into)
        except KeyboardInterrupt:
            # Had it come to the end, the ones would be there.
            print("interrupted", into.count(1))
    assert fragment.tell() == 0
    assert fragment.readinto_at(0, into) == len(ones)
    print("afterwards", into == ones)
"""
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1", key=key)
    printed = run_python_well(LONG_CALLS + script, pickle.dumps(writer).hex(), "SIGINT", key.hex(), **SLOWER)
    assert printed.splitlines() == ["interrupted 0", "interrupted 0", "afterwards True"]


def test_ctrl_c_reaches_a_thread_that_waits_for_another_and_harms_no_data(tmp_path: Path, key: bytes) -> None:
    script = """
with handle.raw_fragment("mem", chunk_size_bytes=32) as fragment:
    other = threading.Thread(target=lambda: fragment.write(ones))
    other.start()
    while os.stat(path).st_size < 1 << 20:
        pass
    main = threading.main_thread().ident
    send_when(lambda: sys._current_frames()[main].f_code.co_qualname == "Fragment.write")
    try:
        fragment.write(b"two")
    except KeyboardInterrupt:
        print("interrupted")
    other.join()
    fragment.write(b"three")
with vmsnap.SnapshotReader(handle.path, key=bytes.fromhex(sys.argv[3])).raw_fragment("mem") as fragment:
    print(fragment.read() == ones + b"three")
"""
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1", key=key, threads=1)
    printed = run_python_well(LONG_CALLS + script, pickle.dumps(writer).hex(), "SIGINT", key.hex(), **SLOWER)
    assert printed.splitlines() == ["interrupted", "True"]


def test_a_signal_whose_handler_returns_is_handled_during_the_call_and_disturbs_nothing(
    tmp_path: Path, key: bytes
) -> None:
    script = """
sizes = []
signal.signal(number, lambda *_: sizes.append(os.stat(path).st_size))
with handle.raw_fragment("mem", chunk_size_bytes=32) as fragment:
    send_when(lambda: os.stat(path).st_size > 1 << 20)
    fragment.write(ones)
assert 1 << 20 < sizes[0] < os.stat(path).st_size - (1 << 20), (sizes, os.stat(path).st_size)
with vmsnap.SnapshotReader(handle.path, key=bytes.fromhex(sys.argv[3])).raw_fragment("mem") as fragment:
    print(fragment.read() == ones)
"""
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1", key=key, threads=1)
    printed = run_python_well(LONG_CALLS + script, pickle.dumps(writer).hex(), "SIGUSR1", key.hex(), **SLOWER)
    assert printed.splitlines() == ["True"]


@row("signal-handler")
def test_a_signal_handler_cannot_use_the_fragment_in_whose_call_it_runs(place: Place) -> None:
    script = """
refusals = []
def handler(*_):
    for call in (lambda: fragment.write(b"x"), lambda: fragment.write(ones), fragment.tell, fragment.flush):
        try:
            call()
        except vmsnap.StateError:
            refusals.append(call)
    fragment.tell()
signal.signal(number, handler)
fragment = handle.raw_fragment("mem", chunk_size_bytes=65536)
zeros = mmap.mmap(-1, 4 << 30)
try:
    send_when(lambda: os.stat(path).st_size > 1 << 20)
    fragment.write(zeros)
finally:
    print("refused", len(refusals))
    fragment.discard()
"""
    handle = pickle.dumps(write(place.create(threads=1), "other", b"kept")).hex()
    message = "a signal handler cannot use it"
    script = LONG_CALLS + script
    printed = refused_elsewhere("signal-handler", message, place.location, script, handle, "SIGUSR1", **SLOWER)
    assert "refused 4" in printed
    check_independently(place.location, place.key, {"other": b"kept"})


def test_a_writer_that_is_killed_leaves_nothing_that_opens(tmp_path: Path, key: bytes) -> None:
    script = """
send_when(lambda: path.exists() and os.stat(path).st_size > 1 << 20)
with handle.raw_fragment("mem", chunk_size_bytes=32) as fragment:
    fragment.write(ones)
"""
    place = Place(tmp_path / "vm1", key)
    writer = write(place.create(threads=1), "other", b"kept")
    killed = run_python(LONG_CALLS + script, pickle.dumps(writer).hex(), "SIGKILL", **SLOWER)
    assert killed.returncode == -signal.SIGKILL
    assert 1 << 20 < place.file("mem").stat().st_size < stored_size(128 << 20, 32)
    with pytest.raises(vmsnap.AuthenticationError, match=r'fragment "mem" of .*vm1: authentication failed'):
        place.open().raw_fragment("mem")
    assert read(place.open(), "other") == b"kept"
