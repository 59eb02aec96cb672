"""The command line: `vmsnap dump`, `dump-process`, `ls`, `cat` and `demo`, run as a user runs them."""

import errno
import functools
import json
import os
import re
import resource
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import vmsnap
from commands import error_of, run, write_private
from vmsnap.cli.failure import CommandError
from vmsnap.cli.process import Process

MIB = 1 << 20

# A process with known bytes in the middle of its memory, which also says when it goes on after a stop. The mapping of a
# file that was cut short afterwards has a page that can be read, and one that nobody can.
VICTIM = """
import ctypes, mmap, os, sys, tempfile
memory = mmap.mmap(-1, 3 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
memory[1 << 20 : 2 << 20] = os.urandom(1 << 20)
with tempfile.TemporaryFile() as file:
    file.write(b"s" * 3 * mmap.PAGESIZE)
    file.flush()
    short = mmap.mmap(file.fileno(), 3 * mmap.PAGESIZE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    file.truncate(mmap.PAGESIZE)
place = lambda m: ctypes.addressof(ctypes.c_char.from_buffer(m))
print(place(memory), place(short), flush=True)
for line in sys.stdin:
    print("echo", line, end="", flush=True)
"""


class Victim:
    """A live child process to dump."""

    def __init__(self) -> None:
        command = [sys.executable, "-c", VICTIM]
        self.child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.pid = self.child.pid
        self.address, self.short_address = map(int, self._line().split())

    def _line(self) -> str:
        assert self.child.stdout is not None
        return self.child.stdout.readline()

    def answers(self) -> bool:
        """Return whether the process runs, by its state and by its answer. A stopped one would never answer."""
        assert self.child.stdin is not None
        if self.state() in "Tt":
            return False
        self.child.stdin.write("hello\n")
        self.child.stdin.flush()
        return self._line() == "echo hello\n"

    def state(self) -> str:
        return Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()[0]

    def stop(self) -> None:
        os.kill(self.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, self.pid, os.WSTOPPED | os.WNOWAIT)

    def memory(self, start: int, end: int) -> bytes:
        with open(f"/proc/{self.pid}/mem", "rb", buffering=0) as file:
            return os.pread(file.fileno(), end - start, start)


@pytest.fixture
def victim() -> Iterator[Victim]:
    victim = Victim()
    with victim.child as child:
        yield victim
        child.kill()


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    """A raw RAM file, of a length that is not a multiple of anything."""
    path = tmp_path / "ram.bin"
    path.write_bytes(os.urandom(2 * MIB + 4321))
    return path


def listing(*arguments: str | Path) -> dict[str, int]:
    """Return the output of `vmsnap ls` in a pipe."""
    lines = run("ls", *arguments).stdout.decode().splitlines()
    return {path: int(size) for path, size in (line.split("\t") for line in lines)}


def memory_of(root: Path, key: bytes | None = None) -> bytes:
    """All guest memory of a snapshot with one region."""
    memory = vmsnap.open(root, key=key).memory()
    [region] = memory.regions
    return memory.read(region.start, len(region))


def test_a_dumped_file_reads_back_byte_for_byte(tmp_path: Path, ram: Path) -> None:
    run("dump", ram, tmp_path / "vm")
    assert memory_of(tmp_path / "vm") == ram.read_bytes()


def test_a_key_file_encrypts_the_dump(tmp_path: Path, ram: Path, key_file: Path, key: bytes) -> None:
    run("dump", ram, tmp_path / "vm", "--key-file", key_file)
    with vmsnap.SnapshotReader(tmp_path / "vm", True, key=key).raw_fragment("mem") as fragment:
        assert fragment.chunk_size_bytes == 16384
    assert memory_of(tmp_path / "vm", key) == ram.read_bytes()


def test_a_file_of_one_byte_becomes_memory_of_one_byte(tmp_path: Path, key_file: Path, key: bytes) -> None:
    (tmp_path / "short").write_bytes(b"x")
    run("dump", tmp_path / "short", tmp_path / "vm", "--key-file", key_file)
    assert memory_of(tmp_path / "vm", key) == b"x"


