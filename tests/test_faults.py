"""Complete or absent, proved by breaking things: a process killed, or refused, at every system call of a whole run."""

import os
import re
import resource
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import vmsnap

KEY = bytes(range(32))
BOTH = pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])

# A whole run: created, two fragments in two folders, committed.
RUN = """
import os, sys, vmsnap
path, key = sys.argv[1], bytes.fromhex(sys.argv[2]) or None
os.path.exists("/BEGIN")
with vmsnap.create(path, key=key, threads=1) as snap:
    snap.write_fragment("clock", {"now": 12})
    with snap.add_namespace("ram").raw_fragment("one", chunk_size_bytes=64) as fragment:
        fragment.write(bytes(200))
os.path.exists("/END")
"""

# Those that look at or change files; the others take no error that a disk would give.
FILE_CALLS = {
    "mkdirat",
    "openat",
    "flock",
    "fchmod",
    "pwrite64",
    "fsync",
    "unlinkat",
    "renameat2",
    "getdents64",
    "newfstatat",
}


def strace(folder: Path, key: bytes | None, *options: str) -> subprocess.CompletedProcess[str]:
    program = shutil.which("strace")
    if program is None:
        pytest.skip("there is no strace")
    return subprocess.run(
        [program, "-f", "-qq", *options, sys.executable, "-I", "-c", RUN, folder / "vm1", (key or b"").hex()],
        env={**os.environ, "PYTHONHASHSEED": "0", "VMSNAP_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def recorded(folder: Path, key: bytes | None) -> list[tuple[str, int, str]]:
    """Every system call of the run between its marks: name, its number among those of that name, and line."""
    log = folder / "log"
    done = strace(folder, key, "-y", "-o", str(log))
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr}")
    assert done.returncode == 0, done.stderr
    seen: Counter[str] = Counter()
    calls = []
    begun = False
    for line in log.read_text().splitlines():
        if (call := re.match(r"\d+ +(\w+)\(", line)) is None:
            continue
        seen[call[1]] += 1
        begun = (begun or '"/BEGIN"' in line) and '"/END"' not in line
        if begun:
            calls.append((call[1], seen[call[1]], line))
    shutil.rmtree(folder / "vm1")
    log.unlink()
    return calls


def outcome(folder: Path, key: bytes | None) -> str:
    """Whether the snapshot is absent or complete; anything else fails. What else was left, `clean` removes."""
    path = folder / "vm1"
    found = "absent"
    if path.exists():
        report = vmsnap.verify(path, key=key)
        assert report.ok
        assert list(report.fragments) == ["clock", "ram/one"], report
        found = "complete"
    cleaned = vmsnap.clean(folder)
    assert not cleaned.held
    assert set(os.listdir(folder)) == ({"vm1"} if found == "complete" else set())
    return found


def try_all(
    tmp_path: Path, key: bytes | None, points: list[tuple[str, int]], injection: str
) -> list[tuple[int, str, str]]:
    """Run once for each point with something injected there: status, standard error and outcome of each."""

    def one(number: int) -> tuple[int, str, str]:
        name, count = points[number]
        folder = tmp_path / str(number)
        folder.mkdir()
        done = strace(
            folder, key, "-o", os.devnull, "-e", f"trace={name}", "-e", f"inject={name}:{injection}:when={count}"
        )
        result = done.returncode, done.stderr, outcome(folder, key)
        shutil.rmtree(folder)
        return result

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(one, range(len(points))))


@BOTH
def test_killed_before_any_system_call_it_is_absent_or_complete(tmp_path: Path, key: bytes | None) -> None:
    calls = recorded(tmp_path, key)
    results = try_all(tmp_path, key, [(name, count) for name, count, _ in calls], "signal=KILL")
    outcomes = Counter(found for _, _, found in results)
    killed = sum(status in (-9, 137) for status, _, _ in results)
    print(f"killed at {killed} of {len(calls)} system calls: {dict(outcomes)}")
    # A count may be missed by one where Python itself makes a call more or less.
    assert killed > len(calls) * 0.8
    assert outcomes["absent"]
    assert outcomes["complete"]


