"""Measure the cost of staging: the same dump staged and in place, in alternating pairs, and the median of the ratios.

python benches/staging.py [DIRECTORY] [MiB]
"""

import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import vmsnap

PAIRS = 21
WRITE_BYTES = 16 << 20
KEY = bytes(range(32))


def dump(writer: vmsnap.SnapshotWriter, data: memoryview) -> None:
    """Write one fragment in large calls."""
    with writer.raw_fragment("mem", chunk_size_bytes=64 << 10) as fragment:
        for offset in range(0, len(data), WRITE_BYTES):
            fragment.write(data[offset : offset + WRITE_BYTES])


def in_place(path: Path, key: bytes | None, data: memoryview) -> None:
    """Write in place, as crosvm does."""
    dump(vmsnap.SnapshotWriter(path, key=key, threads=2), data)


def staged(durable: bool) -> Callable[[Path, bytes | None, memoryview], None]:
    """Return a function that writes a snapshot which is complete or absent."""

    def run(path: Path, key: bytes | None, data: memoryview) -> None:
        with vmsnap.create(path, key=key, threads=2, durable=durable) as snap:
            dump(snap, data)

    return run


def seconds(
    run: Callable[[Path, bytes | None, memoryview], None], directory: Path, key: bytes | None, data: memoryview
) -> float:
    """Time one dump to a new path."""
    path = directory / "vm1"
    start = time.perf_counter()
    run(path, key, data)
    taken = time.perf_counter() - start
    shutil.rmtree(path)
    return taken


def main() -> None:
    """Measure all cases, and print a table."""
    parent = sys.argv[1] if len(sys.argv) > 1 else "/dev/shm"
    data = memoryview(bytearray(range(256)) * (4096 * int(sys.argv[2] if len(sys.argv) > 2 else 512)))
    print(f"{len(data) >> 20} MiB in {parent}, two threads, {PAIRS} pairs; ratio to the time in place")
    with tempfile.TemporaryDirectory(dir=parent) as name:
        for key in (None, KEY):
            for durable in (False, True):
                run = staged(durable)
                seconds(in_place, Path(name), key, data)
                ratios = []
                for number in range(PAIRS):
                    # The order alternates, because each run leaves traces in caches and in free memory.
                    order = (in_place, run) if number % 2 else (run, in_place)
                    taken = {each: seconds(each, Path(name), key, data) for each in order}
                    ratios.append(taken[run] / taken[in_place])
                label = f"{'encrypted' if key else 'plain'}{', durable' if durable else ''}"
                all_of_them = " ".join(f"{ratio:.2f}" for ratio in sorted(ratios))
                print(f"{label:20} {statistics.median(ratios):.2f}   ({all_of_them})")


if __name__ == "__main__":
    main()
