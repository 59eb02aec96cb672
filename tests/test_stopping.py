"""A process stands still while it is dumped: nobody notices, it always goes on, and it is never waited for."""

import os
import platform
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import vmsnap
from child import ANONYMOUS, USERFAULT, Child, child, expected
from commands import error_of, run
from vmsnap.process import StoppedProcess

PAGE = os.sysconf("SC_PAGESIZE")
SIZE = 8 << 20
BOTH = pytest.mark.parametrize("command", ["dump", "dump-process"])

# Page faults are served by another process, which asks this one each time: so it is this one that is waited for, and
# nothing about it tells. A line on standard output says that the other process asks; one on its standard input has it
# ask no more.
HELPED = (
    ANONYMOUS.replace("fill(memory)", "fill(memory); faults = {faults}")
    + """
import fcntl, select, socket, struct, threading
uffd = ctypes.CDLL(None, use_errno=True).syscall(faults, os.O_CLOEXEC)
if uffd < 0:
    print("refused", os.strerror(ctypes.get_errno()), flush=True)
    sys.exit()
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
fcntl.ioctl(uffd, 0xC018AA3F, struct.pack("QQQ", 0xAA, 0, 0))
fcntl.ioctl(uffd, 0xC020AA00, struct.pack("QQQQ", start, 8 << 20, 1, 0))
asked, asking = socket.socketpair()
if os.fork() == 0:
    ctypes.CDLL(None).prctl(1, 9, 0, 0, 0)  # PR_SET_PDEATHSIG
    asked.close()
    place = ctypes.create_string_buffer(b"\\x42" * 4096)
    serve = False
    while True:
        if not (event := os.read(uffd, 32)):
            os._exit(0)
        address = struct.unpack_from("Q", event, 16)[0]
        if not serve:
            os.write(asking.fileno(), b"?")
            os.write(1, b"asks\\n")
            ready, _, _ = select.select([0, asking], [], [])
            if 0 in ready:
                os.read(0, 100)
                serve = True
            else:
                asking.recv(1)
        try:
            page = struct.pack("QQQQq", address & ~4095, ctypes.addressof(place), 4096, 0, 0)
            fcntl.ioctl(uffd, 0xC028AA03, bytearray(page))
        except FileExistsError:
            pass
        except OSError:
            os._exit(0)
os.close(uffd)
asking.close()
def answer():
    while asked.recv(1):
        asked.sendall(b"!")
threading.Thread(target=answer, daemon=True).start()
print(start, flush=True)
threading.Event().wait()
"""
)
HELPED = HELPED.replace("{faults}", str({"x86_64": 323, "aarch64": 282}[platform.machine()]))


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def wait_until(condition: Callable[[], bool]) -> None:
    """Look again and again; fails after a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start(*arguments: object, before: str = "", **options: Any) -> subprocess.Popen[bytes]:
    """Start `vmsnap`, in a process in which other code has run before."""
    # SIGINT is ignored if the tests run in the background.
    heed = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)"
    script = f"{heed}\n{before}\nfrom vmsnap.cli import main\nmain()\n"
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.Popen(command, **options)


@contextmanager
def waiting(process: Child, folder: Path, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    """A dump that waits for the process that it has stopped."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with start("dump", process.pid, folder / "vm1", "--threads", 1, **(pipes | options)) as dump:
        try:
            assert process.process.stdout is not None
            assert process.process.stdout.readline() == "asks\n"
            assert state(process.pid) == "t"
            yield dump
        finally:
            dump.kill()


@BOTH
def test_a_parent_notices_nothing(tmp_path: Path, command: str) -> None:
    with child(tmp_path, ANONYMOUS) as process:
        run(command, process.pid, tmp_path / "vm1")
        # What a shell asks of its jobs: is any stopped, has any gone on?
        assert os.waitpid(process.pid, os.WNOHANG | os.WUNTRACED | os.WCONTINUED) == (0, 0)


