"""What Python adds to a read of guest memory at a random address: to be set against the same row of benches/memory.rs.

Arguments: [MIB], 1024 by default.
"""

import mmap
import os
import random
import statistics
import sys
import tempfile
from pathlib import Path
from time import perf_counter

import vmsnap

PAGE = 4096
READS = 4000


def main() -> None:
    """Print a line for each of the four forms: the median and the mean of a read of 4 KiB of data."""
    size = int(sys.argv[1] if len(sys.argv) > 1 else 1024) << 20
    numbers = random.Random(1)
    descriptor = os.memfd_create("guest")
    os.truncate(descriptor, size)
    words = [bytes(numbers.choices(range(97, 123), k=numbers.randint(2, 11))) for _ in range(2000)]
    text = b" ".join(numbers.choices(words, k=1 << 16))
    with mmap.mmap(descriptor, size) as memory, tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        data = []
        for start in range(0, size, 256 << 10):
            if (kind := numbers.random()) > 0.7:
                at = numbers.randrange(len(text) - (256 << 10))
                noise = kind < 0.85
                memory[start : start + (256 << 10)] = os.urandom(256 << 10) if noise else text[at : at + (256 << 10)]
                data.append(start)
        for compress in (None, "lz4"):
            for key in (None, vmsnap.generate_key()):
                root = Path(folder) / f"{compress}-{key is not None}"
                with vmsnap.create(root, key=key) as writer:
                    writer.write_memory([vmsnap.GuestRegion(0, descriptor)], compress=compress)
                stored = vmsnap.open(root, key=key).memory()
                times = []
                for _ in range(READS):
                    address = numbers.choice(data) + numbers.randrange(64) * PAGE
                    began = perf_counter()
                    page = stored.read(address, PAGE)
                    times.append((perf_counter() - began) * 1e6)
                    if page != memory[address : address + PAGE]:
                        raise SystemExit("what was read is not what was dumped")
                name = f"Python: random read lz4={compress is not None} encrypted={key is not None}"
                print(f"{name:<60} median {statistics.median(times):.1f} us, mean {statistics.mean(times):.1f} us")


if __name__ == "__main__":
    main()
