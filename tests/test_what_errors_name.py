"""An error names its subject once: the snapshot, the fragment, the file, the process or the stream."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import vmsnap
from commands import error_of, run, write_private
from support import MIB, pattern, run_python

KEY = bytes(range(32))

DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "changed": lambda stored: (
        stored[: len(stored) // 2] + bytes([stored[len(stored) // 2] ^ 1]) + stored[len(stored) // 2 + 1 :]
    ),
    "changed at its end": lambda stored: stored[:-1] + bytes([stored[-1] ^ 1]),
    "cut off": lambda stored: stored[:-1],
    "empty": lambda stored: b"",
    "foreign": lambda stored: b"foreign " * 100,
}


@pytest.fixture(params=[None, KEY], ids=["plain", "encrypted"])
def key(request: pytest.FixtureRequest) -> bytes | None:
    found: bytes | None = request.param
    return found


@pytest.fixture(params=[None, "lz4"])
def root(request: pytest.FixtureRequest, tmp_path: Path, key: bytes | None) -> Path:
    with vmsnap.create(tmp_path / "vm1", key=key) as snapshot:
        snapshot.write_memory([vmsnap.GuestRegion(0, pattern(MIB // 4))], compress=request.param)
        snapshot.add_namespace("cpu").write_fragment("regs", list(range(2000)))
    return tmp_path / "vm1"


def errors(root: Path, key: bytes | None) -> list[str]:
    """Return the texts of all errors that reading everything ends with."""
    calls: list[Callable[[], object]] = [
        lambda: vmsnap.open(root, key=key).memory().read(0, MIB // 4),
        lambda: vmsnap.open(root, key=key).memory().restore([bytearray(MIB // 4)]),
        lambda: vmsnap.open(root, key=key).namespace("cpu").read_fragment("regs"),
        lambda: vmsnap.open(root, key=key).namespace("cpu").raw_fragment("regs").read(),
        lambda: vmsnap.open(root, key=key).list_fragments(),
        lambda: vmsnap.SnapshotWriter.open(root, key=key),
    ]
    texts = []
    for call in calls:
        try:
            call()
        except (vmsnap.VmsnapError, OSError) as error:
            texts.append(str(error))
    return texts


def is_named_once(text: str, root: Path, name: str) -> bool:
    """Return whether the snapshot is named once, and its contents not more often."""
    return text.count(str(root)) == 1 and text.count(f'"{name}"') <= 1


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("path", ["mem", "mem_metadata", "cpu/regs", "vmsnap_manifest", "enc_metadata"])
def test_what_is_damaged_is_named_once(root: Path, key: bytes | None, path: str, damage: str) -> None:
    if path == "enc_metadata" and key is None:
        return
    file = root / path
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    for text in errors(root, key):
        assert is_named_once(text, root, file.name), text
    report = vmsnap.verify(root, key=key)
    assert report.problems
    for problem in report.problems:
        assert str(root) not in problem.text, problem
        assert not problem.text.startswith(file.name), problem


@pytest.mark.parametrize("path", ["mem", "cpu/regs", "vmsnap_manifest", "enc_metadata"])
@pytest.mark.parametrize("make", [os.mkfifo, lambda path: os.symlink("nowhere", path)], ids=["FIFO", "link"])
def test_what_is_in_its_place_is_named_once(
    root: Path, key: bytes | None, path: str, make: Callable[[Path], None]
) -> None:
    (root / path).unlink(missing_ok=True)
    make(root / path)
    found = errors(root, key)
    assert found
    for text in found:
        assert is_named_once(text, root, Path(path).name), text


# Errors of the operating system ---------------------------------------------------------------------------------------


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    path = tmp_path / "ram.img"
    path.write_bytes(pattern(MIB // 4))
    return path


def error_with(injection: str, *arguments: object, of: Path | None = None) -> str:
    """Run a command of which a system call fails; of one path, where it is given. Returns its error."""
    program = shutil.which("strace")
    if program is None:
        pytest.skip("there is no strace")
    command = [program, "-f", "-qq", "-o", os.devnull, "-e", f"trace={injection.partition(':')[0]}"]
    command += ["-e", f"inject={injection}", *(["-P", str(of)] if of else [])]
    command += [sys.executable, "-m", "vmsnap", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, timeout=300)
    if b"strace: " in done.stderr:
        pytest.skip(f"strace may not trace here: {done.stderr.decode()}")
    assert done.returncode == 1, done.stderr
    return error_of(done).removeprefix("vmsnap: error: ")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, ram: Path) -> None:
    # First its beginning is read, which tells its format; then its memory.
    for number, said in ((1, f"{ram} cannot be read"), (2, "guest-physical address 0x0 cannot be read")):
        text = error_with(f"pread64:error=EIO:when={number}", "dump", ram, tmp_path / "out", of=ram)
        assert text.endswith(f"{said}: Input/output error")
        assert os.listdir(tmp_path) == ["ram.img"]
    assert error_with("read:error=EIO", "put", ram, tmp_path / "out", "sda", "--create", of=ram) == (
        f"{ram}: Input/output error"
    )
    assert not (tmp_path / "out").exists()
    text = error_with("read:error=EIO", "put", "-", tmp_path / "out", "sda", "--create", of=Path(os.devnull))
    assert text == "standard input: Input/output error"
    key = write_private(tmp_path / "key", KEY)
    assert error_with("read:error=EIO", "dump", ram, tmp_path / "out", "--key-file", key, of=key).startswith(f"{key}: ")
    passphrase = write_private(tmp_path / "passphrase", b"secret\n")
    arguments = ["dump", ram, tmp_path / "out", "--passphrase-file", passphrase]
    assert (
        error_with("read:error=EIO", *arguments, of=passphrase) == f"{passphrase}: cannot be read: Input/output error"
    )


def test_a_file_that_cannot_be_written_is_named_and_removed(tmp_path: Path, ram: Path) -> None:
    run("put", ram, tmp_path / "base", "ram", "--create")
    out = tmp_path / "out"
    for arguments in (["get", tmp_path / "base", "ram", out], ["keygen", "-o", out]):
        assert error_with("write:error=EIO", *arguments, of=out) == f"{out}: Input/output error"
        assert not out.exists()
    assert error_with("fsync:error=EIO", "keygen", "-o", out, of=out) == f"{out}: Input/output error"
    assert not out.exists()
    out.write_bytes(b"before")
    text = error_with("rename:error=EIO", "get", tmp_path / "base", "ram", out, "--force")
    assert text == f"{out}: cannot be replaced: Input/output error"
    assert out.read_bytes() == b"before"


@pytest.mark.parametrize("command", ["dump", "dump-process"])
def test_a_process_is_named_of_which_the_kernel_refuses_something(tmp_path: Path, command: str) -> None:
    with subprocess.Popen(["sleep", "100"]) as process:
        try:
            text = error_with("ptrace:error=ENOSYS", command, process.pid, tmp_path / "out")
        finally:
            process.kill()
    assert f"process {process.pid}" in text
    assert "Function not implemented" in text
    assert list(tmp_path.iterdir()) == []


def test_a_descriptor_that_is_not_open_is_named(tmp_path: Path, ram: Path) -> None:
    line = error_of(run("dump", ram, tmp_path / "out", "--passphrase-fd", 99, status=1))
    assert line == "vmsnap: error: file descriptor 99: Bad file descriptor"


def test_what_a_failed_command_leaves_behind_is_said(tmp_path: Path, ram: Path) -> None:
    """Where the directory it was staged in can neither be renamed nor be removed."""
    folder = tmp_path / "snapshots"
    folder.mkdir()
    text = error_with("renameat2,unlinkat:error=EIO", "dump", ram, folder / "out")
    [left] = os.listdir(folder)
    assert re.search(
        rf"cannot commit .*; cannot remove the staged directory .*{left}: .*; vmsnap.clean removes it", text
    )


def test_a_staged_directory_that_cannot_be_made_is_one_error_of_the_snapshot(tmp_path: Path, ram: Path) -> None:
    text = error_with("mkdirat:error=EIO", "dump", ram, tmp_path / "out")
    assert text == f"cannot create the snapshot {tmp_path}/out: the directory cannot be created: Input/output error"


def test_a_descriptor_too_many_is_an_error_of_the_fragment(tmp_path: Path) -> None:
    script = """
import fcntl, os, resource, sys, vmsnap
writer = vmsnap.SnapshotWriter(sys.argv[1])
free = os.dup(0)
os.close(free)
for more in range(1, 5):
    resource.setrlimit(resource.RLIMIT_NOFILE, (free + more, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    for write in (lambda: writer.raw_fragment("a").discard(), lambda: writer.add_namespace(f"n{more}")):
        try:
            write()
        except OSError as error:
            print(error)
"""
    told = run_python(script, tmp_path / "vm1")
    assert told.returncode == 0, told.stderr
    lines = told.stdout.splitlines()
    assert len(lines) > 2
    for line in lines:
        assert "Too many open files" in line
        assert f"{tmp_path}/vm1" in line