def test_all_threads_stand_still_and_none_is_started(tmp_path: Path) -> None:
    # Each thread starts its successor and ends, so that there is always one that was not there before.
    setup = (
        ANONYMOUS
        + """
import itertools, threading
def run(place):
    for _ in range(1000):
        memory[place] = (memory[place] + 1) % 256
    threading.Thread(target=run, args=(place,)).start()
for place in range(8):
    threading.Thread(target=run, args=(place,)).start()
"""
    )
    with child(tmp_path, setup) as process:
        region = vmsnap.GuestRegion(0, vmsnap.ProcessMemory(process.pid), offset=process.address, size=PAGE)
        for number in range(20):
            held = StoppedProcess(process.pid, 60)
            assert StoppedProcess.is_stopped(process.pid)
            pages = []
            for name in ("one", "two"):
                root = tmp_path / f"{name}{number}"
                vmsnap.SnapshotWriter(root).write_memory([region])
                pages.append(vmsnap.open(root).memory().read(0, PAGE))
            assert pages[0] == pages[1]
            assert StoppedProcess.is_stopped(process.pid)
            held.let_go()
            held.let_go()


def test_one_that_was_stopped_by_a_signal_meanwhile_stays_so(tmp_path: Path) -> None:
    with child(tmp_path, ANONYMOUS) as process:
        held = StoppedProcess(process.pid, 60)
        os.kill(process.pid, signal.SIGSTOP)
        held.let_go()
        wait_until(lambda: state(process.pid) == "T")
        os.kill(process.pid, signal.SIGCONT)
        wait_until(lambda: state(process.pid) not in "Tt")


def test_a_signal_that_came_meanwhile_is_not_lost(tmp_path: Path) -> None:
    setup = ANONYMOUS + "\nimport signal; signal.signal(signal.SIGUSR1, lambda *_: os.write(1, b'signal\\n'))"
    with child(tmp_path, setup) as process:
        assert process.process.stdout is not None
        for _ in range(20):
            # Now before it is stopped, now while it is.
            os.kill(process.pid, signal.SIGUSR1)
            held = StoppedProcess(process.pid, 60)
            held.let_go()
            assert process.process.stdout.readline() == "signal\n"
            held = StoppedProcess(process.pid, 60)
            os.kill(process.pid, signal.SIGUSR1)
            held.let_go()
            assert process.process.stdout.readline() == "signal\n"


def test_who_traces_it_already_is_named(tmp_path: Path) -> None:
    with child(tmp_path, ANONYMOUS) as process:
        held = StoppedProcess(process.pid, 60)
        # Stopped by a debugger, it is left as it was found.
        run("dump", process.pid, tmp_path / "vm1")
        assert state(process.pid) == "t"
        with pytest.raises(PermissionError, match=rf"process {os.getpid()} \(.*\) traces it: stop it there"):
            StoppedProcess(process.pid, 60)
        held.let_go()


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_however_a_dump_ends_that_waits_for_the_process_it_goes_on(tmp_path: Path, number: signal.Signals) -> None:
    with child(tmp_path, HELPED) as process:
        with waiting(process, tmp_path) as dump:
            dump.send_signal(number)
            assert dump.wait(60) == (-number if number == signal.SIGKILL else 128 + number)
            assert dump.stderr is not None
            assert b"Traceback" not in dump.stderr.read()
        wait_until(lambda: state(process.pid) not in "Tt")
        vmsnap.clean(tmp_path)
        assert os.listdir(tmp_path) == []


def test_where_nothing_moves_the_process_goes_on_and_it_is_an_error(tmp_path: Path) -> None:
    patience = "import vmsnap.cli.hold\nvmsnap.cli.hold._PATIENCE_SECONDS = 1.0\n"
    with child(tmp_path, HELPED) as process:
        with waiting(process, tmp_path, before=patience) as dump:
            _, told = dump.communicate(timeout=60)
            assert dump.returncode == 1
            [line] = told.decode().splitlines()
            assert f"process {process.pid}: no progress for 1 s while it was stopped" in line
            assert "try --no-stop" in line
        assert state(process.pid) not in "Tt"
        assert os.listdir(tmp_path) == []


