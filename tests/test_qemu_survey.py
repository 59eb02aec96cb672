"""The survey finds all memory of a guest: its blocks, where the guest sees them, and the files behind them."""

import os
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import qemus
import vmsnap
from guest import PATIENCE, ask, qemu_command, running
from qemus import Qemu
from support import MIB
from surveyed import only_block, surveyed
from vmsnap.qemu import RamRange
from vmsnap.qemu.survey import Block

GIB = 1 << 30
MARK = b"here is the guest"

pytestmark = pytest.mark.skipif(os.uname().machine != "x86_64", reason="the machine types are those of x86")


def guest_sees(qmp: Path, folder: Path, address: int) -> bool:
    """Whether the guest has the mark at an address."""
    copy = folder / "copy"
    ask(qmp, "pmemsave", val=address, size=len(MARK), filename=str(copy))
    return copy.read_bytes() == MARK


def write_mark(block: Block, offset: int) -> None:
    assert block.file is not None
    os.pwrite(block.file.descriptor, MARK, block.file.offset + offset)


def stream_of(qmp: Path, folder: Path) -> bytes:
    """Return what QEMU migrates."""
    path = folder / "stream"
    ask(qmp, "migrate", uri=f"exec:cat > {path}")
    until = time.monotonic() + PATIENCE
    while (status := ask(qmp, "query-migrate")["status"]) != "completed":
        assert status not in ("failed", "cancelled")
        assert time.monotonic() < until
    return path.read_bytes()


@pytest.mark.parametrize("machine", ["pc", "q35", "microvm"])
def test_the_memory_of_a_plain_m_is_found(tmp_path: Path, qmp: Path, qemu: Qemu, machine: str) -> None:
    name = "microvm.ram" if machine == "microvm" else "pc.ram"
    with running(qemu_command(qmp, "-S", machine=machine, memory="", qemu=qemu, size="64M"), qmp):
        with surveyed(qmp) as ram:
            block = only_block(ram)
        assert block.name == block.backend == name
        assert block.ranges == ram.machine.ram == [RamRange(name, 0, 0, 64 * MIB)]
        assert (block.shared, block.preallocated, block.page_size) == (False, False, os.sysconf("SC_PAGE_SIZE"))
        assert block.file is None
        assert "is not shared" in str(block.why_no_file)
        # The block list of the stream has each name after its length, and the size.
        assert bytes([len(name)]) + name.encode() + (64 * MIB).to_bytes(8) in stream_of(qmp, tmp_path)


@pytest.mark.parametrize("kind", ["memfd", "file", "ram"])
@pytest.mark.parametrize("share", ["on", "off"])
@pytest.mark.parametrize("prealloc", ["on", "off"])
def test_each_backend_is_found_and_a_file_that_can_be_filled_reaches_the_guest(
    tmp_path: Path, qmp: Path, qemu: Qemu, kind: str, share: str, prealloc: str
) -> None:
    ram_path = tmp_path / "ram"
    more = f",mem-path={ram_path}" if kind == "file" else ""
    memory = f"memory-backend-{kind},id=mem,size=16M,share={share},prealloc={prealloc}{more}"
    with running(qemu_command(qmp, "-S", memory=memory, qemu=qemu, size="16M"), qmp):
        with surveyed(qmp) as ram:
            block = only_block(ram)
            has_file = block.file is not None
        with surveyed(qmp, to_fill=True) as ram:
            filled = only_block(ram)
            if filled.writable:
                write_mark(filled, 5 * MIB)
        assert (block.shared, block.preallocated) == (share == "on", prealloc == "on")
        assert block.ranges == [RamRange("mem", 0, 0, 16 * MIB)]
        # QEMU 10 has memory that it shares with nobody in a file, too.
        if kind != "ram":
            assert has_file == (share == "on")
            assert filled.file is not None
            assert filled.file.path == (str(ram_path) if kind == "file" else "")
            # A private page that QEMU has touched is no longer that of the file.
            assert filled.writable == (share == "on" or prealloc == "off")
        assert filled.writable == guest_sees(qmp, tmp_path, 5 * MIB)
        assert (block.why_no_file is None) == has_file
        assert (filled.why_no_file is None) == (filled.file is not None)


