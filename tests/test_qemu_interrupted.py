"""A save that is interrupted at any moment: the guest is never worse off, and there is no snapshot."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
import vmsnap
import vmsnap.qemu
from guest import PATIENCE, ask, file_memory, qemu_command, running
from qemu_states import eventually, guards, is_as_before, once, settings, state
from qemus import Qemu
from refusals import refused, row
from support import MIB
from toy_guest import Toy
from vmsnap.qemu import mark, monitor

# Saves in a process of its own, and says on standard output when the guest memory is being read; then it waits.
_SAVING = """
import sys, threading
import vmsnap.qemu

def begun(done, total):
    print("reading", flush=True)
    threading.Event().wait()

vmsnap.qemu.save(sys.argv[1], sys.argv[2], progress=begun)
"""


def saving(qmp: Path, target: Path) -> "subprocess.Popen[bytes]":
    """Begin a save that does not end, and return its process when it reads the memory."""
    process = subprocess.Popen([sys.executable, "-c", _SAVING, str(qmp), str(target)], stdout=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"reading\n"
    return process


def killed(process: "subprocess.Popen[bytes]") -> None:
    process.kill()
    process.communicate()


# The mark and the guard -----------------------------------------------------------------------------------------------


def test_a_killed_save_leaves_the_guest_running_without_another_save(
    folder: Path, qmp: Path, toy: Toy, qemu: Qemu
) -> None:
    with running(qemu_command(qmp, *toy.options, memory=file_memory(f"{qmp}.ram"), qemu=qemu), qmp):
        toy.ticks(3)
        before = settings(qmp)
        process = saving(qmp, folder / "vm1")
        [guard] = guards(qmp)
        assert os.getsid(guard) == guard
        killed(process)
        eventually(lambda: not guards(qmp), "ended its guard")
        assert state(qmp) == "running"
        assert settings(qmp) == before
        toy.goes_on()
        assert not (folder / "vm1").exists()
        vmsnap.qemu.save(qmp, folder / "vm1")
        eventually(lambda: not guards(qmp), "ended its guard")


def test_the_next_save_puts_right_what_a_save_without_a_guard_left(
    folder: Path, qmp: Path, toy: Toy, qemu: Qemu
) -> None:
    with running(qemu_command(qmp, *toy.options, memory=file_memory(f"{qmp}.ram"), qemu=qemu), qmp):
        toy.ticks(3)
        before = settings(qmp)
        process = saving(qmp, folder / "vm1")
        for each in guards(qmp):
            os.kill(each, signal.SIGKILL)
        killed(process)
        assert state(qmp) != "running"
        report = vmsnap.qemu.save(qmp, folder / "vm2")
        assert report.interrupted is not None
        assert f"by process {process.pid}, was interrupted" in report.interrupted
        assert "resumed" in report.interrupted
        assert settings(qmp) == before
        assert state(qmp) == "running"
        toy.goes_on()
        assert vmsnap.qemu.save(qmp, folder / "vm3").interrupted is None


def test_a_frozen_program_saves_without_a_guard(folder: Path, qmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "frozen", True, raising=False)
    seen = []
    with running(qemu_command(qmp), qmp):
        vmsnap.qemu.save(qmp, folder / "vm1", progress=lambda *_: seen.extend(guards(qmp)))
        assert is_as_before(qmp)
    assert seen == []


def test_settings_of_the_user_are_put_back(folder: Path, qmp: Path, qemu: Qemu) -> None:
    with running(qemu_command(qmp, qemu=qemu), qmp):
        on = ["auto-converge", "events", "multifd", "return-path"]
        ask(qmp, "migrate-set-capabilities", capabilities=[{"capability": each, "state": True} for each in on])
        ask(qmp, "migrate-set-parameters", max_bandwidth=5 * MIB, downtime_limit=123, tls_creds="none-such")
        before = settings(qmp)
        assert before["on"] == sorted(on)
        vmsnap.qemu.save(qmp, folder / "vm1")
        assert settings(qmp) == before

        def broken(_done: int, _total: int) -> None:
            raise ZeroDivisionError

        with pytest.raises(ZeroDivisionError):
            vmsnap.qemu.save(qmp, folder / "vm2", progress=broken)
        assert settings(qmp) == before
        assert state(qmp) == "running"


def test_what_version_0_1_left_is_put_right(folder: Path, qmp: Path, toy: Toy) -> None:
    """It changed two settings and left no mark."""
    with running(qemu_command(qmp, *toy.options), qmp):
        ask(qmp, "migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
        ask(qmp, "migrate-set-parameters", max_bandwidth=1 << 40)
        report = vmsnap.qemu.save(qmp, folder / "vm1")
        assert report.interrupted == (
            "an earlier save, by vmsnap 0.1, was interrupted: the defaults of QEMU were restored"
        )
        assert is_as_before(qmp)


@row("qemu-refuses")
@pytest.mark.parametrize("text", ["", "[]", '{"version": 2}', "x" * 100_000, '{"holder": ' + "[" * 30_000])
def test_an_object_of_somebody_else_is_not_touched(folder: Path, qmp: Path, text: str) -> None:
    with running(qemu_command(qmp), qmp):
        ask(qmp, "object-add", qom_type="authz-simple", id="vmsnap-save", identity=text)
        with refused("qemu-refuses", "does not understand: .*'object-del'", folder):
            vmsnap.qemu.save(qmp, folder / "vm1")
        assert ask(qmp, "qom-get", path="/objects/vmsnap-save", property="identity") == text


def holder(**changed: Any) -> mark.Holder:
    here = mark.Holder.here()
    return mark.Holder(**{**here.__dict__, **changed})


def test_a_process_is_known_from_another_with_its_number() -> None:
    assert holder().is_alive() is True
    assert holder(start=1).is_alive() is False
    with subprocess.Popen(["true"]) as process:
        process.wait()
        assert holder(pid=process.pid).is_alive() is False
    assert holder(boot="another").is_alive() is None
    inside = holder(namespace=1).is_alive()
    assert inside is (False if os.stat("/proc/self/ns/pid").st_ino == 0xEFFFFFFC and os.geteuid() == 0 else None)


def test_a_guest_goes_on_although_qemu_is_about_to_finish(
    folder: Path, qmp: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A migration has ended a moment before QEMU says so of the guest."""
    run = monitor.Monitor.run
    late = []

    async def finishing(self: monitor.Monitor, command: str, **arguments: object) -> Any:
        if command == "query-status" and late:
            return {"status": late.pop()}
        return await run(self, command, **arguments)

    def broken() -> None:
        late.extend(["finish-migrate"] * 2)
        raise ZeroDivisionError

    monkeypatch.setattr(monitor.Monitor, "run", finishing)
    with running(qemu_command(qmp, *toy.options, memory=""), qmp):
        with pytest.raises(ZeroDivisionError):
            vmsnap.qemu.save(qmp, folder / "vm1", while_paused=broken)
        assert late == []
        assert is_as_before(qmp)
        toy.ticks(3)


