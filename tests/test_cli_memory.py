"""The command line for guest memory: `vmsnap dump`, `restore`, `peek` and `map`, as a user runs them."""

import io
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import vmsnap
from commands import error_of, run
from PIL import Image
from vmsnap import GuestRegion

PAGE = 4096
MIB = 1 << 20
TEXT = b"a line of text in guest memory\n" * 200


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    """A sparse raw file of 4 MiB: random, text, zero, then a hole."""
    path = tmp_path / "ram.bin"
    with open(path, "wb") as file:
        file.write(random.Random(1).randbytes(64 * PAGE) + (TEXT * 50)[: 32 * PAGE] + bytes(32 * PAGE))
        file.truncate(4 * MIB)
    return path


def test_a_file_goes_in_and_comes_out(tmp_path: Path, ram: Path, key_file: Path) -> None:
    opened = ["--key-file", key_file]
    told = run("dump", ram, tmp_path / "vm1", "--compress", "lz4", *opened).stderr.decode()
    assert "stored 4.0 MiB of guest memory" in told
    assert "384.0 KiB of data (ranges: 1)" in told
    run("restore", tmp_path / "vm1", tmp_path / "out", *opened)
    assert (tmp_path / "out").read_bytes() == ram.read_bytes()
    assert (tmp_path / "out").stat().st_blocks * 512 < MIB
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o600
    assert b"exists" in run("restore", tmp_path / "vm1", tmp_path / "out", *opened, status=1).stderr
    (tmp_path / "out").write_bytes(b"older")
    run("restore", tmp_path / "vm1", tmp_path / "out", "--force", *opened)
    assert (tmp_path / "out").read_bytes() == ram.read_bytes()


def test_json_tells_what_the_report_has(tmp_path: Path, ram: Path) -> None:
    told = json.loads(run("dump", ram, tmp_path / "vm1", "--json").stdout)
    assert told["seconds"] > 0
    del told["seconds"]
    stored = sum((tmp_path / "vm1" / name).stat().st_size for name in ("mem", "mem_metadata"))
    assert told == {
        "logical_bytes": 4 * MIB,
        "data_bytes": 96 * PAGE,
        "stored_bytes": stored,
        "ranges": 1,
        "unreadable": [],
    }


def test_ranges_lie_at_their_addresses(tmp_path: Path, ram: Path) -> None:
    low, high = ["--range", "0-100000"], ["--range", "0x100000-400000@0x100000000"]
    run("dump", ram, tmp_path / "vm1", *low, *high)
    content = ram.read_bytes()
    memory = vmsnap.open(tmp_path / "vm1").memory()
    assert memory.regions == [range(MIB), range(1 << 32, (1 << 32) + 3 * MIB)]
    run("restore", tmp_path / "vm1", tmp_path / "out")
    with open(tmp_path / "out", "rb") as file:
        assert file.read(MIB) == content[:MIB]
        file.seek(1 << 32)
        assert file.read() == content[MIB:]
    run("restore", tmp_path / "vm1", tmp_path / "high", "--region", 1)
    assert (tmp_path / "high").read_bytes() == content[MIB:]
    assert (
        b"there is no region 2; the 2 regions are numbered from 0"
        in run("restore", tmp_path / "vm1", tmp_path / "x", "--region", 2, status=1).stderr
    )
    assert not (tmp_path / "x").exists()


def test_a_live_process_is_dumped_and_goes_on(tmp_path: Path) -> None:
    program = """
import ctypes, mmap, sys
memory = mmap.mmap(-1, 4 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[8192:8200] = b"vmsnap!!"
print(ctypes.addressof(ctypes.c_char.from_buffer(memory)), flush=True)
print(sys.stdin.readline(), flush=True)
"""
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program], stdin=pipe, stdout=pipe, text=True) as child:
        assert child.stdout is not None
        address = int(child.stdout.readline())
        span = f"{address:x}-{address + (4 << 20):x}"
        told = json.loads(run("dump", child.pid, tmp_path / "part", "--range", f"{span}@0", "--json").stdout)
        assert (told["logical_bytes"], told["data_bytes"]) == (4 * MIB, PAGE)
        run("dump", child.pid, tmp_path / "all", "--compress", "lz4")
        assert child.communicate("goes on\n")[0] == "goes on\n\n"
    assert b"|vmsnap!!........|" in run("peek", tmp_path / "part", "0x2000", 16).stdout
    assert b"|vmsnap!!........|" in run("peek", tmp_path / "all", hex(address + 0x2000), 16).stdout
    refused = run("restore", tmp_path / "all", tmp_path / "out", status=1).stderr
    assert b"--region N" in refused
    assert not (tmp_path / "out").exists()


