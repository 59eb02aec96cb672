"""Saves through QEMU's migration stream: of a guest that stands still, and of one that runs meanwhile."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import vmsnap
import vmsnap.qemu
from commands import error_of, run
from guest import PATIENCE, ask, ended, qemu_command, running, shared_memory
from qemu_states import eventually, is_as_before, settings, state
from qemus import Qemu
from refusals import refused, row
from support import MIB
from toy_guest import Toy
from vmsnap.qemu import hold, monitor, plan, saving

_HUGE = "memory-backend-memfd,id=mem,size=64M,share=on,hugetlb=on,hugetlbsize=2M"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    path = tmp_path / "snapshots"
    path.mkdir()
    return path


@pytest.fixture
def qmp(tmp_path: Path) -> Path:
    return tmp_path / "qmp"


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Toy]:
    made = Toy(tmp_path)
    yield made
    made.close()


def copied(command: list[str], toy: Toy, other: Toy) -> list[str]:
    """Return the command for a second guest beside the first one: with another console, monitor and memory file."""
    words = [each.replace(str(toy.path), str(other.path)) for each in command]
    return [each.replace("/qmp,", "/qmp2,").replace("/ram", "/ram2") for each in words]


def goes_on_and_loads(command: list[str], toy: Toy, snapshot: Path, tmp_path: Path, key: bytes | None = None) -> None:
    """Check the guest that was saved, and a copy of it beside it: each checks its own memory."""
    toy.ticks(100)
    other = Toy(tmp_path, "copy")
    with ended(vmsnap.qemu.load(snapshot, copied(command, toy, other), key=key).process):
        other.ticks(100)
    other.close()
    assert other.number is not None
    assert toy.number is not None


# Every kind of memory -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize(
    ("memory", "way"),
    [
        ("", "stream"),
        ("memory-backend-memfd,id=mem,size=256M,share=on", "files"),
        ("memory-backend-memfd,id=mem,size=256M,share=off", "stream"),
        ("memory-backend-ram,id=mem,size=256M,share=on", "stream"),
        ("memory-backend-file,id=mem,size=256M,share=on,mem-path=FOLDER/ram", "files"),
    ],
)
def test_any_guest_is_saved_and_goes_on(
    tmp_path: Path, folder: Path, qmp: Path, toy: Toy, key: bytes, qemu: Qemu, memory: str, way: str, live: bool
) -> None:
    command = qemu_command(qmp, *toy.options, memory=memory.replace("FOLDER", str(tmp_path)), qemu=qemu)
    with running(command, qmp):
        toy.ticks(3)
        before = settings(qmp)
        report = vmsnap.qemu.save(qmp, folder / "vm1", key=key, compress="lz4", live=live)
        assert settings(qmp) == before
        assert is_as_before(qmp)
        # Newer versions of QEMU send memory that is shared and has no name.
        unnamed = "memfd" in memory and qemu.number >= (8, 1)
        assert report.way == ("live" if live else "stream" if unnamed else way)
        assert (report.rounds > 1) == live
        assert report.memory.logical_bytes == 256 * MIB
        # Devices, and not the memory of the guest.
        assert report.device_state_bytes < MIB
        assert report.machine.state == "running"
        goes_on_and_loads(command, toy, folder / "vm1", tmp_path, key)
    assert vmsnap.verify(folder / "vm1", key=key, expect_seal_digest=report.seal_digest).ok


@pytest.mark.parametrize("live", [False, True])
def test_a_guest_on_huge_pages_is_saved(
    tmp_path: Path,
    folder: Path,
    qmp: Path,
    toy: Toy,
    qemu: Qemu,
    live: bool,
    huge_pages: Callable[[int], AbstractContextManager[None]],
) -> None:
    command = qemu_command(qmp, *toy.options, memory=_HUGE, size="64M", qemu=qemu)
    with huge_pages(64), running(command, qmp):
        toy.ticks(3)
        report = vmsnap.qemu.save(qmp, folder / "vm1", live=live)
        assert report.memory.logical_bytes == 64 * MIB
        goes_on_and_loads(command, toy, folder / "vm1", tmp_path)


@pytest.mark.parametrize("live", [False, True])
def test_of_two_numa_nodes_one_may_be_in_a_file(
    tmp_path: Path, folder: Path, qmp: Path, toy: Toy, qemu: Qemu, live: bool
) -> None:
    """One is read from its file, the other is taken out of the stream. An emulated guest stands still meanwhile."""
    numa = [
        *("-object", f"memory-backend-file,id=m0,size=128M,share=on,mem-path={tmp_path}/ram"),
        *("-object", "memory-backend-ram,id=m1,size=128M"),
        *("-numa", "node,memdev=m0", "-numa", "node,memdev=m1"),
    ]
    command = qemu_command(qmp, *toy.options, *numa, memory="", qemu=qemu)
    with running(command, qmp):
        toy.ticks(3)
        report = vmsnap.qemu.save(qmp, folder / "vm1", live=live)
        assert report.way == "stream"
        assert [each.backend for each in report.machine.ram] == ["m0", "m1"]
        goes_on_and_loads(command, toy, folder / "vm1", tmp_path)


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("memory", ["", "memory-backend-file,id=mem,size=64M,share=on,mem-path=FOLDER/ram"])
def test_memory_that_is_not_plugged_in_is_zero(
    tmp_path: Path, folder: Path, qmp: Path, toy: Toy, qemu: Qemu, memory: str, live: bool
) -> None:
    """QEMU sends no page of it. It is private, so its bytes are not in a file either.

    In newer machine types its device has a section before the pages, which vmsnap does not read.
    """
    if not qemu.knows(machine := "pc-i440fx-7.2"):
        pytest.skip(f"{qemu} does not know {machine}")
    device = ["-object", "memory-backend-ram,id=vm,size=128M", "-device", "virtio-mem-pci,memdev=vm"]
    limit = ["-m", "64M,slots=1,maxmem=1G"]
    memory = memory.replace("FOLDER", str(tmp_path))
    options = [*limit, *device, *toy.options]
    command = qemu_command(qmp, *options, machine=machine, memory=memory, size="64M", qemu=qemu)
    with running(command, qmp):
        toy.ticks(3)
        report = vmsnap.qemu.save(qmp, folder / "vm1", live=live)
        assert report.memory.logical_bytes == 192 * MIB
        assert report.memory.data_bytes <= 64 * MIB
        goes_on_and_loads(command, toy, folder / "vm1", tmp_path)


def test_a_paused_guest_is_saved_as_it_stands(folder: Path, qmp: Path, toy: Toy, qemu: Qemu) -> None:
    with running(qemu_command(qmp, *toy.options, memory="", qemu=qemu), qmp):
        toy.ticks(3)
        ask(qmp, "stop")
        report = vmsnap.qemu.save(qmp, folder / "vm1", live=True)
        assert (report.way, report.rounds) == ("stream", 1)
        assert report.machine.state == "paused"
        assert state(qmp) == "paused"
        vmsnap.qemu.save(qmp, folder / "vm2")
        assert state(qmp) == "paused"
        ask(qmp, "cont")
        toy.ticks(100)


def test_a_guest_that_was_saved_live_ends_where_it_should(folder: Path, qmp: Path, toy: Toy) -> None:
    command = qemu_command(qmp, *toy.options, memory="")
    with running(command, qmp) as process:
        toy.ticks(3)
        vmsnap.qemu.save(qmp, folder / "vm1", live=True, then="quit")
        assert process.wait(PATIENCE) == 0
    with ended(vmsnap.qemu.load(folder / "vm1", command).process):
        # Not a number is missing, and none comes twice.
        toy.ticks(100)


# Rounds ---------------------------------------------------------------------------------------------------------------


def drained(toy: Toy) -> Callable[[], None]:
    """Read the console in a thread, so that the guest does not wait for it; return a function that ends this."""
    ending = threading.Event()

    def reading() -> None:
        while not ending.is_set():
            toy.ticks(10)

    thread = threading.Thread(target=reading)
    thread.start()

    def end() -> None:
        ending.set()
        thread.join()

    return end


def test_a_guest_that_writes_faster_than_it_is_saved_is_stopped(folder: Path, qmp: Path, tmp_path: Path) -> None:
    toy = Toy(tmp_path, moving_mib=64, period_ms=0)
    command = qemu_command(qmp, *toy.options, memory="")
    with running(command, qmp):
        end = drained(toy)
        report = vmsnap.qemu.save(qmp, folder / "vm1", live=True, max_rounds=2)
        end()
        assert report.rounds >= 2
        assert report.repeated_bytes > 0
        assert is_as_before(qmp)
        toy.ticks(3)
    toy.number = None
    with ended(vmsnap.qemu.load(folder / "vm1", command).process):
        toy.ticks(3)
    toy.close()


def test_of_rounds_there_are_few() -> None:
    rounds = vmsnap.qemu.migration.Rounds(limit=4)
    left = [100, 60, 50, 40, 30]
    goes_on = [rounds.go_on({"dirty-sync-count": number, "remaining": each}) for number, each in enumerate(left, 1)]
    assert goes_on == [True, True, True, True, False]
    rounds = vmsnap.qemu.migration.Rounds(limit=100)
    left = [100, 60, 61, 62, 60]
    goes_on = [rounds.go_on({"dirty-sync-count": number, "remaining": each}) for number, each in enumerate(left, 1)]
    assert goes_on == [True, True, True, True, False]


# While it stands still ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("live", [False, True])
@pytest.mark.parametrize("memory", ["", None])
def test_a_disk_is_copied_at_the_same_instant(
    folder: Path, qmp: Path, toy: Toy, tmp_path: Path, live: bool, memory: str | None
) -> None:
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    drive = ["-drive", f"if=none,id=d,format=raw,file={disk},cache=writeback", "-device", "virtio-blk-pci,drive=d"]
    command = qemu_command(qmp, *toy.options, *drive, memory=memory)
    with running(command, qmp):
        toy.ticks(3)
        copy = f"cp {disk} {tmp_path}/copy"
        arguments = ["--live"] if live else []
        run("qemu", "save", "--qmp", qmp, folder / "vm1", *arguments, "--while-paused", copy)
        assert (tmp_path / "copy").read_bytes() == disk.read_bytes()
        states = []
        vmsnap.qemu.save(qmp, folder / "vm2", live=live, while_paused=lambda: states.append("paused"))
        assert states == ["paused"]
        assert is_as_before(qmp)
        toy.ticks(100)


@row("qemu-while-paused")
@pytest.mark.parametrize("live", [False, True])
def test_a_command_that_fails_ends_the_save(folder: Path, qmp: Path, toy: Toy, live: bool) -> None:
    async def fail() -> None:
        await vmsnap.qemu.run_command("exit 3")

    with running(qemu_command(qmp, *toy.options, memory=""), qmp):
        with refused("qemu-while-paused", "stands still failed with status 3: exit 3", folder):
            vmsnap.qemu.save(qmp, folder / "vm1", live=live, while_paused=fail)
        arguments = ["--live"] if live else []
        command = ["qemu", "save", "--qmp", qmp, folder / "vm1", *arguments, "--while-paused", "exit 7"]
        assert "failed with status 7: exit 7" in error_of(run(*command, status=1))
        with pytest.raises(ZeroDivisionError):
            vmsnap.qemu.save(qmp, folder / "vm1", live=live, while_paused=lambda: 1 / 0)
        assert list(folder.iterdir()) == []
        assert is_as_before(qmp)
        toy.ticks(100)


def test_a_signal_ends_the_command_too(folder: Path, qmp: Path, toy: Toy, tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    words = ["qemu", "save", "--qmp", qmp, folder / "vm1", "--while-paused", f"sleep 1000 & echo $! >{begun}; wait"]
    with running(qemu_command(qmp, *toy.options, memory=""), qmp):
        with subprocess.Popen([sys.executable, "-m", "vmsnap", *map(str, words)]) as process:
            eventually(lambda: begun.exists() and begun.read_text().endswith("\n"), "begun")
            process.send_signal(signal.SIGTERM)
            assert process.wait(PATIENCE) == 128 + signal.SIGTERM
        sleeping = Path("/proc", begun.read_text().strip(), "stat")
        eventually(lambda: not sleeping.exists() or b") Z " in sleeping.read_bytes(), "ended the command")
        assert list(folder.iterdir()) == []
        assert is_as_before(qmp)
        toy.ticks(100)


# Interrupted ----------------------------------------------------------------------------------------------------------


def once(call: Callable[[], object]) -> Callable[[int, int], None]:
    """Return a function for `progress=` that calls another one the first time."""
    calls = []

    def progress(_done: int, _total: int) -> None:
        if not calls:
            calls.append(call())

    return progress


@row("disk-full")
@pytest.mark.parametrize("live", [False, True])
def test_a_full_disk_leaves_the_guest_running(
    small_disk: Path, tmp_path: Path, qmp: Path, qemu: Qemu, live: bool
) -> None:
    toy = Toy(tmp_path, still_mib=96)
    with running(qemu_command(qmp, *toy.options, memory="", qemu=qemu), qmp):
        toy.ticks(3)
        before = settings(qmp)
        with refused("disk-full", "No space left", small_disk):
            vmsnap.qemu.save(qmp, small_disk / "vm1", live=live)
        assert settings(qmp) == before
        assert state(qmp) == "running"
        toy.ticks(100)
    toy.close()


@row("qemu-ends")
@pytest.mark.parametrize("live", [False, True])
def test_qemu_may_die_while_it_sends(folder: Path, qmp: Path, toy: Toy, qemu: Qemu, live: bool) -> None:
    with running(qemu_command(qmp, *toy.options, memory="", qemu=qemu), qmp) as process:
        toy.ticks(3)
        with refused("qemu-ends", "QEMU ended or closed the connection|cannot send .* to QEMU", folder):
            vmsnap.qemu.save(qmp, folder / "vm1", live=live, progress=once(process.kill))


@pytest.mark.parametrize("live", [False, True])
def test_a_save_that_is_cancelled_leaves_the_guest_running(folder: Path, qmp: Path, toy: Toy, live: bool) -> None:
    async def cancelled() -> None:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()

        def progress(_done: int, _total: int) -> None:
            loop.call_soon_threadsafe(begun.set)

        save = vmsnap.qemu.save_async(qmp, folder / "vm1", live=live, progress=progress)
        task = asyncio.create_task(save)
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with running(qemu_command(qmp, *toy.options, memory="", size="2G"), qmp):
        toy.ticks(3)
        asyncio.run(cancelled())
        assert list(folder.iterdir()) == []
        assert is_as_before(qmp)
        toy.ticks(100)


@pytest.mark.parametrize("commands", [["stop"], ["stop", "cont"], ["migrate"]])
def test_what_somebody_else_does_meanwhile_counts(
    folder: Path, qmp: Path, toy: Toy, tmp_path: Path, qemu: Qemu, commands: list[str]
) -> None:
    """A guest that somebody stops during a live save stays paused; QEMU refuses a second migration."""
    second = tmp_path / "second"

    def act() -> None:
        eventually(lambda: state(second) == "running", "resumed")
        for command in commands:
            if command == "migrate":
                with pytest.raises(Exception, match="migration"):
                    ask(second, "migrate", uri="exec:cat >/dev/null")
            else:
                ask(second, command)

    monitors = ["-qmp", f"unix:{second},server=on,wait=off"]
    command = qemu_command(qmp, *toy.options, *monitors, memory="", size="2G", qemu=qemu)
    with running(command, qmp):
        toy.ticks(3)
        before = settings(qmp)
        vmsnap.qemu.save(qmp, folder / "vm1", live=True, progress=once(act))
        assert state(qmp) == ("paused" if commands == ["stop"] else "running")
        assert settings(qmp) == before
        if state(qmp) == "paused":
            ask(qmp, "cont")
        toy.ticks(100)


@pytest.mark.parametrize("runs", [False, True])
def test_a_migration_that_somebody_cancels_is_no_snapshot(
    folder: Path, qmp: Path, toy: Toy, tmp_path: Path, qemu: Qemu, runs: bool
) -> None:
    """Nor is it repeated, also if an emulated guest had just been resumed."""
    second = tmp_path / "second"

    def cancel() -> None:
        if runs:
            eventually(lambda: state(second) == "running", "resumed")
        ask(second, "migrate_cancel")

    monitors = ["-qmp", f"unix:{second},server=on,wait=off"]
    command = qemu_command(qmp, *toy.options, *monitors, memory="", size="2G", qemu=qemu)
    with running(command, qmp):
        toy.ticks(3)
        with pytest.raises(vmsnap.QemuError, match=r"cancelled|failed to transfer"):
            vmsnap.qemu.save(qmp, folder / "vm1", live=True, progress=once(cancel))
        assert list(folder.iterdir()) == []
        assert is_as_before(qmp)
        toy.ticks(100)


def acting_before(monkeypatch: pytest.MonkeyPatch, command: str, act: Callable[[], object]) -> None:
    """Call a function just before vmsnap sends a command to QEMU for the first time."""
    send = monitor.Monitor.run
    calls = []

    async def run_late(self: monitor.Monitor, name: str, **arguments: object) -> Any:
        if name == command and not calls:
            calls.append(await asyncio.to_thread(act))
        return await send(self, name, **arguments)

    monkeypatch.setattr(monitor.Monitor, "run", run_late)


@pytest.mark.parametrize(("memory", "live"), [(None, False), ("", False), ("", True)])
@pytest.mark.parametrize(("command", "then"), [("stop", "paused"), ("cont", "running")])
def test_what_somebody_else_does_before_it_begins_counts(
    folder: Path,
    qmp: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory: str | None,
    live: bool,
    command: str,
    then: str,
) -> None:
    second = tmp_path / "second"
    with running(qemu_command(qmp, "-qmp", f"unix:{second},server=on,wait=off", memory=memory), qmp):
        if command == "cont":
            ask(second, "stop")
        # After the first look at the guest, and before the save stops it.
        acting_before(monkeypatch, "object-add", lambda: ask(second, command))
        report = vmsnap.qemu.save(qmp, folder / "vm1", live=live)
        assert state(qmp) == then
        assert report.machine.state == then
        assert vmsnap.open(folder / "vm1").read_fragment("machine")["state"] == then


def test_a_guest_that_somebody_stops_and_resumes_runs_although_qemu_stops_it(
    folder: Path, qmp: Path, toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is resumed after a look that found it paused, and the migration ends before the next look."""
    second = tmp_path / "second"
    looked, resumed = hold.Hold.notice, threading.Event()

    async def look(self: hold.Hold) -> None:
        migrates = (await self._monitor.run("query-migrate")).get("status") == "active"
        if migrates and not resumed.is_set():
            await asyncio.to_thread(ask, second, "stop")
            await looked(self)
            assert not self.runs
            await asyncio.to_thread(ask, second, "cont")
            resumed.set()
            await self._monitor.migrated()
        else:
            await looked(self)

    async def is_not_emulated(_monitor: monitor.Monitor) -> bool:
        return False

    monkeypatch.setattr(hold.Hold, "notice", look)
    # The way of a guest with KVM. Nothing loads this snapshot.
    monkeypatch.setattr(plan, "is_emulated", is_not_emulated)
    monitors = ["-qmp", f"unix:{second},server=on,wait=off"]
    with running(qemu_command(qmp, *toy.options, *monitors, memory="", size="2G"), qmp):
        toy.ticks(3)
        vmsnap.qemu.save(qmp, folder / "vm1", live=True, progress=once(lambda: resumed.wait(PATIENCE)))
        assert resumed.is_set()
        assert is_as_before(qmp)


