"""The memory of a live process as a source: all data is stored, and untouched pages stay untouched."""

import ctypes
import os
import re
from pathlib import Path

import pytest
import vmsnap
from child import ANONYMOUS, GUARDED, MEMFD, PRIVATE_FILE, SHARED, USERFAULT, VAST, Child, child, expected
from commands import run
from refusals import refused, row
from support import let_others_in
from vmsnap import GuestRegion, ProcessMemory

PAGE = os.sysconf("SC_PAGESIZE")
MIB = 1 << 20


def stored(tmp_path: Path, process: Child, size: int = 8 * MIB) -> tuple[bytes, vmsnap.MemoryReport]:
    root = tmp_path / "vm1"
    region = GuestRegion(0x1000, ProcessMemory(process.pid), offset=process.address, size=size)
    report = vmsnap.SnapshotWriter(root).write_memory([region])
    return vmsnap.open(root).memory().read(0x1000, size), report


@pytest.mark.parametrize(
    "setup", [ANONYMOUS, SHARED, MEMFD, PRIVATE_FILE], ids=["anonymous", "shared", "memfd", "file"]
)
def test_what_was_touched_is_stored_and_the_rest_stays_untouched(tmp_path: Path, setup: str) -> None:
    with child(tmp_path, setup) as process:
        before = process.resident()
        assert before < 2 * MIB
        memory, report = stored(tmp_path, process)
        assert memory == expected()
        assert report.data_bytes == 128 * PAGE
        assert process.resident() == before


def test_a_part_of_a_mapping_is_stored(tmp_path: Path) -> None:
    with child(tmp_path, PRIVATE_FILE) as process:
        process.address += 3 * PAGE
        assert stored(tmp_path, process, MIB + 5)[0] == expected()[3 * PAGE :][: MIB + 5]


def test_pages_that_a_handler_brings_are_asked_for(tmp_path: Path) -> None:
    with child(tmp_path, USERFAULT) as process:
        memory, _ = stored(tmp_path, process)
    whole = bytearray(expected())
    for page in range(2048):
        if page % 16:
            whole[page * PAGE : (page + 1) * PAGE] = b"\x42" * PAGE
    assert memory == whole