def test_chunk_size_and_threads_reach_the_library(tmp_path: Path, ram: Path, key_file: Path, key: bytes) -> None:
    run("dump", ram, tmp_path / "vm", "--key-file", key_file, "--chunk-size", 8192, "--threads", 1)
    with vmsnap.SnapshotReader(tmp_path / "vm", key=key).raw_fragment("mem") as fragment:
        assert fragment.chunk_size_bytes == 8192


def test_every_mapping_of_a_process_equals_its_memory(
    tmp_path: Path, victim: Victim, key_file: Path, key: bytes
) -> None:
    victim.stop()  # so that its memory does not change after the dump
    run("dump-process", victim.pid, tmp_path / "vm", "--key-file", key_file)
    snapshot = vmsnap.SnapshotReader(tmp_path / "vm", True, key=key)
    with snapshot.raw_fragment("maps") as fragment:
        maps = fragment.readall()
    assert maps == Path(f"/proc/{victim.pid}/maps").read_bytes()
    memory = snapshot.namespace("mem")
    names = memory.list_fragments()
    assert all(re.fullmatch(r"[0-9a-f]{16}-[0-9a-f]{16}", name) for name in names)
    ranges = [tuple(int(part, 16) for part in name.split("-")) for name in names]
    assert any(start <= victim.address and victim.address + 3 * MIB <= end for start, end in ranges)
    for name, (start, end) in zip(names, ranges, strict=True):
        with memory.raw_fragment(name) as fragment:
            assert fragment.readall() == victim.memory(start, end), name


def test_a_process_goes_on_after_its_dump(tmp_path: Path, victim: Victim) -> None:
    run("dump-process", victim.pid, tmp_path / "vm")
    assert victim.answers()


def test_a_process_that_was_stopped_stays_so(tmp_path: Path, victim: Victim) -> None:
    victim.stop()
    run("dump-process", victim.pid, tmp_path / "vm")
    assert victim.state() == "T"


def test_a_process_goes_on_after_a_dump_that_failed(tmp_path: Path, victim: Victim) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "vmsnap", "dump-process", str(victim.pid), tmp_path / "vm"],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16)),
        capture_output=True,
    )
    assert "File too large" in error_of(done)
    assert victim.answers()
    assert not (tmp_path / "vm").exists()


def test_a_process_goes_on_when_ctrl_c_ends_its_stop(victim: Victim) -> None:
    with pytest.raises(KeyboardInterrupt), Process(victim.pid) as process, process.stopped():  # noqa: PT012
        assert victim.state() == "t"  # as a debugger stops it
        raise KeyboardInterrupt
    assert victim.answers()


def test_memory_that_this_user_may_not_read_names_the_remedy(victim: Victim, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_arguments: object) -> int:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # root, as in CI, may read everything
    with pytest.raises(CommandError, match="ptrace_scope"):
        Process(victim.pid)


def test_no_stop_leaves_the_process_running(tmp_path: Path, victim: Victim) -> None:
    run("dump-process", victim.pid, tmp_path / "vm", "--no-stop")
    assert victim.answers()
    assert any(path.startswith("mem/") for path in listing(tmp_path / "vm"))


def test_pages_that_nobody_can_read_are_left_out_and_named(tmp_path: Path, victim: Victim) -> None:
    done = run("dump-process", victim.pid, tmp_path / "vm")
    page = os.sysconf("SC_PAGE_SIZE")
    start = victim.short_address
    assert f"left out: {start + page:016x}-{start + 3 * page:016x}" in done.stderr.decode()
    whole = listing(tmp_path / "vm")
    readable = f"mem/{start:016x}-{start + page:016x}"
    assert whole[readable] == page
    assert not [path for path in whole if f"{start + page:016x}-" in path or path.endswith(f"-{start + 3 * page:016x}")]
    assert run("cat", tmp_path / "vm", readable).stdout == b"s" * page


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_a_copy_leaves_nothing(tmp_path: Path, number: signal.Signals) -> None:
    # A named pipe is a file that never ends, so that the signal always comes in the middle of the copy.
    os.mkfifo(tmp_path / "endless")
    command = [
        sys.executable,
        "-m",
        "vmsnap",
        "put",
        str(tmp_path / "endless"),
        str(tmp_path / "vm"),
        "ns/ram",
        "--create",
    ]
    # These signals are ignored if the tests run in the background, and children inherit that.
    heed = functools.partial(signal.signal, number, signal.SIG_DFL)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, preexec_fn=heed) as put:
        with open(tmp_path / "endless", "wb", buffering=0) as pipe:
            # More than the pipe holds: it is written only when the copy has begun to read.
            pipe.write(b"x" * (1 << 20))
            assert (tmp_path / "vm/ns/ram").exists()
            put.send_signal(number)
            assert put.wait(timeout=60) == 128 + number
        assert put.stderr is not None
        assert b"Traceback" not in put.stderr.read()
    assert os.listdir(tmp_path) == ["endless"]