def test_a_file_that_qemu_has_only_for_reading_is_not_filled(tmp_path: Path, qmp: Path) -> None:
    """A template, which other guests start from. QEMU before 8.2 cannot use it: it has no rom=."""
    qemu = qemus.found("10.0")
    path = tmp_path / "ram"
    path.write_bytes(bytes(16 * MIB))
    memory = f"memory-backend-file,id=mem,size=16M,share=off,readonly=on,rom=off,mem-path={path}"
    with (
        running(qemu_command(qmp, "-S", memory=memory, qemu=qemu, size="16M"), qmp),
        surveyed(qmp, to_fill=True) as ram,
    ):
        assert not only_block(ram).writable


def test_nodes_a_dimm_and_a_device_are_found_where_the_guest_sees_them(tmp_path: Path, qmp: Path, qemu: Qemu) -> None:
    """Around the hole below 4 GiB. The guest decides on the address of memory that belongs to a PCI device."""
    command = [
        *(*qemu.command, "-accel", "tcg", "-nodefaults", "-display", "none", "-S"),
        *("-machine", "q35,nvdimm=on", "-m", "5G,slots=2,maxmem=9G"),
        *("-object", "memory-backend-memfd,id=m1,size=2560M,share=on", "-numa", "node,memdev=m1"),
        *("-object", "memory-backend-ram,id=m0,size=2560M", "-numa", "node,memdev=m0"),
        *("-object", "memory-backend-memfd,id=dimm,size=1G,share=on", "-device", "pc-dimm,memdev=dimm,id=dimm0"),
        *("-object", f"memory-backend-file,id=nv,size=256M,share=on,mem-path={tmp_path}/nv"),
        *("-device", "nvdimm,memdev=nv,id=nv0,label-size=2M"),
        *("-object", f"memory-backend-file,id=bar,size=4M,share=on,mem-path={tmp_path}/bar"),
        *("-device", "ivshmem-plain,memdev=bar,addr=5"),
        # The machine does not use this one.
        *("-object", "memory-backend-ram,id=unused,size=16M"),
        *("-qmp", f"unix:{qmp},server=on,wait=off"),
    ]
    nowhere = 1 << 52
    with running(command, qmp):
        with surveyed(qmp, to_fill=True) as ram:
            blocks = {each.backend: each for each in ram.blocks}
            marks = [each for each, block in ram.places() if each.mapped and block.writable]
            for each in marks:
                write_mark(blocks[each.backend], each.offset)
                write_mark(blocks[each.backend], each.offset + each.size - len(MARK))
        assert ram.machine.ram == [
            RamRange("m1", 0, 0, 2 * GIB),
            RamRange("m1", 4 * GIB, 2 * GIB, GIB // 2),
            RamRange("m0", 4 * GIB + GIB // 2, 0, 2 * GIB + GIB // 2),
            RamRange("dimm", 7 * GIB, 0, GIB),
            RamRange("nv", 8 * GIB, 0, 254 * MIB),
            RamRange("bar", nowhere, 0, 4 * MIB, mapped=False, block="0000:00:05.0/bar"),
            RamRange("nv", nowhere + 4 * MIB, 254 * MIB, 2 * MIB, mapped=False),
        ]
        assert [each.name for each in ram.blocks] == ["0000:00:05.0/bar", "dimm", "m0", "m1", "nv"]
        assert [each.size for each in ram.blocks] == [4 * MIB, GIB, 2560 * MIB, 2560 * MIB, 256 * MIB]
        assert {each.backend for each in marks} == {"m1", "dimm", "nv"}
        for each in marks:
            assert guest_sees(qmp, tmp_path, each.guest_base)
            assert guest_sees(qmp, tmp_path, each.guest_base + each.size - len(MARK))


def test_memory_of_virtio_devices_is_found(tmp_path: Path, qmp: Path, qemu: Qemu) -> None:
    """QEMU does not migrate that of a virtio-pmem, so it must be in a file."""
    pmem = "memory-backend-{},id=pm,size=64M"
    command = [
        *(*qemu.command, "-accel", "tcg", "-nodefaults", "-display", "none", "-S"),
        *("-machine", "q35", "-m", "64M,slots=2,maxmem=4G", "-qmp", f"unix:{qmp},server=on,wait=off"),
        *("-object", "memory-backend-ram,id=vm,size=1G", "-device", "virtio-mem-pci,memdev=vm,addr=6"),
        *("-device", "virtio-pmem-pci,memdev=pm,addr=7", "-object"),
    ]
    with running([*command, pmem.format(f"file,share=on,mem-path={tmp_path}/pm")], qmp):
        with surveyed(qmp) as ram:
            assert [(each.name, each.migrated, each.file is not None) for each in ram.blocks] == [
                ("0000:00:06.0/vm", True, False),
                ("pc.ram", True, False),
                ("pm", False, True),
            ]
        assert ram.machine.ram == [
            RamRange("pc.ram", 0, 0, 64 * MIB),
            RamRange("vm", 4 * GIB, 0, GIB, block="0000:00:06.0/vm"),
            RamRange("pm", 5 * GIB, 0, 64 * MIB),
        ]
    with (
        running([*command, pmem.format("ram")], qmp),
        pytest.raises(vmsnap.QemuError, match="'pm' is not shared"),
        surveyed(qmp),
    ):
        pass


def test_the_name_of_a_block_may_be_the_path_of_its_object(tmp_path: Path, qmp: Path, qemu: Qemu) -> None:
    """Machine types up to 4.0 name blocks like this."""
    memory = "memory-backend-memfd,id=mem,size=16M,share=on,x-use-canonical-path-for-ramblock-id=on"
    with running(qemu_command(qmp, "-S", memory=memory, qemu=qemu, size="16M"), qmp):
        with surveyed(qmp) as ram:
            assert only_block(ram).name == "/objects/mem"
        assert ram.machine.ram == [RamRange("mem", 0, 0, 16 * MIB, block="/objects/mem")]
        assert b"\x0c/objects/mem" + (16 * MIB).to_bytes(8) in stream_of(qmp, tmp_path)


def test_huge_pages_are_told(qmp: Path, qemu: Qemu, huge_pages: Callable[[int], AbstractContextManager[None]]) -> None:
    """Their file can be read, but not written."""
    memory = "memory-backend-memfd,id=mem,size=16M,share=on,hugetlb=on,hugetlbsize=2M"
    with huge_pages(8), running(qemu_command(qmp, "-S", memory=memory, qemu=qemu, size="16M"), qmp):
        with surveyed(qmp) as ram:
            assert only_block(ram).page_size == 2 * MIB
            assert only_block(ram).file is not None
        with surveyed(qmp, to_fill=True) as ram:
            assert not only_block(ram).writable


def test_a_guest_that_runs_sees_its_memory_where_it_was(qmp: Path, qemu: Qemu) -> None:
    """The firmware covers parts of the memory, and hides others."""
    command = [*qemu.command, "-accel", "tcg", "-display", "none", "-m", "64M", "-machine", "q35"]
    with running([*command, "-S", "-qmp", f"unix:{qmp},server=on,wait=off"], qmp):
        with surveyed(qmp) as ram:
            before = ram.machine
        assert before.state == "paused"
        ask(qmp, "cont")
        until = time.monotonic() + PATIENCE
        # The firmware writes its tables there.
        while "pc.ram @00000000000f0000" not in ask(qmp, "human-monitor-command", command_line="info mtree -f"):
            assert time.monotonic() < until
        with surveyed(qmp) as ram:
            assert ram.machine.state == "running"
            assert ram.machine.ram == before.ram == [RamRange("pc.ram", 0, 0, 64 * MIB)]
            assert ram.machine.devices == before.devices