# A QEMU that does not answer ------------------------------------------------------------------------------------------


@row("qemu-stopped")
def test_a_qemu_that_does_not_answer_is_given_up_and_the_guard_waits_for_it(
    folder: Path, qmp: Path, toy: Toy, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "_ANSWER_SECONDS", 0.5)
    monkeypatch.setattr(vmsnap.qemu.hold, "_UNDO_SECONDS", 0.5)
    with running(qemu_command(qmp, *toy.options), qmp) as process:
        toy.ticks(3)
        with refused("qemu-stopped", "QEMU does not answer 'query-status' within 0.5 s", folder):
            vmsnap.qemu.save(qmp, folder / "vm1", progress=once(lambda: process.send_signal(signal.SIGSTOP)))
        assert guards(qmp)
        process.send_signal(signal.SIGCONT)
        eventually(lambda: not guards(qmp), "ended its guard")
        assert is_as_before(qmp)
        toy.goes_on()


def test_a_command_that_is_cancelled_with_its_answer_is_cancelled(qmp: Path) -> None:
    """At every step of the event loop around its answer: a cancellation that is lost would keep a save waiting."""

    async def cancelled_at(steps: int) -> bool:
        command = asyncio.ensure_future(connection.run("query-status"))
        for _ in range(steps):
            await asyncio.sleep(0)
        if not command.cancel():
            return False
        with pytest.raises(asyncio.CancelledError):
            await command
        return True

    async def repeated() -> list[bool]:
        nonlocal connection
        async with monitor.connected(monitor.connection_to(qmp), "QEMU") as connection:
            return [await cancelled_at(steps) for steps in range(400) for _ in range(3)]

    connection: monitor.Monitor
    with running(qemu_command(qmp, "-S", size="16M"), qmp):
        found = asyncio.run(repeated())
    # The first ones are cancelled before the answer, the last ones have it.
    assert set(found) == {True, False}


