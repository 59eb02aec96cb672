"""A process with known memory, which several test modules dump."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

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
# Pages 3 and 4 are guards (MADV_GUARD_INSTALL), one of them where pages existed before.
GUARDED = (
    ANONYMOUS
    + """
memory[4 * 4096 : 5 * 4096] = bytes([9]) * 4096
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
ctypes.CDLL(None).madvise(ctypes.c_void_p(start + 3 * 4096), ctypes.c_size_t(2 * 4096), 102)
"""
)
# A mapping of a TiB, of which one page, in the middle, was touched.
VAST = """
call = ctypes.CDLL(None).mmap
call.restype = ctypes.c_void_p
vast = call(None, ctypes.c_size_t(1 << 40), 3, 0x4022, -1, ctypes.c_long(0))  # MAP_NORESERVE
memory = (ctypes.c_char * (1 << 40)).from_address(vast)
ctypes.memset(vast + (1 << 39), 7, 4096)
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
