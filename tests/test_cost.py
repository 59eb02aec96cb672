"""The cost of a dump or a restore is linear in the size of the memory: counted in system calls and pages, not seconds.

A process does one thing between two marks, and strace writes down its system calls. Its cost is how many these are, how
many pages they read and write, and how many pages the kernel steps through to find the end of data: on tmpfs SEEK_HOLE
looks at each page from where it begins to where it ends.
"""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

PAGE = 4096

# The number of these calls depends on the load of the machine.
_BY_CHANCE = "futex,sched_yield,restart_syscall,rt_sigreturn,clock_nanosleep"
_COPYING = {"read", "pread64", "write", "pwrite64", "process_vm_readv", "copy_file_range", "sendfile"}

_HEAD = """
import mmap, os, resource, sys
import vmsnap
from vmsnap import GuestRegion

path, n, threads = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
PAGE = 4096
# Regions have files of their own here.
most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

def memfd(size, pages):
    descriptor = os.memfd_create("guest")
    os.truncate(descriptor, size)
    for page in pages:
        os.pwrite(descriptor, page.to_bytes(8, "little") * (PAGE // 8), page * PAGE)
    return descriptor

def dump(regions):
    vmsnap.SnapshotWriter(path, threads=threads).write_memory(regions)

def stored():
    return vmsnap.SnapshotReader(path, threads=threads).memory()

def measured(work):
    os.access("/BEGIN", 0)
    work()
    os.access("/END", 0)
"""

# Shapes of guest memory: each is made from n, and has n pages of data or half as many.
_GUESTS = {
    # A real one and a bad one: half of it never touched, then half of it touched page by page.
    "half-hole-half-data": "regions = [GuestRegion(0, memfd(2 * n * PAGE, range(n, 2 * n)))]",
    "half-data-half-hole": "regions = [GuestRegion(0, memfd(2 * n * PAGE, range(n)))]",
    "runs": "regions = [GuestRegion(0, memfd(2 * n * PAGE, (page for page in range(2 * n) if page % 600 >= 300)))]",
    "single-pages": "regions = [GuestRegion(0, memfd(8 * n * PAGE, range(5, 8 * n, 8)))]",
    "a-page-in-16-mib": "regions = [GuestRegion(0, memfd(n << 24, range(5, n << 12, 1 << 12)))]",
    "regions-of-a-file": """
file = memfd(2 * n * PAGE, range(1, 2 * n, 2))
regions = [GuestRegion(at, file, at, 2 * PAGE) for at in range(0, 2 * n * PAGE, 2 * PAGE)]
""",
    "regions-of-buffers": """
regions = [GuestRegion(at, bytes(PAGE) + b"x" * PAGE) for at in range(0, 2 * n * PAGE, 2 * PAGE)]
""",
}
_SIZES = {"a-page-in-16-mib": 256, "regions-of-a-file": 200, "regions-of-buffers": 200}

# Where guests go that have come back; each region of them is somewhere of its own.
_PLACES = {
    "memfds": "targets = [GuestRegion(each.start, memfd(len(each), [])) for each in memory.regions]",
    "mappings": "targets = [GuestRegion(each.start, mmap.mmap(-1, len(each))) for each in memory.regions]",
    "parts-of-a-file": """
whole = memfd(memory.regions[-1].stop, [])
targets = [GuestRegion(each.start, whole, each.start, len(each)) for each in memory.regions]
""",
    "files": """
targets = [GuestRegion(each.start, f"{path}.{each.start}") for each in memory.regions]
for each, target in zip(memory.regions, targets):
    with open(target.source, "wb") as file:
        file.truncate(len(each))
""",
}

_DUMP = "measured(lambda: dump(regions))"
_RESTORE = "measured(lambda: memory.restore(targets))"


def _dump(guest: str) -> str:
    return f"{_GUESTS[guest]}\n{_DUMP}"


def _restore(guest: str, place: str) -> str:
    return f"{_GUESTS[guest]}\ndump(regions)\nmemory = stored()\n{_PLACES[place]}\n{_RESTORE}"


class Cost(NamedTuple):
    """Return the calls between the marks."""

    calls: int
    copied_pages: int
    walked_pages: int


