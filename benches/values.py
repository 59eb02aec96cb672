"""Compare values in fragments with cbor2 and `write(2)` or `read(2)` of the bytes alone.

Each figure is a ratio from one run, as in `compare.py`: reference and candidate alternate, a warm-up is not counted,
and the median counts. `make bench-values` runs this; `BENCH_ARGS="--count 200 --pairs 3"` is a quick look.
"""

import argparse
import json
import os
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import cbor2
import numpy as np
import vmsnap


@dataclass
class Queue:
    size: int
    ready: bool
    desc: int
    next: int | None


@dataclass
class Device:
    name: str
    queues: list[Queue]


def states() -> dict[str, tuple[object, object]]:
    """Return device states of about 100 kB, each with its type. The kinds of values in a state decide its cost."""
    queues = [{"size": 256, "ready": True, "desc": 2**32 + i * 4096, "next": None} for i in range(16)]
    registers = {f"r{i}": i * 2**33 for i in range(64)}
    many = [{"size": 256, "ready": True, "desc": 2**32 + i * 4096, "next": None} for i in range(2700)]
    return {
        "registers, queues, 96 KiB of bytes": (
            {"name": "virtio-net", "queues": queues, "registers": registers, "ram": os.urandom(96 << 10)},
            None,
        ),
        "array of 12,800 uint64": ({"registers": np.arange(12_800, dtype="<u8") << 33}, None),
        "list of 11,400 ints": ([i << 33 for i in range(11_400)], None),
        "2,700 records of four": ({"name": "virtio-blk", "queues": many}, None),
        "2,700 records of four, as dataclasses": (Device("virtio-blk", [Queue(**queue) for queue in many]), Device),
    }


def seconds(work: Callable[[int], object], count: int) -> float:
    start = time.perf_counter()
    for number in range(count):
        work(number)
    return time.perf_counter() - start


class Bench:
    """Measures one state in one directory."""

    def __init__(self, directory: Path, state: object, type: object, count: int) -> None:
        self.root, self.state, self.type, self.count = directory / "snapshot", state, type, count
        self.plain = vmsnap.serialization.encode(state)
        self.decoded = vmsnap.serialization.decode(self.plain)

    def write_reference(self) -> float:
        self.root.mkdir()

        def work(number: int) -> None:
            # The decoded state, because cbor2 does not support dataclasses.
            data = cbor2.dumps(self.simple)
            file = os.open(self.root / f"{number}", os.O_WRONLY | os.O_CREAT | os.O_EXCL)
            os.write(file, data)
            os.close(file)

        return seconds(work, self.count)

    @property
    def simple(self) -> object:
        if isinstance(self.state, dict) and isinstance(array := self.state.get("registers"), np.ndarray):
            return {"registers": cbor2.CBORTag(71, array.tobytes())}
        return self.decoded

    def read_reference(self) -> float:
        def work(number: int) -> None:
            file = os.open(self.root / f"{number}", os.O_RDONLY)
            data = os.read(file, os.fstat(file).st_size)
            os.close(file)
            cbor2.loads(data)

        return seconds(work, self.count)

    def write(self, key: bytes | None) -> float:
        writer = vmsnap.SnapshotWriter(self.root, key=key)
        return seconds(lambda number: writer.write_fragment(f"{number}", self.state), self.count)

    def read(self, key: bytes | None) -> float:
        reader = vmsnap.SnapshotReader(self.root, key=key)
        return seconds(lambda number: reader.read_fragment(f"{number}", self.type), self.count)

    def pair(self, key: bytes | None) -> dict[str, tuple[float, float]]:
        shutil.rmtree(self.root, ignore_errors=True)
        reference = self.write_reference(), self.read_reference()
        shutil.rmtree(self.root)
        own = self.write(key), self.read(key)
        shutil.rmtree(self.root)
        return {"write": (reference[0], own[0]), "read": (reference[1], own[1])}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"))
    parser.add_argument("--count", type=int, default=1000, help="values written and read each time")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--json", action="store_true", help="all figures")
    options = parser.parse_args()
    figures = []
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        for name, (state, type) in states().items():
            bench = Bench(Path(directory), state, type, options.count)
            for label, key in (("plain", None), ("encrypted", vmsnap.generate_key())):
                pairs = [bench.pair(key) for _ in range(options.pairs + 1)][1:]
                for direction in ("write", "read"):
                    times = [pair[direction] for pair in pairs]
                    figures.append(
                        {
                            "state": name,
                            "bytes": len(bench.plain),
                            "what": f"{direction} {label}",
                            "ratio": statistics.median(reference / own for reference, own in times),
                            "a_second": options.count / statistics.median(own for _, own in times),
                            "reference_a_second": options.count / statistics.median(ref for ref, _ in times),
                            "times": times,
                        }
                    )
    if options.json:
        print(json.dumps(figures, indent=2))
        return
    print("| state | bytes | operation | of the reference | values a second | reference |\n|---|---|---|---|---|---|")
    for f in figures:
        print(
            f"| {f['state']} | {f['bytes']:,} | {f['what']} | {f['ratio']:.2f} | {f['a_second']:,.0f} "
            f"| {f['reference_a_second']:,.0f} |"
        )


if __name__ == "__main__":
    main()
