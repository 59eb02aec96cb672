"""The memory of a live process as a source: all it has is stored, and what it never touched stays untouched."""

import ctypes
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest
import vmsnap
from refusals import refused
from vmsnap import GuestRegion, ProcessMemory

PAGE = os.sysconf("SC_PAGESIZE")
MIB = 1 << 20

# Each makes a mapping `memory` of 8 MiB and fills every 16th page of it; `path` is for a file, if it needs one.
ANONYMOUS = "memory = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS); fill(memory)"
SHARED = "memory = mmap.mmap(-1, 8 << 20); fill(memory)"
MEMFD = """
fd = os.memfd_create("guest")
os.truncate(fd, 9 << 20)
memory = mmap.mmap(fd, 8 << 20, offset=1 << 20)
fill(memory)
"""
# As Firecracker restores: a private mapping of a file, with some pages the guest's own since.
PRIVATE_FILE = """
with open(path, "w+b") as file:
    file.truncate(8 << 20)
    for page in range(0, 2048, 32):
        file.seek(page * 4096)
        file.write(bytes([page % 251 + 1]) * 4096)
    file.flush()
    memory = mmap.mmap(file.fileno(), 8 << 20, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
for page in range(16, 2048, 32):
    memory[page * 4096 : (page + 1) * 4096] = bytes([page % 251 + 1]) * 4096
"""
# Pages that are missing are brought by a handler, as in a lazy restore or a post-copy migration: bytes of 0x42.
USERFAULT = """
import fcntl, struct, threading
memory = mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
fill(memory)
uffd = ctypes.CDLL(None, use_errno=True).syscall(323, os.O_CLOEXEC)
if uffd < 0:
    print("refused", os.strerror(ctypes.get_errno()), flush=True)
    sys.exit()
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
fcntl.ioctl(uffd, 0xC018AA3F, struct.pack("QQQ", 0xAA, 0, 0))
fcntl.ioctl(uffd, 0xC020AA00, struct.pack("QQQQ", start, 8 << 20, 1, 0))
page = ctypes.create_string_buffer(b"\\x42" * 4096)
def serve():
    while True:
        address = struct.unpack_from("Q", os.read(uffd, 32), 16)[0]
        copy = struct.pack("QQQQq", address & ~4095, ctypes.addressof(page), 4096, 0, 0)
        fcntl.ioctl(uffd, 0xC028AA03, bytearray(copy))
threading.Thread(target=serve, daemon=True).start()
"""
CHILD = """
import ctypes, mmap, os, sys
path, user = sys.argv[1], int(sys.argv[2])
if user != os.getuid():
    os.setgroups([])
    os.setgid(user)
    os.setuid(user)
    ctypes.CDLL(None).prctl(4, 1, 0, 0, 0)  # PR_SET_DUMPABLE: its owner may look into it again
def fill(memory):
    for page in range(0, 2048, 16):
        memory[page * 4096 : (page + 1) * 4096] = bytes([page % 251 + 1]) * 4096
{setup}
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
sys.stdin.read()
"""


def expected() -> bytes:
    memory = bytearray(8 * MIB)
    for page in range(0, 2048, 16):
        memory[page * 4096 : (page + 1) * 4096] = bytes([page % 251 + 1]) * 4096
    return bytes(memory)


@dataclass
class Child:
    pid: int
    address: int
    process: subprocess.Popen[str]

    def resident(self) -> int:
        """Bytes of the mapping that are in the process' page table, and of its file that are in memory."""
        text = Path(f"/proc/{self.pid}/smaps").read_text()
        part = text[text.index(f"{self.address:x}-") :]
        found = re.search(r"^Rss: +(\d+) kB", part, re.MULTILINE)
        assert found
        return int(found[1]) * 1024


@contextmanager
def child(tmp_path: Path, setup: str, user: int | None = None) -> Iterator[Child]:
    numbers = str(os.getuid() if user is None else user)
    command = [sys.executable, "-c", CHILD.replace("{setup}", setup), str(tmp_path / "file"), numbers]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            line = process.stdout.readline()
            if line.startswith("refused"):
                pytest.skip(f"userfaultfd is {line.strip()}")
            yield Child(process.pid, int(line), process)
        finally:
            process.kill()


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


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives up being root")
@pytest.mark.parametrize("setup", [ANONYMOUS, SHARED, MEMFD], ids=["anonymous", "shared", "memfd"])
def test_the_owner_alone_gets_the_same_bytes(tmp_path: Path, setup: str) -> None:
    # Without root there is no /proc/PID/map_files: a memfd is found among the descriptors, and memory that is shared
    # without one is read whole.
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o711)
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


def test_pages_that_cannot_be_read_are_told_by_address(tmp_path: Path) -> None:
    # The end of a file that was cut after it was mapped, and what is mapped nowhere.
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
        (GuestRegion(0, own, offset=start), "size is needed"),
        (GuestRegion(0, own, offset=start + 1, size=PAGE), "does not begin with a page"),
        (GuestRegion(0, own, offset=0, size=PAGE), "nothing is mapped"),
        (GuestRegion(0, own, offset=(1 << 64) - PAGE, size=2 * PAGE), "after the last address"),
    ]
    for region, text in wrong:
        with pytest.raises(vmsnap.InvalidArgumentError, match=text):
            writer.write_memory([region])
    vmsnap.SnapshotWriter(tmp_path / "vm2").write_memory([GuestRegion(0, bytes(PAGE))])
    with pytest.raises(vmsnap.InvalidArgumentError, match="not restored into a process"):
        vmsnap.open(tmp_path / "vm2").memory().restore([GuestRegion(0, own, offset=start, size=PAGE)])
