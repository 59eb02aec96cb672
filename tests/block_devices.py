"""Small file systems of several kinds, each in a file that is a block device."""

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

MIB = 1 << 20

# The programs that make them, and the smallest sizes that these accept.
MAKERS = {
    "ext4": (["mkfs.ext4", "-q", "-F"], 64 * MIB),
    "xfs": (["mkfs.xfs", "-q", "-m", "reflink=1"], 320 * MIB),
    "btrfs": (["mkfs.btrfs", "-q"], 128 * MIB),
}


@contextmanager
def mounted(kind: str, folder: Path) -> Iterator[Path]:
    """Mount a new file system of a kind.

    Loop devices are the only thing that CI may lack: many containers do not have them.
    """
    command, size = MAKERS[kind]
    maker = shutil.which(command[0], path="/usr/sbin:/sbin:/usr/bin:/bin")
    if maker is None:
        pytest.skip(f"there is no {command[0]}")
    image, target = folder / f"{kind}.img", folder / kind
    with open(image, "xb") as file:
        file.truncate(size)
    target.mkdir()
    subprocess.run([maker, *command[1:], image], check=True, capture_output=True)
    done = subprocess.run(["mount", "-o", "loop", image, target], capture_output=True, text=True, check=False)
    if done.returncode != 0:
        pytest.skip(f"there are no loop devices: {done.stderr.strip()}")
    try:
        yield target
    finally:
        subprocess.run(["umount", "--lazy", target], check=True)
        image.unlink()