def _cost(folder: Path) -> Cost:
    """Add up the output of strace, which is a file for each thread."""
    calls = copied_bytes = walked_bytes = 0
    for log in folder.glob("log.*"):
        text = log.read_text()
        if '"/BEGIN"' in text:
            text = text.partition('"/BEGIN"')[2].partition('"/END"')[0]
        for name, given, result in re.findall(r"^(\w+)\((.*)\) += (\d+)", text, re.MULTILINE):
            calls += 1
            if name in _COPYING:
                copied_bytes += int(result)
            elif name == "lseek" and given.endswith("SEEK_HOLE"):
                walked_bytes += int(result) - int(given.split(", ")[1])
    return Cost(calls, copied_bytes // PAGE, walked_bytes // PAGE)


def cost(folder: Path, script: str, n: int, threads: int = 1) -> Cost:
    """Run a script in a process of its own, and tell what its measured part cost."""
    program = shutil.which("strace")
    if program is None:
        pytest.skip("there is no strace")
    folder.mkdir()
    tracing = ["-ff", "-qq", "-o", folder / "log", "-e", f"trace=!{_BY_CHANCE}"]
    done = subprocess.run(
        [program, *tracing, sys.executable, "-c", _HEAD + script, folder / "vm1", str(n), str(threads)],
        capture_output=True,
        text=True,
        check=False,
    )
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    found = _cost(folder)
    assert found.calls > 10, "strace saw nothing between the marks"
    shutil.rmtree(folder)
    return found


def check_linear(tmp_path: Path, script: str, n: int) -> list[Cost]:
    """Check that the cost of n, 2n and 4n is a constant plus a part that grows with n. A quadratic part grows faster.

    One thread, so that the same is done in every run.
    """
    costs = [cost(tmp_path / str(count), script, count) for count in (n, 2 * n, 4 * n)]
    for name, first, second, third in zip(Cost._fields, *costs, strict=True):
        # Twice where it is linear, four times where it is quadratic.
        assert third - second <= 2.3 * max(second - first, 0) + 20, f"{name}: {costs}"
    return costs


@pytest.mark.parametrize("guest", _GUESTS)
def test_a_dump_costs_what_there_is_of_data(tmp_path: Path, guest: str) -> None:
    n = _SIZES.get(guest, 4096)
    costs = check_linear(tmp_path, _dump(guest), n)
    # No range is examined twice, for any data before it.
    assert costs[0].walked_pages <= n
    # A second thread may look for the end of the same data.
    two = cost(tmp_path / "two", _dump(guest), n, threads=2)
    assert two.walked_pages <= 3 * n
    assert two.copied_pages <= costs[0].copied_pages + 10
    assert two.calls <= costs[0].calls * 1.5 + 100


def test_a_hole_costs_nothing_however_long_it_is(tmp_path: Path) -> None:
    guest = "regions = [GuestRegion(0, memfd(n << 30, [n << 17]))]"
    first = cost(tmp_path / "first", f"{guest}\n{_DUMP}", 1)
    # 16 TiB last: where each part of a hole costs something, that takes hours.
    for gib in (64, 1 << 14):
        other = cost(tmp_path / str(gib), f"{guest}\n{_DUMP}", gib)
        assert other.calls <= first.calls + 10
        assert other.walked_pages == first.walked_pages == 1


@pytest.mark.parametrize("place", _PLACES)
def test_a_restore_costs_what_there_is_of_data(tmp_path: Path, place: str) -> None:
    check_linear(tmp_path, _restore("single-pages", place), 2048)


@pytest.mark.parametrize("place", _PLACES)
def test_a_restore_costs_as_much_for_each_region(tmp_path: Path, place: str) -> None:
    check_linear(tmp_path, _restore("regions-of-a-file", place), 100)


def test_a_read_costs_the_same_in_more_memory(tmp_path: Path) -> None:
    reads = "measured(lambda: [memory.read(8 * PAGE * at + 5 * PAGE, PAGE) for at in range(0, 1024, 8)])"
    script = f"{_GUESTS['single-pages']}\ndump(regions)\nmemory = stored()\n{reads}"
    few, many = (cost(tmp_path / str(n), script, n) for n in (1024, 8192))
    assert many.calls <= few.calls + 10
    assert many.copied_pages <= few.copied_pages + 10
