"""Calls that share the process's threads: none waits for another's, and none fails where no thread can be started."""

import os
import pty
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import vmsnap
import vmsnap.qemu.started
from refusals import refused, row
from support import pattern, run_python_well

# Two calls that go on for as long as a third has not read; each writes 100 GiB, if they have to wait for it.
THREE_CALLS = """
import sys, threading, vmsnap
root = sys.argv[1]
data = bytes(range(1, 256)) * (4 << 20 >> 8)
with vmsnap.SnapshotWriter(f"{root}/read").raw_fragment("ram") as fragment:
    fragment.write(data)
stored = vmsnap.SnapshotReader(f"{root}/read").raw_fragment("ram")
block = b"\\1" * (64 << 20)
regions = [vmsnap.GuestRegion(number * len(block), block) for number in range(1600)]
read = threading.Event()

class Enough(Exception):
    pass

def dump(number, begun, ended):
    def progress(done, total):
        begun.set()
        if read.is_set():
            raise Enough
    try:
        vmsnap.SnapshotWriter(f"{root}/{number}").write_memory(regions, compress="lz4", progress=progress)
    except Enough:
        pass
    ended.set()

calls = [(number, threading.Event(), threading.Event()) for number in range(2)]
threads = [threading.Thread(target=dump, args=call) for call in calls]
for thread in threads:
    thread.start()
for _, begun, _ in calls:
    begun.wait()
assert stored.read_at(0, len(data)) == data
print(*(ended.is_set() for _, _, ended in calls))
read.set()
for thread in threads:
    thread.join()
"""


def test_a_read_does_not_wait_for_long_calls_of_other_threads(tmp_path: Path) -> None:
    assert run_python_well(THREE_CALLS, tmp_path, VMSNAP_THREADS="2") == "False False\n"


# Where the system allows no more threads: a control group with pids.max, ulimit -u ---------------------------------

#: After so many the next is refused.
ALLOWED = pytest.mark.parametrize("allowed", [0, 1])


def with_threads(allowed: int, *command: str | Path) -> list[str | Path]:
    """Make a command one that may start so many threads and processes, and no more."""
    if (strace := shutil.which("strace")) is None:
        pytest.skip("there is no strace")
    refusal = f"inject=clone,clone3:error=EAGAIN:when={allowed + 1}+"
    return [strace, "-f", "-qq", "-o", os.devnull, "-e", "trace=clone,clone3", "-e", refusal, *command]


def outcome(command: list[str | Path]) -> tuple[int, str]:
    """Run a command that wants four threads, and return its status and standard error."""
    environment = os.environ | {"VMSNAP_THREADS": "4", "TERM": "xterm"}
    done = subprocess.run(command, stderr=subprocess.PIPE, env=environment, text=True, check=False)
    if "ptrace" in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr}")
    return done.returncode, done.stderr


EVERYTHING = """
import sys, vmsnap
root = sys.argv[1]

class Service:
    name = "service"
    def wrap(self, payload):
        return bytes(255 - byte for byte in payload)
    unwrap = wrap

identity = vmsnap.generate_identity()
[recipient] = vmsnap.recipients_of(identity)
ways = {
    "key": ({"key": bytes(32)},) * 2,
    "passphrase": ({"passphrase": "correct horse"},) * 2,
    "age": ({"recipients": recipient}, {"identities": identity}),
    "service": ({"key_provider": Service()},) * 2,
}
ram = bytes(range(256)) * (8 << 20 >> 8)
for name, (writing, reading) in ways.items():
    with vmsnap.create(f"{root}/{name}", **writing) as snap:
        with snap.raw_fragment("small writes") as fragment:
            for at in range(0, len(ram), 100_000):
                fragment.write(ram[at : at + 100_000])
        snap.write_memory([vmsnap.GuestRegion(0, ram)], compress="lz4")
    reader = vmsnap.open(f"{root}/{name}", **reading)
    assert reader.raw_fragment("small writes").read() == ram
    back = bytearray(len(ram))
    reader.memory().restore([vmsnap.GuestRegion(0, back)])
    assert back == ram
    assert vmsnap.verify(f"{root}/{name}", **reading).ok
"""


@ALLOWED
def test_without_threads_the_caller_does_everything(tmp_path: Path, allowed: int) -> None:
    command = with_threads(allowed, sys.executable, "-c", EVERYTHING, tmp_path)
    assert outcome(command) == (0, "")


@ALLOWED
def test_a_dump_without_a_thread_for_its_progress_bar_is_complete(tmp_path: Path, allowed: int) -> None:
    (tmp_path / "ram.img").write_bytes(pattern(1 << 20))
    arguments = ("-m", "vmsnap", "dump", tmp_path / "ram.img", tmp_path / "vm1")
    terminal, other_end = pty.openpty()
    status = subprocess.run(
        with_threads(allowed, sys.executable, *arguments), stderr=other_end, env=os.environ | {"TERM": "xterm"}
    ).returncode
    os.close(other_end)
    said = os.read(terminal, 65536).decode()
    os.close(terminal)
    if "ptrace" in said:
        pytest.skip(f"strace may not trace here: {said}")
    assert (status, "Traceback" in said) == (0, False), said
    assert vmsnap.verify(tmp_path / "vm1").ok


def refuse(_: threading.Thread) -> None:
    raise RuntimeError("can't start new thread")


@row("qemu-no-thread")
@ALLOWED
def test_a_guest_is_not_touched_where_the_threads_for_it_cannot_be_started(
    tmp_path: Path, allowed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # This fails before vmsnap connects to QEMU, which does not run here.
    with monkeypatch.context() as patch, refused("qemu-no-thread", "the system allows no more", tmp_path):
        patch.setattr(threading.Thread, "start", refuse)
        vmsnap.qemu.save(tmp_path / "qmp", tmp_path / "vm1")
    for arguments in (("save", "--qmp", tmp_path / "qmp", tmp_path / "vm1"), ("load", tmp_path / "vm1", "--", "true")):
        status, said = outcome(with_threads(allowed, sys.executable, "-m", "vmsnap", "qemu", *arguments))
        assert (status, said.count("\n")) == (1, 1), said
        assert "vmsnap: error: can't start new thread: the system allows no more" in said
    assert os.listdir(tmp_path) == []


def test_a_qemu_that_cannot_be_listened_to_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    processes: list[subprocess.Popen[bytes]] = []

    class Noted(subprocess.Popen[bytes]):
        def __init__(self, *arguments: object, **options: object) -> None:
            super().__init__(*arguments, **options)  # type: ignore[call-overload]
            processes.append(self)

    monkeypatch.setattr(subprocess, "Popen", Noted)
    monkeypatch.setattr(threading.Thread, "start", refuse)
    with pytest.raises(vmsnap.QemuError, match="the system allows no more"):
        vmsnap.qemu.started.StartedQemu(["sh", "-c", "exec sleep 1000"])
    # The first is the guard, which ends by itself.
    assert [process.returncode for process in processes] == [0, -15]