def test_peek_shows_what_hexdump_does(tmp_path: Path, ram: Path) -> None:
    run("dump", ram, tmp_path / "vm1", "--compress", "lz4")
    content = ram.read_bytes()
    shown = run("peek", tmp_path / "vm1", "0x40000", "8K").stdout.decode().splitlines()
    assert shown[0] == "00040000  61 20 6c 69 6e 65 20 6f  66 20 74 65 78 74 20 69  |a line of text i|"
    assert shown[-1] == "00042000"
    assert len(shown) == 513
    told = json.loads(run("peek", tmp_path / "vm1", 4095, 17, "--json").stdout)
    assert told == {"address": 4095, "size": 17, "hex": content[4095:4112].hex()}
    assert b"extend past the end of their region" in run("peek", tmp_path / "vm1", "0x3ff000", "2M", status=1).stderr
    assert b"is not a number" in run("peek", tmp_path / "vm1", "4x", 1, status=2).stderr


def test_a_namespace_has_memory_of_its_own(tmp_path: Path) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "fleet")
    writer.add_namespace("vm7").write_memory([GuestRegion(0, b"seven" * 1000)])
    assert b"|sevenseven" in run("peek", tmp_path / "fleet", 0, 16, "--namespace", "vm7").stdout
    run("restore", tmp_path / "fleet", tmp_path / "out", "--namespace", "vm7")
    assert (tmp_path / "out").read_bytes() == b"seven" * 1000
    assert "contains no guest memory" in error_of(run("peek", tmp_path / "fleet", 0, 16, status=1))


def test_the_map_shows_each_page_in_its_color(tmp_path: Path, ram: Path) -> None:
    vmsnap.SnapshotWriter(tmp_path / "vm1").write_memory([GuestRegion(0, ram)], detect_zeros=False)
    told = json.loads(run("map", tmp_path / "vm1", "-o", tmp_path / "map.png", "--json").stdout)
    assert told == {
        "page_bytes": 4096,
        "regions": [
            {"guest_base": 0, "size": 4 * MIB, "pages": {"hole": 896, "zero": 32, "text-like": 32, "dense": 64}}
        ],
    }
    picture = Image.open(tmp_path / "map.png").convert("RGB")
    # 64 pages a row, of 16 dots each: in all as many dots as there are pages of the color, beside those of the legend.
    counts = {color: count for count, color in picture.getcolors(1 << 20) or []}
    for color, pages in [((226, 229, 233), 896), ((143, 163, 190), 32), ((46, 160, 108), 32), ((201, 84, 56), 64)]:
        assert 0 <= counts[color] - pages * 256 < 200
    assert b"exists" in run("map", tmp_path / "vm1", "-o", tmp_path / "map.png", status=1).stderr
    assert b"is in the snapshot" in run("map", tmp_path / "vm1", "-o", tmp_path / "vm1" / "x.png", status=1).stderr
    assert sorted(os.listdir(tmp_path / "vm1")) == ["mem", "mem_metadata"]


def test_the_map_of_large_memory_has_the_mean_of_colors(tmp_path: Path) -> None:
    # 16 GiB, of which every other page of 32 MiB holds something: 2048 pages a row, 4 of them a dot.
    with open(tmp_path / "ram", "wb") as file:
        file.truncate(16 << 30)
        for page in range(0, 8192, 2):
            os.pwrite(file.fileno(), b"\xff" * PAGE, page * PAGE)
    vmsnap.SnapshotWriter(tmp_path / "vm1").write_memory([GuestRegion(0, tmp_path / "ram")])
    run("map", tmp_path / "vm1", "-o", tmp_path / "map.png")
    picture = Image.open(io.BytesIO((tmp_path / "map.png").read_bytes())).convert("RGB")
    colors = {color for _, color in picture.getcolors(1 << 20) or []}
    mean = tuple((hole + dense) // 2 for hole, dense in zip((226, 229, 233), (201, 84, 56), strict=True))
    assert any(max(abs(a - b) for a, b in zip(color, mean, strict=True)) <= 1 for color in colors)


def test_what_is_not_there_is_said(tmp_path: Path, ram: Path) -> None:
    assert b"no such process" in run("dump", "999999999", tmp_path / "vm1", status=1).stderr
    assert b"No such file" in run("dump", tmp_path / "absent", tmp_path / "vm1", status=1).stderr
    assert b"not START-END" in run("dump", ram, tmp_path / "vm1", "--range", "12", status=2).stderr
    assert b"before it begins" in run("dump", ram, tmp_path / "vm1", "--range", "12-12", status=2).stderr
    assert b"has 4194304 bytes" in run("dump", ram, tmp_path / "vm1", "--range", "0-400001", status=1).stderr
    assert not (tmp_path / "vm1").exists()
    assert [each.name for each in tmp_path.iterdir()] == ["ram.bin"]
