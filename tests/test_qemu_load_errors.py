"""A load of a QEMU guest that is refused or fails: QEMU ends, and the memory of the guest is left nowhere."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import vmsnap
import vmsnap.qemu
from commands import error_of, run
from guest import PATIENCE, ended, file_memory, need_qemu, qemu_command, running
from qemu_states import state
from refusals import refused, row
from support import MIB

SIZE = 256 * MIB


@pytest.fixture(scope="module")
def firmware(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A snapshot of a guest that is a firmware."""
    need_qemu()
    folder = tmp_path_factory.mktemp("guest")
    with running(qemu_command(folder / "qmp"), folder / "qmp"):
        vmsnap.qemu.save(folder / "qmp", folder / "vm1")
    return folder / "vm1"


@pytest.fixture
def saved(firmware: Path, folder: Path) -> Path:
    """A copy of it."""
    return Path(shutil.copytree(firmware, folder / "vm1"))


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
    memory = file_memory(tmp_path / "ram")
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
    memory = file_memory(tmp_path / "ram")
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
