"""Guest memory from Python: sources, destinations, reading at random, progress."""

import mmap
import os
import pickle
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import numpy as np
import pytest
import vmsnap
from refusals import refused, refused_elsewhere, row
from support import pattern
from vmsnap import GuestRegion

KEY = bytes(range(32))
PAGE = 4096
FORMS = pytest.mark.parametrize("compress", [None, "lz4"])
BOTH = pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])


def guest() -> bytearray:
    """Make 2 MiB: holes, text and noise."""
    memory = bytearray(2 << 20)
    numbers = random.Random(1)
    for page in range(0, 512, 3):
        content = numbers.randbytes(PAGE) if page % 2 else b"text " * 819 + b"\0"
        memory[page * PAGE : (page + 1) * PAGE] = content
    return memory


def memfd_of(memory: bytes) -> int:
    descriptor = os.memfd_create("guest")
    os.truncate(descriptor, len(memory))
    for start in range(0, len(memory), PAGE):
        page = memory[start : start + PAGE]
        if any(page):
            os.pwrite(descriptor, page, start)
    return descriptor


@BOTH
@FORMS
def test_memory_goes_and_comes_back(tmp_path: Path, key: bytes | None, compress: str | None) -> None:
    memory = guest()
    with vmsnap.create(tmp_path / "vm1", key=key) as snap:
        report = snap.write_memory([GuestRegion(0x1000, memory)], compress=compress)
    pages = len(range(0, 512, 3))
    assert (report.logical_bytes, report.data_bytes, report.ranges) == (2 << 20, pages * PAGE, pages)
    assert report.stored_bytes == sum((tmp_path / "vm1" / name).stat().st_size for name in ("mem", "mem_metadata"))
    assert report.seconds > 0
    assert report.unreadable == []
    stored = vmsnap.open(tmp_path / "vm1", key=key).memory()
    assert stored.regions == [range(0x1000, 0x1000 + (2 << 20))]
    assert stored.data_ranges(0)[1] == range(3 * PAGE, 4 * PAGE)
    assert (stored.compressed, stored.data_bytes) == (compress is not None, report.data_bytes)
    assert stored[0x1000:0x3000] == stored.read(0x1000, 0x2000) == memory[:0x2000]
    assert stored.read(0x1800, len(memory) - 0x800) == memory[0x800:]
    back = bytearray(b"\xee" * len(memory))
    stored.restore([back])
    assert back == memory


def test_sources_of_every_kind_store_the_same(tmp_path: Path) -> None:
    memory = guest()
    descriptor = memfd_of(memory)
    (tmp_path / "ram").write_bytes(b"head" + memory)
    with mmap.mmap(descriptor, 0) as mapping, open(descriptor, "rb", closefd=False) as file:
        sources: list[tuple[object, int]] = [
            (memory, 0),
            (bytes(memory), 0),
            (memoryview(memory), 0),
            (np.frombuffer(memory, np.uint64), 0),
            (mapping, 0),
            (descriptor, 0),
            (file, 0),
            (tmp_path / "ram", 4),
            (str(tmp_path / "ram"), 4),
        ]
        for number, (source, offset) in enumerate(sources):
            writer = vmsnap.SnapshotWriter(tmp_path / f"vm{number}")
            writer.write_memory([GuestRegion(0, source, offset=offset, size=len(memory))])  # type: ignore[arg-type]
            for name in ("mem", "mem_metadata"):
                assert (tmp_path / f"vm{number}" / name).read_bytes() == (tmp_path / "vm0" / name).read_bytes()
    os.close(descriptor)


@FORMS
@pytest.mark.parametrize("detect_zeros", [True, False])
@pytest.mark.parametrize("min_gap_bytes", [1, 4096, 3 * PAGE])
def test_memory_that_is_promised_to_stay_is_stored_as_any_other(
    tmp_path: Path, compress: Literal["lz4"] | None, detect_zeros: bool, min_gap_bytes: int
) -> None:
    memory = bytearray(guest() + pattern(600_001))
    for number, stable in enumerate((False, True)):
        with vmsnap.create(tmp_path / f"vm{number}") as snap:
            regions = [GuestRegion(0, memory, size=1_000_000), GuestRegion(1 << 32, memory, offset=123)]
            snap.write_memory(
                regions, compress=compress, detect_zeros=detect_zeros, min_gap_bytes=min_gap_bytes, stable=stable
            )
        assert vmsnap.verify(tmp_path / f"vm{number}").ok
    for name in ("mem", "mem_metadata"):
        assert (tmp_path / "vm1" / name).read_bytes() == (tmp_path / "vm0" / name).read_bytes()
    with vmsnap.create(tmp_path / "vm2", key=KEY) as snap:
        snap.write_memory([GuestRegion(7, memory)], compress=compress, chunk_size_bytes=5000, stable=True)
    assert vmsnap.open(tmp_path / "vm2", key=KEY).memory().read(7, len(memory)) == memory


