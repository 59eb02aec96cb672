"""Saving and resuming a running QEMU guest: a real guest that counts, and QEMUs without a guest for the errors."""

import asyncio
import hashlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
import vmsnap
import vmsnap.qemu
from commands import error_of, run
from guest import (
    HELD,
    HELD_DIGEST,
    PATIENCE,
    QEMU,
    Console,
    ask,
    ended,
    file_memory,
    listens,
    need_qemu,
    qemu_command,
    running,
)
from qemu_states import eventually, is_as_before, state
from refusals import refused, refused_elsewhere, row
from support import MIB, run_python
from toy_guest import Toy
from vmsnap.qemu import Machine, RamRange

SIZE = 256 * MIB


@pytest.fixture(autouse=True)
def _qemu() -> None:
    need_qemu()


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
        counts += console.counts(6)
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
    memory = file_memory(tmp_path / "ram")
    command = qemu_command(qmp, *console.boot(), machine="q35", memory=memory)
    other = Console(tmp_path, "other")
    copy = [each.replace(f"{tmp_path}/ram", f"{tmp_path}/ram2") for each in command]
    copy = [each.replace(str(console.path), str(other.path)).replace(str(qmp), f"{qmp}2") for each in copy]
    with running(command, qmp) as process:
        counts = console.counts(3)
        report = vmsnap.qemu.save(qmp, folder / "vm1", key=key)
        assert is_as_before(qmp)
        counts += console.counts(5)
        with ended(vmsnap.qemu.load(folder / "vm1", copy, key=key).process):
            copied = other.counts(5)
            counts += console.counts(3)
        # And once more, of a guest that went on.
        vmsnap.qemu.save(qmp, folder / "vm2", key=key, then="continue")
        counts += console.counts(5)
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
        counts += console.counts(4)
    assert [each.number for each in counts] == list(range(len(counts)))
    assert counts[-1].digest == changed != HELD_DIGEST


def test_with_share_off_the_guest_leaves_the_file_as_it_is(
    tmp_path: Path, folder: Path, qmp: Path, toy: Toy, key: bytes
) -> None:
    """Several guests may then run on one file."""
    with running(qemu_command(qmp, *toy.options), qmp):
        toy.ticks(3)
        vmsnap.qemu.save(qmp, folder / "vm1", key=key, then="quit")
    memory = f"memory-backend-file,id=mem,size=256M,share=off,mem-path={tmp_path}/ram"
    command = qemu_command(qmp, *toy.options, memory=memory)
    with ended(vmsnap.qemu.load(folder / "vm1", command, key=key).process):
        toy.ticks(20)
        # Its memory is in no file now, so QEMU sends it.
        assert vmsnap.qemu.save(qmp, folder / "vm2", key=key).way == "stream"
        assert state(qmp) == "running"
    wanted = tmp_path / "wanted"
    vmsnap.open(folder / "vm1", key=key).memory().restore([wanted])
    assert (tmp_path / "ram").read_bytes() == wanted.read_bytes()


@pytest.mark.parametrize("name", ["vm1", "vm1.vmsnap.tar"])
def test_the_command_line_saves_and_loads(folder: Path, qmp: Path, toy: Toy, tmp_path: Path, name: str) -> None:
    """A directory, and one file."""
    identity, recipient = vmsnap.generate_identity(), tmp_path / "identity.txt"
    recipient.touch(0o600)
    recipient.write_text(identity)
    command = qemu_command(qmp, *toy.options)
    with running(command, qmp) as process:
        toy.ticks(3)
        arguments = ["-r", vmsnap.recipients_of(identity)[0], "--compress", "lz4"]
        told = run("qemu", "save", "--qmp", qmp, folder / name, *arguments, "--quit").stderr.decode()
        assert process.wait(PATIENCE) == 0
    assert told.startswith("vmsnap: saved pc-i440fx-")
    assert re.search(r"; the guest was paused for \d+\.\d{3} s: ", told)
    load = [sys.executable, "-m", "vmsnap", "qemu", "load", folder / name, "-i", recipient, "--", *command]
    with ended(subprocess.Popen(load, stderr=subprocess.PIPE)) as loading:
        # The first numbers that are read may come from before.
        wait_for(qmp, loading)
        toy.ticks(50)
        told = run("qemu", "save", "--qmp", qmp, folder / "vm2", "--continue", "--json").stdout.decode()
        assert json.loads(told)["logical_bytes"] == SIZE
        toy.catch_up()
        toy.ticks(5)
        # The command is there as long as QEMU, and ends with it.
        assert loading.poll() is None
        loading.send_signal(signal.SIGTERM)
        _, said = loading.communicate(timeout=PATIENCE)
        assert loading.returncode == 128 + signal.SIGTERM
        assert "the guest continues after" in said.decode()
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


def test_nothing_of_the_device_state_is_in_the_snapshot_in_plaintext(folder: Path, qmp: Path, key: bytes) -> None:
    with running(qemu_command(qmp), qmp):
        report = vmsnap.qemu.save(qmp, folder / "vm1", key=key)
    assert b"QEVM" not in (folder / "vm1/device_state").read_bytes()
    with vmsnap.open(folder / "vm1", key=key).raw_fragment("device_state") as fragment:
        assert fragment.read(4) == b"QEVM"
        assert fragment.size == report.device_state_bytes
