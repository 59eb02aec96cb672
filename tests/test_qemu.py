"""Saving and resuming a running QEMU guest: a real guest that counts, and QEMUs without a guest for the errors."""

import asyncio
import hashlib
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import vmsnap
import vmsnap.qemu
from commands import error_of, run
from guest import HELD, HELD_DIGEST, PATIENCE, QEMU, Console, ask, ended, listens, need_qemu, qemu_command, running
from qemu_states import eventually, is_as_before, state
from refusals import refused, refused_elsewhere, row
from support import MIB, let_others_in, run_python
from vmsnap.qemu import Machine, RamRange, monitor

SIZE = 256 * MIB


@pytest.fixture(autouse=True)
def _qemu() -> None:
    need_qemu()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where snapshots go; QEMU's own files are beside it."""
    path = tmp_path / "snapshots"
    path.mkdir()
    return path


@pytest.fixture
def qmp(tmp_path: Path) -> Path:
    return tmp_path / "qmp"


@pytest.fixture
def console(tmp_path: Path) -> Iterator[Console]:
    made = Console(tmp_path, "console")
    yield made
    made.close()


# A guest that counts ----------------------------------------------------------------------------------------------


def test_a_guest_goes_on_where_it_stopped_five_times_in_a_row(
    folder: Path, qmp: Path, console: Console, key: bytes
) -> None:
    command = qemu_command(qmp, *console.boot())
    with running(command, qmp) as process:
        counts = console.counts(3)
        vmsnap.qemu.save(qmp, folder / "vm0", key=key, compress="lz4", then="quit")
        process.wait(PATIENCE)
    for generation in range(5):
        with ended(vmsnap.qemu.load(folder / f"vm{generation}", command, key=key).process) as process:
            counts += console.counts(3)
            report = vmsnap.qemu.save(qmp, folder / f"vm{generation + 1}", key=key, compress="lz4", then="quit")
            assert process.wait(PATIENCE) == 0
    with ended(vmsnap.qemu.load(folder / "vm5", command, key=key).process):
        counts += console.counts(20)
    # Numbers that the guest counted before a save, and that are read only afterwards, must be in order too.
    assert [each.number for each in counts] == list(range(len(counts)))
    assert {each.digest for each in counts} == {HELD_DIGEST}
    assert report.memory.logical_bytes == SIZE
    assert report.memory.stored_bytes < report.memory.data_bytes
    assert 0 < report.paused_seconds < report.seconds
    assert vmsnap.verify(folder / "vm5", key=key, expect_seal_digest=report.seal_digest).ok


def test_the_source_goes_on_and_a_copy_begins_where_it_was_saved(
    tmp_path: Path, folder: Path, qmp: Path, console: Console, key: bytes
) -> None:
    """With the memory in a file, and a q35."""
    memory = f"memory-backend-file,id=mem,size=256M,share=on,mem-path={tmp_path}/ram"
    command = qemu_command(qmp, *console.boot(), machine="q35", memory=memory)
    other = Console(tmp_path, "other")
    copy = [each.replace(f"{tmp_path}/ram", f"{tmp_path}/ram2") for each in command]
    copy = [each.replace(str(console.path), str(other.path)).replace(str(qmp), f"{qmp}2") for each in copy]
    with running(command, qmp) as process:
        counts = console.counts(3)
        report = vmsnap.qemu.save(qmp, folder / "vm1", key=key)
        assert is_as_before(qmp)
        counts += console.counts(10)
        with ended(vmsnap.qemu.load(folder / "vm1", copy, key=key).process):
            copied = other.counts(5)
            counts += console.counts(3)
        # And once more, of a guest that went on.
        vmsnap.qemu.save(qmp, folder / "vm2", key=key, then="continue")
        counts += console.counts(10)
        assert process.poll() is None
    assert [each.number for each in counts] == list(range(len(counts)))
    assert {each.digest for each in [*counts, *copied]} == {HELD_DIGEST}
    first = copied[0].number
    assert [each.number for each in copied] == list(range(first, first + 5))
    assert 3 <= first <= 13
    assert report.machine.machine_type.startswith("pc-q35-")
    other.close()


