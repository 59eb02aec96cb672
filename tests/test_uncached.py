"""Dumps and restores that bypass the page cache."""

import ctypes
import mmap
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import vmsnap
from commands import run
from pages import REPOSITORY

_SIZE = 24 << 20

_libc = ctypes.CDLL(None, use_errno=True)


def _is_tmpfs(directory: Path) -> bool:
    found = subprocess.run(["stat", "-f", "-c", "%T", directory], capture_output=True, text=True, check=True)
    return found.stdout.strip() in ("tmpfs", "ramfs")


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return a directory on a file system whose files are not the page cache itself."""
    target = REPOSITORY / "target"
    target.mkdir(exist_ok=True)
    parent = next((each for each in (tmp_path, target) if not _is_tmpfs(each)), None)
    if parent is None:
        pytest.skip("the directory for temporary files and target/ are on tmpfs")
    directory = Path(tempfile.mkdtemp(dir=parent))
    yield directory
    shutil.rmtree(directory)


def _cached_part(path: Path) -> float:
    """Return the part of a file's pages that are in the page cache, after what was written is on the disk."""
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
        size = os.fstat(file.fileno()).st_size
        with mmap.mmap(file.fileno(), size, flags=mmap.MAP_PRIVATE) as mapped:
            pages = (ctypes.c_ubyte * -(-size // mmap.PAGESIZE))()
            start = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
            assert _libc.mincore(ctypes.c_void_p(start), ctypes.c_size_t(size), pages) == 0
    return sum(page & 1 for page in pages) / len(pages)


def _forget(path: Path) -> None:
    with open(path, "r+b") as file:
        os.fsync(file.fileno())
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def image(disk: Path) -> Path:
    path = disk / "ram.img"
    path.write_bytes(os.urandom(_SIZE))
    _forget(path)
    return path


@pytest.mark.parametrize("form", ["plain", "encrypted", "compressed"])
def test_no_page_stays_of_any_file_that_took_part(disk: Path, image: Path, form: str) -> None:
    key = vmsnap.generate_key() if form == "encrypted" else None
    with vmsnap.create(disk / "vm1", key=key) as writer:
        compress = "lz4" if form == "compressed" else None
        writer.write_memory([vmsnap.GuestRegion(0, image)], compress=compress, uncached=True)
    assert _cached_part(image) < 0.25
    assert _cached_part(disk / "vm1/mem") < 0.25
    vmsnap.open(disk / "vm1", key=key).memory().restore([disk / "back.img"], uncached=True)
    assert _cached_part(disk / "vm1/mem") < 0.25
    assert _cached_part(disk / "back.img") < 0.25
    assert (disk / "back.img").read_bytes() == image.read_bytes()


def test_the_page_cache_is_used_by_default(disk: Path, image: Path) -> None:
    with vmsnap.create(disk / "vm1") as writer:
        writer.write_memory([vmsnap.GuestRegion(0, image)])
    assert _cached_part(disk / "vm1/mem") > 0.75
    assert _cached_part(image) > 0.75


def test_the_command_line_has_it_for_both_ways(disk: Path, image: Path) -> None:
    run("dump", image, disk / "vm1", "--uncached")
    run("restore", disk / "vm1", disk / "back.img", "--uncached")
    for path in (image, disk / "vm1/mem", disk / "back.img"):
        assert _cached_part(path) < 0.25
    assert (disk / "back.img").read_bytes() == image.read_bytes()


def test_on_tmpfs_it_changes_nothing(tmp_path: Path) -> None:
    shm = Path("/dev/shm")
    if not os.access(shm, os.W_OK):
        pytest.skip("/dev/shm is not writable")
    ram = os.urandom(1 << 20)
    with tempfile.TemporaryDirectory(dir=shm) as folder:
        location = Path(folder) / "vm1"
        with vmsnap.create(location) as writer:
            writer.write_memory([vmsnap.GuestRegion(0, ram)], uncached=True)
        back = bytearray(len(ram))
        vmsnap.open(location).memory().restore([back], uncached=True)
    assert back == ram
