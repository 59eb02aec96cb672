"""The standard streams, closed or refusing: the work is done all the same, and nothing goes where it must not."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
import vmsnap
from commands import error_of, run, write_private
from guest import PATIENCE, ask, ended, listens, qemu_command, running
from support import MIB, pattern
from vmsnap.cli.files import NamedFile

KEY = bytes(range(32))


class Made:
    """The inputs of commands."""

    def __init__(self, folder: Path) -> None:
        self.ram = folder / "ram.img"
        self.ram.write_bytes(pattern(MIB))
        self.key = write_private(folder / "key", KEY)
        self.base, self.secret, self.home = folder / "base", folder / "secret", folder / "home"
        with vmsnap.create(self.base) as snapshot:
            snapshot.write_fragment("clock", {"now": 12})
            snapshot.write_memory([vmsnap.GuestRegion(0, pattern(MIB))])
        with vmsnap.create(self.secret, key=KEY) as snapshot:
            snapshot.write_fragment("clock", {"now": 12})
        self.packed = folder / "packed"
        vmsnap.pack(self.secret, self.packed, key=KEY)
        self.home.mkdir()


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    return Made(tmp_path_factory.mktemp("made"))


Arguments = Callable[[Made, Path], list[object]]

# Commands that create something, and print nothing on standard output.
MAKING: dict[str, Arguments] = {
    "dump": lambda made, out: ["dump", made.ram, out],
    "dump, for a new identity": lambda made, out: ["dump", made.ram, out, "--encrypt"],
    "restore": lambda made, out: ["restore", made.base, out],
    "get": lambda made, out: ["get", made.base, "mem", out],
    "put": lambda made, out: ["put", made.ram, out, "disks/sda", "--create"],
    "encrypt": lambda made, out: ["encrypt", made.base, out, "--new-key-file", made.key],
    "decrypt": lambda made, out: ["decrypt", made.secret, out, "--key-file", made.key],
    "pack": lambda made, out: ["pack", made.secret, out, "--key-file", made.key],
    "unpack": lambda made, out: ["unpack", made.packed, out, "--key-file", made.key],
    "keygen": lambda made, out: ["keygen", "-o", out],
}

# Commands whose purpose is their output.
PRINTING: dict[str, Arguments] = {
    "ls": lambda made, out: ["ls", made.base],
    "info": lambda made, out: ["info", made.base],
    "tree": lambda made, out: ["tree", made.base],
    "show": lambda made, out: ["show", made.base, "clock"],
    "cat": lambda made, out: ["cat", made.base, "mem"],
    "get": lambda made, out: ["get", made.base, "mem", "-"],
    "peek": lambda made, out: ["peek", made.base, 0, 64],
    "verify": lambda made, out: ["verify", made.base],
    "dump --json": lambda made, out: ["dump", made.ram, out, "--json", "--encrypt"],
    "keygen": lambda made, out: ["keygen"],
    "demo": lambda made, out: ["demo", "--size-mib", 1],
    "help": lambda made, out: ["--help"],
    "help of a command": lambda made, out: ["ls", "--help"],
}


def redirected(redirections: str, *arguments: object, home: Path) -> subprocess.CompletedProcess[bytes]:
    """Run a command as a shell does that was told `redirections`."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {redirections}', "sh", sys.executable, "-m", "vmsnap", *map(str, arguments)],
        env=os.environ | {"XDG_CONFIG_HOME": str(home)},
        capture_output=True,
        timeout=PATIENCE,
    )


@pytest.mark.parametrize("redirections", ["<&-", ">&-", "2>&-", "2>/dev/full", ">/dev/full", "<&- >&- 2>&-"])
@pytest.mark.parametrize("command", MAKING)
def test_what_is_made_is_made_whole(made: Made, tmp_path: Path, command: str, redirections: str) -> None:
    out = tmp_path / "out"
    done = redirected(redirections, *MAKING[command](made, out), home=tmp_path)
    assert (done.returncode, done.stdout) == (0, b""), done.stderr
    if command in ("restore", "get"):
        assert out.read_bytes() == pattern(MIB)
    elif command == "put":
        assert (out / "disks/sda").read_bytes() == pattern(MIB)
    elif command == "keygen":
        assert len(vmsnap.recipients_of(out)) == 1
    else:
        identity = tmp_path / "vmsnap/identity.txt"
        by_key = command in ("encrypt", "pack", "unpack")
        opening = {"key": KEY} if by_key else {"identities": identity} if identity.exists() else {}
        assert vmsnap.verify(out, **opening).ok
    assert {path.name for path in tmp_path.iterdir()} <= {"out", "vmsnap"}


