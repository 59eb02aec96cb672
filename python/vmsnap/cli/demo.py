"""``vmsnap demo``: dump, restore and random reads on this machine, every byte compared and every figure measured."""

import hashlib
import json
import mmap
import os
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from time import perf_counter
from typing import Literal

import click

import vmsnap
from vmsnap import GuestMemory, GuestRegion, MemoryReport, ProcessMemory
from vmsnap.cli.command import Command
from vmsnap.cli.failure import CommandError
from vmsnap.cli.io import COPY_BATCH_BYTES
from vmsnap.cli.keys import WritingKeys
from vmsnap.cli.options import threads_option
from vmsnap.cli.paths import PATH
from vmsnap.cli.process import Process
from vmsnap.cli.terminal import human_size, print_table, printable, progress_so_far, to_terminal

_READS = 1000
_READ_BYTES = 4096
_PAIRS = 5


def check(passed: bool, text: str) -> None:
    """Print a check that passed, or fail."""
    if not passed:
        raise CommandError(f"check failed: {text}")
    click.echo(f"ok  {text}")


def speed(name: str, size: int, seconds: float, note: str) -> tuple[str, str, str]:
    """Return a row of the table: how long `size` bytes took."""
    return name, f"{seconds:.3f} s", f"{human_size(size / seconds)}/s, {note}"


@contextmanager
def child_with_memory(size: int) -> Iterator[tuple[int, int, str]]:
    """Run a child that holds `size` bytes of memory, and end it afterwards.

    Yields
    ------
    tuple
        The process ID, the address of the memory, and its SHA-256 as the child computed it.
    """
    command = [sys.executable, "-I", str(Path(__file__).with_name("demo_child.py")), str(size)]
    # A session of its own: Ctrl-C is for this process, which then ends the child.
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True) as child:
        try:
            line = child.stdout.readline() if child.stdout else b""
            if not line:
                raise CommandError(f"a child process cannot hold {human_size(size)}")
            told = json.loads(line)
            yield child.pid, told["address"], told["sha256"]
        finally:
            child.kill()


def resident_bytes(pid: int) -> int:
    """Return how much memory of a process is resident."""
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * mmap.PAGESIZE


def dump(
    writer: vmsnap.SnapshotWriter, pid: int, address: int, size: int, compress: Literal["lz4"] | None
) -> MemoryReport:
    """Store the child's memory as a guest's, at guest-physical address 0."""
    region = GuestRegion(0, ProcessMemory(pid), offset=address, size=size)
    with progress_so_far("dump") as show:
        return writer.write_memory([region], compress=compress, progress=show)


def read_at_random(memory: GuestMemory, size: int, address: int, process: Process) -> float:
    """Read pages all over guest memory, compare each with the live memory, and return the mean seconds of a read."""
    live = bytearray(_READ_BYTES)
    live_memory = process.range(address, address + size)
    seconds = 0.0
    equal = 0
    for _ in range(_READS):
        at = random.randrange(size // _READ_BYTES) * _READ_BYTES
        began = perf_counter()
        page = memory.read(at, _READ_BYTES)
        seconds += perf_counter() - began
        live_memory.read_into(at, live)
        equal += page == live
    check(equal == _READS, f"{equal} of {_READS} random reads of 4 KiB equal the child's memory")
    return seconds / _READS


def flip_a_bit(root: Path, directory: Path, key: bytes) -> None:
    """Copy a snapshot, flip one bit of the memory in the copy, and check that restoring it is refused."""
    with tempfile.TemporaryDirectory(dir=directory) as parent:
        copy = Path(parent, "copy")
        if root.is_dir():
            shutil.copytree(root, copy)
        else:
            vmsnap.unpack(root, copy, key=key)
        _flip_a_bit(copy, key)


def _flip_a_bit(copy: Path, key: bytes) -> None:
    with open(copy / "mem", "r+b", buffering=0) as file:
        bit = random.randrange(os.fstat(file.fileno()).st_size * 8)
        [byte] = os.pread(file.fileno(), 1, bit // 8)
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit % 8]), bit // 8)
    refusal = "nothing"
    try:
        vmsnap.SnapshotReader(copy, key=key).memory().restore([copy / "ram"])
    except (vmsnap.AuthenticationError, vmsnap.CorruptSnapshotError) as error:
        refusal = type(error).__name__
    check(refusal != "nothing", f"a copy with its bit {bit:,} flipped is refused: {refusal}")


