"""Compare fragments with `write(2)` and `read(2)`, from Rust and from Python, and with other ways to encrypt a file.

Every figure is a ratio from one run. Reference and candidate alternate in pairs, the first pair is not counted, and the
median of the ratios counts. `make bench` runs this; `make bench BENCH_ARGS="--mib 256 --pairs 3"` is a quick look.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import vmsnap

REPOSITORY = Path(__file__).resolve().parents[1]
MIB = 1 << 20
CALL_BYTES = MIB


def seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


class Directory:
    """Measures in one directory."""

    def __init__(self, directory: Path, data: memoryview, pairs: int) -> None:
        self.directory, self.data, self.pairs = directory, data, pairs
        self.key = vmsnap.generate_key()

    def calls(self, size: int) -> list[memoryview]:
        return [self.data[at : at + size] for at in range(0, len(self.data), size)]

    def reference_write(self) -> float:
        path = self.directory / "reference"
        path.unlink(missing_ok=True)
        calls = self.calls(CALL_BYTES)

        def work() -> None:
            with path.open("wb", buffering=0) as file:
                for call in calls:
                    file.write(call)

        spent = seconds(work)
        path.unlink()
        return spent

    def snapshot(self, **options: object) -> tuple[Path, vmsnap.SnapshotWriter]:
        root = self.directory / "snapshot"
        shutil.rmtree(root, ignore_errors=True)
        return root, vmsnap.SnapshotWriter(root, **options)  # type: ignore[arg-type]

    def write(self, chunk: int, call: int | None, *, encrypted: bool = True) -> float:
        _, writer = self.snapshot(**({"key": self.key, "threads": 2} if encrypted else {}))
        calls = [self.data] if call is None else self.calls(call)

        def work() -> None:
            with writer.raw_fragment("mem", chunk_size_bytes=chunk) as fragment:
                for data in calls:
                    fragment.write(data)

        return seconds(work)

    def write_and_remove(self, chunk: int, call: int | None, *, encrypted: bool = True) -> float:
        spent = self.write(chunk, call, encrypted=encrypted)
        # Removed like the file of the reference, so that both get the same pages, which are no longer fresh.
        shutil.rmtree(self.directory / "snapshot")
        return spent

    def other(self, write: "Callable[[Path, memoryview], object]") -> float:
        path = self.directory / "other"
        path.unlink(missing_ok=True)
        spent = seconds(lambda: write(path, self.data))
        path.unlink()
        return spent

    def row(self, name: str, measure: Callable[[], float], reference: Callable[[], float]) -> dict[str, object]:
        pairs = [(reference(), measure()) for _ in range(self.pairs + 1)][1:]
        gib = len(self.data) / (1 << 30)
        return {
            "name": name,
            "ratio": statistics.median(first / second for first, second in pairs),
            "gib_s": gib / statistics.median(second for _, second in pairs),
            "reference_gib_s": gib / statistics.median(first for first, _ in pairs),
        }

    def reads(self, chunk: int) -> dict[str, object]:
        self.write(chunk, None)
        plain = self.directory / "reference"
        plain.write_bytes(self.data)
        back = memoryview(bytearray(b"\1") * len(self.data))

        def reference() -> float:
            def work() -> None:
                with plain.open("rb", buffering=0) as file:
                    for at in range(0, len(back), CALL_BYTES):
                        file.readinto(back[at : at + CALL_BYTES])

            return seconds(work)

        reader = vmsnap.SnapshotReader(self.directory / "snapshot", key=self.key, threads=2)
        with reader.raw_fragment("mem") as fragment:
            row = self.row(
                f"Python: read encrypted, {size(chunk)} chunks",
                lambda: seconds(lambda: fragment.readinto_at(0, back)),
                reference,
            )
        if back != self.data:
            sys.exit("the bytes that were read differ from those written")
        return row

    def random_reads(self) -> dict[str, object]:
        self.write(4096, None)
        offsets = [random.randrange(len(self.data) // 4096) * 4096 for _ in range(20_000)]
        with vmsnap.SnapshotReader(self.directory / "snapshot", key=self.key).raw_fragment("mem") as fragment:
            read_at = fragment.read_at

            def work() -> None:
                for offset in offsets:
                    read_at(offset, 4096)

            work()
            spent = statistics.median(seconds(work) for _ in range(self.pairs))
        name = f"Python: random 4 KiB in {len(self.data) // MIB} MiB, encrypted"
        return {"name": name, "microseconds": spent / len(offsets) * 1e6}


def size(count: int) -> str:
    return f"{count // MIB} MiB" if count >= MIB else f"{count // 1024} KiB"


def aesgcm_by_hand(path: Path, data: memoryview) -> None:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    aead = AESGCM(os.urandom(32))
    with path.open("wb", buffering=0) as file:
        for index, at in enumerate(range(0, len(data), MIB)):
            file.write(aead.encrypt(index.to_bytes(12), data[at : at + MIB], None))


def tink_streaming(path: Path, data: memoryview) -> None:
    import tink
    from tink import streaming_aead

    streaming_aead.register()
    template = streaming_aead.streaming_aead_key_templates.AES256_GCM_HKDF_1MB
    primitive = tink.new_keyset_handle(template).primitive(streaming_aead.StreamingAead)
    with path.open("wb") as file, primitive.new_encrypting_stream(file, b"") as stream:
        for at in range(0, len(data), MIB):
            stream.write(bytes(data[at : at + MIB]))


def age_by_pyrage(path: Path, data: memoryview) -> None:
    import pyrage

    identity = pyrage.x25519.Identity.generate()
    path.write_bytes(pyrage.encrypt(bytes(data), [identity.to_public()]))


def peak_memory(directory: Path) -> list[dict[str, object]]:
    """Measure the peak memory of a write and a read of 4 GiB, each in its own process, without the interpreter's."""
    script = """
import sys, vmsnap
root, task = sys.argv[1:]
key = bytes(32)
buffer = bytearray(b"\\1") * (1 << 20)
def peak():  # not ru_maxrss, which starts with the peak of the parent process
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith("VmHWM:"))
before = peak()
if task == "writing":
    with vmsnap.SnapshotWriter(root, key=key).raw_fragment("mem", chunk_size_bytes=1 << 20) as fragment:
        for _ in range(4096):
            fragment.write(buffer)
else:
    with vmsnap.SnapshotReader(root, key=key).raw_fragment("mem") as fragment:
        while fragment.readinto(buffer):
            pass
print(peak() - before)
"""
    root = directory / "peak"
    rows: list[dict[str, object]] = []
    for task in ["writing", "reading"]:
        output = subprocess.check_output([sys.executable, "-c", script, str(root), task], text=True)
        rows.append({"name": f"Python: peak memory, {task} 4 GiB at 1 MiB chunks", "mib": int(output) / MIB})
    shutil.rmtree(root)
    return rows