@pytest.mark.parametrize("redirections", ["<&-", "2>&-", "2>/dev/full", "<&- 2>&-"])
@pytest.mark.parametrize("command", PRINTING)
def test_what_is_printed_is_that_and_nothing_more(made: Made, tmp_path: Path, command: str, redirections: str) -> None:
    done = redirected(redirections, *PRINTING[command](made, tmp_path / "out"), home=tmp_path)
    assert done.returncode == 0, done.stderr
    if command == "dump --json":
        # Not the advice on the new identity, which has its place on standard error.
        assert json.loads(done.stdout)["logical_bytes"] == MIB
    elif command in ("keygen", "demo"):
        assert done.stdout
    else:
        assert done.stdout == run(*PRINTING[command](made, tmp_path / "out")).stdout


@pytest.mark.parametrize(
    ("redirection", "message"),
    [(">&-", "standard output is closed"), (">/dev/full", "standard output: No space left on device")],
)
@pytest.mark.parametrize("command", PRINTING)
def test_what_cannot_be_printed_is_one_error(
    made: Made, tmp_path: Path, command: str, redirection: str, message: str
) -> None:
    done = redirected(redirection, *PRINTING[command](made, tmp_path / "out"), home=made.home)
    assert (done.returncode, done.stdout) == (1, b"")
    lines = done.stderr.decode().splitlines()
    assert lines[-1] == f"vmsnap: error: {message}"
    assert len([line for line in lines if "identity" not in line and "Public key" not in line]) == 1


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full"])
@pytest.mark.parametrize(
    ("arguments", "status"),
    [(["nonsense"], 2), (["ls"], 2), (["ls", "none"], 1), (["cat", "BASE", "\udcff"], 1), (["ls", "SECRET"], 3)],
)
def test_an_error_that_cannot_be_printed_has_its_status(
    made: Made, arguments: list[str], status: int, redirection: str
) -> None:
    places = {"BASE": str(made.base), "SECRET": str(made.secret)}
    done = redirected(redirection, *(places.get(each, each) for each in arguments), home=made.home)
    assert (done.returncode, done.stdout, done.stderr) == (status, b"", b"")


def test_data_from_a_closed_standard_input_is_an_error(made: Made, tmp_path: Path) -> None:
    for path in ("sda", "ns/sda"):
        done = redirected("<&-", "put", "-", tmp_path / "out", path, "--create", home=tmp_path)
        assert done.returncode == 1
        assert error_of(done) == "vmsnap: error: standard input is closed"
        assert list(tmp_path.iterdir()) == []


def test_a_reader_of_messages_that_goes_away_is_no_error(made: Made, tmp_path: Path) -> None:
    theirs, ours = os.pipe()
    os.close(theirs)
    command = [sys.executable, "-m", "vmsnap", "dump", str(made.ram), str(tmp_path / "out")]
    try:
        assert subprocess.run(command, stderr=ours, timeout=PATIENCE).returncode == 0
    finally:
        os.close(ours)
    assert vmsnap.verify(tmp_path / "out").ok


def test_a_progress_bar_that_cannot_be_drawn_is_no_error(made: Made, tmp_path: Path) -> None:
    """On a real terminal, whose writes fail as those of one do that was hung up."""
    strace = shutil.which("strace")
    if strace is None:
        pytest.skip("there is no strace")
    ours, theirs = pty.openpty()
    try:
        log = tmp_path / "log"
        done = subprocess.run(
            [
                *(strace, "-f", "-qq", "-o", log, "-P", os.ttyname(theirs), "-e", "trace=write"),
                *("-e", "inject=write:error=EIO", sys.executable, "-m", "vmsnap"),
                *("dump", made.ram, tmp_path / "out"),
            ],
            stderr=theirs,
            stdout=subprocess.PIPE,
            env=os.environ | {"TERM": "xterm"},
            timeout=PATIENCE,
        )
        if not log.exists():
            pytest.skip(f"strace may not trace here: {os.read(ours, 1000).decode()}")
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 0
    assert "INJECTED" in log.read_text()
    assert vmsnap.verify(tmp_path / "out").ok