def test_destinations_of_every_kind_get_the_same(tmp_path: Path) -> None:
    memory = guest()
    vmsnap.SnapshotWriter(tmp_path / "vm1").write_memory([GuestRegion(0x5000, memory)], compress="lz4")
    stored = vmsnap.open(tmp_path / "vm1").memory()
    stored.restore([tmp_path / "new"])
    assert (tmp_path / "new").read_bytes() == memory
    assert (tmp_path / "new").stat().st_blocks * 512 < len(memory) // 2
    descriptor = os.memfd_create("guest")
    os.pwrite(descriptor, b"\xee" * len(memory), 0)
    with mmap.mmap(descriptor, len(memory)) as mapping:
        for target in (descriptor, mapping):
            os.pwrite(descriptor, b"\xee" * len(memory), 0)
            stored.restore([target])
            assert os.pread(descriptor, len(memory), 0) == memory
    array = np.ones(len(memory), np.uint8)
    stored.restore([array])
    assert array.tobytes() == memory
    with open(tmp_path / "image", "w+b") as file:
        stored.restore([GuestRegion(0x5000, file, offset=0x5000)])
    assert (tmp_path / "image").read_bytes() == bytes(0x5000) + memory
    wide = bytearray(b"\xee" * (len(memory) + 20))
    stored.restore([GuestRegion(0x5000, wide, offset=10, size=len(memory))])
    assert wide == b"\xee" * 10 + memory + b"\xee" * 10
    os.close(descriptor)


@row(
    "memory-regions",
    "memory-options",
    "process-missing",
    "process-not-permitted",
    "process-range",
    "no-memory",
    "destinations",
    "outside-memory",
    "memory-malformed",
)
def test_each_row_of_guest_memory_is_as_the_table_says(tmp_path: Path) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
    own = vmsnap.ProcessMemory(os.getpid())
    page = bytes([7]) * PAGE
    with refused("memory-regions", "overlap", tmp_path):
        writer.write_memory([GuestRegion(0, page), GuestRegion(PAGE - 1, page)])
    with refused("memory-options", "lz4", tmp_path):
        writer.write_memory([GuestRegion(0, page)], compress="zstd")  # type: ignore[arg-type]
    with refused("process-missing", "process 4194305: there is no such process", tmp_path):
        vmsnap.ProcessMemory(4194305)
    script = "os.setgid(65534) if os.getuid() == 0 else None\nos.setuid(65534) if os.getuid() == 0 else None\n"
    script += "vmsnap.ProcessMemory(1)"
    refused_elsewhere("process-not-permitted", "process 1: no permission to read its memory", tmp_path, script)
    with refused("process-range", "nothing is mapped", tmp_path):
        writer.write_memory([GuestRegion(0, own, offset=0, size=PAGE)])
    with refused("no-memory", "mem_metadata", tmp_path):
        vmsnap.open(tmp_path / "vm1").memory()
    writer.write_memory([GuestRegion(0x1000, page), GuestRegion(0x8000, page)])
    memory = vmsnap.open(tmp_path / "vm1").memory()
    target = tmp_path / "target"
    target.touch()
    with refused("destinations", "overlap", tmp_path):
        memory.restore([GuestRegion(each.start, target, offset=0) for each in memory.regions])
    with refused("outside-memory", "no memory at guest-physical address 0x5000", tmp_path):
        memory.read(0x5000, 1)
    (tmp_path / "vm1/mem").write_bytes(page)
    with refused("memory-malformed", "", tmp_path):
        vmsnap.open(tmp_path / "vm1").memory()


def test_a_file_that_is_allocated_stays_so_if_told(tmp_path: Path) -> None:
    """Whatever it holds, in parts of pages, and at an offset; a file with holes keeps to holes."""
    mib = 1 << 20
    content = bytes(mib + 100) + pattern(mib) + bytes(6 * mib - 100)
    with vmsnap.create(tmp_path / "vm1") as writer:
        writer.write_memory([GuestRegion(0, content)])
    memory = vmsnap.open(tmp_path / "vm1").memory()
    path = tmp_path / "ram"
    for before in (bytes(9 * mib), b"\xff" * (9 * mib)):
        path.write_bytes(before)
        allocated = blocks_of(path)
        memory.restore([GuestRegion(0, path, offset=1000, size=len(content))], keep_allocated=True)
        assert path.read_bytes() == before[:1000] + content + before[1000 + len(content) :]
        assert blocks_of(path) == allocated
    path.write_bytes(b"")
    os.truncate(path, len(content))
    memory.restore([path], keep_allocated=True)
    assert path.read_bytes() == content
    assert blocks_of(path) * 512 < len(content) // 2


