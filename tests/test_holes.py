"""Holes: stepped over where there are some, and not believed in where they cannot be."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import vmsnap
from support import pattern
from vmsnap import GuestRegion

PAGE = 4096
MIB = 1 << 20


# vmsnap cannot detect wrong holes in a few places: --no-sparse exists for them.
@pytest.mark.parametrize(
    ("fault", "option"),
    [
        ("lseek:error=ENXIO", []),
        ("lseek:error=EINVAL", []),
        ("lseek:error=ENXIO", ["--no-sparse"]),
        ("lseek:error=ENXIO:when=3+", ["--no-sparse"]),
    ],
)
def test_a_file_that_is_said_to_be_one_hole_is_read(tmp_path: Path, fault: str, option: list[str]) -> None:
    if shutil.which("strace") is None:
        pytest.skip("there is no strace")
    noise = pattern(MIB)
    (tmp_path / "noise").write_bytes(noise)
    command = [sys.executable, "-m", "vmsnap", "dump", str(tmp_path / "noise"), str(tmp_path / "vm1"), *option]
    strace = ["strace", "-f", "-qq", "-o", "/dev/null", "-e", "trace=lseek", "-e", f"inject={fault}"]
    subprocess.run([*strace, *command], check=True)
    assert vmsnap.open(tmp_path / "vm1").memory().read(0, MIB) == noise


def test_all_is_read_where_holes_are_not_to_be_trusted(tmp_path: Path) -> None:
    with open(tmp_path / "ram", "wb") as file:
        file.truncate(4 * MIB)
        os.pwrite(file.fileno(), b"7" * PAGE, MIB)
    reports = []
    for number, options in enumerate(({}, {"sparse": False}, {"sparse": False, "detect_zeros": False})):
        writer = vmsnap.SnapshotWriter(tmp_path / f"vm{number}")
        reports.append(writer.write_memory([GuestRegion(0, tmp_path / "ram")], **options).data_bytes)  # type: ignore[arg-type]
        assert vmsnap.open(tmp_path / f"vm{number}").memory().read(0, 4 * MIB) == (tmp_path / "ram").read_bytes()
    assert reports == [PAGE, PAGE, 4 * MIB]


def test_a_page_in_sixteen_tebibytes_is_found_at_once(tmp_path: Path) -> None:
    descriptor = os.memfd_create("guest")
    size = 16 << 40
    os.truncate(descriptor, size)
    os.pwrite(descriptor, b"7" * PAGE, size // 3 // PAGE * PAGE)
    told: list[tuple[int, int]] = []
    report = vmsnap.SnapshotWriter(tmp_path / "vm1").write_memory(
        [GuestRegion(0, descriptor)], progress=lambda done, total: told.append((done, total))
    )
    os.close(descriptor)
    assert (report.logical_bytes, report.data_bytes, report.ranges) == (size, PAGE, 1)
    assert told[-1] == (size, size)
    memory = vmsnap.open(tmp_path / "vm1").memory()
    assert memory.read(size // 3 // PAGE * PAGE, PAGE) == b"7" * PAGE
    target = os.memfd_create("back")
    memory.restore([target])
    assert os.fstat(target).st_blocks * 512 == PAGE
    os.close(target)