def test_nothing_yet_is_not_the_end(tmp_path: Path) -> None:
    """Of a descriptor that does not block, which a shell's pipeline may share with a program that set it so."""
    ours, theirs = os.pipe()
    os.set_blocking(ours, False)

    def write_late(*_: object) -> None:
        os.write(theirs, b"late")
        os.close(theirs)

    before = signal.signal(signal.SIGALRM, write_late)
    try:
        # In the middle of the read, which has found nothing by then, or is about to.
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        with NamedFile(ours, "rb", "standard input") as file:
            buffer = bytearray(10)
            assert file.readinto(buffer) == 4
            assert buffer[:4] == b"late"
            assert file.readinto(buffer) == 0
            assert file.read(1) == b""
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_slow_reader_that_set_the_pipe_so_gets_everything(made: Made) -> None:
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    command = [sys.executable, "-m", "vmsnap", "cat", str(made.base), "mem"]
    with subprocess.Popen(command, stdout=theirs, stderr=subprocess.PIPE) as cat, open(ours, "rb") as file:
        os.close(theirs)
        assert file.read() == pattern(MIB)
        assert cat.stderr is not None
        assert cat.stderr.read() == b""
    assert cat.returncode == 0


# QEMU ----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path: Path, qmp: Path) -> Path:
    """A snapshot of a guest that is a firmware."""
    with running(qemu_command(qmp), qmp) as process:
        run("qemu", "save", "--qmp", qmp, tmp_path / "vm1", "--quit")
        process.wait(PATIENCE)
    return tmp_path / "vm1"


def talkative(command: list[str]) -> list[str]:
    """Let QEMU say something on both streams before anything else."""
    return ["sh", "-c", 'echo "said on 1"; echo "said on 2" >&2; exec "$@"', "sh", *command]


@pytest.mark.parametrize("redirections", ["2>&-", "2>/dev/full", "<&- >&- 2>&-"])
def test_a_guest_is_saved(tmp_path: Path, qmp: Path, redirections: str) -> None:
    with running(qemu_command(qmp), qmp) as process:
        done = redirected(redirections, "qemu", "save", "--qmp", qmp, tmp_path / "vm1", "--quit", home=tmp_path)
        assert (done.returncode, done.stdout) == (0, b""), done.stderr
        assert process.wait(PATIENCE) == 0
    assert vmsnap.verify(tmp_path / "vm1").ok


@pytest.mark.parametrize("redirections", ["2>&-", "2>/dev/full", "<&- >&- 2>&-"])
def test_a_guest_that_goes_on_is_not_ended_for_a_line(saved: Path, qmp: Path, redirections: str) -> None:
    # The last line is printed after QEMU is told to go on, and asked is QEMU once the guest does.
    command = f'exec "$@" {redirections}'
    load = [sys.executable, "-m", "vmsnap", "qemu", "load", str(saved), "--", *talkative(qemu_command(qmp))]
    with ended(subprocess.Popen(["sh", "-c", command, "sh", *load])) as loading:
        while not listens(qmp):
            assert loading.poll() is None
        while ask(qmp, "query-status")["status"] != "running":
            assert loading.poll() is None
        with suppress(EOFError):  # it is gone before the connection is closed
            ask(qmp, "quit")
        assert loading.wait(PATIENCE) == 0


# Files of the caller's have the numbers of the standard streams.
OWN_FILES = """
import os, subprocess, sys, vmsnap.qemu
saved, folder, *command = sys.argv[1:]
CLOSE
files = [open(f"{folder}/own{number}", "w+b", buffering=0) for number in range(3)]
assert [file.fileno() for file in files] == [0, 1, 2]
for file in files:
    file.write(b"mine")
process = vmsnap.qemu.load(saved, command).process
process.terminate()
process.wait()
"""


@pytest.mark.parametrize("closed", ["by the shell", "by the caller"])
def test_what_qemu_says_goes_into_no_file_of_the_callers(tmp_path: Path, saved: Path, qmp: Path, closed: str) -> None:
    script = OWN_FILES.replace("CLOSE", "os.closerange(0, 3)" if closed == "by the caller" else "")
    redirections = "<&- >&- 2>&-" if closed == "by the shell" else ""
    command = [sys.executable, "-c", script, str(saved), str(tmp_path), *talkative(qemu_command(qmp))]
    done = subprocess.run(["sh", "-c", f'exec "$@" {redirections}', "sh", *command], timeout=PATIENCE)
    assert [(tmp_path / f"own{number}").read_bytes() for number in range(3)] == [b"mine"] * 3
    assert done.returncode == 0


def test_what_qemu_says_goes_where_the_callers_own_words_go(tmp_path: Path, saved: Path, qmp: Path) -> None:
    script = """
import sys, vmsnap.qemu
saved, *command = sys.argv[1:]
process = vmsnap.qemu.load(saved, command).process
process.terminate()
process.wait()
"""
    command = [sys.executable, "-c", script, str(saved), *talkative(qemu_command(qmp))]
    done = subprocess.run(command, capture_output=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout) == (0, b"said on 1\n")
    assert done.stderr.startswith(b"said on 2\n")