def blocks_of(path: Path) -> int:
    """Return the number of allocated blocks. A file system may allocate them only when data is written to the disk."""
    with open(path, "rb") as file:
        os.fsync(file)
        return os.fstat(file.fileno()).st_blocks


def test_two_regions_are_not_restored_to_the_same_bytes(tmp_path: Path) -> None:
    regions = [GuestRegion(0x1000, b"a" * PAGE), GuestRegion(0x8000, b"b" * PAGE)]
    vmsnap.SnapshotWriter(tmp_path / "vm1").write_memory(regions)
    memory = vmsnap.open(tmp_path / "vm1").memory()
    both = bytearray(2 * PAGE - 1)
    for targets in (
        [tmp_path / "new", tmp_path / "new"],
        [memoryview(both)[:PAGE], memoryview(both)[PAGE - 1 :]],
        [GuestRegion(0x1000, tmp_path / "new", offset=0), GuestRegion(0x8000, tmp_path / "new", offset=PAGE - 1)],
    ):
        with pytest.raises(vmsnap.InvalidArgumentError, match=r"same bytes|overlap"):
            memory.restore(targets)  # type: ignore[arg-type]
    assert both == bytes(len(both))
    assert not (tmp_path / "new").exists()
    seen: list[tuple[int, int]] = []
    memory.restore([None, tmp_path / "new"], progress=lambda done, total: seen.append((done, total)))
    assert (tmp_path / "new").read_bytes() == b"b" * PAGE
    assert seen[-1] == (PAGE, PAGE)


def test_refusals_leave_everything_as_it_was(tmp_path: Path) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
    page = bytes([7]) * PAGE
    refusals: list[tuple[Callable[[], object], str]] = [
        (lambda: writer.write_memory([GuestRegion(0, page), GuestRegion(1, page)]), "overlap"),
        (lambda: writer.write_memory([GuestRegion(0, page, offset=1, size=PAGE)]), "has 4096 bytes"),
        (lambda: writer.write_memory([GuestRegion(-1, page)]), "guest_base"),
        (lambda: writer.write_memory([GuestRegion(0, page)], compress="zstd"), "lz4"),  # type: ignore[arg-type]
        (lambda: writer.write_memory([GuestRegion(0, page)], block_size_bytes=5), "64 KiB"),
        (lambda: writer.write_memory([GuestRegion(0, page)], on_error="skip"), "on_error"),  # type: ignore[arg-type]
    ]
    for call, text in refusals:
        with pytest.raises(vmsnap.InvalidArgumentError, match=text):
            call()
    with pytest.raises(FileNotFoundError):
        writer.write_memory([GuestRegion(0, tmp_path / "absent")])
    assert os.listdir(tmp_path / "vm1") == []
    writer.write_memory([GuestRegion(0x1000, page)])
    with pytest.raises(FileExistsError):
        writer.write_memory([GuestRegion(0x1000, page)])
    stored = vmsnap.open(tmp_path / "vm1").memory()
    back = bytearray(PAGE)
    wrong: list[tuple[list[object], str]] = [
        ([], "expected 1 memory regions but there are 0"),
        ([bytearray(5)], "has 5 bytes"),
        ([GuestRegion(0, back)], "is at 0x0"),
        ([back, bytearray(PAGE)], "expected 1"),
    ]
    for targets, text in wrong:
        with pytest.raises(vmsnap.InvalidArgumentError, match=text):
            stored.restore(targets)  # type: ignore[arg-type]
    assert back == bytes(PAGE)
    for address, size in [(0, 1), (0x1000, PAGE + 1), (-1, 1)]:
        with pytest.raises(vmsnap.InvalidArgumentError):
            stored.read(address, size)
    with pytest.raises(TypeError):
        stored[0x1000]  # type: ignore[index]
    with pytest.raises(vmsnap.InvalidArgumentError):
        stored[0x2000:0x1000]
    with pytest.raises(vmsnap.InvalidArgumentError):
        stored.data_ranges(1)


def test_progress_is_told_and_may_cancel(tmp_path: Path) -> None:
    memory = np.random.default_rng(1).integers(0, 256, 768 << 20, np.uint8)
    told: list[tuple[int, int]] = []

    def show(done: int, total: int) -> None:
        told.append((done, total))
        if len(told) == 2:
            raise KeyboardInterrupt

    writer = vmsnap.SnapshotWriter(tmp_path / "vm1", key=KEY, threads=1)
    with pytest.raises(KeyboardInterrupt):
        writer.write_memory([GuestRegion(0, memory)], compress="lz4", progress=show)
    assert all(0 <= done <= total == memory.size for done, total in told)
    assert told == sorted(told)
    assert os.listdir(tmp_path / "vm1") == ["enc_metadata"]