def test_a_process_goes_on_before_the_terminal_is_written_to(tmp_path: Path) -> None:
    # As after Ctrl-S: a process that writes to the terminal waits.
    leader, follower = os.openpty()
    with child(tmp_path, HELPED) as process:
        options = {"stdin": follower, "stdout": follower, "stderr": follower}
        with waiting(process, tmp_path, **options) as dump:
            assert process.process.stdin is not None
            termios.tcflow(follower, termios.TCOOFF)
            process.process.stdin.write("serve\n")
            process.process.stdin.flush()
            wait_until(lambda: state(process.pid) not in "Tt")
            assert dump.poll() is None
            termios.tcflow(follower, termios.TCOON)
            while dump.poll() is None:
                if select.select([leader], [], [], 0.1)[0]:
                    os.read(leader, 4096)
            assert dump.returncode == 0
    os.close(leader)
    os.close(follower)
    memory = vmsnap.open(tmp_path / "vm1").memory().read(process.address, SIZE)
    assert memory[:PAGE] == expected()[:PAGE]
    assert memory[PAGE : 16 * PAGE] == b"\x42" * 15 * PAGE


# Runs vmsnap on a terminal that it shows itself, and prints what came. The command may become an orphan first.
TERMINAL = """
import os, subprocess, sys, time
leader, follower = os.openpty()
target, command, root, orphan = sys.argv[1:]
arguments = [sys.executable, "-m", "vmsnap", command, target if target != "own" else str(os.getpid()), root]
if orphan == "orphan":
    fork = "import os, sys; os.fork() and os._exit(0); os.execv(sys.argv[1], sys.argv[1:])"
    arguments = [sys.executable, "-c", fork, *arguments]
memory = os.urandom(32 << 20)
process = subprocess.Popen(arguments, stdin=follower, stdout=follower, stderr=follower, start_new_session=True)
os.close(follower)
try:
    while output := os.read(leader, 1000):
        os.write(1, output)
except OSError:  # all others have closed it
    pass
sys.exit(process.wait())
"""


@BOTH
@pytest.mark.parametrize("orphan", ["child", "orphan"])
def test_no_bar_is_shown_by_the_process_that_is_stopped(tmp_path: Path, orphan: str, command: str) -> None:
    arguments = [sys.executable, "-c", TERMINAL, "own", command, str(tmp_path / "vm1"), orphan]
    done = subprocess.run(arguments, stdout=subprocess.PIPE, check=True, timeout=120)
    assert b"\x1b" not in done.stdout
    assert b"vmsnap: stored" in done.stdout
    assert vmsnap.verify(tmp_path / "vm1").ok
    with child(tmp_path, ANONYMOUS) as process:
        arguments = [sys.executable, "-c", TERMINAL, str(process.pid), command, str(tmp_path / "vm2"), orphan]
        done = subprocess.run(arguments, stdout=subprocess.PIPE, check=True, timeout=120)
        assert b"\x1b" in done.stdout


@BOTH
def test_pages_that_it_would_bring_itself_are_not_waited_for(tmp_path: Path, command: str) -> None:
    with child(tmp_path, USERFAULT) as process:
        done = run(command, process.pid, tmp_path / "vm1")
        said = "left out" if command == "dump-process" else "unreadable, stored as zeros"
        width = "016x" if command == "dump-process" else "#x"
        hole = f"{process.address + PAGE:{width}}-{process.address + 16 * PAGE:{width}}"
        assert f"vmsnap: {said}: {hole}" in done.stderr.decode()
        assert state(process.pid) not in "Tt"
        if command == "dump":
            assert vmsnap.open(tmp_path / "vm1").memory().read(process.address, SIZE) == expected()
            span = f"{process.address:x}-{process.address + SIZE:x}"
            part = run(command, process.pid, tmp_path / "vm2", "--range", span, status=1)
            assert re.search(rf"{process.address + PAGE:#x} cannot be read: .*--no-stop", error_of(part))
            run(command, process.pid, tmp_path / "vm2", "--range", span, "--no-stop")


