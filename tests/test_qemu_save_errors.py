"""A save of a QEMU guest that is refused, fails or is cancelled: the guest goes on, and there is no snapshot."""

import asyncio
import os
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import vmsnap
import vmsnap.qemu
from commands import error_of, run
from guest import PATIENCE, ask, file_memory, qemu_command, running
from qemu_states import is_as_before, state
from refusals import refused, refused_elsewhere, row
from support import MIB, let_others_in, run_python
from vmsnap.qemu import monitor

SIZE = 256 * MIB


@row("qemu-no-socket", "qemu-other-file", "qemu-ended-before", "qemu-silent")
def test_a_socket_that_is_none_is_refused(folder: Path, qmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with refused("qemu-no-socket", "there is no QMP socket: .*-qmp unix:", folder):
        vmsnap.qemu.save(qmp, folder / "vm1")
    assert "there is no QMP socket" in error_of(run("qemu", "save", "--qmp", qmp, folder / "vm1", status=1))
    qmp.touch()
    with refused("qemu-other-file", "is not a socket", folder):
        vmsnap.qemu.save(qmp, folder / "vm1")
    qmp.unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(qmp))
        with refused("qemu-ended-before", "no process listens", folder):
            vmsnap.qemu.save(qmp, folder / "vm1")
        server.listen()
        # Connected, and never greeted: so is a second client of a QEMU.
        monkeypatch.setattr(monitor, "_GREETING_SECONDS", 0.1)
        with refused("qemu-silent", "disconnect any other one", folder):
            vmsnap.qemu.save(qmp, folder / "vm1")
        monkeypatch.setattr(monitor, "_GREETING_SECONDS", PATIENCE)

        def answer() -> None:
            # The one from before is first in the queue.
            server.accept()[0].close()
            with server.accept()[0] as other:
                other.sendall(b"220 mail.example.org ESMTP\r\n")

        thread = threading.Thread(target=answer)
        thread.start()
        with refused("qemu-silent", "is not a QMP monitor of QEMU", folder):
            vmsnap.qemu.save(qmp, folder / "vm1")
        thread.join()


