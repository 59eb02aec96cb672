"""Measure how long a QEMU guest is paused while it is saved: with vmsnap, with QEMU alone, and with `lz4 | age`.

The guest of the tests has 256 MiB, of which 64 MiB are random. QEMU migrates all of it to a file with `max-bandwidth`
raised, between `stop` and `cont`, or to a pipe of `lz4` and `age`. Pairs alternate, the first one is not counted, and
ratios compare times.
"""

import argparse
import asyncio
import functools
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import vmsnap
import vmsnap.qemu
from guest import Console, qemu_command, running
from vmsnap.qemu.monitor import Monitor, connected, connection_to

RANDOM_MIB = 64


async def _migrate(qmp: Path, uri: str, descriptor: int | None) -> float:
    """Let QEMU save everything, and return how long its guest was paused."""
    async with connected(connection_to(qmp), "QEMU") as monitor:
        await monitor.run("migrate-set-parameters", max_bandwidth=1 << 40)
        started = perf_counter()
        await monitor.run("stop")
        await _send(monitor, uri, descriptor)
        await monitor.migrated()
        await monitor.run("cont")
        return perf_counter() - started


async def _send(monitor: Monitor, uri: str, descriptor: int | None) -> None:
    if descriptor is not None:
        await monitor.send_descriptor("bench", descriptor)
    await monitor.run("migrate", uri=uri)


def by_cat(qmp: Path, path: Path) -> float:
    return asyncio.run(_migrate(qmp, f"exec:cat > {path}", None))


def to_file(qmp: Path, path: Path) -> float:
    with open(path, "wb") as file:
        return asyncio.run(_migrate(qmp, "fd:bench", file.fileno()))


def to_pipe(identity: Path, qmp: Path, path: Path) -> float:
    return asyncio.run(_migrate(qmp, f"exec:lz4 -1 -c | age -e -i {identity} > {path}", None))


def size_of(path: Path) -> int:
    files = [path] if path.is_file() else list(path.iterdir())
    return sum(file.stat().st_size for file in files)


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink()


def compare(
    title: str,
    theirs: Callable[[Path], float],
    ours: Callable[[Path], vmsnap.qemu.SaveReport],
    directory: Path,
    pairs: int,
) -> None:
    """Print the ratio of the pauses, and the ratio of QEMU's pause to the whole time of vmsnap."""
    rows = []
    for _ in range(pairs + 1):
        stood = theirs(directory / "theirs")
        report = ours(directory / "ours")
        rows.append((stood, report.paused_seconds, report.seconds))
        sizes = size_of(directory / "theirs") / 1e6, size_of(directory / "ours") / 1e6
        remove(directory / "theirs")
        remove(directory / "ours")
    rows = rows[1:]
    theirs_s, pause_s, total_s = (statistics.median(column) for column in zip(*rows, strict=True))
    pause = statistics.median(ours / theirs for theirs, ours, _ in rows)
    faster = statistics.median(theirs / total for theirs, _, total in rows)
    print(
        f"{title:44} theirs {theirs_s:.3f} s {sizes[0]:5.0f} MB | ours: pause {pause_s:.3f} s, all {total_s:.3f} s, "
        f"{sizes[1]:4.0f} MB | pause ratio {pause:.2f}, all {faster:.1f} times as fast "
        f"{[f'{theirs / total:.1f}' for theirs, _, total in rows]}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="vmsnap-bench-") as name:
        directory = Path(name)
        qmp, console = directory / "qmp", Console(directory, "console")
        with running(qemu_command(qmp, *console.boot(RANDOM_MIB)), qmp):
            console.count()
            key = vmsnap.generate_key()
            print(f"{arguments.directory}, {os.cpu_count()} processors, aead {vmsnap.aead_provider()}")
            for title, options in (
                ("plain", {}),
                ("encrypted", {"key": key}),
                ("lz4, encrypted", {"compress": "lz4", "key": key}),
            ):
                ours = functools.partial(lambda options, path: vmsnap.qemu.save(qmp, path, **options), options)
                for way, theirs in (("exec:cat", by_cat), ("fd:", to_file)):
                    name = f"{title}, to QEMU's plain {way}"
                    compare(name, functools.partial(theirs, qmp), ours, directory, arguments.pairs)
            if not shutil.which("age") or not shutil.which("lz4"):
                print("no comparison with lz4 and age: they are not installed")
                return
            identity = directory / "identity.txt"
            subprocess.run(["age-keygen", "-o", identity], check=True, capture_output=True)
            compare(
                "lz4, encrypted, to QEMU | lz4 | age",
                functools.partial(to_pipe, identity, qmp),
                ours,
                directory,
                arguments.pairs,
            )


if __name__ == "__main__":
    main()
