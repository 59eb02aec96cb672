"""Measure how long a QEMU guest is paused while it is saved, and how long the save takes, beside QEMU's own ways.

    python benches/qemu_save.py [--version 10.0] [--only live]

The guest is the toy guest of the tests: 1 GiB, a half of which is data, and a part of that is rewritten at a given
rate. It is saved in three ways: `live` while it runs; `stream` while it is stopped, through QEMU's stream; and `files`
while it is stopped, from the file that its memory is in. QEMU itself migrates to `exec:cat > FILE`, and QEMU 10.0 to a
file as `mapped-ram` with multifd. Its bandwidth is raised, its other parameters are the default ones.

The writers of a way take turns on one guest, and the first turn is not counted. The table has medians. Its ratios, the
medians of those within a turn, are the times of a writer in relation to those of QEMU's writers. The pause is the time
between the events STOP and RESUME. QEMU's own downtime, which does not include the time until a client says `cont`, is
in brackets, and ratios of live saves refer to it.
"""

import argparse
import asyncio
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

import qemus
import vmsnap
import vmsnap.qemu
from guest import qemu_command, running
from qemu.qmp import Message, QMPClient
from qemus import Qemu
from support import MIB
from toy_guest import Toy

SIZE_MIB = 1024
STILL_MIB, MOVING_MIB = 384, 128
# A step of the guest rewrites 256 KiB.
STEPS = 512
# Each is a thread of QEMU.
CHANNELS = os.cpu_count() or 1


class Times(NamedTuple):
    pause: float
    total: float
    downtime: float | None = None
    size: int = 0

    @property
    def shortest_pause(self) -> float:
        """The pause that QEMU reports, or else the one that was seen."""
        return self.pause if self.downtime is None else self.downtime


@dataclass(frozen=True)
class Writer:
    name: str
    write: Callable[[Path, Path], Times]
    is_base: bool = False


@dataclass(frozen=True)
class Guest:
    """A kind of guest: how its memory is backed, and whether it is saved live."""

    name: str
    is_in_file: bool = False
    is_live: bool = False


WAYS = (Guest("live", is_live=True), Guest("stream"), Guest("files", is_in_file=True))


# QEMU's own saves --------------------------------------------------------------------------------------------------


async def _migrate(qmp: Path, uri: str, live: bool, capabilities: tuple[str, ...]) -> Times:
    # The results of its commands are typed as `object`.
    client: Any = QMPClient()
    await client.connect(str(qmp))
    try:
        await client.execute("migrate-set-parameters", {"max-bandwidth": 1 << 40})
        if "multifd" in capabilities:
            await client.execute("migrate-set-parameters", {"multifd-channels": CHANNELS})
        await _set(client, ("events", *capabilities), True)
        with client.listener() as events:
            started = perf_counter()
            if not live:
                await client.execute("stop")
            await client.execute("migrate", {"uri": uri})
            stopped = None
            while True:
                event = await events.get()
                if event["event"] == "STOP":
                    stopped = _time_of(event)
                status = event["data"]["status"] if event["event"] == "MIGRATION" else None
                assert status not in ("failed", "cancelled"), f"QEMU cannot migrate to {uri}"
                if status == "completed":
                    break
            # The event is a moment early.
            while (await client.execute("query-status"))["status"] == "finish-migrate":
                pass
            await client.execute("cont")
            while (event := await events.get())["event"] != "RESUME":
                pass
            total = perf_counter() - started
        # It is there from 7.2 to 10.0 for a guest that ran.
        downtime = (await client.execute("query-migrate")).get("downtime") if live else None
        await _set(client, ("events", *capabilities), False)
        assert stopped is not None
        return Times(_time_of(event) - stopped, total, None if downtime is None else downtime / 1e3)
    finally:
        await client.disconnect()


async def _set(client: Any, capabilities: tuple[str, ...], state: bool) -> None:
    wanted = [{"capability": each, "state": state} for each in capabilities]
    await client.execute("migrate-set-capabilities", {"capabilities": wanted})


def _time_of(event: Message) -> float:
    stamp: Any = event["timestamp"]
    return float(stamp["seconds"] + stamp["microseconds"] / 1e6)


def theirs(qemu: Qemu, live: bool, directory: Path) -> Iterator[Writer]:
    def through(command: str) -> Callable[[Path, Path], Times]:
        return lambda qmp, path: asyncio.run(_migrate(qmp, f"exec:{command} > {path}", live, ()))

    yield Writer("QEMU exec:cat", through("cat"), is_base=True)
    if qemu.number >= (9, 0):
        capabilities = ("mapped-ram", "multifd")
        yield Writer(
            f"QEMU mapped-ram, {CHANNELS} channels",
            lambda qmp, path: asyncio.run(_migrate(qmp, f"file:{path}", live, capabilities)),
            is_base=True,
        )
    if shutil.which("age") and shutil.which("lz4"):
        identity = directory / "identity.txt"
        if not identity.exists():
            subprocess.run(["age-keygen", "-o", identity], check=True, capture_output=True)
        yield Writer("QEMU exec:lz4 | age", through(f"lz4 -1 -c | age -e -i {identity}"))


# Saves of vmsnap ----------------------------------------------------------------------------------------------------


