"""Where memory is limited (ulimit -v, a small machine), a call that needs more raises MemoryError, and nothing else.

Each operation runs in forked children that may have less and less memory, from enough for all of it to hardly any.
"""

import os
import resource
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import vmsnap
from commands import write_private
from refusals import refused_elsewhere, row
from support import MIB, pattern, run_python

KEY = bytes(range(32))

#: How many MiB more than the process has, when a child begins. Some must do, and some must not.
ROOM = (3000, 260, 140, 100, 70, 50, 30, 18, 10, 6)

OUTCOMES = {0: "done", 3: "MemoryError"}


def address_space() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    return pages * resource.getpagesize()


def outcome(work: Callable[[], object], room: int) -> str:
    """How `work` ends in a child that may have so many bytes more than it has."""
    child = os.fork()
    if child == 0:
        status = 5
        try:
            resource.setrlimit(resource.RLIMIT_AS, (address_space() + room,) * 2)
            work()
            status = 0
        except MemoryError:
            status = 3
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return OUTCOMES.get(status, f"exit status {status}")


def try_with_less_and_less(
    work: Callable[[], object],
    afterwards: Callable[[str], object] = lambda _: None,
    rooms: Sequence[int] = ROOM,
) -> None:
    """Run the call, which succeeds or raises the right error, and check the leftovers each time."""
    outcomes = {}
    for mib in rooms:
        outcomes[mib] = outcome(work, mib * MIB)
        afterwards(outcomes[mib])
    assert set(outcomes.values()) == {"done", "MemoryError"}, outcomes


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sealed snapshot: a fragment in the largest chunks, guest memory in such, and in the largest LZ4 blocks."""
    path = tmp_path_factory.mktemp("stored") / "vm1"
    ram = pattern(4 * MIB) * 17
    with vmsnap.create(path, key=KEY) as snap:
        with snap.raw_fragment("ram", chunk_size_bytes=64 * MIB) as fragment:
            fragment.write(ram)
        regions = [vmsnap.GuestRegion(0, ram)]
        snap.add_namespace("raw").write_memory(regions, chunk_size_bytes=64 * MIB)
        snap.add_namespace("lz4").write_memory(
            regions, chunk_size_bytes=64 * MIB, compress="lz4", block_size_bytes=4 * MIB
        )
    return path


BUFFER = bytearray(68 * MIB)
DATA = memoryview(bytes(range(256)) * (68 * MIB >> 8))

READS: dict[str, Callable[[vmsnap.SnapshotReader], object]] = {
    "read_at": lambda reader: reader.raw_fragment("ram").read_at(0, 16),
    "read": lambda reader: reader.raw_fragment("ram").read(16),
    "all": lambda reader: reader.raw_fragment("ram").read(),
    "readinto": lambda reader: reader.raw_fragment("ram").readinto(BUFFER),
    "memory_read": lambda reader: reader.namespace("raw").memory().read(5, 16),
    "memory_read_lz4": lambda reader: reader.namespace("lz4").memory().read(5, 16 * MIB),
    "restore": lambda reader: reader.namespace("raw").memory().restore([BUFFER]),
    "restore_lz4": lambda reader: reader.namespace("lz4").memory().restore([BUFFER]),
}


@pytest.mark.parametrize("read", READS.values(), ids=READS)
def test_snapshots_are_read(stored: Path, read: Callable[[vmsnap.SnapshotReader], object]) -> None:
    try_with_less_and_less(lambda: read(vmsnap.open(stored, key=KEY, threads=4)))


@row("out-of-memory")
def test_what_is_asked_for_is_said(stored: Path) -> None:
    script = f"""
import resource
fragment = vmsnap.open(sys.argv[1], key={KEY!r}).raw_fragment("ram")
with open("/proc/self/statm") as file:
    pages = int(file.read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (30 << 20),) * 2)
