"""A real guest for QEMU: Debian's kernel and busybox, and an init that counts on the serial console.

Each line is ``count N SHA256``, the digest being that of 8 MiB which the guest holds in its memory.
"""

import asyncio
import functools
import hashlib
import os
import re
import select
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from packages import CACHE, told, unpacked
from qemu.qmp import ConnectError, QMPClient
from qemu.qmp.qmp_client import GreetingError, NegotiationError
from qemus import QEMU, Qemu
from support import MIB, pattern

HELD = pattern(8 * MIB, seed=8)
HELD_DIGEST = hashlib.sha256(HELD).hexdigest()

# The limit for any step of a guest on a busy machine, in seconds. A test fails if its guest takes longer.
PATIENCE = 120

_INIT = """#!/bin/busybox sh
/bin/busybox mount -t devtmpfs dev /dev
exec >/dev/ttyS0 2>&1 </dev/null
NOISE
n=0
while :; do
  set -- $(/bin/busybox sha256sum /held)
  echo "count $n $1"
  n=$((n+1))
done
"""


class Count(NamedTuple):
    number: int
    digest: str


def need_qemu() -> None:
    """Skip the test where there is no QEMU."""
    if shutil.which(QEMU) is None:
        pytest.skip(f"there is no {QEMU}: apt install qemu-system-x86")


def _kernel_package() -> str:
    """Return the package that today's linux-image-cloud-amd64 stands for."""
    depends = told("apt-cache", "depends", "linux-image-cloud-amd64")
    found = re.search(r"Depends: (linux-image-\S+-cloud-amd64)$", depends, re.MULTILINE)
    if not found:
        pytest.skip("apt knows no linux-image-cloud-amd64 (try apt-get update; on Debian for x86_64)")
    return found[1]


@functools.cache
def kernel_files() -> Path:
    """Return the directory of the files of Debian's cloud kernel: /boot/vmlinuz-VERSION, /lib/modules/VERSION."""
    known = sorted(CACHE.glob("packages/linux-image-*-cloud-amd64"))
    return known[-1] if known else unpacked(_kernel_package())


def kernel() -> Path:
    [found] = kernel_files().glob("boot/vmlinuz-*")
    return found


def busybox() -> Path:
    return unpacked("busybox-static") / "bin/busybox"


@functools.cache
def initramfs(random_mib: int = 0) -> Path:
    """Return an archive with the init and the data for it to hold, or with an init that creates MiB of noise."""
    noise = f"/bin/busybox dd if=/dev/urandom of=/held bs=1M count={random_mib}" if random_mib else ""
    path = CACHE / f"initramfs-{random_mib}"
    write_initramfs(path, _INIT.replace("NOISE", noise), held=b"" if random_mib else HELD)
    return path


def write_initramfs(path: Path, init: str, **files: bytes) -> None:
    """Write an archive with busybox, a script for it, and files at the root, for a kernel to unpack."""
    directory, program = 0o40755, 0o100755
    entries = [
        ("bin", directory, b""),
        ("dev", directory, b""),
        ("bin/busybox", program, busybox().read_bytes()),
        ("init", program, init.encode()),
        *((name, 0o100644, content) for name, content in files.items()),
    ]
    # Another process may boot from it at this moment.
    whole = path.with_name(f"{path.name}.{os.getpid()}")
    whole.write_bytes(_cpio(entries))
    whole.rename(path)


def _cpio(entries: list[tuple[str, int, bytes]]) -> bytes:
    """Pack files as the kernel unpacks them: Documentation/driver-api/early-userspace/buffer-format.rst, "newc"."""
    archive = bytearray()
    for inode, (name, mode, content) in enumerate([*entries, ("TRAILER!!!", 0, b"")], start=1):
        path = name.encode() + b"\0"
        numbers = (inode, mode, 0, 0, 1, 0, len(content), 0, 0, 0, 0, len(path), 0)
        archive += b"070701" + b"".join(b"%08x" % number for number in numbers) + path
        archive += bytes(-len(archive) % 4) + content
        archive += bytes(-len(archive) % 4)
    return bytes(archive)


def shared_memory(size: str = "256M") -> str:
    return f"memory-backend-memfd,id=mem,size={size},share=on"


def file_memory(path: str | Path, size: str = "256M") -> str:
    """Memory in a file, which newer versions of QEMU leave out of their stream too."""
    return f"memory-backend-file,id=mem,size={size},share=on,mem-path={path}"


