"""Archives on the command line: `pack`, `unpack`, `--archive`, and every command that reads."""

import array
import fcntl
import os
import pty
import shutil
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import vmsnap
from commands import error_of, run, write_private
from support import MIB, pattern, tree

KEY = bytes(range(32))
RAM = pattern(MIB // 2) + bytes(MIB // 2)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A directory with `vm1`, its archive, its key in `vm.key`, and a raw image of memory."""
    write_private(tmp_path / "vm.key", KEY)
    (tmp_path / "ram.img").write_bytes(RAM)
    with vmsnap.create(tmp_path / "vm1", key=KEY) as snapshot:
        snapshot.write_memory([vmsnap.GuestRegion(0, RAM)])
        snapshot.write_fragment("clock", {"now": 12})
        with snapshot.add_namespace("disks").raw_fragment("sda") as fragment:
            fragment.write(pattern(300_000))
    vmsnap.pack(tmp_path / "vm1", tmp_path / "vm1.vmsnap.tar", key=KEY)
    return tmp_path


def command(*arguments: object) -> list[str]:
    # SIGINT is ignored if the tests run in the background.
    heed = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    return [sys.executable, "-c", f"{heed}; from vmsnap.cli import main; main()", *map(str, arguments)]


def wait_until(condition: Callable[[], object]) -> None:
    """Look again and again; fails after a minute."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# pack and unpack -----------------------------------------------------------------------------------------------------


def test_a_snapshot_is_packed_and_unpacked(folder: Path) -> None:
    key = ["--key-file", folder / "vm.key"]
    packed = run("pack", folder / "vm1", folder / "again", *key)
    digest = vmsnap.open(folder / "vm1", key=KEY).seal_digest
    assert digest is not None
    assert (packed.stdout, packed.stderr.decode()) == (b"", f"vmsnap: seal digest: {digest.hex()}\n")
    assert (folder / "again").read_bytes() == (folder / "vm1.vmsnap.tar").read_bytes()
    unpacked = run("unpack", folder / "again", folder / "vm2", *key, "--threads", 1, "--no-durable")
    assert (unpacked.stdout, unpacked.stderr) == (b"", packed.stderr)
    assert vmsnap.verify(folder / "vm2", key=KEY, expect_seal_digest=digest).ok


def test_a_snapshot_passes_through_a_pipe(folder: Path) -> None:
    script = '"$@" pack vm1 - --key-file vm.key | "$@" unpack - vm2 --key-file vm.key'
    vmsnap_here = [sys.executable, "-m", "vmsnap"]
    done = subprocess.run(["sh", "-euc", script, "sh", *vmsnap_here], cwd=folder, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, ""), done.stderr
    first, second = done.stderr.splitlines()
    assert first == second
    assert vmsnap.verify(folder / "vm2", key=KEY, expect_seal_digest=first.split()[-1]).ok


def test_an_archive_is_unpacked_from_the_output_of_a_command(folder: Path) -> None:
    if not shutil.which("bash"):
        pytest.skip("there is no bash")
    script = f"{sys.executable} -m vmsnap unpack <(cat vm1.vmsnap.tar) vm2 --key-file vm.key"
    subprocess.run(["bash", "-euc", script], cwd=folder, check=True, capture_output=True)
    assert vmsnap.verify(folder / "vm2", key=KEY).ok


def test_the_seal_digest_may_be_required(folder: Path) -> None:
    key = ["--key-file", folder / "vm.key"]
    digest = vmsnap.open(folder / "vm1", key=KEY).seal_digest
    assert digest is not None
    before = tree(folder)
    for arguments in (["pack", folder / "vm1", folder / "new"], ["unpack", folder / "vm1.vmsnap.tar", folder / "new"]):
        assert "seal digest" in error_of(run(*arguments, *key, "--expect-seal-digest", "00" * 32, status=3))
        assert tree(folder) == before
        run(*arguments, *key, "--expect-seal-digest", digest.hex())
        if (folder / "new").is_dir():
            shutil.rmtree(folder / "new")
        else:
            (folder / "new").unlink()


def test_a_passphrase_comes_from_a_file_beside_the_pipe(folder: Path) -> None:
    secret = write_private(folder / "secret", b"hunter2\n")
    vmsnap.create(folder / "vm3.vmsnap.tar", passphrase="hunter2").commit()
    with open(folder / "vm3.vmsnap.tar", "rb") as file:
        done = subprocess.run(
            command("unpack", "-", folder / "vm4", "--passphrase-file", secret), stdin=file, capture_output=True
        )
    assert done.returncode == 0, done.stderr
    assert vmsnap.verify(folder / "vm4", passphrase="hunter2").ok


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["pack", "vm1", "vm1.vmsnap.tar", "--key-file", "vm.key"], 1, "the path already exists"),
        (["pack", "vm1", "new"], 3, "pass the key"),
        (["pack", "ram.img", "new"], 4, "not a vmsnap archive"),
        (["pack", "none", "new"], 1, "none"),
        (["unpack", "vm1.vmsnap.tar", "vm1", "--key-file", "vm.key"], 1, "the path already exists"),
        (["unpack", "vm1.vmsnap.tar", "new"], 3, "pass the key"),
        (["unpack", "ram.img", "new"], 4, "not a vmsnap archive"),
        (["unpack", "vm1", "new"], 4, "it is a directory"),
        (["unpack", "none", "new"], 1, "none"),
    ],
)
def test_what_is_refused_is_one_line_and_changes_nothing(
    folder: Path, arguments: list[str], status: int, message: str
) -> None:
    before = tree(folder)
    assert message in error_of(run(*arguments, status=status, cwd=folder))
    assert tree(folder) == before


# Streams -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["pack", "vm1", "-"], ["unpack", "-", "vm2"]])
def test_a_terminal_is_refused(folder: Path, arguments: list[str]) -> None:
    ours, theirs = pty.openpty()
    try:
        with open(theirs, "r+b", buffering=0, closefd=False) as terminal:
            done = subprocess.run(
                [sys.executable, "-m", "vmsnap", *arguments, "--key-file", "vm.key"],
                cwd=folder,
                stdin=terminal,
                stdout=terminal,
                stderr=subprocess.PIPE,
            )
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 2
    assert b"an archive is binary, and standard" in done.stderr
    assert not (folder / "vm2").exists()


@pytest.mark.parametrize(
    ("redirection", "arguments", "message"),
    [
        (">&-", ["pack", "vm1", "-"], "vmsnap: error: standard output is closed"),
        (">/dev/full", ["pack", "vm1", "-"], "No space left on device"),
        ("<&-", ["unpack", "-", "vm2"], "vmsnap: error: standard input is closed"),
        ("</dev/null", ["unpack", "-", "vm2"], "it is empty"),
    ],
)
def test_streams_that_are_closed_or_full_are_one_error(
    folder: Path, redirection: str, arguments: list[str], message: str
) -> None:
    before = tree(folder)
    done = subprocess.run(
        ["sh", "-c", f'exec "$@" {redirection}', "sh", *command(*arguments, "--key-file", "vm.key")],
        cwd=folder,
        capture_output=True,
    )
    assert done.returncode in (1, 4)
    assert message in error_of(done)
    assert tree(folder) == before


def large(folder: Path) -> Path:
    """Return a snapshot that is larger than a pipe holds, which vmsnap makes larger."""
    with vmsnap.create(folder / "large", key=KEY) as snapshot, snapshot.raw_fragment("disk") as fragment:
        fragment.write(pattern(8 << 20))
    return folder / "large"


def test_a_reader_that_goes_away_ends_the_command_silently(folder: Path) -> None:
    with subprocess.Popen(
        command("pack", large(folder), "-", "--key-file", folder / "vm.key"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert len(process.stdout.read(1024)) == 1024
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 128 + signal.SIGPIPE


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_that_waits_for_a_quiet_pipe(folder: Path, number: signal.Signals) -> None:
    before = tree(folder)
    archive = (folder / "vm1.vmsnap.tar").read_bytes()
    with subprocess.Popen(
        command("unpack", "-", folder / "vm2", "--key-file", folder / "vm.key"),
        stdin=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stderr is not None
        process.stdin.write(archive[: len(archive) // 2])
        process.stdin.flush()
        # It has read everything, and is in the middle of the snapshot.
        wait_until(lambda: list(folder.glob(".vmsnap-*")) and _unread(process.stdin.fileno()) == 0)
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert b"Traceback" not in process.stderr.read()
    assert tree(folder) == before


def _unread(pipe: int) -> int:
    """Return the number of bytes in a pipe."""
    count = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, count)
    return count[0]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_a_command_whose_reader_is_quiet(folder: Path, number: signal.Signals) -> None:
    with subprocess.Popen(
        command("pack", large(folder), "-", "--key-file", folder / "vm.key"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(1) == b"p"
        process.send_signal(number)
        assert process.wait(60) == 128 + number
        assert b"Traceback" not in process.stderr.read()


# Creating ------------------------------------------------------------------------------------------------------------

CREATING: dict[str, list[str]] = {
    "dump": ["dump", "ram.img", "NEW"],
    "dump-process": ["dump-process", str(os.getpid()), "NEW", "--no-stop"],
    "encrypt": ["encrypt", "vm1", "NEW", "--key-file", "vm.key", "--new-key-file", "vm.key"],
    "encrypt an archive": ["encrypt", "vm1.vmsnap.tar", "NEW", "--key-file", "vm.key", "--new-key-file", "vm.key"],
    "decrypt": ["decrypt", "vm1", "NEW", "--key-file", "vm.key"],
    "decrypt an archive": ["decrypt", "vm1.vmsnap.tar", "NEW", "--key-file", "vm.key"],
}


@pytest.mark.parametrize("name", CREATING)
def test_a_command_creates_one_file(folder: Path, name: str) -> None:
    if name == "dump-process":
        # A small process.
        with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as process:
            arguments = [str(process.pid) if each == str(os.getpid()) else each for each in CREATING[name]]
            _create(folder, arguments)
            process.kill()
    else:
        _create(folder, CREATING[name])


def _create(folder: Path, arguments: list[str]) -> None:
    key = KEY if arguments[0] == "encrypt" else None
    made = [("new.vmsnap.tar", [], True), ("one", ["--archive"], True), ("two", [], False)]
    for new, options, is_archive in [*made, ("three.vmsnap.tar", ["--no-archive"], False)]:
        run(*(new if each == "NEW" else each for each in arguments), *options, cwd=folder)
        assert (folder / new).is_file() == is_archive
        assert vmsnap.verify(folder / new, key=key).ok


def test_put_creates_no_archive(folder: Path) -> None:
    before = tree(folder)
    done = run("put", "ram.img", "new.vmsnap.tar", "--create", cwd=folder, status=2)
    assert b"vmsnap pack" in done.stderr
    assert tree(folder) == before


# Reading -------------------------------------------------------------------------------------------------------------

READING: dict[str, list[str]] = {
    "ls": ["ls", "SNAPSHOT"],
    "ls of a namespace": ["ls", "SNAPSHOT", "disks"],
    "tree": ["tree", "SNAPSHOT"],
    "show": ["show", "SNAPSHOT", "clock"],
    "cat": ["cat", "SNAPSHOT", "disks/sda", "--offset", "1000", "--size", "70000"],
    "get": ["get", "SNAPSHOT", "disks/sda", "-"],
    "peek": ["peek", "SNAPSHOT", "0x1000", "64"],
    "map": ["map", "SNAPSHOT", "-o", "map.png", "--json"],
    "verify": ["verify", "SNAPSHOT"],
}


@pytest.mark.parametrize("name", READING)
def test_a_command_reads_an_archive_as_the_directory(folder: Path, name: str) -> None:
    outputs = []
    for snapshot in ("vm1", "vm1.vmsnap.tar"):
        arguments = [snapshot if each == "SNAPSHOT" else each for each in READING[name]]
        done = run(*arguments, "--key-file", "vm.key", cwd=folder)
        assert done.stderr == b""
        # `tree` begins with the name of the snapshot.
        outputs.append(done.stdout.replace(snapshot.encode(), b"vm1", 1))
        (folder / "map.png").unlink(missing_ok=True)
    assert outputs[0] == outputs[1] != b""


def test_info_and_ls_tell_of_an_archive_what_they_tell_of_the_directory(folder: Path) -> None:
    for options in ([], ["--key-file", folder / "vm.key"]):
        texts = [run("info", folder / name, *options).stdout.decode() for name in ("vm1", "vm1.vmsnap.tar")]
        lines = [
            [line for line in text.splitlines() if not line.startswith(("snapshot\t", "modified\t"))] for text in texts
        ]
        assert lines[0] == lines[1]
        assert "sealed\tyes" in lines[1]
    long = run("ls", "-l", folder / "vm1.vmsnap.tar", "--key-file", folder / "vm.key").stdout.decode()
    assert len({line.split("\t")[-1] for line in long.splitlines()}) == 1


def test_memory_and_fragments_come_out_of_an_archive(folder: Path) -> None:
    run("restore", "vm1.vmsnap.tar", "back.img", "--key-file", "vm.key", cwd=folder)
    assert (folder / "back.img").read_bytes() == RAM
    run("get", "vm1.vmsnap.tar", "disks/sda", "--key-file", "vm.key", cwd=folder)
    assert (folder / "sda").read_bytes() == pattern(300_000)


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_an_archive_is_never_overwritten(folder: Path, force: list[str]) -> None:
    shutil.copy(folder / "vm1.vmsnap.tar", folder / "other")
    before = tree(folder)
    for target in ("vm1.vmsnap.tar", "other"):
        for arguments in (
            ["get", "vm1.vmsnap.tar", "clock", target],
            ["restore", "vm1.vmsnap.tar", target],
            ["get", "vm1", "clock", target],
        ):
            done = run(*arguments, *force, "--key-file", "vm.key", cwd=folder, status=1)
            assert "is a snapshot in one file, which nothing overwrites" in error_of(done)
    assert tree(folder) == before


def test_nothing_is_added_to_an_archive(folder: Path) -> None:
    before = tree(folder)
    done = run("put", "ram.img", "vm1.vmsnap.tar", "more", "--key-file", "vm.key", cwd=folder, status=1)
    assert "always sealed" in error_of(done)
    done = run("seal", "vm1.vmsnap.tar", "--key-file", "vm.key", cwd=folder, status=1)
    assert "vm1.vmsnap.tar is already sealed" in error_of(done)
    assert tree(folder) == before


def test_an_archive_is_not_memory(folder: Path) -> None:
    message = error_of(run("dump", "vm1.vmsnap.tar", "new", cwd=folder, status=1))
    assert "vm1.vmsnap.tar is a snapshot in one file, not a raw image of memory: vmsnap restore" in message
    assert not (folder / "new").exists()


def test_the_key_of_an_archive_is_changed(folder: Path) -> None:
    write_private(folder / "new.key", KEY[::-1])
    run("rekey", "vm1.vmsnap.tar", "--key-file", "vm.key", "--new-key-file", "new.key", cwd=folder)
    assert vmsnap.verify(folder / "vm1.vmsnap.tar", key=KEY[::-1]).ok