def test_a_process_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as gone:
        pass
    assert "no such process" in error_of(run("dump-process", gone.pid, tmp_path / "vm", status=1))
    assert not (tmp_path / "vm").exists()


def test_a_process_without_memory_is_refused(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", ""]) as child:
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)  # a zombie now
        assert f"process {child.pid}" in error_of(run("dump-process", child.pid, tmp_path / "vm", status=1))
    assert not (tmp_path / "vm").exists()


def test_a_number_names_a_file_where_no_process_has_it(tmp_path: Path) -> None:
    (tmp_path / "99999999").write_bytes(b"file")
    run("dump", "99999999", "vm", cwd=tmp_path)
    assert memory_of(tmp_path / "vm") == b"file"


def test_a_number_with_a_slash_names_a_file_always(tmp_path: Path, victim: Victim) -> None:
    (tmp_path / str(victim.pid)).write_bytes(b"file")
    run("dump", f"./{victim.pid}", "vm", cwd=tmp_path)
    assert memory_of(tmp_path / "vm") == b"file"


def test_the_command_for_processes_names_the_one_for_files(tmp_path: Path, ram: Path) -> None:
    done = run("dump-process", ram, tmp_path / "vm", status=2)
    assert b"is not a process ID; to store a file, use vmsnap dump" in done.stderr
    assert not (tmp_path / "vm").exists()


def test_an_existing_folder_is_refused_and_untouched(tmp_path: Path, ram: Path) -> None:
    (tmp_path / "vm").mkdir()
    (tmp_path / "vm" / "mine").write_bytes(b"mine")
    assert "exists" in error_of(run("dump", ram, tmp_path / "vm", status=1))
    assert [path.name for path in (tmp_path / "vm").iterdir()] == ["mine"]


@pytest.mark.parametrize("target", ["missing", "folder"])
def test_a_dump_of_what_is_no_file_leaves_nothing(tmp_path: Path, target: str) -> None:
    (tmp_path / "folder").mkdir()
    assert target in error_of(run("dump", tmp_path / target, tmp_path / "vm", status=1))
    assert not (tmp_path / "vm").exists()


@pytest.mark.parametrize("form", ["{raw}", "{raw}\n", "{hex}", "{hex}\n", "{HEX}\r\n"])
def test_a_key_file_is_raw_or_hex_with_or_without_a_newline(tmp_path: Path, ram: Path, form: str) -> None:
    key = b"0123456789abcdefghijklmnopqrstu\n"  # a raw key may end in the byte of a newline
    text = form.format(raw=key.decode(), hex=key.hex(), HEX=key.hex().upper())
    path = write_private(tmp_path / "vm.key", text.encode())
    run("dump", ram, tmp_path / "vm", "--key-file", path)
    assert vmsnap.SnapshotReader(tmp_path / "vm", True, key=key).list_fragments() == ["mem", "mem_metadata"]


@pytest.mark.parametrize("content", [b"", b"k" * 31, b"k" * 34, b"0" * 63, b"0" * 62 + b" 0", b"g" * 64, b"k" * 5000])
def test_a_file_that_holds_no_key_is_refused(tmp_path: Path, ram: Path, content: bytes) -> None:
    path = write_private(tmp_path / "vm.key", content)
    assert "64 hex digits" in error_of(run("dump", ram, tmp_path / "vm", "--key-file", path, status=1))
    assert not (tmp_path / "vm").exists()


