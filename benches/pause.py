"""How long a QEMU guest stands still to be saved: vmsnap's way against QEMU's own, and against `lz4 | age`.

The guest has 256 MiB, of which 64 MiB are random; it is the one of the tests. QEMU migrates all of it to a file, with
`max-bandwidth` raised, from `stop` to `cont`; and into a pipe of `lz4` and `age`. Pairs are interleaved, the first one
is thrown away, and ratios are of times.
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
    """Let QEMU save everything; return how long its guest stood still."""
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
    folder: Path,
    pairs: int,
) -> None:
    """Print how often as long the guest stands still their way, and how often as long all of it takes."""
    rows = []
    for _ in range(pairs + 1):
        stood = theirs(folder / "theirs")
        report = ours(folder / "ours")
        rows.append((stood, report.paused_seconds, report.seconds))
        sizes = size_of(folder / "theirs") / 1e6, size_of(folder / "ours") / 1e6
        remove(folder / "theirs")
        remove(folder / "ours")
    rows = rows[1:]
    theirs_s, pause_s, total_s = (statistics.median(column) for column in zip(*rows, strict=True))
    pause = statistics.median(ours / theirs for theirs, ours, _ in rows)
    faster = statistics.median(theirs / total for theirs, _, total in rows)
    print(
        f"{title:44} theirs {theirs_s:.3f} s {sizes[0]:5.0f} MB | ours: pause {pause_s:.3f} s, all {total_s:.3f} s, "
        f"{sizes[1]:4.0f} MB | pause {pause:.2f} of theirs, all {faster:.1f} times as fast "
        f"{[f'{theirs / total:.1f}' for theirs, _, total in rows]}",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pairs", type=int, default=7)
    parser.add_argument("--folder", type=Path, default=Path("/dev/shm"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder, prefix="vmsnap-bench-") as name:
        folder = Path(name)
        qmp, console = folder / "qmp", Console(folder, "console")
        with running(qemu_command(qmp, *console.boot(RANDOM_MIB)), qmp):
            console.count()
            key = vmsnap.generate_key()
            print(f"{arguments.folder}, {os.cpu_count()} processors, aead {vmsnap.aead_provider()}")
            for title, options in (
                ("plain", {}),
                ("encrypted", {"key": key}),
                ("lz4, encrypted", {"compress": "lz4", "key": key}),
            ):
                ours = functools.partial(lambda options, path: vmsnap.qemu.save(qmp, path, **options), options)
                for way, theirs in (("exec:cat", by_cat), ("fd:", to_file)):
                    name = f"{title}, to QEMU's plain {way}"
                    compare(name, functools.partial(theirs, qmp), ours, folder, arguments.pairs)
            if not shutil.which("age") or not shutil.which("lz4"):
                print("no lz4 and age here to compare with")
                return
            identity = folder / "identity.txt"
            subprocess.run(["age-keygen", "-o", identity], check=True, capture_output=True)
            compare(
                "lz4, encrypted, to QEMU | lz4 | age",
                functools.partial(to_pipe, identity, qmp),
                ours,
                folder,
                arguments.pairs,
            )


if __name__ == "__main__":
    main()
