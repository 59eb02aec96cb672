"""A Linux guest whose processes check, round by round, that they find again what they left: the witness of a save.

Each process says its name and the number of its round on the serial console:

- `memory` rewrites and checks memory of its own, at a given rate;
- `files` rewrites files in a tmpfs and keeps their SHA-256, with a new process for each step;
- `disk` writes to a disk and checks it, past the page cache;
- `clock` sleeps for a tenth of a second.
"""

import functools
import re
import struct
import subprocess
import tempfile
from pathlib import Path

import pytest
from guest import Console, kernel_files, write_initramfs
from packages import CACHE
from support import MIB

SIZE_BYTES = 512 * MIB
SIZE = f"{SIZE_BYTES // MIB}M"
DISK_BYTES = 4 * MIB
NAMES = ("memory", "files", "disk", "clock")

# Rounds after which a process has checked all that it has, and rewritten all but the files.
_ALL = {"memory": 12, "files": 4, "disk": DISK_BYTES // (64 << 10), "clock": 3}

_MODULES = ("virtio_ring", "virtio", "virtio_pci_legacy_dev", "virtio_pci_modern_dev", "virtio_pci", "virtio_blk")
_SOURCE = Path(__file__).resolve().parent / "programs/witness.c"

_INIT = f"""#!/bin/busybox sh
/bin/busybox --install /bin
mount -t devtmpfs dev /dev
exec >/dev/ttyS0 2>&1 </dev/null
mkdir /work
mount -t tmpfs -o size=100m work /work
for each in {" ".join(_MODULES)}; do
  insmod /$each.ko || echo "bad module $each"
done
chmod +x /witness

files() {{
  cd /work
  for each in 0 1 2 3 4 5 6 7; do
    dd if=/dev/urandom of=$each bs=64k count=8 2>/dev/null
  done
  sha256sum ? > sums
  n=0
  while sha256sum -c -s sums; do
    each=$((n % 8))
    cat $(((n + 3) % 8)) sums | dd of=$each bs=64k count=8 conv=notrunc 2>/dev/null
    grep -v " $each$" sums > kept
    sha256sum $each >> kept
    mv kept sums
    echo "files $n"
    n=$((n + 1))
  done
  echo "bad files"
}}

clock() {{
  n=0
  while sleep 0.1; do
    echo "clock $n"
    n=$((n + 1))
  done
}}

/witness memory MEMORY &
/witness disk /dev/vda &
files &
clock &
wait
while :; do sleep 1; done
"""


@functools.cache
def _program() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        try:
            command = ["cc", "-static", "-O2", "-Wall", "-Wextra", "-Werror", "-o", f"{folder}/witness", _SOURCE]
            subprocess.run(command, check=True, capture_output=True, text=True)
        except FileNotFoundError:
            pytest.skip("there is no cc to compile a program of the guest with: apt install gcc libc6-dev")
        except subprocess.CalledProcessError as error:
            pytest.skip(f"a static program cannot be compiled: {error.stderr.strip()}")
        return Path(folder, "witness").read_bytes()


@functools.cache
def _initramfs(held_mib: int, changed_mib: int, period_ms: int) -> Path:
    path = CACHE / f"initramfs-witness-{held_mib}-{changed_mib}-{period_ms}"
    [drivers] = kernel_files().glob("lib/modules/*/kernel/drivers")
    modules = {f"{each}.ko": next(drivers.glob(f"*/{each}.ko")).read_bytes() for each in _MODULES}
    init = _INIT.replace("MEMORY", f"{held_mib} {changed_mib} {period_ms}")
    write_initramfs(path, init, witness=_program(), **modules)
    return path


def make_disk(path: Path, image: str) -> None:
    """Make an empty disk, "raw" or "qcow2"."""
    if image == "raw":
        path.touch()
        path.open("r+b").truncate(DISK_BYTES)
        return
    cluster = 1 << 16
    layout = (2 * cluster, 4)  # the block of reference counts, and how many clusters there are
    header = struct.pack(">4sIQIIQIIQQIIQ", b"QFI\xfb", 2, 0, 0, 16, DISK_BYTES, 0, 1, 3 * cluster, cluster, 1, 0, 0)
    clusters = header, struct.pack(">Q", layout[0]), struct.pack(">4H", *[1] * layout[1]), b""
    path.write_bytes(b"".join(each.ljust(cluster, b"\0") for each in clusters))


class Witness(Console):
    """The guest and its console. It holds `held_mib` and changes `changed_mib` of it in each `period_ms`."""

    def __init__(
        self, folder: Path, name: str = "witness", *, held_mib: int = 48, changed_mib: int = 4, period_ms: int = 100
    ) -> None:
        super().__init__(folder, name)
        self._initramfs = _initramfs(held_mib, changed_mib, period_ms)
        self.rounds: dict[str, int] = {}

    def options(self, disk: Path, image: str = "raw") -> list[str]:
        """Options for a QEMU with this guest and its disk; its memory is `SIZE`."""
        # The host's system does not end here: a flush of the guest need not reach the host's disk.
        drive = f"if=none,id=disk,format={image},file={disk},cache=unsafe"
        # On a busy machine, the kernel would report that a processor was stuck.
        boot = self.boot_from(self._initramfs, "nowatchdog")
        return [*boot, "-drive", drive, "-device", "virtio-blk-pci,drive=disk"]

    def goes_on(self) -> None:
        """Wait until each process has checked all that it has, and each round follows the one before."""
        wanted = {name: self.rounds.get(name, -1) + 2 + _ALL[name] for name in NAMES}
        while any(self.rounds.get(name, -1) < wanted[name] for name in NAMES):
            line = self.line()
            assert not re.search(rb"bad |panic|Oops|BUG:|I/O error", line), f"the guest says {line!r}"
            # The first line of a guest that was loaded may lack its beginning.
            if found := re.fullmatch(rb"([a-z]+) (\d+)", line):
                name, number = found[1].decode(), int(found[2])
                if name in NAMES:
                    last = self.rounds.get(name)
                    assert last is None or number == last + 1, f"round {number} of {name} comes after {last}"
                    self.rounds[name] = number
