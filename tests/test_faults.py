"""Complete or absent, proved by breaking things: a process killed, or refused, at every system call of a whole run."""

import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import power_loss
import pytest
import vmsnap
from faults import short_transfers, traced

KEY = bytes(range(32))
BOTH = pytest.mark.parametrize("key", [None, KEY], ids=["plain", "encrypted"])

# A whole run: created, two fragments in two directories, committed.
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

# Calls that read or change files. A disk error cannot occur in the others.
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


# The run without durability, and the run in place with a seal at the end.
CARELESS_RUN = RUN.replace("threads=1)", "threads=1, durable=False)")
SEALING_RUN = """
import sys, vmsnap
path, key = sys.argv[1], bytes.fromhex(sys.argv[2]) or None
snap = vmsnap.SnapshotWriter(path, key=key, threads=1)
snap.write_fragment("clock", {"now": 12})
with snap.add_namespace("ram").raw_fragment("one", chunk_size_bytes=64) as fragment:
    fragment.write(bytes(200))
vmsnap.seal(path, key=key, threads=1)
"""


def strace(folder: Path, key: bytes | None, *options: str, run: str = RUN) -> subprocess.CompletedProcess[str]:
    return traced(run, [folder / "vm1", (key or b"").hex()], *options)


def recorded(folder: Path, key: bytes | None) -> list[tuple[str, int, str]]:
    """Every system call of the run between its marks: name, its number among those of that name, and line."""
    log = folder / "log"
    done = strace(folder, key, "-y", "-o", str(log))
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


def outcome(folder: Path, key: bytes | None, *, strict: bool = True) -> str:
    """Whether the snapshot is absent or complete, or else broken, which `strict` fails. `clean` removes all else."""
    path = folder / "vm1"
    found = "absent"
    if path.exists():
        report = vmsnap.verify(path, key=key) if (path / "enc_metadata").exists() or not key else None
        whole = report is not None and report.ok and list(report.fragments) == ["clock", "ram/one"]
        assert whole or not strict, report
        found = "complete" if whole else "broken"
    cleaned = vmsnap.clean(folder)
    assert not cleaned.held
    assert set(os.listdir(folder)) == (set() if found == "absent" else {"vm1"})
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


def power_losses(
    tmp_path: Path, key: bytes | None, run: str, most: int, *, only_at_the_end: bool = False
) -> tuple[Counter[str], Counter[str]]:
    """Let the power fail after each operation of a run, and after the last: count the outcomes of each of both."""
    folder = tmp_path / "recorded"
    folder.mkdir()
    log = tmp_path / "log"
    done = strace(folder, key, "-o", str(log), *power_loss.STRACE, run=run)
    assert done.returncode == 0, done.stderr
    operations = power_loss.recorded_operations(log.read_text(), folder)
    whole = power_loss.Disk(operations).tree()
    assert {path.decode() for path in whole} == {str(path.relative_to(folder)) for path in folder.rglob("*")}
    return power_loss.outcomes(
        operations,
        tmp_path,
        lambda place: outcome(place, key, strict=False),
        most,
        only_at_the_end=only_at_the_end,
    )


@BOTH
def test_a_commit_that_returned_outlives_a_power_failure(tmp_path: Path, key: bytes | None) -> None:
    before, end = power_losses(tmp_path, key, RUN, 1 << 14)
    print(f"power lost before the end of a commit: {dict(before)}, after: {dict(end)}")
    assert before["absent"] > 1000
    assert before["complete"]
    assert set(before) == {"absent", "complete"}
    assert set(end) == {"complete"}


@BOTH
def test_a_seal_that_returned_outlives_a_power_failure(tmp_path: Path, key: bytes | None) -> None:
    _, end = power_losses(tmp_path, key, SEALING_RUN, 64, only_at_the_end=True)
    assert set(end) == {"complete"}


@BOTH
def test_without_syncs_the_model_loses_something(tmp_path: Path, key: bytes | None) -> None:
    _, end = power_losses(tmp_path, key, CARELESS_RUN, 64, only_at_the_end=True)
    assert end["broken"]


# Four processes write at once, through handles that were pickled, and all threads of each.
BUSY_RUN = """
import multiprocessing, sys, vmsnap

def write(writer, number):
    for part in range(5):
        with writer.raw_fragment(f"{number}-{part}", chunk_size_bytes=4096) as fragment:
            fragment.write(bytes([part]) * 300_000)

if __name__ == "__main__":
    path, key = sys.argv[1], bytes.fromhex(sys.argv[2]) or None
    with vmsnap.create(path, key=key) as snap:
        context = multiprocessing.get_context("fork")
        children = [context.Process(target=write, args=(snap, number)) for number in range(4)]
        for child in children:
            child.start()
        for child in children:
            child.join()
            assert child.exitcode == 0
"""


def kill_at_random_times(tmp_path: Path, key: bytes | None, times: int) -> Counter[str]:
    script = tmp_path / "run.py"
    script.write_text(BUSY_RUN)
    folder = tmp_path / "snapshots"
    folder.mkdir()
    path = folder / "vm1"
    command = [sys.executable, "-I", str(script), str(path), (key or b"").hex()]
    began = time.perf_counter()
    subprocess.run(command, check=True)
    whole = time.perf_counter() - began
    outcomes: Counter[str] = Counter()
    for number in range(times):
        shutil.rmtree(path, ignore_errors=True)
        with subprocess.Popen(command, start_new_session=True) as run:
            time.sleep(whole * (0.4 + 0.8 * number / times))
            os.killpg(run.pid, signal.SIGKILL)
        if path.exists():
            report = vmsnap.verify(path, key=key)
            assert report.ok, report
            assert len(report.fragments) == 20
        outcomes["complete" if path.exists() else "absent"] += 1
        deadline = time.monotonic() + 30
        while vmsnap.clean(folder).held:  # until the last of them is gone
            assert time.monotonic() < deadline
        assert os.listdir(folder) == (["vm1"] if path.exists() else [])
    return outcomes


@BOTH
def test_processes_killed_at_random_times_leave_all_or_nothing(tmp_path: Path, key: bytes | None) -> None:
    print(kill_at_random_times(tmp_path, key, 15))


@BOTH
@pytest.mark.torture
def test_processes_killed_at_random_times_leave_all_or_nothing_for_long(tmp_path: Path, key: bytes | None) -> None:
    outcomes = kill_at_random_times(tmp_path, key, 500)
    print(outcomes)
    assert outcomes["absent"] > 50
    assert outcomes["complete"] > 50


@BOTH
def test_short_reads_and_writes_change_nothing(tmp_path: Path, key: bytes | None) -> None:
    script = f"{RUN}assert vmsnap.verify(path, key=key, threads=1).ok\n"
    folder = tmp_path / "snapshots"
    folder.mkdir()
    log = tmp_path / "log"
    done = strace(folder, key, short_transfers(tmp_path), "-o", str(log), run=script)
    assert done.returncode == 0, done.stderr
    # It was so: the same place is written again and again, by halves.
    assert len(re.findall(r"pwrite64\(", log.read_text())) > 15
    assert re.search(r"pread64\(.*, 1, ", log.read_text())
    assert outcome(folder, key) == "complete"


@BOTH
def test_a_file_that_cannot_grow_leaves_nothing(tmp_path: Path, key: bytes | None) -> None:
    """Short writes, then an error, as a limit on the size of a file causes them."""
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