def test_damaged_memory_is_told(tmp_path: Path) -> None:
    memory = guest()
    for name, key, compress in [("a", None, None), ("b", None, "lz4"), ("c", KEY, None), ("d", KEY, "lz4")]:
        root = tmp_path / name
        vmsnap.SnapshotWriter(root, key=key).write_memory([GuestRegion(0, memory)], compress=compress)  # type: ignore[arg-type]
        whole = (root / "mem").read_bytes()
        for damaged in (whole[:-1], whole + b"\0", whole[: len(whole) // 2], b""):
            (root / "mem").write_bytes(damaged)
            with pytest.raises((vmsnap.CorruptSnapshotError, vmsnap.AuthenticationError)):
                vmsnap.open(root, key=key).memory()
        (root / "mem").write_bytes(whole)
        vmsnap.open(root, key=key).memory().restore([bytearray(len(memory))])


def test_lz4s_own_program_reads_it(tmp_path: Path) -> None:
    try:
        subprocess.run(["lz4", "--version"], capture_output=True, check=True)
    except FileNotFoundError:
        if os.environ.get("VMSNAP_REQUIRE_ALL") == "1":
            raise
        pytest.skip("the program lz4 is not installed")
    memory = guest()
    vmsnap.SnapshotWriter(tmp_path / "plain").write_memory([GuestRegion(0, memory)])
    for size in (64, 256, 1024, 4096):
        root = tmp_path / str(size)
        vmsnap.SnapshotWriter(root).write_memory(
            [GuestRegion(0, memory)], compress="lz4", block_size_bytes=size << 10, chunk_size_bytes=100
        )
        done = subprocess.run(["lz4", "-d", "-c", str(root / "mem")], capture_output=True, check=True)
        assert done.stdout == (tmp_path / "plain/mem").read_bytes()


def test_a_writer_from_a_pickle_writes_memory(tmp_path: Path) -> None:
    with vmsnap.create(tmp_path / "vm1", key=KEY) as snap:
        pickle.loads(pickle.dumps(snap.add_namespace("ram"))).write_memory([GuestRegion(0, b"x" * 5000)])
    assert vmsnap.open(tmp_path / "vm1", key=KEY).namespace("ram").memory()[4990:5000] == b"x" * 10


def test_a_forked_child_is_refused(tmp_path: Path) -> None:
    vmsnap.SnapshotWriter(tmp_path / "vm1", key=KEY).write_memory([GuestRegion(0, guest())])
    memory = vmsnap.open(tmp_path / "vm1", key=KEY).memory()
    assert memory.read(0, 16)
    refusals: list[Callable[[], object]] = [lambda: memory.read(0, 16), lambda: memory.restore([bytearray(2 << 20)])]
    for call in refusals:
        if (pid := os.fork()) == 0:
            status = 1
            try:
                call()
            except vmsnap.StateError:
                status = 0
            finally:
                os._exit(status)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0


@FORMS
@BOTH
def test_a_large_and_scattered_guest_takes_little_memory(
    tmp_path: Path, key: bytes | None, compress: str | None
) -> None:
    # 16 GiB, of which 100,000 pages hold something, none beside another.
    script = """
import os, sys, vmsnap
root, key, compress = sys.argv[1], bytes.fromhex(sys.argv[2]) or None, sys.argv[3] or None
guest, back = os.memfd_create("guest"), os.memfd_create("back")
os.truncate(guest, 16 << 30)
for page in range(0, 4 << 20, 42):
    os.pwrite(guest, b"page %7d " % page * 315, page * 4096)

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])

def begin():
    open("/proc/self/clear_refs", "w").write("5")
    return peak()

before = begin()
report = vmsnap.SnapshotWriter(root, key=key, threads=2).write_memory([vmsnap.GuestRegion(0, guest)], compress=compress)
print(peak() - before, report.ranges)
before = begin()
memory = vmsnap.open(root, key=key, threads=2).memory()
memory.restore([back])
print(peak() - before, memory.read(42 * 4096, 12).decode())
"""
    command = [sys.executable, "-c", script, str(tmp_path / "vm1"), (key or b"").hex(), compress or ""]
    (dumped, ranges), (restored, *text) = (
        line.split() for line in subprocess.check_output(command, text=True).splitlines()
    )
    assert int(ranges) > 65_536
    assert text == ["page", "42"]
    assert max(int(dumped), int(restored)) < 64 << 10
