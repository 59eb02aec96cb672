"""Guests with memory of virtio devices.

QEMU sends the state of a virtio-mem device before the memory of the guest, in machine types from 8.0 on. It does not
send the memory of a virtio-pmem device.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import vmsnap
import vmsnap.qemu
from guest import Console, Count, ask, ended, kernel_files, qemu_command, running, write_initramfs
from migration_files import resume
from packages import CACHE
from qemus import Qemu
from refusals import refused, row
from support import MIB
from toy_guest import Toy

PAGE = 4096

_MODULES = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_mem")

# The files of a tmpfs are in movable memory, and with `memhp_default_state=online_movable` all of the device is.
_INIT = f"""#!/bin/busybox sh
/bin/busybox --install /bin
mount -t devtmpfs dev /dev
exec >/dev/ttyS0 2>&1 </dev/null
mkdir /files /proc
mount -t proc proc /proc
mount -t tmpfs -o size=100% work /files
before=$(awk '/^MemTotal/ {{ print $2 }}' /proc/meminfo)
for each in {" ".join(_MODULES)}; do
  insmod /$each.ko || echo "bad module $each"
done
until [ $(awk '/^MemTotal/ {{ print $2 }}' /proc/meminfo) -gt $((before + 60000)) ]; do sleep 0.1; done
dd if=/dev/urandom of=/files/held bs=1M count=24 2>/dev/null
n=0
while :; do
  set -- $(sha256sum /files/held)
  echo "count $n $1"
  n=$((n + 1))