@row("qemu-silent")
def test_a_second_client_is_told_of_the_first(folder: Path, qmp: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(monitor, "_GREETING_SECONDS", 0.5)
    with running(qemu_command(qmp), qmp), socket.socket(socket.AF_UNIX) as first:
        first.connect(str(qmp))
        assert b"QMP" in first.recv(4096)
        with refused("qemu-silent", "one client at a time", folder):
            vmsnap.qemu.save(qmp, folder / "vm1")


@row("qemu-not-permitted")
def test_who_may_not_look_into_qemu_is_told(folder: Path, qmp: Path) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can be another user as well")
    as_other = "import vmsnap.qemu\nos.setgid(65534)\nos.setuid(65534)\nvmsnap.qemu.save(sys.argv[1], sys.argv[2])"
    with running(qemu_command(qmp), qmp) as process:
        let_others_in(qmp)
        qmp.chmod(0o700)
        message = "no permission to connect: run as root"
        refused_elsewhere("qemu-not-permitted", message, folder, as_other, qmp, folder / "vm1")
        qmp.chmod(0o777)
        message = "no permission to access QEMU: run as root, or as the user"
        with_pid = as_other.replace("sys.argv[2])", "sys.argv[2], pid=int(sys.argv[3]))")
        refused_elsewhere("qemu-not-permitted", message, folder, with_pid, qmp, folder / "vm1", process.pid)
        # The memory is shared, but this user cannot open it, so QEMU has to send it.
        folder.chmod(0o777)
        as_other += "\nassert vmsnap.open(sys.argv[2]).read_fragment('machine')['command_line'] == []"
        done = run_python(f"import os, sys, vmsnap\n{as_other}", qmp, folder / "vm1")
        assert done.returncode == 0, done.stderr
        assert is_as_before(qmp)


@row("qemu-not-now")
def test_a_guest_that_is_being_migrated_is_refused(folder: Path, qmp: Path) -> None:
    with running(qemu_command(qmp), qmp):
        # Into a pipe that nobody reads, so that it does not end.
        ask(qmp, "migrate", uri="exec:sleep 1000")
        with refused("qemu-not-now", "is already being migrated or saved", folder):
            vmsnap.qemu.save(qmp, folder / "vm1")
        assert state(qmp) == "running"
        ask(qmp, "migrate_cancel")


@row("qemu-not-now")
def test_a_guest_that_waits_for_another_is_refused(folder: Path, qmp: Path) -> None:
    with running(qemu_command(qmp, "-incoming", "defer"), qmp), refused("qemu-not-now", "waits for", folder):
        vmsnap.qemu.save(qmp, folder / "vm1")


@row("qemu-refuses")
def test_a_device_that_cannot_be_saved_is_named(folder: Path, qmp: Path) -> None:
    # QEMU 7.2 knows no state of these.
    disk = folder.parent / "disk"
    disk.write_bytes(bytes(MIB))
    device = ["-drive", f"if=none,id=d,format=raw,file={disk}", "-device", "nvme,drive=d,serial=1"]
    with running(qemu_command(qmp, *device), qmp):
        with refused("qemu-refuses", "nvme|NVMe|non-migratable", folder):
            vmsnap.qemu.save(qmp, folder / "vm1")
        assert is_as_before(qmp)


@row("root-exists", "qemu-then")
def test_a_path_that_is_taken_does_not_stop_the_guest(folder: Path, qmp: Path) -> None:
    (folder / "vm1").mkdir()
    with running(qemu_command(qmp), qmp):
        with refused("root-exists", "exists", folder):
            vmsnap.qemu.save(qmp, folder / "vm1")
        assert is_as_before(qmp)
        with refused("qemu-then", "as-before", folder):
            vmsnap.qemu.save(qmp, folder / "vm1", then="halt")


@row("qemu-ends")
def test_qemu_may_die_at_any_point_and_leaves_no_snapshot(folder: Path, qmp: Path) -> None:
    # Before it is stopped; and while its memory is read.
    for at in ("wrap", "memory"):
        with running(qemu_command(qmp), qmp) as process:

            class Killing:
                name = "killing"

                def wrap(self, payload: bytes) -> bytes:
                    process.kill() if at == "wrap" else None  # noqa: B023
                    return payload[::-1]

                def unwrap(self, wrapped: bytes) -> bytes:
                    return wrapped[::-1]

            def dying(_done: int, _total: int) -> None:
                process.kill()

            with refused("qemu-ends", "QEMU ended or closed the connection|cannot send .* to QEMU", folder):
                vmsnap.qemu.save(qmp, folder / "vm1", key_provider=Killing(), progress=dying)


@row("disk-full")
@pytest.mark.parametrize("compress", [None, "lz4"])
def test_a_full_disk_leaves_the_guest_running(small_disk: Path, folder: Path, qmp: Path, compress: Any) -> None:
    del folder
    noise = file_memory(f"{qmp}.ram")
    Path(f"{qmp}.ram").write_bytes(os.urandom(4 * MIB))
    os.truncate(f"{qmp}.ram", SIZE)
    with running(qemu_command(qmp, memory=noise), qmp):
        with refused("disk-full", "No space left", small_disk):
            vmsnap.qemu.save(qmp, small_disk / "vm1", compress=compress)
        assert is_as_before(qmp)


def test_a_save_that_is_cancelled_leaves_the_guest_running(folder: Path, qmp: Path, key: bytes) -> None:
    async def cancelled() -> None:
        begun = asyncio.Event()
        loop = asyncio.get_running_loop()
        task = asyncio.create_task(
            vmsnap.qemu.save_async(
                qmp, folder / "vm1", key=key, progress=lambda *_: loop.call_soon_threadsafe(begun.set) and None
            )
        )
        await begun.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    with running(qemu_command(qmp, size="2G"), qmp):
        asyncio.run(cancelled())
        assert list(folder.iterdir()) == []
        assert is_as_before(qmp)
        vmsnap.qemu.save(qmp, folder / "vm1", key=key)


def canceller() -> Callable[[], None]:
    """Return a function that cancels this task from another thread, and returns when the task is cancelled."""
    loop, task, told = asyncio.get_running_loop(), asyncio.current_task(), threading.Event()
    assert task is not None

    def cancel() -> None:
        task.cancel()
        told.set()

    def from_outside() -> None:
        loop.call_soon_threadsafe(cancel)
        assert told.wait(PATIENCE)

    return from_outside


@pytest.mark.parametrize("archive", [False, True])
@pytest.mark.parametrize("then", ["as-before", "quit"])
def test_a_save_that_is_cancelled_in_its_commit_leaves_no_snapshot(
    folder: Path, qmp: Path, then: Any, archive: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = vmsnap.StagedSnapshot.commit

    async def saving() -> None:
        cancel = canceller()

        def late(staged: vmsnap.StagedSnapshot) -> None:
            cancel()
            commit(staged)

        monkeypatch.setattr(vmsnap.StagedSnapshot, "commit", late)
        with pytest.raises(asyncio.CancelledError):
            await vmsnap.qemu.save_async(qmp, folder / "vm1", then=then, archive=archive)
        assert list(folder.iterdir()) == []

    with running(qemu_command(qmp), qmp):
        asyncio.run(saving())
        assert is_as_before(qmp)


def test_a_save_that_is_cancelled_before_it_stops_the_guest_leaves_nothing(folder: Path, qmp: Path) -> None:
    async def saving() -> None:
        cancel = canceller()

        class Late:
            name = "late"

            def wrap(self, payload: bytes) -> bytes:
                cancel()
                return payload[::-1]

            def unwrap(self, wrapped: bytes) -> bytes:
                return wrapped[::-1]

        with pytest.raises(asyncio.CancelledError):
            await vmsnap.qemu.save_async(qmp, folder / "vm1", key_provider=Late())
        assert list(folder.iterdir()) == []

    with running(qemu_command(qmp), qmp):
        asyncio.run(saving())
        assert is_as_before(qmp)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_the_guest_running(folder: Path, qmp: Path, number: signal.Signals) -> None:
    """Handle signals like the command line: the handler of SIGTERM raises an exception."""
    script = """
import os, signal, sys, time
import vmsnap.qemu

def interrupted(_done, _total):
    os.kill(os.getpid(), int(sys.argv[3]))
    time.sleep(1)  # the handler runs in another thread meanwhile

signal.signal(signal.SIGTERM, lambda *_: sys.exit(77))
vmsnap.qemu.save(sys.argv[1], sys.argv[2], progress=interrupted)
"""
    with running(qemu_command(qmp), qmp):
        done = run_python(script, qmp, folder / "vm1", int(number))
        assert done.returncode == (77 if number == signal.SIGTERM else -signal.SIGINT), done.stderr
        assert is_as_before(qmp)
    assert list(folder.iterdir()) == []


def test_what_a_callback_raises_leaves_the_guest_running(folder: Path, qmp: Path) -> None:
    def broken(_done: int, _total: int) -> None:
        raise ZeroDivisionError

    with running(qemu_command(qmp), qmp):
        with pytest.raises(ZeroDivisionError):
            vmsnap.qemu.save(qmp, folder / "vm1", progress=broken)
        assert is_as_before(qmp)
    assert list(folder.iterdir()) == []