@row("qemu-changed")
def test_a_changed_page_is_refused_and_shows_where_it_is_forced(folder: Path, qmp: Path, console: Console) -> None:
    command = qemu_command(qmp, *console.boot())
    with running(command, qmp):
        counts = console.counts(3)
        vmsnap.qemu.save(qmp, folder / "vm1", then="quit")
    # Wherever it is: the kernel may have left a copy where it unpacked it from.
    page = HELD[5 * MIB : 5 * MIB + 4096]
    changed_page = bytes([page[0] ^ 1]) + page[1:]
    memory = folder / "vm1/mem"
    content = memory.read_bytes()
    assert page in content
    memory.write_bytes(content.replace(page, changed_page))
    with refused("qemu-changed", "is damaged or was changed: .*mem", folder):
        vmsnap.qemu.load(folder / "vm1", command)
    line = error_of(run("qemu", "load", folder / "vm1", "--", *command, status=4))
    assert "is damaged or was changed" in line
    changed = hashlib.sha256(HELD.replace(page, changed_page)).hexdigest()
    with ended(vmsnap.qemu.load(folder / "vm1", command, verify=False).process):
        # The first line may have begun with a sum from before.
        counts += console.counts(10)
    assert [each.number for each in counts] == list(range(len(counts)))
    assert counts[-1].digest == changed != HELD_DIGEST


def test_with_share_off_the_guest_leaves_the_file_as_it_is(
    tmp_path: Path, folder: Path, qmp: Path, console: Console, key: bytes
) -> None:
    """Several guests may then run on one file."""
    with running(qemu_command(qmp, *console.boot()), qmp):
        counts = console.counts(3)
        vmsnap.qemu.save(qmp, folder / "vm1", key=key, then="quit")
    memory = f"memory-backend-file,id=mem,size=256M,share=off,mem-path={tmp_path}/ram"
    command = qemu_command(qmp, *console.boot(), memory=memory)
    with ended(vmsnap.qemu.load(folder / "vm1", command, key=key).process):
        counts += console.counts(20)
        # Its memory is in no file now, so QEMU sends it.
        assert vmsnap.qemu.save(qmp, folder / "vm2", key=key).way == "stream"
        assert state(qmp) == "running"
    assert [each.number for each in counts] == list(range(len(counts)))
    wanted = tmp_path / "wanted"
    vmsnap.open(folder / "vm1", key=key).memory().restore([wanted])
    assert (tmp_path / "ram").read_bytes() == wanted.read_bytes()


@pytest.mark.parametrize("name", ["vm1", "vm1.vmsnap.tar"])
def test_the_command_line_saves_and_loads(folder: Path, qmp: Path, console: Console, tmp_path: Path, name: str) -> None:
    """A directory, and one file."""
    identity, recipient = vmsnap.generate_identity(), tmp_path / "identity.txt"
    recipient.touch(0o600)
    recipient.write_text(identity)
    command = qemu_command(qmp, *console.boot())
    with running(command, qmp) as process:
        counts = console.counts(3)
        arguments = ["-r", vmsnap.recipients_of(identity)[0], "--compress", "lz4"]
        told = run("qemu", "save", "--qmp", qmp, folder / name, *arguments, "--quit").stderr.decode()
        assert process.wait(PATIENCE) == 0
    assert told.startswith("vmsnap: saved pc-i440fx-")
    assert re.search(r"; the guest was paused for \d+\.\d{3} s: ", told)
    load = [sys.executable, "-m", "vmsnap", "qemu", "load", folder / name, "-i", recipient, "--", *command]
    with ended(subprocess.Popen(load, stderr=subprocess.PIPE)) as loading:
        # The first numbers that are read may come from before.
        wait_for(qmp, loading)
        counts += console.counts(5)
        told = run("qemu", "save", "--qmp", qmp, folder / "vm2", "--continue", "--json").stdout.decode()
        assert json.loads(told)["logical_bytes"] == SIZE
        counts += console.counts(5)
        # The command is there as long as QEMU, and ends with it.
        assert loading.poll() is None
        loading.send_signal(signal.SIGTERM)
        _, said = loading.communicate(timeout=PATIENCE)
        assert loading.returncode == 128 + signal.SIGTERM
        assert "the guest continues after" in said.decode()
    assert [each.number for each in counts] == list(range(len(counts)))
    assert {each.digest for each in counts} == {HELD_DIGEST}
    assert not qmp.exists()


