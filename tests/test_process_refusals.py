"""System errors while a process is read, which must not be taken for an unreadable page."""

import errno
import json
import os
import pickle
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import vmsnap
from child import ANONYMOUS, PRIVATE_FILE, USERFAULT, Child, child, expected
from refusals import refused, refused_elsewhere, row
from seccomp import refusing
from vmsnap import GuestRegion
from vmsnap.process import StoppedProcess

COMMAND = "import sys\nfrom vmsnap.cli import main\nmain()\n"
SIZE = 8 << 20
REFUSALS = [errno.EPERM, errno.ENOSYS, errno.EACCES, errno.ENOMEM, errno.EINTR]


def run(before: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run `vmsnap` in a process in which other code has run before."""
    command = [sys.executable, "-c", before + COMMAND, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)


def memory_of(root: Path, process: Child) -> bytes:
    return vmsnap.open(root).memory().read(process.address, SIZE)


@pytest.mark.parametrize("number", REFUSALS, ids=errno.errorcode.get)
@pytest.mark.parametrize("setup", [ANONYMOUS, PRIVATE_FILE], ids=["anonymous", "file"])
def test_memory_is_read_in_another_way_where_one_is_refused(tmp_path: Path, number: int, setup: str) -> None:
    with child(tmp_path, setup) as process:
        done = run(refusing(number, "process_vm_readv"), "dump", process.pid, tmp_path / "vm1", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["unreadable"] == []
        assert memory_of(tmp_path / "vm1", process) == expected()


@pytest.mark.parametrize("command", ["dump", "dump-process"])
def test_where_all_ways_are_refused_nothing_is_stored(tmp_path: Path, command: str) -> None:
    with child(tmp_path, ANONYMOUS) as process:
        before = refusing(errno.EPERM, "process_vm_readv", "pread64")
        done = run(before, command, process.pid, tmp_path / "vm1")
        assert done.returncode == 1
        [line] = done.stderr.splitlines()
        assert f"process {process.pid}: process_vm_readv failed (Operation not permitted" in line
        assert f"/proc/{process.pid}/mem: Operation not permitted" in line
        assert os.listdir(tmp_path) == []


@row("process-refused")
def test_a_refused_call_is_an_error_of_its_own(tmp_path: Path) -> None:
    with child(tmp_path, ANONYMOUS) as process:
        script = f"""
import pickle
writer = pickle.loads(bytes.fromhex(sys.argv[1]))
{refusing(errno.EPERM, "process_vm_readv", "pread64")}
region = vmsnap.GuestRegion(0, vmsnap.ProcessMemory({process.pid}), offset={process.address}, size={SIZE})
writer.write_memory([region], on_error="zero")
"""
        state = pickle.dumps(vmsnap.SnapshotWriter(tmp_path / "vm2")).hex()
        message = f"process {process.pid}: process_vm_readv failed"
        refused_elsewhere("process-refused", message, tmp_path, script, state)


@pytest.mark.skipif(shutil.which("strace") is None, reason="there is no strace")
@pytest.mark.parametrize("command", ["dump", "dump-process"])
@pytest.mark.parametrize(
    "calls",
    [
        ["openat:error=ENOENT"],
        ["openat:error=EPERM"],
        ["ioctl:error=ENOTTY"],
        ["ioctl:error=EPERM", "pread64:error=EPERM"],
    ],
    ids=["absent", "not opened", "not scanned", "not read"],
)
def test_without_a_page_map_the_memory_is_read(tmp_path: Path, calls: list[str], command: str) -> None:
    with child(tmp_path, ANONYMOUS) as process:
        trace = ["strace", "-f", "-qq", "-o", os.devnull, "-P", f"/proc/{process.pid}/pagemap"]
        for call in calls:
            trace += ["-e", f"inject={call}"]
        arguments = [sys.executable, "-m", "vmsnap", command, str(process.pid), str(tmp_path / "vm1")]
        done = subprocess.run([*trace, *arguments], capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        if command == "dump":
            assert memory_of(tmp_path / "vm1", process) == expected()
        else:
            assert fragments_of(tmp_path / "vm1", process) == expected()


def fragments_of(root: Path, process: Child) -> bytes:
    """Return the memory of the child from its fragment."""
    memory = vmsnap.open(root).namespace("mem")
    for name in memory.list_fragments():
        start, end = (int(part, 16) for part in name.split("-"))
        if start <= process.address < end:
            with memory.raw_fragment(name) as fragment:
                return fragment.read_at(process.address - start, SIZE)
    raise AssertionError("it is not there")


def test_who_may_not_trace_is_told_what_to_do(tmp_path: Path) -> None:
    with child(tmp_path, ANONYMOUS) as process:
        done = run(refusing(errno.EPERM, "ptrace"), "dump", process.pid, tmp_path / "vm1")
        assert done.returncode == 1
        [line] = done.stderr.splitlines()
        assert f"process {process.pid}: it may not be traced" in line
        assert f"kill -STOP {process.pid}" in line
        assert "--no-stop" in line
        assert os.listdir(tmp_path) == []


@row("process-awaited")
def test_pages_that_a_stopped_process_would_bring_itself_are_an_error(tmp_path: Path) -> None:
    with child(tmp_path, USERFAULT) as process:
        writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
        held = StoppedProcess(process.pid, 60)
        region = GuestRegion(0, vmsnap.ProcessMemory(process.pid), offset=process.address, size=SIZE)
        with refused("process-awaited", "is stopped: let it run during the dump", tmp_path):
            writer.write_memory([region])
        report = writer.write_memory([region], on_error="zero")
        held.let_go()
        assert sum(len(each) for each in report.unreadable) == SIZE - 128 * os.sysconf("SC_PAGESIZE")
        assert vmsnap.open(tmp_path / "vm1").memory().read(0, SIZE) == expected()