def ours(way: Guest) -> Iterator[Writer]:
    key = vmsnap.generate_key()
    live = {"live": True} if way.is_live else {}
    kinds: dict[str, dict[str, Any]] = {
        "vmsnap": {},
        "vmsnap encrypted": {"key": key},
        "vmsnap LZ4, encrypted": {"compress": "lz4", "key": key},
    }

    def writer(name: str, options: dict[str, Any]) -> Writer:
        def write(qmp: Path, path: Path) -> Times:
            # QEMU's own ways do not sync their files either.
            report = vmsnap.qemu.save(qmp, path, durable=False, **live, **options)
            return Times(report.paused_seconds, report.seconds)

        return Writer(name, write)

    return (writer(*each) for each in kinds.items())


# Turns and the table -----------------------------------------------------------------------------------------------


def measure(qemu: Qemu, way: Guest, directory: Path, arguments: argparse.Namespace) -> dict[Writer, list[Times]]:
    """Let the writers take turns on a new guest."""
    qmp, ram = directory / "qmp", directory / "ram"
    memory = f"memory-backend-file,id=mem,size={SIZE_MIB}M,share=on,mem-path={ram}" if way.is_in_file else ""
    toy = Toy(
        directory,
        f"toy-{way.name}",
        still_mib=STILL_MIB,
        moving_mib=MOVING_MIB,
        steps=STEPS,
        still_parts=4 * STEPS,
        period_ms=1000 * MOVING_MIB * MIB / STEPS / 1e6 / arguments.rate,
    )
    command = qemu_command(
        qmp, *toy.options, memory=memory, size=f"{SIZE_MIB}M", qemu=qemu, accel=arguments.accel, machine="q35"
    )
    writers = [*theirs(qemu, way.is_live, directory), *ours(way)]
    turns: dict[Writer, list[Times]] = {each: [] for each in writers}
    with running(command, qmp):
        toy.ticks(2)
        began = perf_counter()
        toy.tick()
        rate = MOVING_MIB * MIB / 1e6 / (perf_counter() - began)
        print(f"\n{qemu}, {way.name}; the guest rewrites {rate:.0f} MB/s")
        for turn in range(arguments.pairs + 1):
            for writer in writers:
                path = directory / "saved"
                times = writer.write(qmp, path)
                if turn:
                    turns[writer].append(times._replace(size=_size_of(path)))
                shutil.rmtree(path) if path.is_dir() else path.unlink()
                # A guest that found other memory than it wrote ends the measurement.
                toy.catch_up()
                toy.tick()
    toy.close()
    ram.unlink(missing_ok=True)
    return turns


def _size_of(path: Path) -> int:
    files = [path] if path.is_file() else list(path.iterdir())
    return sum(each.stat().st_blocks * 512 for each in files)


def report(turns: dict[Writer, list[Times]]) -> None:
    bases = [each for each in turns if each.is_base]
    heads = [f"{'to ' + base.name.removeprefix('QEMU ').split(',')[0] + ': pause':>22} {'total':>6}" for base in bases]
    print(f"{'':28} {'pause ms':>16} {'total s':>8} {'MB':>6}", *heads)
    for writer, times in turns.items():
        pause = f"{statistics.median(each.pause for each in times) * 1e3:.1f}"
        if times[0].downtime is not None:
            pause += f" ({statistics.median(each.shortest_pause for each in times) * 1e3:.0f})"
        total = statistics.median(each.total for each in times)
        line = f"{writer.name:28} {pause:>16} {total:8.3f} {times[-1].size / 1e6:6.0f}"
        for base in bases:
            pairs = list(zip(times, turns[base], strict=True))
            # A downtime of less than half a millisecond is 0.
            paused = statistics.median(own.shortest_pause / max(base.shortest_pause, 5e-4) for own, base in pairs)
            line += f" {paused:22.2f} {statistics.median(own.total / base.total for own, base in pairs):6.2f}"
        print(line, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = {"7.2": "system", **{each: each for each in qemus.NAMES}}
    parser.add_argument("--version", choices=names, action="append", help="of QEMU; both without it")
    parser.add_argument("--only", choices=[each.name for each in WAYS], action="append", help="a way; all without it")
    parser.add_argument("--pairs", type=int, default=5, help="how many turns are counted")
    parser.add_argument("--rate", type=float, default=100, help="MB that the guest rewrites in each second, at most")
    parser.add_argument("--directory", type=Path, default=Path("/dev/shm"), help="where files go")
    parser.add_argument("--accel", default="tcg", help="tcg or kvm")
    arguments = parser.parse_args()
    print(f"{arguments.directory}, {os.cpu_count()} processors, {arguments.accel}, aead {vmsnap.aead_provider()};")
    print(
        f"a guest of {SIZE_MIB} MiB, of which {STILL_MIB + MOVING_MIB} are data, {MOVING_MIB} are rewritten at up to "
        f"{arguments.rate:g} MB/s; medians of {arguments.pairs} turns"
    )
    for name in dict.fromkeys(names[each] for each in arguments.version or qemus.NAMES):
        qemu = qemus.found(name)
        for way in WAYS:
            if way.name in (arguments.only or [way.name]):
                with tempfile.TemporaryDirectory(dir=arguments.directory, prefix="vmsnap-bench-") as directory:
                    report(measure(qemu, way, Path(directory), arguments))


if __name__ == "__main__":
    main()