@pytest.mark.parametrize("mode", [0o644, 0o640, 0o602, 0o610])
def test_a_key_file_that_others_may_use_is_refused(tmp_path: Path, ram: Path, key_file: Path, mode: int) -> None:
    key_file.chmod(mode)
    assert "chmod 600" in error_of(run("dump", ram, tmp_path / "vm", "--key-file", key_file, status=1))
    assert not (tmp_path / "vm").exists()


def test_the_wrong_key_is_refused_and_nothing_is_printed(tmp_path: Path, ram: Path, key_file: Path) -> None:
    run("put", ram, tmp_path / "vm", "ram", "--create", "--key-file", key_file)
    wrong = write_private(tmp_path / "wrong.key", vmsnap.generate_key())
    error_of(run("ls", tmp_path / "vm", "--key-file", wrong, status=3))
    error_of(run("ls", tmp_path / "vm", "--json", "--key-file", wrong, status=3))
    error_of(run("cat", tmp_path / "vm", "ram", "--key-file", wrong, status=3))
    assert "key" in error_of(run("cat", tmp_path / "vm", "ram", status=3))


def test_ls_lists_all_namespaces(tmp_path: Path, key_file: Path, key: bytes) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "vm", key=key)
    for place, size in (
        (writer, 1),
        (writer.add_namespace("a"), 20),
        (writer.add_namespace("b").add_namespace("c"), 300),
    ):
        with place.raw_fragment("it") as fragment:
            fragment.write(bytes(size))
    sizes = {"it": 1, "a/it": 20, "b/c/it": 300}
    assert listing(tmp_path / "vm", "--key-file", key_file) == sizes
    told = json.loads(run("ls", tmp_path / "vm", "--json", "--key-file", key_file).stdout)
    assert {each["path"]: each["size"] for each in told} == sizes
    assert all(each["chunk_size_bytes"] == 4096 and each["stored_size"] > each["size"] for each in told)


def test_a_name_cannot_send_codes_to_the_terminal(tmp_path: Path) -> None:
    name = "red\x1b[31m\nline\ttab"
    with vmsnap.SnapshotWriter(tmp_path / "vm").raw_fragment(name) as fragment:
        fragment.write(b"x")
    assert run("ls", tmp_path / "vm").stdout == b"red\\x1b[31m\\nline\\ttab\t1\n"
    assert [each["path"] for each in json.loads(run("ls", tmp_path / "vm", "--json").stdout)] == [name]
    assert run("cat", tmp_path / "vm", name).stdout == b"x"
    error_of(run("cat", tmp_path / "vm", name + "missing", status=1))


def test_forced_colours_do_not_reach_a_pipe(tmp_path: Path, ram: Path) -> None:
    run("put", ram, tmp_path / "vm", "ram", "--create", env={"FORCE_COLOR": "1"})
    assert b"\x1b" not in run("ls", tmp_path / "vm", env={"FORCE_COLOR": "1", "TERM": "xterm-256color"}).stdout


@pytest.mark.parametrize(
    ("offset", "size"),
    [(0, 0), (0, 1), (65535, 2), (MIB - 1, MIB + 2), (2 * MIB + 4320, 99), (3 * MIB, 1), (sys.maxsize, 1)],
)
def test_cat_writes_the_part_asked_for(tmp_path: Path, ram: Path, key_file: Path, offset: int, size: int) -> None:
    run("put", ram, tmp_path / "vm", "ram", "--create", "--key-file", key_file)
    part = run("cat", tmp_path / "vm", "ram", "--offset", offset, "--size", size, "--key-file", key_file)
    assert part.stdout == ram.read_bytes()[offset : offset + size]


def test_cat_without_a_size_goes_to_the_end(tmp_path: Path, ram: Path) -> None:
    run("put", ram, tmp_path / "vm", "ram", "--create")
    assert run("cat", tmp_path / "vm", "ram", "--offset", MIB + 7).stdout == ram.read_bytes()[MIB + 7 :]