done
"""

# How the memory of the machine and that of the device are backed.
BACKENDS = {
    "plain": ("memory-backend-ram", ""),
    "memfd": ("memory-backend-memfd", ",share=on"),
    "file": ("memory-backend-file", ",share=on,mem-path={folder}/{id}"),
}
SIZES = {"mem": "256M", "vm": "128M"}


def options(folder: Path, backend: str) -> list[str]:
    """Return the memory of a machine: 256 MiB, and a device of 128 MiB of which 64 MiB are wanted."""
    kind, rest = BACKENDS[backend]
    mem, vm = (f"{kind},id={name},size={size}{rest.format(folder=folder, id=name)}" for name, size in SIZES.items())
    device = "virtio-mem-pci,memdev=vm,requested-size=64M"
    return ["-m", "256M,maxmem=1G", "-object", mem, "-object", vm, "-device", device]


@functools.cache
def initramfs() -> Path:
    path = CACHE / "initramfs-virtio-mem"
    [drivers] = kernel_files().glob("lib/modules/*/kernel/drivers")
    modules = {f"{each}.ko": next(drivers.glob(f"*/{each}.ko")).read_bytes() for each in _MODULES}
    write_initramfs(path, _INIT, **modules)
    return path


class Linux:
    """A Linux guest whose files are in the memory that is plugged in."""

    def __init__(self, folder: Path, backend: str, qemu: Qemu) -> None:
        folder.mkdir()
        self.qmp = folder / "qmp"
        self._console = Console(folder, "linux")
        boot = self._console.boot_from(initramfs(), "nowatchdog memhp_default_state=online_movable")
        machine = f"{qemu.newest('q35')},memory-backend=mem"
        self._command = qemu_command(self.qmp, *options(folder, backend), *boot, machine=machine, memory="", qemu=qemu)

    @contextmanager
    def boots(self) -> Iterator[None]:
        with running(self._command, self.qmp):
            yield
        self._console.close()

    @contextmanager
    def loads(self, snapshot: Path, key: bytes | None = None) -> Iterator[None]:
        with ended(vmsnap.qemu.load(snapshot, self._command, key=key).process):
            yield
        self._console.close()

    def goes_on(self) -> str:
        """Check that the guest counts, and still has the memory; return the digest of its files."""
        first, second = self._console.counts(2)
        assert second == Count(first.number + 1, first.digest)
        [device] = ask(self.qmp, "query-memory-devices")
        assert device["data"]["size"] == 64 * MIB
        return first.digest


def test_linux_goes_on_with_the_memory_that_was_plugged_in(
    tmp_path: Path, folder: Path, key: bytes, qemu: Qemu
) -> None:
    source = Linux(tmp_path / "source", "plain", qemu)
    with source.boots():
        digest = source.goes_on()
        report = vmsnap.qemu.save(source.qmp, folder / "stopped", durable=False)
        assert report.way == "stream"
        assert source.goes_on() == digest
        # QEMU emulates the guest, so that it stands still: it has two blocks of memory.
        report = vmsnap.qemu.save(source.qmp, folder / "live", live=True, durable=False)
        assert report.way == "stream"
        assert source.goes_on() == digest
    [device] = [each for each in report.machine.ram if each.backend == "vm"]
    plugged = vmsnap.open(folder / "live").memory().read(device.guest_base, device.size)
    pages = sum(any(plugged[at : at + PAGE]) for at in range(0, len(plugged), PAGE))
    assert 24 * MIB <= pages * PAGE <= 64 * MIB

    private = Linux(tmp_path / "private", "plain", qemu)
    with private.loads(folder / "stopped"):
        assert private.goes_on() == digest
    shared = Linux(tmp_path / "shared", "file", qemu)
    with shared.loads(folder / "live"):
        assert shared.goes_on() == digest
        report = vmsnap.qemu.save(shared.qmp, folder / "files", key=key, compress="lz4", durable=False)
        assert report.way == "files"
        assert shared.goes_on() == digest
    other = Linux(tmp_path / "other", "memfd", qemu)
    with other.loads(folder / "files", key):
        assert other.goes_on() == digest


@pytest.mark.parametrize("machine", ["pc", "q35"])
def test_a_guest_of_the_newest_machine_type_is_exported_and_imported(
    tmp_path: Path, folder: Path, qmp: Path, toy: Toy, qemu: Qemu, machine: str
) -> None:
    """The memory of the device stays in the device state, because a file does not tell what it is."""
    device = ["-object", "memory-backend-ram,id=vm,size=128M", "-device", "virtio-mem-pci,memdev=vm"]
    limit = ["-m", "64M,slots=1,maxmem=1G"]
    command = qemu_command(qmp, *limit, *device, *toy.options, machine=machine, memory="", size="64M", qemu=qemu)
    with running(command, qmp):
        toy.ticks(3)
        vmsnap.qemu.save(qmp, folder / "vm", then="quit")
    vmsnap.export_file(folder / "vm", tmp_path / "file", "qemu")
    vmsnap.import_file(tmp_path / "file", folder / "imported")
    with pytest.raises(vmsnap.QemuError, match="memory"):
        vmsnap.qemu.load(folder / "imported", command)
    vmsnap.export_file(folder / "imported", tmp_path / "again", "qemu")
    with running([*command, "-incoming", f"exec:cat '{tmp_path / 'again'}'"], qmp):
        resume(qmp)
        toy.ticks(100)


@row("export-lacks-memory")
def test_a_guest_with_virtio_pmem_loads_but_is_not_exported(
    tmp_path: Path, folder: Path, qmp: Path, toy: Toy, qemu: Qemu
) -> None:
    """No migration stream contains the memory of the device. A snapshot does."""
    pmem = f"memory-backend-file,id=pm,size=16M,share=on,mem-path={tmp_path}/pm"
    options = ["-m", "64M,maxmem=1G", "-object", pmem, "-device", "virtio-pmem-pci,memdev=pm"]
    command = qemu_command(qmp, *options, *toy.options, machine="q35", memory="", size="64M", qemu=qemu)
    with running(command, qmp):
        toy.ticks(3)
        with open(tmp_path / "pm", "r+b") as file:
            file.write(b"kept")
        report = vmsnap.qemu.save(qmp, folder / "vm", then="quit")
        assert report.memory.logical_bytes == 80 * MIB
    message = "lacks the guest memory 'pm', because QEMU never migrates the memory of a virtio-pmem.* vmsnap qemu load"
    with refused("export-lacks-memory", message, folder):
        vmsnap.export_file(folder / "vm", folder / "new", "qemu")
    (tmp_path / "pm").unlink()
    with ended(vmsnap.qemu.load(folder / "vm", command).process):
        toy.ticks(100)
        assert (tmp_path / "pm").read_bytes()[:4] == b"kept"