# A file system of one file of 8 MiB, each page of which is filled with its number; mounted (where nobody else sees it),
# mapped and served by one process. Code that may wait for the server must not hold the interpreter lock.
FUSE = """
import struct, threading
libc = ctypes.CDLL(None, use_errno=True)
fuse = os.open("/dev/fuse", os.O_RDWR)
os.mkdir(path)
options = b"fd=%d,rootmode=40000,user_id=0,group_id=0" % fuse
private = libc.unshare(0x20000) or libc.mount(None, b"/", None, ctypes.c_ulong(0x44000), None)
if private or libc.mount(b"vmsnap-test", path.encode(), b"fuse", ctypes.c_ulong(0), options):
    print("refused", os.strerror(ctypes.get_errno()), flush=True)
    sys.exit()
LONG = 1 << 30
def attributes(node):
    size, mode = (0, 0o40755) if node == 1 else (8 << 20, 0o100644)
    return struct.pack("6Q10I", node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)
def serve():
    while True:
        request = os.read(fuse, 1 << 18)
        _, opcode, unique, node = struct.unpack_from("IIQQ", request)
        error, answer = 0, b""
        if opcode == 26:  # INIT
            answer = struct.pack("IIIIHHIIHHI", 7, 31, 0, 0, 12, 10, 4096, 1, 0, 0, 0).ljust(64, b"\\0")
        elif opcode == 1:  # LOOKUP
            answer = struct.pack("QQQQII", 2, 0, LONG, LONG, 0, 0) + attributes(2)
        elif opcode == 3:  # GETATTR
            answer = struct.pack("QII", LONG, 0, 0) + attributes(node)
        elif opcode == 14:  # OPEN
            answer = struct.pack("QII", 0, 0, 0)
        elif opcode == 15:  # READ
            _, offset, size = struct.unpack_from("QQI", request, 40)
            pages = range(offset // 4096, (offset + size) // 4096)
            answer = b"".join(bytes([page % 251 + 1]) * 4096 for page in pages)
        elif opcode in (2, 36, 42):  # FORGET, INTERRUPT and BATCH_FORGET have no answer
            continue
        elif opcode != 18:  # RELEASE; all others are unknown (ENOSYS)
            error = -38
        os.write(fuse, struct.pack("IiQ", 16 + len(answer), error, unique) + answer)
threading.Thread(target=serve, daemon=True).start()
file = os.open(path + "/file", os.O_RDONLY)
os.close(os.dup(file))  # tells the kernel that there is no FLUSH, for which a server that is killed would wait
memory = mmap.mmap(file, 8 << 20, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
libc.memcpy(ctypes.create_string_buffer(1), ctypes.c_void_p(ctypes.addressof(ctypes.c_char.from_buffer(memory))), 1)
"""


@pytest.mark.skipif(os.getuid() != 0, reason="only root mounts")
@pytest.mark.skipif(not os.path.exists("/dev/fuse"), reason="there is no /dev/fuse")
def test_files_that_it_serves_itself_are_not_waited_for(tmp_path: Path) -> None:
    whole = b"".join(bytes([page % 251 + 1]) * PAGE for page in range(2048))
    with child(tmp_path, FUSE) as process:
        done = run("dump", process.pid, tmp_path / "vm1")
        memory = vmsnap.open(tmp_path / "vm1").memory().read(process.address, SIZE)
        # The bytes read before are returned; the kernel decides how many.
        assert memory[:PAGE] == whole[:PAGE]
        assert memory[-PAGE:] == bytes(PAGE)
        assert f"-{process.address + SIZE:#x}\n" in done.stderr.decode()
        assert state(process.pid) not in "Tt"
        run("dump-process", process.pid, tmp_path / "vm2")
        span = f"{process.address:x}-{process.address + SIZE:x}"
        assert "--no-stop" in error_of(run("dump", process.pid, tmp_path / "vm3", "--range", span, status=1))
        run("dump", process.pid, tmp_path / "vm3", "--range", span, "--no-stop")
        assert vmsnap.open(tmp_path / "vm3").memory().read(process.address, SIZE) == whole
