"""Measure random reads of guest memory from Python. The same row of benches/memory/ shows how much Python adds.

The guests are a real one, which `make guest` makes, and one of random and text-like pages.
"""

import argparse
import mmap
import os
import random
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter

import vmsnap

PAGE = 4096
READS = 4000
IMAGE = Path(os.environ.get("VMSNAP_BENCH_RAM") or Path(__file__).resolve().parents[1] / "target/guest/ram.img")


def compare(title: str, descriptor: int, data: Sequence[int]) -> None:
    """Print a line for each of the four forms: the median and the mean time of a read of 4 KiB of data.

    `data` has the addresses of pages.
    """
    numbers = random.Random(1)
    for compress in (None, "lz4"):
        for key in (None, vmsnap.generate_key()):
            with tempfile.TemporaryDirectory(dir="/dev/shm", prefix="vmsnap-bench-") as directory:
                root = Path(directory) / "vm1"
                with vmsnap.create(root, key=key) as writer:
                    writer.write_memory([vmsnap.GuestRegion(0, descriptor)], compress=compress)
                stored = vmsnap.open(root, key=key).memory()
                times = []
                for _ in range(READS):
                    address = numbers.choice(data)
                    began = perf_counter()
                    page = stored.read(address, PAGE)
                    times.append((perf_counter() - began) * 1e6)
                    if page != os.pread(descriptor, PAGE, address):
                        raise SystemExit("the page that was read differs from the one that was dumped")
            form = " ".join(word for word, said in (("lz4", compress), ("encrypted", key)) if said) or "plain"
            name = f"{title}, Python: random read {form}"
            print(f"{name:<64} median {statistics.median(times):.1f} us, mean {statistics.mean(times):.1f} us")


def real() -> None:
    if not IMAGE.exists():
        print(f"real: skipped: {IMAGE} does not exist; `make guest` makes it")
        return
    with open(IMAGE, "rb") as file:
        data, end = [], 0
        while True:
            try:
                start = os.lseek(file.fileno(), end, os.SEEK_DATA)
            except OSError:  # ENXIO: a hole up to the end
                break
            end = os.lseek(file.fileno(), start, os.SEEK_HOLE)
            data += range(start, end, PAGE)
        compare("real", file.fileno(), data)


def synthetic(size: int) -> None:
    numbers = random.Random(1)
    descriptor = os.memfd_create("guest")
    os.truncate(descriptor, size)
    words = [bytes(numbers.choices(range(97, 123), k=numbers.randint(2, 11))) for _ in range(2000)]
    text = b" ".join(numbers.choices(words, k=1 << 16))
    run = 256 << 10
    data: list[int] = []
    with mmap.mmap(descriptor, size) as memory:
        for start in range(0, size, run):
            if (kind := numbers.random()) > 0.7:
                at = numbers.randrange(len(text) - run)
                memory[start : start + run] = os.urandom(run) if kind < 0.85 else text[at : at + run]
                data += range(start, start + run, PAGE)
    compare("runs", descriptor, data)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["real", "synthetic"], metavar="real|synthetic")
    parser.add_argument("--mib", type=int, default=1024, help="size of the synthetic guest")
    arguments = parser.parse_args()
    if "real" in arguments.parts:
        real()
    if "synthetic" in arguments.parts:
        synthetic(arguments.mib << 20)


if __name__ == "__main__":
    main()