def test_a_signal_is_obeyed_while_qemu_does_not_answer(folder: Path, qmp: Path, toy: Toy) -> None:
    script = """
import os, signal, sys, threading
import vmsnap.qemu
from vmsnap.qemu import hold

hold._UNDO_SECONDS = 0.5

def stopped(_done, _total):
    global stopped
    os.kill(int(sys.argv[3]), signal.SIGSTOP)
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGINT)).start()
    stopped = lambda *_: None

vmsnap.qemu.save(sys.argv[1], sys.argv[2], progress=lambda *told: stopped(*told))
"""
    with running(qemu_command(qmp, *toy.options), qmp) as process:
        toy.ticks(3)
        command = [sys.executable, "-c", script, str(qmp), str(folder / "vm1"), str(process.pid)]
        # Well before the thirty seconds in which QEMU has to answer.
        assert subprocess.run(command, capture_output=True, timeout=25).returncode == -signal.SIGINT
        assert list(folder.iterdir()) == []
        process.send_signal(signal.SIGCONT)
        eventually(lambda: not guards(qmp), "ended its guard")
        assert is_as_before(qmp)


# At any moment --------------------------------------------------------------------------------------------------------


def kill_at_random(folder: Path, qmp: Path, toy: Toy, rounds: int, **options: Any) -> None:
    """Kill a process that saves again and again, after times that no one chose; the guest runs on each time."""
    script = """
import itertools, sys
import vmsnap.qemu
print("begun", flush=True)
for number in itertools.count():
    vmsnap.qemu.save(sys.argv[1], f"{sys.argv[2]}-{number}", durable=False, **eval(sys.argv[3]))
"""
    before = settings(qmp)
    for number in range(rounds):
        command = [sys.executable, "-c", script, str(qmp), str(folder / f"vm{number}"), repr(options)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            threading.Event().wait(int.from_bytes(os.urandom(2)) / 65536 * 0.6)
            killed(process)
        eventually(lambda: not guards(qmp), "ended its guard")
        assert state(qmp) == "running"
        assert settings(qmp) == before
        toy.ticks(5)
        for each in folder.glob(f"vm{number}-*"):
            assert vmsnap.verify(each).ok


_WAYS = [("files", None, {}), ("stream", "", {}), ("live", "", {"live": True})]


@pytest.mark.parametrize(("way", "memory", "options"), _WAYS)
def test_a_save_may_be_killed_at_any_moment(
    folder: Path, qmp: Path, toy: Toy, way: str, memory: str | None, options: dict[str, Any]
) -> None:
    with running(qemu_command(qmp, *toy.options, memory=memory), qmp):
        assert vmsnap.qemu.save(qmp, folder / "vm", **options).way == way
        kill_at_random(folder, qmp, toy, 4, **options)


@pytest.mark.torture
@pytest.mark.parametrize(("way", "memory", "options"), _WAYS)
def test_a_save_may_be_killed_at_any_moment_often(
    folder: Path, qmp: Path, toy: Toy, way: str, memory: str | None, options: dict[str, Any], qemu: Qemu
) -> None:
    del way
    with running(qemu_command(qmp, *toy.options, memory=memory, qemu=qemu), qmp):
        kill_at_random(folder, qmp, toy, 20, **options)


# After the commit -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("then", ["as-before", "quit"])
def test_a_signal_right_after_the_commit_leaves_nothing_or_a_report(folder: Path, qmp: Path, then: str) -> None:
    """A snapshot without a word about it would be taken for a save that failed."""
    script = """
import os, signal, sys
import vmsnap
import vmsnap.qemu

commit = vmsnap.StagedSnapshot.commit

def late(staged):
    commit(staged)
    os.kill(os.getpid(), signal.SIGINT)

vmsnap.StagedSnapshot.commit = late
report = vmsnap.qemu.save(sys.argv[1], sys.argv[2], then=sys.argv[3])
print(report.seal_digest.hex())
"""
    with running(qemu_command(qmp), qmp):
        command = [sys.executable, "-c", script, str(qmp), str(folder / "vm1"), then]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
        assert (folder / "vm1").exists() == (done.returncode == 0)
        if done.returncode == 0:
            assert vmsnap.verify(folder / "vm1", expect_seal_digest=done.stdout.strip()).ok
        else:
            assert done.returncode == -signal.SIGINT
            assert is_as_before(qmp)


def test_the_command_line_tells_of_an_interrupted_save(folder: Path, qmp: Path) -> None:
    with running(qemu_command(qmp), qmp):
        ask(qmp, "migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
        ask(qmp, "migrate-set-parameters", max_bandwidth=1 << 40)
        command = [sys.executable, "-m", "vmsnap", "qemu", "save", "--qmp", str(qmp), str(folder / "vm1"), "--json"]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        assert done.stderr.startswith("vmsnap: warning: an earlier save, by vmsnap 0.1, was interrupted")
        assert "by vmsnap 0.1" in json.loads(done.stdout)["interrupted"]