def page_tables(pid: int) -> int:
    """Bytes of a process' page tables."""
    found = re.search(r"^VmPTE:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found
    return int(found[1]) * 1024


def read_calls() -> int:
    """How often this process has read from something."""
    found = re.search(r"^syscr: (\d+)", Path("/proc/self/io").read_text(), re.MULTILINE)
    assert found
    return int(found[1])


def test_what_was_never_touched_costs_nothing_however_long_it_is(tmp_path: Path) -> None:
    with child(tmp_path, VAST) as process:
        tables = page_tables(process.pid)
        region = GuestRegion(0, ProcessMemory(process.pid), offset=process.address, size=1 << 40)
        before = read_calls()
        report = vmsnap.SnapshotWriter(tmp_path / "vm1").write_memory([region])
        assert (report.logical_bytes, report.data_bytes) == (1 << 40, PAGE)
        # Linux before 6.7 has the page map read, of 128 MiB at a time; a call for each slice would be millions.
        assert read_calls() - before < 20_000
        assert vmsnap.open(tmp_path / "vm1").memory().read(1 << 39, PAGE) == b"\7" * PAGE
        assert page_tables(process.pid) == tables


@pytest.mark.parametrize(
    "setup", [ANONYMOUS, SHARED, MEMFD, PRIVATE_FILE], ids=["anonymous", "shared", "memfd", "file"]
)
def test_a_dump_of_all_mappings_touches_nothing_either(tmp_path: Path, setup: str) -> None:
    with child(tmp_path, setup) as process:
        # Once before, because the kernel creates its own pages, like the vdso, when they are first read.
        run("dump-process", process.pid, tmp_path / "vm0")
        before = process.resident(), page_tables(process.pid)
        run("dump-process", process.pid, tmp_path / "vm1")
        assert (process.resident(), page_tables(process.pid)) == before
        assert before[0] < 2 * MIB
        memory = vmsnap.open(tmp_path / "vm1").namespace("mem")
        [name] = [each for each in memory.list_fragments() if covers(each, process.address)]
        with memory.raw_fragment(name) as fragment:
            assert fragment.read_at(process.address - int(name.split("-")[0], 16), 8 * MIB) == expected()


def covers(name: str, address: int) -> bool:
    """Whether the fragment of that name has the address."""
    start, end = (int(part, 16) for part in name.split("-"))
    return start <= address < end


def test_of_a_very_long_hole_there_is_no_fragment(tmp_path: Path) -> None:
    with child(tmp_path, VAST) as process:
        tables = page_tables(process.pid)
        told = run("dump-process", process.pid, tmp_path / "vm1").stderr.decode()
        middle = process.address + (1 << 39)
        assert f"left out: {process.address:016x}-{middle:016x} anonymous (nothing but zeros)" in told
        assert page_tables(process.pid) < tables + MIB
        memory = vmsnap.open(tmp_path / "vm1").namespace("mem")
        [name] = [each for each in memory.list_fragments() if covers(each, middle)]
        with memory.raw_fragment(name) as fragment:
            assert fragment.size <= 64 * MIB
            assert fragment.read_at(0, PAGE + 1) == b"\7" * PAGE + b"\0"


def test_guard_pages_hold_nothing(tmp_path: Path) -> None:
    version = tuple(int(part) for part in re.findall(r"\d+", os.uname().release)[:2])
    if version < (6, 15):
        return  # the kernel does not have them, or does not report them
    with child(tmp_path, GUARDED) as process:
        memory, report = stored(tmp_path, process)
        assert memory == expected()
        assert report.unreadable == []
        done = run("dump-process", process.pid, tmp_path / "all")
        assert f"{process.address + 3 * PAGE:016x}-" not in done.stderr.decode()
        fragments = vmsnap.open(tmp_path / "all").namespace("mem")
        [name] = [each for each in fragments.list_fragments() if covers(each, process.address)]
        with fragments.raw_fragment(name) as fragment:
            assert fragment.read_at(process.address - int(name.split("-")[0], 16), 8 * MIB) == expected()


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives up being root")
@pytest.mark.parametrize("setup", [ANONYMOUS, SHARED, MEMFD], ids=["anonymous", "shared", "memfd"])
def test_the_owner_alone_gets_the_same_bytes(tmp_path: Path, setup: str) -> None:
    # Without root there is no /proc/PID/map_files: a memfd is found among the descriptors, and memory that is shared
    # without one is read whole.
    tmp_path.chmod(0o777)
    let_others_in(tmp_path)
    with child(tmp_path, setup, user=65534) as process:
        told, telling = os.pipe()
        if (pid := os.fork()) == 0:
            status = 1
            try:
                os.setgroups([])
                os.setgid(65534)
                os.setuid(65534)
                ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # or its own /proc/self is root's
                memory, _ = stored(tmp_path, process)
                status = 0 if memory == expected() else 2
            except BaseException as error:
                os.write(telling, repr(error).encode())
            finally:
                os._exit(status)
        os.close(telling)
        _, status = os.waitpid(pid, 0)
        assert os.waitstatus_to_exitcode(status) == 0, os.read(told, 4096).decode()


@row("memory-unreadable")
def test_pages_that_cannot_be_read_are_told_by_address(tmp_path: Path) -> None:
    # The end of a file that was truncated after it was mapped, and an address without a mapping.
    setup = """
with open(path, "w+b") as file:
    file.truncate(8 << 20)
    memory = mmap.mmap(file.fileno(), 8 << 20)
    fill(memory)
    file.truncate(4 << 20)
"""
    with child(tmp_path, setup) as process:
        region = GuestRegion(1 << 32, ProcessMemory(process.pid), offset=process.address, size=8 * MIB)
        writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
        with refused("memory-unreadable", f"guest-physical address {(1 << 32) + 4 * MIB:#x} cannot be read", tmp_path):
            writer.write_memory([region])
        assert os.listdir(tmp_path / "vm1") == []
        report = writer.write_memory([region], on_error="zero")
        assert report.unreadable == [range((1 << 32) + 4 * MIB, (1 << 32) + 8 * MIB)]
        memory = vmsnap.open(tmp_path / "vm1").memory().read(1 << 32, 8 * MIB)
        assert memory == expected()[: 4 * MIB] + bytes(4 * MIB)


@row("process-ended")
def test_a_process_that_has_ended_is_never_taken_for_zeros(tmp_path: Path) -> None:
    with child(tmp_path, ANONYMOUS) as process:
        region = GuestRegion(0, ProcessMemory(process.pid), offset=process.address, size=8 * MIB)
        process.process.kill()
        process.process.wait()
        writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
        with refused("process-ended", "has ended, or runs another program", tmp_path):
            writer.write_memory([region], on_error="zero")
        assert os.listdir(tmp_path / "vm1") == []


def test_refusals_name_the_process(tmp_path: Path) -> None:
    own = ProcessMemory(os.getpid())
    assert own.pid == os.getpid()
    assert repr(own) == f"vmsnap.ProcessMemory({os.getpid()})"
    with pytest.raises(FileNotFoundError, match="process 4194305: there is no such process"):
        ProcessMemory(4194305)
    with pytest.raises(vmsnap.InvalidArgumentError, match="pid"):
        ProcessMemory(-1)
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
    buffer = ctypes.create_string_buffer(1 << 20)
    start = -(-ctypes.addressof(buffer) // PAGE) * PAGE
    wrong = [
        (GuestRegion(0, own, offset=start), "the size of a region in a process must be given"),
        (GuestRegion(0, own, offset=start + 1, size=PAGE), "does not begin at a page boundary"),
        (GuestRegion(0, own, offset=0, size=PAGE), "nothing is mapped"),
        (GuestRegion(0, own, offset=(1 << 64) - PAGE, size=2 * PAGE), "after the last address"),
    ]
    for region, text in wrong:
        with pytest.raises(vmsnap.InvalidArgumentError, match=text):
            writer.write_memory([region])
    vmsnap.SnapshotWriter(tmp_path / "vm2").write_memory([GuestRegion(0, bytes(PAGE))])
    with pytest.raises(vmsnap.InvalidArgumentError, match="cannot be restored into a process"):
        vmsnap.open(tmp_path / "vm2").memory().restore([GuestRegion(0, own, offset=start, size=PAGE)])