def race_plain_write(
    directory: Path, data: memoryview, pid: int, address: int, size: int, threads: int | None
) -> list[tuple[str, str, str]]:
    """Measure an encrypted dump against write(2) of as many bytes, in pairs, and return the rows of the table."""

    def plain() -> float:
        began = perf_counter()
        with open(directory / "plain", "xb", buffering=0) as file:
            for offset in range(0, len(data), COPY_BATCH_BYTES):
                file.write(data[offset : offset + COPY_BATCH_BYTES])
        seconds = perf_counter() - began
        (directory / "plain").unlink()
        return seconds

    def encrypted() -> float:
        staged = vmsnap.create(directory / "encrypted", key=vmsnap.generate_key(), threads=threads)
        began = perf_counter()
        dump(staged.writer, pid, address, size, None)
        seconds = perf_counter() - began
        staged.discard()
        return seconds

    # The first pair warms up: the first use of a page by a file system costs several times as much as later uses.
    pairs = [(plain(), encrypted()) for _ in range(1 + _PAIRS)][1:]
    ratio = statistics.median(plain / encrypted for plain, encrypted in pairs)
    return [
        speed("plain write", len(data), statistics.median(plain for plain, _ in pairs), "write(2), from a buffer"),
        speed(
            "encrypted dump",
            len(data),
            statistics.median(encrypted for _, encrypted in pairs),
            "the same number of bytes",
        ),
        ("ratio", f"{ratio:.2f}", f"encrypted to plain, median of {_PAIRS} pairs"),
    ]


@click.command(cls=Command, examples=["vmsnap demo", "vmsnap demo --size-mib 1024 --keep vm1"])
@click.option(
    "--size-mib",
    type=click.IntRange(1, 1 << 20),
    metavar="N",
    default=256,
    show_default=True,
    help="Memory of the child.",
)
@click.option("--keep", type=PATH, metavar="SNAPSHOT", help="Keep the snapshot, and its key in SNAPSHOT.key.")
@threads_option
def demo(size_mib: int, keep: Path | None, threads: int | None) -> None:
    """Measure a dump and a restore of the memory of a child.

    The child process stands for a guest. Everything is compared byte by byte, and nothing is left behind without
    --keep. Needs up to three times the size of the memory in $TMPDIR.
    """
    click.echo(
        f"vmsnap {vmsnap.__version__} (aead: {vmsnap.aead_provider()}): a child with {size_mib} MiB, half zero\n"
    )
    key = vmsnap.generate_key()
    size = size_mib << 20
    with ExitStack() as stack:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmsnap-demo-")))
        pid, address, sha256 = stack.enter_context(child_with_memory(size))
        process = stack.enter_context(Process(pid))
        # Stopped to the end, so that its memory stays as it was dumped.
        stack.enter_context(process.stopped())

        resident = resident_bytes(pid)
        root = keep or directory / "snapshot"
        with WritingKeys(key=key).stage(root, threads=threads) as writer:
            report = dump(writer, pid, address, size, "lz4")
            if keep is not None:
                with open(f"{keep}.key", "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                    file.write(key.hex() + "\n")
        check(resident_bytes(pid) == resident, "memory that the child never touched was neither read nor made resident")

        memory = vmsnap.open(root, True, require_sealed=True, key=key, threads=threads).memory()
        with mmap.mmap(-1, size) as back:
            began = perf_counter()
            with progress_so_far("restore") as show:
                memory.restore([back], progress=show)
            restore_seconds = perf_counter() - began
            check(
                hashlib.sha256(back).hexdigest() == sha256,
                f"all {size:,} bytes are restored: same SHA-256 as in the child",
            )
        page_seconds = read_at_random(memory, size, address, process)
        flip_a_bit(root, directory, key)
        data = memoryview(os.urandom(report.data_bytes))
        rows = [
            ("guest memory", human_size(size), f"{human_size(report.data_bytes)} of data in {report.ranges:,} ranges"),
            ("stored size", human_size(report.stored_bytes), "LZ4, encrypted"),
            speed("dump", report.data_bytes, report.seconds, "from the stopped child, LZ4, encrypted, not yet synced"),
            speed("restore", report.data_bytes, restore_seconds, "into fresh memory"),
            ("random read", f"{page_seconds * 1e6:.1f} us", "4 KiB, decrypted and decompressed, mean"),
            *race_plain_write(directory, data, pid, address, size, threads),
        ]
    click.echo()
    if to_terminal():
        print_table(rows, right=frozenset({1}))
    else:
        click.echo("".join(f"{label:<16}{value:>12}  {note}\n" for label, value, note in rows), nl=False)
    if keep is not None:
        kept, key_file = shlex.quote(str(keep)), shlex.quote(f"{keep}.key")
        click.echo(f"kept; to look into it: vmsnap peek {printable(kept)} 0x0 256 --key-file {printable(key_file)}")
