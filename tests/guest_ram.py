"""The memory of a real guest, in a sparse file: a Linux of 1 GiB that has unpacked, hashed, copied and removed files.

    python tests/guest_ram.py

makes target/guest/ram.img, in about half a minute; `make guest` runs it. An image that is there is used again until the
recipe or the kernel changes. ram.json beside it says what is in it.
"""

import asyncio
import hashlib
import io
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from time import monotonic

import pytest
from guest import Console, kernel, kernel_files, need_qemu, qemu_command, running, shared_memory, write_initramfs
from packages import CACHE, alone
from support import MIB
from vmsnap.qemu.monitor import connected, connection_to

IMAGE = CACHE / "ram.img"
ABOUT = CACHE / "ram.json"
SIZE = "1G"
# Pages that are allocated and not used stay holes; Debian's kernel would write zeros to them.
PARAMETERS = "page_alloc.shuffle=1 init_on_alloc=0"

# Each step says its name, so that a guest which hangs is told from a slow one.
_INIT = """#!/bin/busybox sh
/bin/busybox --install /bin
mount -t devtmpfs dev /dev
exec >/dev/ttyS0 2>&1 </dev/null
mkdir /proc /work
mount -t proc proc /proc
mount -t tmpfs -o size=800m work /work
cd /work
echo step unpack
tar xf /files.tar
rm /files.tar
echo step hash
find . -type f | xargs sha256sum > sums
echo step text
for n in 1 2 3 4 5 6 7 8; do cat sums /proc/kallsyms /proc/meminfo; done > text
echo step noise
dd if=/dev/urandom of=noise bs=1M count=48 2>/dev/null
echo step copy
mkdir copies
set -- $(find lib -type f | sort)
# Between what is copied lies what is allocated and never touched, as where programs reserve more than they need.
while [ $# -gt 3 ]; do
  fallocate -l $(($# * 7919 % 97 * 4 + 4))K copies/reserved$#
  cp $1 $2 $3 $4 copies
  shift 4
done
echo step remove
find copies -name '*.ko' | awk 'NR % 3' | xargs rm
echo step compress
tar cf - lib/modules/*/kernel/net | gzip -1 > net.tar.gz
echo step zero
dd if=/dev/zero of=zeros bs=1M count=32 2>/dev/null
rm -r lib/modules/*/kernel/drivers
sha256sum noise text net.tar.gz
echo done
while :; do sleep 1; done
"""


def _files() -> bytes:
    """Return the kernel's modules as a tar archive, in an order that does not depend on the file system."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        for path in sorted(kernel_files().glob("lib/modules/**/*.ko")):
            tar.add(path, path.relative_to(kernel_files()).as_posix())
    return archive.getvalue()


def _recipe() -> str:
    """Return a digest that differs between images."""
    return hashlib.sha256(f"{kernel().name} {SIZE} {PARAMETERS} {_INIT}".encode()).hexdigest()


def _is_made() -> bool:
    try:
        about = json.loads(ABOUT.read_text())
    except FileNotFoundError:
        return False
    return bool(about["recipe"] == _recipe() and IMAGE.is_file() and IMAGE.stat().st_size == about["size"])


def made() -> Path:
    """Return the image, made where it is not there yet; skips the test where QEMU or a package is missing."""
    need_qemu()
    recipe = _recipe()
    with alone("ram"):
        if not _is_made():
            with tempfile.TemporaryDirectory(dir=CACHE) as folder:
                whole = Path(folder, "ram.img")
                about = {"kernel": kernel().name, "recipe": recipe, **_run(Path(folder), whole)}
                ABOUT.unlink(missing_ok=True)
                whole.rename(IMAGE)
            ABOUT.write_text(json.dumps(about, indent=2) + "\n")
    return IMAGE


def _run(folder: Path, target: Path) -> dict[str, object]:
    """Let a guest work and stop, and copy its memory."""
    initrd, qmp, console = folder / "initramfs", folder / "qmp", Console(folder, "console")
    write_initramfs(initrd, _INIT, **{"files.tar": _files()})
    command = qemu_command(qmp, *console.boot_from(initrd, PARAMETERS), memory=shared_memory(SIZE), size=SIZE)
    try:
        with running(command, qmp) as process:
            while (line := console.line()) != b"done":
                assert b"panic" not in line, line
            asyncio.run(_stop(qmp))
            [memory] = _memfds(process.pid)
            with open(memory, "rb") as source, open(target, "wb") as copy:
                return _copied(source, copy)
    finally:
        console.close()


async def _stop(qmp: Path) -> None:
    async with connected(connection_to(qmp), "QEMU") as monitor:
        await monitor.run("stop")


def _memfds(pid: int) -> list[Path]:
    found = []
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # QEMU closed this one meanwhile
            if os.readlink(path).startswith("/memfd:memory-backend"):
                found.append(path)
    return found


def data_ranges(descriptor: int) -> Iterator[tuple[int, int]]:
    """Yield where a file's data begins and ends, as `SEEK_DATA` and `SEEK_HOLE` tell."""
    size, end = os.fstat(descriptor).st_size, 0
    while end < size:
        try:
            start = os.lseek(descriptor, end, os.SEEK_DATA)
        except OSError:  # ENXIO: a hole up to the end
            return
        end = os.lseek(descriptor, start, os.SEEK_HOLE)
        yield start, end


def _copied(source: io.BufferedReader, copy: io.BufferedWriter) -> dict[str, object]:
    """Copy a sparse file, and return a description of it."""
    size, at = os.fstat(source.fileno()).st_size, 0
    copy.truncate(size)
    ranges = list(data_ranges(source.fileno()))
    digest = hashlib.sha256()
    for start, end in ranges:
        _hash_zeros(digest, start - at)
        for at in range(start, end, MIB):
            piece = os.pread(source.fileno(), min(MIB, end - at), at)
            digest.update(piece)
            copy.seek(at)
            copy.write(piece)
        at = end
    _hash_zeros(digest, size - at)
    return {
        "size": size,
        "data_bytes": sum(end - start for start, end in ranges),
        "ranges": len(ranges),
        "sha256": digest.hexdigest(),
    }


def _hash_zeros(digest: "hashlib._Hash", length: int) -> None:
    zeros = bytes(MIB)
    for at in range(0, length, MIB):
        digest.update(zeros[: length - at])


def main() -> None:
    """Make the image where it is not there, and say what it is."""
    started = monotonic()
    try:
        path = made()
    except pytest.skip.Exception as reason:
        sys.exit(f"there is no real guest: {reason}")
    about = json.loads(ABOUT.read_text())
    print(
        f"{path}: {about['kernel']}, {about['size'] // MIB} MiB, {about['data_bytes'] // MIB} MiB of data in "
        f"{about['ranges']} ranges ({monotonic() - started:.0f} s)"
    )


if __name__ == "__main__":
    main()