def test_a_guest_with_a_disk_goes_on_and_comes_back(tmp_path: Path, folder: Path, qmp: Path) -> None:
    """QEMU gives its disks away when it migrates, and takes them back when it goes on."""
    disk = tmp_path / "disk"
    disk.write_bytes(bytes(MIB))
    drive = ["-drive", f"if=none,id=d,format=raw,file={disk}", "-device", "virtio-blk-pci,drive=d"]
    command = qemu_command(qmp, *drive)
    with running(command, qmp) as process:
        vmsnap.qemu.save(qmp, folder / "vm1")
        assert is_as_before(qmp)
        vmsnap.qemu.save(qmp, folder / "vm2", then="quit")
        process.wait(PATIENCE)
    with ended(vmsnap.qemu.load(folder / "vm2", command).process):
        assert state(qmp) == "running"


def test_the_page_on_qemu_says_what_works(tmp_path: Path, no_identity: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the blocks one by one, with a guest that was started as the page loads it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    text = (Path(__file__).resolve().parents[1] / "docs/qemu.md").read_text()
    blocks = re.findall(r"^```(sh|python)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    qmp = Path("vm1.qmp")
    Path("disk.raw").write_bytes(bytes(MIB))
    identity = vmsnap.generate_identity()
    [load] = [block for _, block in blocks if block.startswith("vmsnap qemu load")]
    command = shlex.split(load.partition(" -- ")[2].replace("\\\n", ""))
    known = {"recipients": vmsnap.recipients_of(identity), "identities": identity, "command": command}
    with ExitStack() as stack:
        process = stack.enter_context(ended(subprocess.Popen(command)))
        wait_for(qmp, process)
        for language, block in blocks:
            if language == "python":
                exec(block, known)
            elif block == load:
                process.kill()
                process.wait()
                qmp.unlink(missing_ok=True)
                wait_for(qmp, stack.enter_context(ended(subprocess.Popen(["bash", "-c", f"exec {block}"]))))
            else:
                subprocess.run(["bash", "-ec", block], check=True, stdout=subprocess.DEVNULL)
    assert state_of_snapshots(tmp_path) == ["vm1", "vm1-disk", "vm2"]
    assert Path("vm1-disk.raw").read_bytes() == bytes(MIB)


def state_of_snapshots(folder: Path) -> list[str]:
    return sorted(each.parent.name for each in folder.glob("*/vmsnap_manifest"))


def wait_for(qmp: Path, process: "subprocess.Popen[bytes]") -> None:
    """Wait until a guest runs."""
    until = time.monotonic() + PATIENCE
    while True:
        assert process.poll() is None, "it has ended"
        assert time.monotonic() < until
        if listens(qmp) and state(qmp) == "running":
            return
        time.sleep(0.05)


# The stored -----------------------------------------------------------------------------------------------------------


def test_the_snapshot_says_what_the_guest_ran_on(folder: Path, qmp: Path) -> None:
    command = qemu_command(qmp)
    with running(command, qmp):
        report = vmsnap.qemu.save(qmp, folder / "vm1")
    version = subprocess.check_output([QEMU, "--version"], text=True)
    reader = vmsnap.open(folder / "vm1", require_sealed=True)
    assert reader.list_fragments() == ["device_state", "machine", "mem", "mem_metadata"]
    machine = reader.read_fragment("machine", type=Machine)
    assert machine == report.machine
    assert f"version {machine.qemu_version} " in version
    assert machine.target == "x86_64"
    assert machine.machine_type.startswith("pc-i440fx-")
    assert machine.ram == [RamRange("mem", 0, 0, SIZE)]
    assert machine.command_line == command
    assert reader.memory().regions == [range(SIZE)]
    with reader.raw_fragment("device_state") as devices:
        # The magic number of QEMU's migration stream.
        assert devices.read(4) == b"QEVM"
        assert devices.size == report.device_state_bytes


def test_memory_in_several_backends_is_found_where_the_guest_sees_it(folder: Path, tmp_path: Path, qmp: Path) -> None:
    """Two NUMA nodes around the hole below 4 GiB, and a DIMM; each memfd is told from the others of its size."""
    dimm = f"memory-backend-file,id=dimm,size=1G,share=on,mem-path={tmp_path}/dimm"
    command = [
        *(QEMU, "-accel", "tcg", "-nodefaults", "-display", "none", "-machine", "q35", "-m", "5G,slots=1,maxmem=8G"),
        *("-object", "memory-backend-memfd,id=m1,size=2560M,share=on", "-numa", "node,memdev=m1"),
        *("-object", "memory-backend-memfd,id=m0,size=2560M,share=on", "-numa", "node,memdev=m0"),
        *("-object", dimm, "-device", "pc-dimm,memdev=dimm,id=dimm0"),
        *("-qmp", f"unix:{qmp},server=on,wait=off"),
    ]
    with running(command, qmp) as process:
        report = vmsnap.qemu.save(qmp, folder / "vm1", compress="lz4", then="quit")
        process.wait(PATIENCE)
    gib = 1 << 30
    assert report.machine.ram == [
        RamRange("m1", 0, 0, 2 * gib),
        RamRange("m1", 4 * gib, 2 * gib, gib // 2),
        RamRange("m0", 4 * gib + gib // 2, 0, 2 * gib + gib // 2),
        RamRange("dimm", 7 * gib, 0, gib),
    ]
    memory = vmsnap.open(folder / "vm1").memory()
    assert memory.regions == [range(each.guest_base, each.guest_base + each.size) for each in report.machine.ram]
    # The firmware's shadow, which says what it is, is in the first backend.
    assert b"SeaBIOS" in memory[0xE0000:0x100000]
    # And back: the DIMM's file is there already, and holds nothing.
    with ended(vmsnap.qemu.load(folder / "vm1", command).process):
        assert state(qmp) == "running"
        vmsnap.qemu.save(qmp, folder / "vm2", then="quit")
    again = vmsnap.open(folder / "vm2").memory()
    assert again.regions == memory.regions
    assert b"SeaBIOS" in again[0xE0000:0x100000]


def test_a_coroutine_leaves_the_loop_to_others(folder: Path, qmp: Path, key: bytes) -> None:
    turns = 0

    async def turning() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    async def both() -> None:
        other = asyncio.create_task(turning())
        await vmsnap.qemu.save_async(qmp, folder / "vm1", key=key, then="quit")
        report = await vmsnap.qemu.load_async(folder / "vm1", command, key=key, paused=True)
        with ended(report.process):
            assert await asyncio.to_thread(state, qmp) == "paused"
        other.cancel()

    command = qemu_command(qmp)
    with running(command, qmp):
        asyncio.run(both())
    assert turns > 100


@row("qemu-not-now")
def test_a_paused_guest_stays_paused_or_continues_where_told(folder: Path, qmp: Path) -> None:
    with running(qemu_command(qmp), qmp):
        ask(qmp, "stop")
        vmsnap.qemu.save(qmp, folder / "vm1", then="continue")
        assert state(qmp) == "running"
        ask(qmp, "stop")
        vmsnap.qemu.save(qmp, folder / "vm2")
        # Not `postmigrate`, with its disks given away: it can be saved again.
        assert state(qmp) == "paused"
        vmsnap.qemu.save(qmp, folder / "vm2b")
        ask(qmp, "migrate", uri="exec:cat >/dev/null")
        eventually(lambda: state(qmp) == "postmigrate", "migrated")
        with refused("qemu-not-now", "was saved or migrated before .*with 'cont' first", folder):
            vmsnap.qemu.save(qmp, folder / "vm3")
        ask(qmp, "cont")
        vmsnap.qemu.save(qmp, folder / "vm3")
        assert is_as_before(qmp)


@row("qemu-extra")
def test_without_the_package_the_extra_is_named(folder: Path, qmp: Path) -> None:
    # As where it is not installed.
    script = "sys.modules['qemu'] = None\nimport vmsnap.qemu"
    refused_elsewhere("qemu-extra", r"pip install 'vmsnap\[qemu\]'", folder, script)
    script = "sys.modules['qemu'] = None\nfrom vmsnap.cli.group import run\nsys.exit(run())"
    done = run_python(f"import sys\n{script}", "qemu", "save", "--qmp", qmp, folder / "vm1")
    assert done.returncode == 1
    assert done.stderr == "vmsnap: error: vmsnap qemu needs the package qemu.qmp: pip install 'vmsnap[qemu]'\n"


# Errors when saving ---------------------------------------------------------------------------------------------------


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
    noise = f"memory-backend-file,id=mem,size=256M,share=on,mem-path={qmp}.ram"
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


# Errors when loading --------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(folder: Path, qmp: Path) -> Path:
    """A snapshot of a guest that is a firmware."""
    with running(qemu_command(qmp), qmp) as process:
        vmsnap.qemu.save(qmp, folder / "vm1", then="quit")
        process.wait(PATIENCE)
    return folder / "vm1"


def no_process_with(text: Path) -> bool:
    return subprocess.run(["pgrep", "-f", str(text)], capture_output=True).returncode == 1


@row("qemu-other-machine")
def test_another_machine_is_refused(saved: Path, folder: Path, qmp: Path) -> None:
    with refused("qemu-other-machine", "type of the saved guest is pc-i440fx-.*started QEMU is pc-q35-", folder):
        vmsnap.qemu.load(saved, qemu_command(qmp, machine="q35"))
    with refused("qemu-other-machine", "256 MiB of backend 'mem' at 0x0, .* 512 MiB of backend 'mem'", folder):
        vmsnap.qemu.load(saved, qemu_command(qmp, size="512M"))
    assert no_process_with(qmp)
    # The id of a backend may be another one.
    other = [each.replace("id=mem", "id=ram").replace("backend=mem", "backend=ram") for each in qemu_command(qmp)]
    with ended(vmsnap.qemu.load(saved, other).process):
        assert state(qmp) == "running"


def copy_of(saved: Path, target: Path, **change: object) -> Path:
    """Copy a snapshot, with something else in the fragment `machine`."""
    with vmsnap.create(target) as writer:
        for fragment in ("device_state", "mem", "mem_metadata"):
            with writer.raw_fragment(fragment) as copy:
                copy.write((saved / fragment).read_bytes())
        writer.write_fragment("machine", {**vmsnap.open(saved).read_fragment("machine"), **change})
    return target


@row("qemu-other-machine")
def test_an_older_qemu_is_refused(folder: Path, qmp: Path, saved: Path) -> None:
    newer = copy_of(saved, folder / "vm2", qemu_version="99.1.0")
    with refused("qemu-other-machine", "saved by QEMU 99.1.0, but .* the same version of QEMU or a newer", folder):
        vmsnap.qemu.load(newer, qemu_command(qmp))
    # A newer QEMU loads the state of an older one; the installed one is newer than version 1.
    older = copy_of(saved, folder / "vm3", qemu_version="4.0.0")
    with ended(vmsnap.qemu.load(older, qemu_command(qmp)).process):
        assert state(qmp) == "running"


@row("qemu-later-format")
def test_a_later_format_is_refused(folder: Path, qmp: Path, saved: Path) -> None:
    later = copy_of(saved, folder / "vm2", version=3)
    with refused("qemu-later-format", "version 3: use a newer vmsnap", folder):
        vmsnap.qemu.load(later, qemu_command(qmp))
    assert no_process_with(qmp)


@row("qemu-no-guest")
def test_a_snapshot_of_no_guest_is_refused(folder: Path, qmp: Path, saved: Path) -> None:
    with vmsnap.create(folder / "vm2") as writer:
        writer.write_memory([vmsnap.GuestRegion(0, bytearray(MIB))])
    with refused("qemu-no-guest", "does not contain a QEMU guest: it has no fragment 'machine'", folder):
        vmsnap.qemu.load(folder / "vm2", qemu_command(qmp))
    with vmsnap.create(folder / "vm3") as writer:
        writer.write_fragment("machine", vmsnap.open(saved).read_fragment("machine"))
        writer.write_memory([vmsnap.GuestRegion(0, bytearray(MIB))])
    with refused("qemu-no-guest", "contains no device state: it has no fragment 'device_state'", folder):
        vmsnap.qemu.load(folder / "vm3", qemu_command(qmp))


@row("not-sealed")
def test_a_snapshot_that_is_not_sealed_is_refused(folder: Path, qmp: Path, saved: Path) -> None:
    shutil.copytree(saved, folder / "vm2")
    (folder / "vm2/vmsnap_manifest").unlink()
    with refused("not-sealed", "vm2", folder):
        vmsnap.qemu.load(folder / "vm2", qemu_command(qmp))
    with ended(vmsnap.qemu.load(folder / "vm2", qemu_command(qmp), verify=False).process):
        assert state(qmp) == "running"


@row("qemu-ends")
def test_a_load_that_fails_says_what_qemu_said(tmp_path: Path, folder: Path, qmp: Path) -> None:
    rng = ["-device", "virtio-rng-pci"]
    with running(qemu_command(qmp, *rng), qmp) as process:
        vmsnap.qemu.save(qmp, folder / "vm1", then="quit")
        process.wait(PATIENCE)
    memory = f"memory-backend-file,id=mem,size=256M,share=on,mem-path={tmp_path}/ram"
    without = qemu_command(qmp, memory=memory)
    with refused("qemu-ends", "QEMU printed: .*virtio-rng", folder):
        vmsnap.qemu.load(folder / "vm1", without, ignore_differences=True)
    line = error_of(run("qemu", "load", folder / "vm1", "--force", "--", *without, status=1))
    assert "virtio-rng" in line
    # The memory of a guest is not left behind in a file that was not there.
    assert not (tmp_path / "ram").exists()
    with refused("qemu-ends", "QEMU printed: .*no-such-option", folder):
        vmsnap.qemu.load(folder / "vm1", [*without, "-no-such-option"])
    assert no_process_with(qmp)


@row("qemu-ends")
def test_what_a_failed_load_filled_is_empty_again(tmp_path: Path, folder: Path, qmp: Path) -> None:
    """A file that was there stays, without the guest's memory; also where it is told in JSON, as by libvirt."""
    with running(qemu_command(qmp, "-device", "virtio-rng-pci"), qmp) as process:
        vmsnap.qemu.save(qmp, folder / "vm1", then="quit")
        process.wait(PATIENCE)
    ram = tmp_path / "ram"
    backend = {"qom-type": "memory-backend-file", "id": "mem", "size": SIZE, "share": True, "mem-path": str(ram)}
    ram.touch()
    os.truncate(ram, SIZE)
    for memory in (json.dumps(backend), f"memory-backend-file,id=mem,size=256M,share=on,mem-path={ram}"):
        with refused("qemu-ends", "QEMU printed: .*virtio-rng", folder):
            vmsnap.qemu.load(folder / "vm1", qemu_command(qmp, memory=memory), ignore_differences=True)
        assert ram.stat().st_size == SIZE
        assert ram.stat().st_blocks == 0


@row("qemu-command", "qemu-command-missing")
def test_arguments_that_cannot_be_are_refused(saved: Path, folder: Path, qmp: Path) -> None:
    for more, message in (
        (["-incoming", "defer"], "not contain -incoming"),
        (["-daemonize"], "not contain -daemonize"),
    ):
        with refused("qemu-command", message, folder):
            vmsnap.qemu.load(saved, qemu_command(qmp, *more))
    with refused("qemu-command", "is empty", folder):
        vmsnap.qemu.load(saved, [])
    with refused("qemu-command-missing", "no-such-qemu", folder):
        vmsnap.qemu.load(saved, ["no-such-qemu"])


@row("qemu-file-in-use")
def test_a_file_that_holds_something_is_not_overwritten(tmp_path: Path, saved: Path, folder: Path, qmp: Path) -> None:
    memory = f"memory-backend-file,id=mem,size=256M,share=on,mem-path={tmp_path}/ram"
    (tmp_path / "ram").write_bytes(bytes(MIB) + b"another guest" + bytes(SIZE - MIB - 13))
    with refused("qemu-file-in-use", "is not empty, and another guest may use it", tmp_path):
        vmsnap.qemu.load(saved, qemu_command(qmp, memory=memory))
    command = qemu_command(qmp, memory=memory)
    assert "is not empty" in error_of(run("qemu", "load", saved, "--", *command, status=1))
    with ended(vmsnap.qemu.load(saved, command, overwrite=True, paused=True).process):
        assert b"another guest" not in (tmp_path / "ram").read_bytes()
    # Resident, and zero: that is nothing.
    (tmp_path / "ram").write_bytes(bytes(SIZE))
    with ended(vmsnap.qemu.load(saved, command).process):
        assert state(qmp) == "running"


@row("wrong-key", "changed")
def test_a_wrong_key_starts_nothing(folder: Path, qmp: Path, key: bytes) -> None:
    with running(qemu_command(qmp), qmp) as process:
        vmsnap.qemu.save(qmp, folder / "vm1", key=key, then="quit")
        process.wait(PATIENCE)
    with refused("wrong-key", "", folder):
        vmsnap.qemu.load(folder / "vm1", qemu_command(qmp), key=bytes(32))
    # A page that was changed is found as it is read, and the guest does not run.
    memory = folder / "vm1/mem"
    data = bytearray(memory.read_bytes())
    data[len(data) // 2] ^= 1
    memory.write_bytes(data)
    for verify in (True, False):
        with refused("changed", "mem", folder):
            vmsnap.qemu.load(folder / "vm1", qemu_command(qmp), key=key, verify=verify)
    assert no_process_with(qmp)


@row("changed")
def test_a_changed_device_state_is_refused(folder: Path, qmp: Path, key: bytes) -> None:
    """In its first segment, which is verified only when it goes to QEMU."""
    with running(qemu_command(qmp), qmp) as process:
        vmsnap.qemu.save(qmp, folder / "vm1", key=key, then="quit")
        process.wait(PATIENCE)
    devices = folder / "vm1/device_state"
    data = bytearray(devices.read_bytes())
    data[1000] ^= 1
    devices.write_bytes(data)
    for verify in (True, False):
        with refused("changed", "device_state", folder):
            vmsnap.qemu.load(folder / "vm1", qemu_command(qmp), key=key, verify=verify)
    assert no_process_with(qmp)


def test_nothing_of_the_device_state_is_in_the_snapshot_in_plaintext(folder: Path, qmp: Path, key: bytes) -> None:
    with running(qemu_command(qmp), qmp):
        report = vmsnap.qemu.save(qmp, folder / "vm1", key=key)
    assert b"QEVM" not in (folder / "vm1/device_state").read_bytes()
    with vmsnap.open(folder / "vm1", key=key).raw_fragment("device_state") as fragment:
        assert fragment.read(4) == b"QEVM"
        assert fragment.size == report.device_state_bytes
