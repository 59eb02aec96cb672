"""Files with guests, as QEMU and libvirt write them."""

import bz2
import gzip
import lzma
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

from guest import PATIENCE, ask

XML = b"""<domain type='qemu'>
  <name>vm1</name>
  <os><type arch='x86_64' machine='pc-i440fx-7.2'>hvm</type></os>
</domain>
"""
COOKIE = b"<cookie><slirpHelper/></cookie>"

# virQEMUSaveFormat of libvirt.
NUMBERS = {"raw": 0, "gzip": 1, "bzip2": 2, "xz": 3, "lzop": 4, "zstd": 5}


def number(value: int, size: int = 4) -> bytes:
    """Return a number as it is in a migration stream: `size` bytes, the most significant first."""
    return value.to_bytes(size, "big")


# The footer of section 2, which is `ram`.
FOOTER = b"\x7e" + number(2)


def migrate(qmp: Path, path: Path, **capabilities: bool) -> Path:
    """Let QEMU save its guest in a file."""
    named = [{"capability": name.replace("_", "-"), "state": state} for name, state in capabilities.items()]
    if named:
        ask(qmp, "migrate-set-capabilities", capabilities=named)
    # mapped-ram needs a file in which QEMU can seek.
    ask(qmp, "migrate", uri=f"file:{path}" if "mapped_ram" in capabilities else f"exec:cat > '{path}'")
    status: Any = None
    while status not in ("completed", "failed"):
        status = ask(qmp, "query-migrate").get("status")
    assert status == "completed"
    return path


def resume(qmp: Path) -> None:
    """Resume a guest that QEMU loads with -incoming. It is in its file as it was saved, so it may be paused."""
    until = time.monotonic() + PATIENCE
    while ask(qmp, "query-status")["status"] == "inmigrate":
        assert time.monotonic() < until, "QEMU does not load the guest"
    ask(qmp, "cont")


def compressed(program: str, content: bytes) -> bytes:
    """Compress as libvirt does: by a program where Python cannot do it."""
    if program == "raw":
        return content
    if program in ("gzip", "bzip2", "xz"):
        return {"gzip": gzip, "bzip2": bz2, "xz": lzma}[program].compress(content)  # type: ignore[attr-defined,no-any-return]
    command = [program, "-c"]
    return subprocess.run(command, input=content, capture_output=True, check=True, timeout=PATIENCE).stdout


def header(
    *,
    magic: bytes = b"LibvirtQemudSave",
    version: int = 2,
    size: int = 0,
    running: int = 1,
    compression: int = 0,
    cookie_offset: int = 0,
    order: str = "<",
) -> bytes:
    """Return the header of a saved image: virQEMUSaveHeader of libvirt."""
    return magic + struct.pack(f"{order}5I56x", version, size, running, compression, cookie_offset)


def saved_image(
    stream: bytes,
    *,
    xml: bytes = XML,
    cookie: bytes = COOKIE,
    padding: int = 64 << 10,
    compression: str = "raw",
    running: bool = True,
    order: str = "<",
) -> bytes:
    """Return a saved image as libvirt writes it: virQEMUSaveDataWrite."""
    texts = xml + b"\0" + (cookie + b"\0" if cookie else b"")
    front = header(
        size=len(texts) + padding,
        running=int(running),
        compression=NUMBERS[compression],
        cookie_offset=len(xml) + 1 if cookie else 0,
        order=order,
    )
    return front + texts + bytes(padding) + compressed(compression, stream)