def rust(arguments: argparse.Namespace, directory: Path, provider: str, only: str = "") -> list[dict[str, object]]:
    command = ["cargo", "bench", "--quiet", "--locked", "--bench", "fragments", "--", "--json"]
    command += [
        "--directory",
        str(directory),
        "--mib",
        str(arguments.mib),
        "--pairs",
        str(arguments.pairs),
        "--threads",
        "2",
        "--only",
        only,
    ]
    output = subprocess.check_output(command, text=True, cwd=REPOSITORY, env={**os.environ, "VMSNAP_AEAD": provider})
    rows = [json.loads(line) for line in output.splitlines() if line.startswith("{")]
    return [{**row, "name": f"Rust, {provider}: {row['name']}"} for row in rows]


def show(title: str, rows: list[dict[str, object]]) -> None:
    print(f"\n### {title}\n\n| case | of the reference | GiB/s | reference GiB/s |\n|---|---|---|---|")
    for row in rows:
        if "ratio" in row:
            print(f"| {row['name']} | {row['ratio']:.2f} | {row['gib_s']:.2f} | {row['reference_gib_s']:.2f} |")
        elif "microseconds" in row:
            print(f"| {row['name']} | {row['microseconds']:.2f} µs | | |")
        else:
            print(f"| {row['name']} | {row['mib']:.0f} MiB | | |")
    sys.stdout.flush()


def processor() -> str:
    text = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    fields = {name.strip(): value.strip() for name, value in fields.items()}
    flags = fields.get("flags", "").split()
    vaes = "with VAES" if "vaes" in flags else "without VAES"
    identity = f"family {fields.get('cpu family', '?')}, model {fields.get('model', '?')}"
    return f"{fields.get('model name', platform.machine())} ({identity}), {os.cpu_count()} cores, {vaes}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mib", type=int, default=1024, help="size of the fragment")
    parser.add_argument("--pairs", type=int, default=5, help="number of counted pairs")
    parser.add_argument("--disk", type=Path, default=REPOSITORY / "target", help="a directory on a disk")
    parser.add_argument("--no-others", action="store_true", help="leave out the comparison with other programs")
    arguments = parser.parse_args()

    print(f"{processor()}; Linux {platform.release()}; Python {platform.python_version()}; {arguments.mib} MiB")
    data = memoryview(b"".join(os.urandom(MIB) for _ in range(arguments.mib)))
    for title, parent in [("/dev/shm", Path("/dev/shm")), ("disk", arguments.disk)]:
        with tempfile.TemporaryDirectory(dir=parent, prefix="vmsnap-bench-") as name:
            directory = Path(name)
            rows = rust(arguments, directory, "aws-lc") + rust(arguments, directory, "aes-gcm", "encrypted, ")
            python = Directory(directory, data, arguments.pairs)
            measures: list[tuple[str, Callable[[], float]]] = [
                (
                    "Python: write plain, 1 MiB a call",
                    lambda python=python: python.write_and_remove(4096, MIB, encrypted=False),
                )
            ]
            for chunk in [4096, 65536, MIB]:
                for call, words in [(None, "one call"), (MIB, "1 MiB a call"), (65536, "64 KiB a call")]:
                    name = f"Python: write encrypted, {size(chunk)} chunks, {words}"
                    measures.append(
                        (name, lambda python=python, chunk=chunk, call=call: python.write_and_remove(chunk, call))
                    )
            if not arguments.no_others:
                for name, other in [
                    ("cryptography, AESGCM by hand, 1 MiB records", aesgcm_by_hand),
                    ("Tink, streaming AEAD, 1 MiB segments", tink_streaming),
                    ("pyrage, age", age_by_pyrage),
                ]:
                    measures.append((name, lambda python=python, other=other: python.other(other)))
            rows += [python.row(name, measure, python.reference_write) for name, measure in measures]
            rows += [python.reads(chunk) for chunk in [4096, 65536, MIB]]
            rows.append(python.random_reads())
            if title == "/dev/shm":
                rows += peak_memory(directory)
            show(title, rows)


if __name__ == "__main__":
    main()
