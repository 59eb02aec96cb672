"""Saves through QEMU's migration stream: of a guest that stands still, and of one that runs meanwhile."""

import asyncio
import json
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import vmsnap
import vmsnap.qemu
from commands import error_of, run
from guest import PATIENCE, ask, ended, qemu_command, running
from qemu_states import eventually, is_as_before, once, settings, state
from qemus import Qemu
from refusals import refused, row
from support import MIB
from toy_guest import Toy
from vmsnap.qemu import monitor, plan

_HUGE = "memory-backend-memfd,id=mem,size=64M,share=on,hugetlb=on,hugetlbsize=2M"


def copied(command: list[str], toy: Toy, other: Toy) -> list[str]:
    """Return the command for a second guest beside the first one: with another console, monitor and memory file."""
    words = [each.replace(str(toy.path), str(other.path)) for each in command]
    return [each.replace("/qmp,", "/qmp2,").replace("/ram", "/ram2") for each in words]


def goes_on_and_loads(command: list[str], toy: Toy, snapshot: Path, tmp_path: Path, key: bytes | None = None) -> None:
    """Check the guest that was saved, and a copy of it beside it: each checks its own memory."""
    toy.goes_on()
    other = Toy(tmp_path, "copy")
    with ended(vmsnap.qemu.load(snapshot, copied(command, toy, other), key=key).process):
        other.goes_on()
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

    Machine types from 8.0 on send the state of its device before the pages, older ones after them.
    """
    device = ["-object", "memory-backend-ram,id=vm,size=128M", "-device", "virtio-mem-pci,memdev=vm"]
    limit = ["-m", "64M,slots=1,maxmem=1G"]
    memory = memory.replace("FOLDER", str(tmp_path))
    options = [*limit, *device, *toy.options]
    command = qemu_command(qmp, *options, memory=memory, size="64M", qemu=qemu)
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
        toy.goes_on()


def test_a_guest_that_was_saved_live_ends_where_it_should(folder: Path, qmp: Path, toy: Toy) -> None:
    command = qemu_command(qmp, *toy.options, memory="")
    with running(command, qmp) as process:
        toy.ticks(3)
        vmsnap.qemu.save(qmp, folder / "vm1", live=True, then="quit")
        assert process.wait(PATIENCE) == 0
    with ended(vmsnap.qemu.load(folder / "vm1", command).process):
        # Not a number is missing, and none comes twice.
        toy.goes_on()


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
        assert is_as_before(qmp)
        toy.ticks(3)
    toy.number = None
    with ended(vmsnap.qemu.load(folder / "vm1", command).process):
        toy.ticks(3)
    toy.close()


def test_pages_that_the_guest_changes_meanwhile_are_sent_again(
    folder: Path, qmp: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the way of a guest with KVM: an emulated one may have to stand still. Nothing loads this snapshot."""

    async def is_not_emulated(_monitor: monitor.Monitor) -> bool:
        return False

    def changes_everything() -> None:
        toy.catch_up()
        toy.ticks(3)

    monkeypatch.setattr(plan, "is_emulated", is_not_emulated)
    # The progress is first shown after 50 ms. By then QEMU must not have come to the end, where the guest is stopped.
    toy = Toy(tmp_path, still_mib=192, moving_mib=16, period_ms=0)
    with running(qemu_command(qmp, *toy.options, memory="", size="320M"), qmp):
        toy.ticks(3)
        report = vmsnap.qemu.save(qmp, folder / "vm1", live=True, progress=once(changes_everything))
        assert report.rounds >= 2
        assert report.repeated_bytes >= MIB
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
        toy.goes_on()


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
        toy.goes_on()


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
        toy.goes_on()


# Interrupted ----------------------------------------------------------------------------------------------------------


@row("disk-full")
@pytest.mark.parametrize("live", [False, True])
def test_a_full_disk_leaves_the_guest_running(
    small_disk: Path, tmp_path: Path, qmp: Path, qemu: Qemu, live: bool
) -> None:
    toy = Toy(tmp_path, still_mib=96, still_parts=24)
    with running(qemu_command(qmp, *toy.options, memory="", qemu=qemu), qmp):
        toy.ticks(3)
        before = settings(qmp)
        with refused("disk-full", "No space left", small_disk):
            vmsnap.qemu.save(qmp, small_disk / "vm1", live=live)
        assert settings(qmp) == before
        assert state(qmp) == "running"
        toy.goes_on()
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
        toy.goes_on()


def test_the_command_line_tells_of_rounds(folder: Path, qmp: Path, toy: Toy) -> None:
    with running(qemu_command(qmp, *toy.options, memory=""), qmp):
        toy.ticks(3)
        told = run("qemu", "save", "--qmp", qmp, folder / "vm1", "--live").stderr.decode()
        assert re.search(r" s in \d+ rounds while it ran; the guest was paused for \d+\.\d{3} s: ", told)
        told = run("qemu", "save", "--qmp", qmp, folder / "vm2", "--live", "--json").stdout.decode()
        found = json.loads(told)
        assert (found["way"], found["interrupted"]) == ("live", None)
        assert found["rounds"] > 1
