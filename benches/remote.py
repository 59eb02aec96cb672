"""Measure how fast a gigabyte goes to an object store and back, and the memory that it takes: `make bench-remote`.

    python benches/remote.py [--mib 1024] [--pairs 5] [--connections 16]

The store is versitygw on loopback. The bytes stand for the memory of a guest that has no page of zeros, because a
client that does not know of memory sends such pages too. For each direction, the ways take turns, each in a process
of its own, and the first turn is not counted. The first way is the reference: obstore, which is Rust's object_store in
Python, moves the plain bytes by the same number of connections and in parts of the same size. The table has medians,
the ratios to the reference within a turn, and the peak memory of the process. The time includes neither the start of
the process nor its imports.
"""

import argparse
import os
import random
import statistics
import struct
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from object_stores import S3, Bucket, running
from support import MIB

PART_BYTES = 8 * MIB
PAGE_BYTES = 4096


class Cost(NamedTuple):
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Course:
    """A bucket, the file whose bytes go there, and the file that they come back to."""

    bucket: Bucket
    source: Path
    target: Path
    connections: int


@dataclass(frozen=True)
class Way:
    """A way to move the bytes: `prepare` imports and connects, and returns the work that is measured."""

    name: str
    prepare: Callable[[Course], Callable[[], object]]


# The ways -----------------------------------------------------------------------------------------------------------


def obstore_push(course: Course) -> Callable[[], object]:
    import obstore

    store = course.bucket.store()

    def work() -> None:
        sizes = {"chunk_size": PART_BYTES, "max_concurrency": course.connections}
        obstore.put(store, "plain", course.source, use_multipart=True, **sizes)

    return work


def obstore_pull(course: Course) -> Callable[[], object]:
    import obstore

    store, size = course.bucket.store(), course.source.stat().st_size

    def work() -> None:
        with open(course.target, "wb") as file, ThreadPoolExecutor(course.connections) as pool:
            file.truncate(size)

            def part(start: int) -> None:
                length = min(PART_BYTES, size - start)
                data = memoryview(obstore.get_range(store, "plain", start=start, length=length))
                assert os.pwrite(file.fileno(), data, start) == length

            list(pool.map(part, range(0, size, PART_BYTES)))

    return work


PUSHES = (Way("obstore", obstore_push),)
PULLS = (Way("obstore", obstore_pull),)


# Turns and the table ------------------------------------------------------------------------------------------------


def write_guest(path: Path, mib: int) -> None:
    """Write memory without a page of zeros and without two equal pages."""
    block = bytearray(random.Random(0).randbytes(16 * MIB))
    with open(path, "wb") as file:
        for start in range(0, mib * MIB, len(block)):
            for page in range(0, len(block), PAGE_BYTES):
                struct.pack_into("<Q", block, page, start + page + 1)
            file.write(block[: mib * MIB - start])


def measured(way: Way, course: Course) -> Cost:
    """Move the bytes in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work = way.prepare(course)
            started = perf_counter()
            work()
            os.write(writing, struct.pack("d", perf_counter() - started))
            status = 0
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            os._exit(status)
    os.close(writing)
    with open(reading, "rb") as answer:
        told = answer.read()
    _, status, usage = os.wait4(child, 0)
    if status != 0:
        sys.exit(f"{way.name} failed, see above")
    return Cost(*struct.unpack("d", told), usage.ru_maxrss * 1024)


def take_turns(ways: tuple[Way, ...], course: Course, pairs: int) -> dict[Way, list[Cost]]:
    costs: dict[Way, list[Cost]] = {each: [] for each in ways}
    for turn in range(pairs + 1):
        for way in ways:
            cost = measured(way, course)
            if turn:
                costs[way].append(cost)
    return costs


def report(direction: str, costs: dict[Way, list[Cost]], size: int) -> None:
    reference = next(iter(costs.values()))
    print(f"\n{direction:28} {'s':>8} {'MB/s':>8} {'ratio':>6} {'peak MB':>8}")
    for way, own in costs.items():
        seconds = statistics.median(each.seconds for each in own)
        ratio = statistics.median(base.seconds / each.seconds for each, base in zip(own, reference, strict=True))
        peak = max(each.peak_bytes for each in own)
        print(f"{way.name:28} {seconds:8.3f} {size / 1e6 / seconds:8.0f} {ratio:6.2f} {peak / 1e6:8.0f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mib", type=int, default=1024, help="the size of the memory")
    parser.add_argument("--pairs", type=int, default=5, help="how many turns are counted")
    parser.add_argument("--connections", type=int, default=16, help="requests at the same time")
    parser.add_argument(
        "--directory", type=Path, default=Path("/dev/shm"), help="where all files go, also of the store"
    )
    arguments = parser.parse_args()
    print(
        f"{arguments.directory}, {os.cpu_count()} processors, {arguments.mib} MiB, {arguments.connections} connections"
    )
    with (
        tempfile.TemporaryDirectory(dir=arguments.directory, prefix="vmsnap-bench-") as directory,
        running(S3, Path(directory)) as server,
    ):
        files = Path(directory, "source"), Path(directory, "target")
        course = Course(server.new_bucket(), *files, arguments.connections)
        write_guest(course.source, arguments.mib)
        for direction, ways in {"push": PUSHES, "pull": PULLS}.items():
            report(direction, take_turns(ways, course, arguments.pairs), course.source.stat().st_size)
        assert course.target.read_bytes() == course.source.read_bytes(), "other bytes came back"


if __name__ == "__main__":
    main()