def qemu_command(
    qmp: Path,
    *more: str | Path,
    machine: str = "pc",
    memory: str | None = None,
    size: str = "256M",
    qemu: Qemu | None = None,
    accel: str = "tcg",
) -> list[str]:
    """Start a QEMU, that of the system unless said, with nothing but a processor, memory and a monitor.

    The memory is the backend of this object, a memfd unless said; with "" it is that of a plain `-m`.
    """
    backend = ["-object", memory or shared_memory(size)] if memory != "" else []
    return [
        *(qemu.command if qemu else [QEMU]),
        *("-accel", accel, "-nodefaults", "-no-user-config", "-display", "none", "-m", size, *backend),
        *("-machine", f"{machine},memory-backend=mem" if backend else machine),
        *("-qmp", f"unix:{qmp},server=on,wait=off"),
        *map(str, more),
    ]


class Console:
    """The serial console of a guest: a FIFO, so that nothing gets lost where one QEMU ends and another goes on."""

    def __init__(self, folder: Path, name: str) -> None:
        self.path = folder / name
        for end in ("in", "out"):
            os.mkfifo(f"{self.path}.{end}")
        # For writing too: it is not at its end when a QEMU is.
        self._out = os.open(f"{self.path}.out", os.O_RDWR)
        self._rest = b""

    def boot(self, random_mib: int = 0) -> list[str]:
        """Return the options for a QEMU with the guest that counts."""
        return self.boot_from(initramfs(random_mib))

    def boot_from(self, initrd: Path, parameters: str = "") -> list[str]:
        """Return the options for a QEMU with the kernel of Debian and an initramfs."""
        return [
            *("-serial", f"pipe:{self.path}"),
            *("-kernel", str(kernel()), "-initrd", str(initrd)),
            *("-append", f"console=ttyS0 quiet panic=-1 {parameters}"),
        ]

    def has_line(self) -> bool:
        """Whether the guest has said a line that was not read."""
        while b"\n" not in self._rest and select.select([self._out], [], [], 0)[0]:
            self._rest += os.read(self._out, 1 << 16)
        return b"\n" in self._rest

    def line(self) -> bytes:
        """Wait for a line, without its end."""
        while b"\n" not in self._rest:
            ready, _, _ = select.select([self._out], [], [], PATIENCE)
            assert ready, f"the guest says nothing after {self._rest!r}"
            self._rest += os.read(self._out, 1 << 16)
        line, _, self._rest = self._rest.partition(b"\n")
        return line.rstrip(b"\r")

    def count(self) -> Count:
        """Wait for the guest to count."""
        while True:
            if found := re.fullmatch(rb"count (\d+) ([0-9a-f]{64})", self.line()):
                return Count(int(found[1]), found[2].decode())

    def counts(self, number: int) -> list[Count]:
        return [self.count() for _ in range(number)]

    def close(self) -> None:
        os.close(self._out)


def listens(qmp: Path) -> bool:
    """Whether somebody listens at a socket: it is there a moment before."""
    with socket.socket(socket.AF_UNIX) as probe:
        return probe.connect_ex(str(qmp)) == 0


def ask(qmp: Path, command: str, **arguments: object) -> Any:
    """Ask a QEMU one thing, by a connection that is closed again."""

    async def connected() -> QMPClient:
        while True:
            client = QMPClient()
            try:
                await client.connect(str(qmp))
                return client
            except ConnectError as error:
                # It takes an event that comes while the connection begins for the greeting or an answer.
                if not isinstance(error.exc, (GreetingError, NegotiationError)):
                    raise

    async def asking() -> object:
        client = await connected()
        try:
            named = {name.replace("_", "-"): value for name, value in arguments.items()}
            return await client.execute(command, named or None)
        finally:
            await client.disconnect()

    return asyncio.run(asking())


@contextmanager
def running(command: list[str], qmp: Path) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a QEMU, killed at the end where it has not ended; it has a monitor when this begins."""
    qmp.unlink(missing_ok=True)
    with subprocess.Popen(command) as process:
        try:
            until = time.monotonic() + PATIENCE
            while not listens(qmp):
                assert process.poll() is None, f"QEMU ended with status {process.returncode}"
                assert time.monotonic() < until, "QEMU makes no monitor"
                time.sleep(0.01)
            yield process
        finally:
            process.kill()


@contextmanager
def ended(process: "subprocess.Popen[bytes]") -> Iterator["subprocess.Popen[bytes]"]:
    """Kill a process at the end."""
    try:
        yield process
    finally:
        process.kill()
        process.wait()
