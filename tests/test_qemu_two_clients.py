"""Two clients of one QEMU: saves at once, and what the other client does to the guest before and during a save."""

import asyncio
import json
import os
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import vmsnap
import vmsnap.qemu
from guest import PATIENCE, ask, file_memory, qemu_command, running, shared_memory
from qemu_states import eventually, is_as_before, once, settings, state
from qemus import Qemu
from refusals import refused, row
from support import MIB
from toy_guest import Toy
from vmsnap.errors import QemuError
from vmsnap.qemu import hold, mark, monitor, plan, saving
from vmsnap.qemu.settings import Settings


@pytest.fixture
def second(tmp_path: Path) -> Path:
    """The socket of a second monitor."""
    return tmp_path / "second"


def two_monitors(second: Path) -> list[str]:
    return ["-qmp", f"unix:{second},server=on,wait=off"]


@row("qemu-torn")
@pytest.mark.parametrize("commands", [["cont"], ["cont", "stop"], ["system_reset"]])
def test_a_guest_that_somebody_resumes_is_not_sealed(
    folder: Path, qmp: Path, second: Path, toy: Toy, commands: list[str], qemu: Qemu
) -> None:
    def resume() -> None:
        for command in commands:
            ask(second, command)

    with running(
        qemu_command(qmp, *toy.options, *two_monitors(second), memory=file_memory(f"{qmp}.ram"), qemu=qemu), qmp
    ):
        toy.ticks(3)
        with refused("qemu-torn", "did not stand still .*save it again", folder):
            vmsnap.qemu.save(qmp, folder / "vm1", progress=once(resume))
        # Who stopped it after the save did wants it to be stopped.
        assert state(qmp) == ("paused" if "stop" in commands else "running")
        assert settings(qmp)["on"] == []


@row("qemu-in-use")
def test_a_second_save_at_once_is_refused_and_disturbs_nothing(
    folder: Path, qmp: Path, second: Path, toy: Toy, qemu: Qemu
) -> None:
    def save_too() -> None:
        with refused("qemu-in-use", f"another vmsnap, process {os.getpid()}, saves this guest", folder):
            vmsnap.qemu.save(second, folder.parent / "other")

    with running(
        qemu_command(qmp, *toy.options, *two_monitors(second), memory=file_memory(f"{qmp}.ram"), qemu=qemu), qmp
    ):
        toy.ticks(3)
        vmsnap.qemu.save(qmp, folder / "vm1", progress=once(save_too))
        assert is_as_before(qmp)
        toy.goes_on()
    assert not (folder.parent / "other").exists()
    # In another file, because this one holds the guest that went on.
    command = qemu_command(qmp, *toy.options, memory=file_memory(f"{second}.ram"), qemu=qemu)
    toy.number = None
    process = vmsnap.qemu.load(folder / "vm1", command).process
    try:
        toy.goes_on()
    finally:
        process.kill()
        process.wait()


def race(folder: Path, qmp: Path, second: Path, rounds: int, **options: Any) -> None:
    """Save over both monitors at once: one of the saves, or both after each other, give a snapshot."""
    folder.mkdir(exist_ok=True)
    for number in range(rounds):
        together = threading.Barrier(2)
        done: list[Path] = []

        def one(monitor: Path, target: Path, together: threading.Barrier, done: list[Path]) -> None:
            together.wait()
            with suppress(QemuError):
                vmsnap.qemu.save(monitor, target, **options)
                done.append(target)

        targets = [(qmp, folder / f"a{number}"), (second, folder / f"b{number}")]
        threads = [threading.Thread(target=one, args=(*each, together, done)) for each in targets]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert done
        assert is_as_before(qmp)
        assert [each for _, each in targets if each.exists()] == sorted(done)
        assert all(vmsnap.verify(each).ok for each in done)


def test_of_two_saves_at_once_none_is_torn(folder: Path, qmp: Path, second: Path, toy: Toy) -> None:
    with running(qemu_command(qmp, *toy.options, *two_monitors(second)), qmp):
        race(folder, qmp, second, 3)
        race(folder / "live", qmp, second, 3, live=True)
        toy.goes_on()