@row("qemu-torn")
@pytest.mark.parametrize(("memory", "live"), [(shared_memory(), False), ("", False), ("", True)])
def test_memory_that_somebody_plugs_in_meanwhile_is_saved_or_refused(
    folder: Path, qmp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, memory: str, live: bool
) -> None:
    second = tmp_path / "second"
    plugged: list[int] = []
    create = saving.create

    def plug() -> None:
        number = len(plugged)
        ask(second, "object-add", qom_type="memory-backend-ram", id=f"m{number}", size=64 * MIB)
        ask(second, "device_add", driver="pc-dimm", id=f"dimm{number}", memdev=f"m{number}")
        plugged.append(number)

    def create_late(*places: Any, **options: Any) -> vmsnap.StagedSnapshot:
        """Create a snapshot, for which a key may have to be derived. A live save may create it several times."""
        if not plugged:
            plug()
        return create(*places, **options)

    options = ["-qmp", f"unix:{second},server=on,wait=off"]
    with running(qemu_command(qmp, *options, memory=memory, size="256M,slots=2,maxmem=1G"), qmp):
        with monkeypatch.context() as patched:
            patched.setattr(saving, "create", create_late)
            report = vmsnap.qemu.save(qmp, folder / "vm1", live=live)
        assert "m0" in [each.backend for each in report.machine.ram]
        acting_before(monkeypatch, "getfd", plug)
        with refused("qemu-torn", "the machine was changed while it was saved: .*save it again", folder):
            vmsnap.qemu.save(qmp, folder / "vm2", live=live)
        assert state(qmp) == "running"


def test_the_command_line_tells_of_rounds(folder: Path, qmp: Path, toy: Toy) -> None:
    with running(qemu_command(qmp, *toy.options, memory=""), qmp):
        toy.ticks(3)
        told = run("qemu", "save", "--qmp", qmp, folder / "vm1", "--live").stderr.decode()
        assert re.search(r" s in \d+ rounds while it ran; the guest was paused for \d+\.\d{3} s: ", told)
        told = run("qemu", "save", "--qmp", qmp, folder / "vm2", "--live", "--json").stdout.decode()
        found = json.loads(told)
        assert (found["way"], found["interrupted"]) == ("live", None)
        assert found["rounds"] > 1