fragment.read_at(0, 16)
"""
    refused_elsewhere("out-of-memory", 'fragment "ram" of .*there is not enough memory for 67', stored, script, stored)


def test_verify_takes_no_want_of_memory_for_a_fault_of_the_snapshot(stored: Path) -> None:
    def work() -> None:
        assert vmsnap.verify(stored, key=KEY, threads=2).ok

    try_with_less_and_less(work)


def in_pieces(snap: vmsnap.SnapshotWriter) -> None:
    with snap.raw_fragment("ram", chunk_size_bytes=64 * MIB) as fragment:
        for at in range(0, len(DATA), MIB):
            fragment.write(DATA[at : at + MIB])


def whole(snap: vmsnap.SnapshotWriter) -> None:
    with snap.raw_fragment("ram", chunk_size_bytes=64 * MIB) as fragment:
        fragment.write(DATA)


def raw_memory(snap: vmsnap.SnapshotWriter) -> None:
    snap.write_memory([vmsnap.GuestRegion(0, DATA)], chunk_size_bytes=64 * MIB)


def packed_memory(snap: vmsnap.SnapshotWriter) -> None:
    regions = [vmsnap.GuestRegion(0, pattern(4 * MIB) * 17)]
    snap.write_memory(regions, chunk_size_bytes=64 * MIB, compress="lz4", block_size_bytes=4 * MIB)


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("write", [in_pieces, whole, raw_memory, packed_memory])
def test_snapshots_are_written_or_leave_nothing(
    tmp_path: Path, threads: int, write: Callable[[vmsnap.SnapshotWriter], object]
) -> None:
    def work() -> None:
        with vmsnap.create(tmp_path / "vm1", key=KEY, threads=threads, durable=False) as snap:
            write(snap)

    def check(how: str) -> None:
        assert os.listdir(tmp_path) == (["vm1"] if how == "done" else [])
        if how == "done":
            shutil.rmtree(tmp_path / "vm1")

    try_with_less_and_less(work, check)


def test_a_fragment_in_place_leaves_nothing(tmp_path: Path) -> None:
    snap = vmsnap.SnapshotWriter(tmp_path / "vm1", key=KEY, threads=2)

    def check(how: str) -> None:
        assert os.listdir(tmp_path / "vm1") == ["enc_metadata", "ram"][: 2 if how == "done" else 1]
        (tmp_path / "vm1/ram").unlink(missing_ok=True)

    try_with_less_and_less(lambda: in_pieces(snap), check)


def test_passphrases(tmp_path: Path) -> None:
    """Each takes 256 MiB for a moment."""
    path = tmp_path / "vm1"
    vmsnap.SnapshotWriter(path, passphrase="correct horse")
    rooms = (400, 240, 100, 20)
    try_with_less_and_less(lambda: vmsnap.open(path, passphrase="correct horse"), rooms=rooms)

    def check(how: str) -> None:
        assert (tmp_path / "vm2").exists() == (how == "done")
        shutil.rmtree(tmp_path / "vm2", ignore_errors=True)

    try_with_less_and_less(lambda: vmsnap.SnapshotWriter(tmp_path / "vm2", passphrase="x"), check, rooms)


def test_long_lists_of_ranges(tmp_path: Path) -> None:
    """A list of two million ranges in a snapshot from crosvm. The memory is a hole of the right length."""
    count = 2_000_000
    ranges = b"".join(
        b"\xa2\x65start\x1b" + (8192 * at).to_bytes(8, "big") + b"\x63end\x1b" + (8192 * at + 4096).to_bytes(8, "big")
        for at in range(count)
    )
    size = (8192 * count).to_bytes(8, "big")
    region = b"\xa3\x6aguest_base\x00\x64size\x1b" + size + b"\x6bdata_ranges\x9a" + count.to_bytes(4, "big") + ranges
    path = tmp_path / "vm1"
    path.mkdir()
    (path / "mem_metadata").write_bytes(b"\xa2\x67regions\x81" + region + b"\x6acompressed\xf4")
    with (path / "mem").open("wb") as memory:
        memory.truncate(4096 * count)
    try_with_less_and_less(lambda: vmsnap.open(path).memory())


LIMITED = """
import os, resource, sys
from vmsnap.cli import main
from vmsnap.cli.group import group
with open("/proc/self/statm") as file:
    pages = int(file.read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (30 << 20),) * 2)
sys.argv[0] = "vmsnap"
main()
"""


def test_the_command_line_says_it_in_one_line(tmp_path: Path, stored: Path) -> None:
    key_file = write_private(tmp_path / "vm.key", KEY)
    done = run_python(LIMITED, "cat", stored, "ram", "--key-file", key_file)
    assert (done.returncode, done.stdout) == (1, "")
    [line] = done.stderr.splitlines()
    assert line.startswith(f'vmsnap: error: fragment "ram" of {stored}: there is not enough memory for 67108')