@BOTH
@pytest.mark.parametrize("error", ["EIO", "ENOSPC", "EINTR"])
def test_refused_at_any_system_call_it_says_so_and_is_absent_or_complete(
    tmp_path: Path, key: bytes | None, error: str
) -> None:
    points = [(name, count) for name, count, _ in recorded(tmp_path, key) if name in FILE_CALLS]
    results = try_all(tmp_path, key, points, f"error={error}")
    for (name, count), (status, text, found) in zip(points, results, strict=True):
        if status == 0:
            assert found == "complete", (name, count)
        else:
            assert status == 1
            assert re.search(r"^(\w*Error|vmsnap\.errors\.\w+): .*", text, re.M), (name, count, text)
    print(f"{error} at {len(points)} system calls: {dict(Counter(found for _, _, found in results))}")


def _calls_on(calls: list[tuple[str, int, str]], name: str, pattern: str) -> list[int]:
    return [number for number, (called, _, line) in enumerate(calls) if called == name and re.search(pattern, line)]


@BOTH
def test_everything_is_synced_before_it_gets_its_name(tmp_path: Path, key: bytes | None) -> None:
    """POSIX keeps what was synced after it was last changed, and nothing else: a model of power loss in one rule.

    Each file after its last write, each folder after the last entry made in it, before the rename; then the parent.
    """
    calls = recorded(tmp_path, key)
    (rename,) = _calls_on(calls, "renameat2", r'"vm1"')
    staged = re.search(r'"(\.vmsnap-[0-9a-f]{16})", .*"vm1"', calls[rename][2])
    assert staged is not None
    files = {"clock", "ram/one", *(["enc_metadata"] if key else [])}
    for file in files:
        last = max(_calls_on(calls, "pwrite64", rf"{staged[1]}/{file}>"))
        assert [sync for sync in _calls_on(calls, "fsync", rf"{staged[1]}/{file}>") if last < sync < rename], file
    manifest = max(_calls_on(calls, "pwrite64", rf"{staged[1]}/\.vmsnap-[0-9a-f]{{16}}>"))
    placed = max(_calls_on(calls, "renameat2", '"vmsnap_manifest"'))
    synced = _calls_on(calls, "fsync", rf"{staged[1]}/\.vmsnap-[0-9a-f]{{16}}>")
    assert [sync for sync in synced if manifest < sync < placed]
    made = max(_calls_on(calls, "openat", rf'{staged[1]}/ram>, "one", .*O_CREAT'))
    assert [sync for sync in _calls_on(calls, "fsync", rf"{staged[1]}/ram>") if made < sync < rename]
    assert [sync for sync in _calls_on(calls, "fsync", rf"{staged[1]}>") if placed < sync < rename]
    assert [sync for sync in _calls_on(calls, "fsync", rf"{re.escape(str(tmp_path))}>") if rename < sync]


@BOTH
def test_a_file_that_cannot_grow_leaves_nothing(tmp_path: Path, key: bytes | None) -> None:
    """Short writes, then an error: what a file's limit makes of them."""
    script = """
import resource, sys, vmsnap
path, key, limit = sys.argv[1], bytes.fromhex(sys.argv[2]) or None, int(sys.argv[3])
resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
with vmsnap.create(path, key=key, threads=1) as snap:
    with snap.raw_fragment("mem", chunk_size_bytes=64) as fragment:
        fragment.write(bytes(200_000))
"""
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY
    for limit in (1, 50, 100, 500, 4096, 65_537, 199_999):
        done = subprocess.run(
            [sys.executable, "-c", script, tmp_path / "vm1", (key or b"").hex(), str(limit)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1
        assert "OSError: [Errno 27]" in done.stderr, (limit, done.stderr)
        assert os.listdir(tmp_path) == []