def test_cat_into_a_closed_pipe_is_quiet(tmp_path: Path, ram: Path) -> None:
    run("put", ram, tmp_path / "vm", "ram", "--create")
    command = [sys.executable, "-m", "vmsnap", "cat", str(tmp_path / "vm"), "ram"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as cat:
        assert cat.stdout is not None
        assert cat.stderr is not None
        cat.stdout.read(1)
        cat.stdout.close()
        assert cat.stderr.read() == b""


def test_output_that_cannot_be_written_is_an_error(tmp_path: Path, ram: Path) -> None:
    run("put", ram, tmp_path / "vm", "ram", "--create")
    with open("/dev/full", "wb") as full:
        for arguments in (["cat", tmp_path / "vm", "ram", "--size", "5"], ["ls", tmp_path / "vm"]):
            command = [sys.executable, "-m", "vmsnap", *map(str, arguments)]
            done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, check=False, timeout=60)
            assert done.returncode == 1
            assert done.stderr == b"vmsnap: error: standard output: No space left on device\n"


@pytest.mark.parametrize("path", ["missing", "missing/ram", "../vm/ram", "/ram", "", "ram/"])
def test_cat_of_what_is_not_there_is_an_error(tmp_path: Path, ram: Path, path: str) -> None:
    run("put", ram, tmp_path / "vm", "ram", "--create")
    error_of(run("cat", tmp_path / "vm", path, status=1))


def test_a_missing_snapshot_is_an_error(tmp_path: Path) -> None:
    assert str(tmp_path / "nowhere") in error_of(run("ls", tmp_path / "nowhere", status=1))


@pytest.mark.parametrize(
    "arguments",
    [["dump"], ["nonsense"], ["ls", "a", "b", "c"], ["cat", "a", "b", "--offset", "-1"], ["demo", "--size-mib", "0"]],
)
def test_wrong_use_exits_with_2(arguments: list[str]) -> None:
    assert run(*arguments, status=2).stdout == b""


def test_version_names_provider_features_and_commit() -> None:
    told = run("--version").stdout.decode()
    features = "age, aws-lc, c-lz4(, object-store)?"
    built = rf"aead: {vmsnap.aead_provider()}; features: {features}; commit: (unknown|[0-9a-f]{{40}}(-dirty)?)"
    assert re.fullmatch(rf"vmsnap {vmsnap.__version__} \({built}\)\n", told)


def test_without_click_the_remedy_is_named(tmp_path: Path) -> None:
    (tmp_path / "click.py").write_text("raise ModuleNotFoundError('No module named click', name='click')")
    done = run(
        "--version", status=2, env={"PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    )
    assert done.stdout == b""
    assert done.stderr == b"vmsnap: error: the command line needs click and rich: pip install 'vmsnap[cli]'\n"


def test_the_demo_passes_and_leaves_nothing(tmp_path: Path) -> None:
    told = run("demo", "--size-mib", 8, env={"TMPDIR": str(tmp_path)}).stdout.decode()
    assert len(re.findall(r"^ok ", told, re.MULTILINE)) == 4
    assert "refused: " in told
    for figure in (
        "guest memory",
        "stored size",
        "dump",
        "restore",
        "random read",
        "plain write",
        "encrypted dump",
        "ratio",
    ):
        assert re.search(rf"^{figure} +[0-9]", told, re.MULTILINE), figure
    assert "\x1b" not in told
    assert list(tmp_path.iterdir()) == []


def test_the_demo_keeps_a_snapshot_that_its_key_opens(tmp_path: Path) -> None:
    run("demo", "--size-mib", 8, "--keep", tmp_path / "vm")
    key_file = tmp_path / "vm.key"
    assert stat.S_IMODE(key_file.stat().st_mode) == 0o600
    assert listing(tmp_path / "vm", "--key-file", key_file)["mem"] > MIB
    assert len(run("peek", tmp_path / "vm", 0, "8M", "--key-file", key_file).stdout) > MIB


def test_the_demo_refuses_to_keep_over_what_exists(tmp_path: Path) -> None:
    (tmp_path / "vm").mkdir()
    assert b"exists" in run("demo", "--size-mib", 8, "--keep", tmp_path / "vm", status=1).stderr
    assert [path.name for path in tmp_path.iterdir()] == ["vm"]