@pytest.mark.torture
def test_of_two_saves_at_once_none_is_torn_often(folder: Path, qmp: Path, second: Path, toy: Toy) -> None:
    with running(qemu_command(qmp, *toy.options, *two_monitors(second)), qmp):
        race(folder, qmp, second, 25)
        race(folder / "live", qmp, second, 25, live=True)
        toy.goes_on()


def test_a_guest_that_somebody_migrates_elsewhere_goes_on(
    folder: Path, qmp: Path, second: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other migration comes first, and is not cancelled."""
    run = monitor.Monitor.run
    elsewhere = f"{second}.elsewhere"

    async def late(self: monitor.Monitor, command: str, **arguments: object) -> Any:
        if command == "migrate":
            await asyncio.to_thread(ask, second, "migrate", uri=f"unix:{elsewhere}")
        return await run(self, command, **arguments)

    with (
        socket.socket(socket.AF_UNIX) as server,
        running(qemu_command(qmp, *toy.options, *two_monitors(second), memory=""), qmp),
        monkeypatch.context() as patched,
    ):
        server.bind(elsewhere)
        server.listen()
        patched.setattr(monitor.Monitor, "run", late)
        with pytest.raises(QemuError, match="migrat"):
            vmsnap.qemu.save(qmp, folder / "vm1")
        patched.undo()
        assert list(folder.iterdir()) == []
        assert state(qmp) == "running"
        assert ask(second, "query-migrate")["status"] in ("setup", "active")
        ask(second, "migrate_cancel")
        eventually(lambda: ask(second, "query-migrate")["status"] == "cancelled", "cancelled")
        # QEMU did not let its settings be restored meanwhile.
        vmsnap.qemu.save(qmp, folder / "vm1")
        assert is_as_before(qmp)


def test_a_save_without_its_mark_undoes_its_changes(folder: Path, qmp: Path, second: Path, toy: Toy) -> None:
    """Another client has removed the mark, for example a recovery that found an older one."""

    def broken() -> None:
        ask(second, "object-del", id="vmsnap-save")
        raise ZeroDivisionError

    with running(qemu_command(qmp, *toy.options, *two_monitors(second)), qmp):
        before = settings(qmp)
        with pytest.raises(ZeroDivisionError):
            vmsnap.qemu.save(qmp, folder / "vm1", while_paused=broken)
        assert settings(qmp) == before
        assert is_as_before(qmp)
        toy.ticks(3)


@pytest.mark.parametrize("at", ["migrate-set-capabilities", "object-del"])
def test_of_two_recoveries_none_removes_the_mark_of_a_new_save(
    qmp: Path, second: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """The other recovery ends first, before the last look at the mark or after it; then a save begins."""
    run = monitor.Monitor.run
    found, here = Settings({"events": False}), mark.Holder.here()
    left = mark.Mark(replace(here, start=1), True, found)
    new = json.dumps(asdict(mark.Mark(here, True, found)))

    async def late(self: monitor.Monitor, command: str, **arguments: object) -> Any:
        if command == at:
            await asyncio.to_thread(ask, second, "object-del", id="vmsnap-save")
            if at != "object-del":
                added = {"qom_type": "authz-simple", "id": "vmsnap-save", "identity": new}
                await asyncio.to_thread(ask, second, "object-add", **added)
        return await run(self, command, **arguments)

    async def recovered() -> str | None:
        async with monitor.connected(monitor.connection_to(qmp), "QEMU") as connection:
            await left.place(connection)
            left.over()
            monkeypatch.setattr(monitor.Monitor, "run", late)
            return await mark.recover(connection)

    with running(qemu_command(qmp, *two_monitors(second)), qmp):
        assert "was interrupted" in (asyncio.run(recovered()) or "")
        if at == "object-del":
            assert is_as_before(qmp)
        else:
            assert ask(qmp, "qom-get", path="/objects/vmsnap-save", property="identity") == new


@pytest.mark.parametrize("commands", [["stop"], ["stop", "cont"], ["migrate"]])
def test_what_somebody_else_does_meanwhile_counts(
    folder: Path, qmp: Path, toy: Toy, second: Path, qemu: Qemu, commands: list[str]
) -> None:
    """A guest that somebody stops during a live save stays paused; QEMU refuses a second migration."""

    def act() -> None:
        eventually(lambda: state(second) == "running", "resumed")
        for command in commands:
            if command == "migrate":
                with pytest.raises(Exception, match="migration"):
                    ask(second, "migrate", uri="exec:cat >/dev/null")
            else:
                ask(second, command)

    command = qemu_command(qmp, *toy.options, *two_monitors(second), memory="", size="2G", qemu=qemu)
    with running(command, qmp):
        toy.ticks(3)
        before = settings(qmp)
        vmsnap.qemu.save(qmp, folder / "vm1", live=True, progress=once(act))
        assert state(qmp) == ("paused" if commands == ["stop"] else "running")
        assert settings(qmp) == before
        if state(qmp) == "paused":
            ask(qmp, "cont")
        toy.goes_on()


@pytest.mark.parametrize("runs", [False, True])
def test_a_migration_that_somebody_cancels_is_no_snapshot(
    folder: Path, qmp: Path, toy: Toy, second: Path, qemu: Qemu, runs: bool
) -> None:
    """Nor is it repeated, also if an emulated guest had just been resumed."""

    def cancel() -> None:
        if runs:
            eventually(lambda: state(second) == "running", "resumed")
        ask(second, "migrate_cancel")

    command = qemu_command(qmp, *toy.options, *two_monitors(second), memory="", size="2G", qemu=qemu)
    with running(command, qmp):
        toy.ticks(3)
        with pytest.raises(vmsnap.QemuError, match=r"cancelled|failed to transfer"):
            vmsnap.qemu.save(qmp, folder / "vm1", live=True, progress=once(cancel))
        assert list(folder.iterdir()) == []
        assert is_as_before(qmp)
        toy.goes_on()


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
    second: Path,
    monkeypatch: pytest.MonkeyPatch,
    memory: str | None,
    live: bool,
    command: str,
    then: str,
) -> None:
    with running(qemu_command(qmp, *two_monitors(second), memory=memory), qmp):
        if command == "cont":
            ask(second, "stop")
        # After the first look at the guest, and before the save stops it.
        acting_before(monkeypatch, "object-add", lambda: ask(second, command))
        report = vmsnap.qemu.save(qmp, folder / "vm1", live=live)
        assert state(qmp) == then
        assert report.machine.state == then
        assert vmsnap.open(folder / "vm1").read_fragment("machine")["state"] == then


def test_a_guest_that_somebody_stops_and_resumes_runs_although_qemu_stops_it(
    folder: Path, qmp: Path, toy: Toy, second: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is resumed after a look that found it paused, and the migration ends before the next look."""
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
    with running(qemu_command(qmp, *toy.options, *two_monitors(second), memory="", size="2G"), qmp):
        toy.ticks(3)
        vmsnap.qemu.save(qmp, folder / "vm1", live=True, progress=once(lambda: resumed.wait(PATIENCE)))
        assert resumed.is_set()
        assert is_as_before(qmp)


@row("qemu-torn")
@pytest.mark.parametrize(("memory", "live"), [(shared_memory(), False), ("", False), ("", True)])
def test_memory_that_somebody_plugs_in_meanwhile_is_saved_or_refused(
    folder: Path, qmp: Path, second: Path, monkeypatch: pytest.MonkeyPatch, memory: str, live: bool
) -> None:
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

    with running(qemu_command(qmp, *two_monitors(second), memory=memory, size="256M,slots=2,maxmem=1G"), qmp):
        with monkeypatch.context() as patched:
            patched.setattr(saving, "create", create_late)
            report = vmsnap.qemu.save(qmp, folder / "vm1", live=live)
        assert "m0" in [each.backend for each in report.machine.ram]
        acting_before(monkeypatch, "getfd", plug)
        with refused("qemu-torn", "the machine was changed while it was saved: .*save it again", folder):
            vmsnap.qemu.save(qmp, folder / "vm2", live=live)
        assert state(qmp) == "running"
