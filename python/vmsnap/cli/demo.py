"""``vmsnap demo``: the main job with nothing but this machine, every byte compared and every figure measured."""

import hashlib
import io
import json
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

import click

import vmsnap
from vmsnap.cli.dump import CHUNK_BYTES, PIECE_BYTES, store_process
from vmsnap.cli.failure import CommandError
from vmsnap.cli.keys import WritingKeys, threads_option
from vmsnap.cli.process import Process
from vmsnap.cli.terminal import human_size, print_table, printable, progress, to_terminal

_READS = 1000
_READ_BYTES = 4096
_PAIRS = 5


def check(passed: bool, text: str) -> None:
    """Print what was found, or fail with it."""
    if not passed:
        raise CommandError(f"not so: {text}")
    click.echo(f"ok  {text}")


def speed(name: str, size: int, seconds: float, note: str) -> tuple[str, str, str]:
    """Return a row of the table: how long `size` bytes took."""
    return name, f"{seconds:.3f} s", f"{human_size(size / seconds)}/s, {note}"


@contextmanager
def memory_holder(size: int) -> Iterator[tuple[int, int, str]]:
    """Run a child that holds `size` bytes of memory, and end it afterwards.

    Yields
    ------
    tuple
        Its process number, the address of the memory, and the SHA-256 of it that the child computed.
    """
    command = [sys.executable, "-I", str(Path(__file__).with_name("holder.py")), str(size)]
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


def addresses_of(name: str) -> tuple[int, int]:
    """Return the range of addresses that is the name of a fragment."""
    start, _, end = name.partition("-")
    return int(start, 16), int(end, 16)


def compare_all(memory: vmsnap.SnapshotReader, process: Process) -> tuple[int, float]:
    """Read all ranges back and compare them with the live memory. Return their bytes and the seconds of reading."""
    stored, live = (memoryview(bytearray(PIECE_BYTES)) for _ in range(2))
    ranges = {name: addresses_of(name) for name in memory.list_fragments()}
    total = sum(end - start for start, end in ranges.values())
    seconds = 0.0
    differing = []
    with progress("compare", total) as advance:
        for name, (address, end) in ranges.items():
            equal = True
            with memory.raw_fragment(name) as fragment:
                began = perf_counter()
                while count := fragment.readinto(stored):
                    seconds += perf_counter() - began
                    process.read_into(address, live[:count])
                    equal = equal and stored[:count] == live[:count]
                    address += count
                    advance(count)
                    began = perf_counter()
            if not equal or address != end:
                differing.append(name)
    text = "equal the child's memory, byte for byte"
    check(
        bool(ranges) and not differing, " ".join([f"all {len(ranges)} mappings, {total:,} bytes, {text}", *differing])
    )
    return total, seconds


def read_at_random(fragment: vmsnap.FragmentReader, base: int, process: Process) -> float:
    """Read pages all over a fragment, compare each with the live memory, and return the mean seconds of a read."""
    live = bytearray(_READ_BYTES)
    seconds = 0.0
    equal = 0
    for _ in range(_READS):
        offset = random.randrange(fragment.size // _READ_BYTES) * _READ_BYTES
        began = perf_counter()
        page = fragment.read_at(offset, _READ_BYTES)
        seconds += perf_counter() - began
        process.read_into(base + offset, memoryview(live))
        equal += page == live
    check(equal == _READS, f"{equal} of {_READS} random reads of 4 KiB equal the child's memory")
    return seconds / _READS


def flip_a_bit(root: Path, copy: Path, name: str, key: bytes) -> None:
    """Copy a snapshot, flip one bit of a range in the copy, and check that reading it is refused."""
    shutil.copytree(root, copy)
    with open(copy / "mem" / name, "r+b", buffering=0) as file:
        bit = random.randrange(os.fstat(file.fileno()).st_size * 8)
        [byte] = os.pread(file.fileno(), 1, bit // 8)
        os.pwrite(file.fileno(), bytes([byte ^ 1 << bit % 8]), bit // 8)
    refusal = "nothing"
    try:
        with vmsnap.SnapshotReader(copy, key=key).namespace("mem").raw_fragment(name) as fragment:
            buffer = bytearray(PIECE_BYTES)
            while fragment.readinto(buffer):
                pass
    except (vmsnap.AuthenticationError, vmsnap.CorruptSnapshotError) as error:
        refusal = type(error).__name__
    check(refusal != "nothing", f"a copy with its bit {bit:,} flipped is refused: {refusal}")
    shutil.rmtree(copy)


def race_plain_write(folder: Path, data: memoryview, key: bytes, threads: int | None) -> list[tuple[str, str, str]]:
    """Measure writing `data` encrypted against write(2) of it, pair by pair, and return the rows of the table."""

    def write_all(file: io.RawIOBase) -> None:
        for offset in range(0, len(data), PIECE_BYTES):
            file.write(data[offset : offset + PIECE_BYTES])

    def plain() -> float:
        began = perf_counter()
        with open(folder / "plain", "xb", buffering=0) as file:
            write_all(file)
        seconds = perf_counter() - began
        (folder / "plain").unlink()
        return seconds

    def sealed() -> float:
        writer = vmsnap.SnapshotWriter(folder / "sealed", key=key, threads=threads)
        began = perf_counter()
        with writer.raw_fragment("ram", chunk_size_bytes=CHUNK_BYTES) as fragment:
            write_all(fragment)
        seconds = perf_counter() - began
        shutil.rmtree(writer.root)
        return seconds

    # The first pair warms up: pages that a file system takes for the first time cost several times what used ones do.
    pairs = [(plain(), sealed()) for _ in range(1 + _PAIRS)][1:]
    ratio = statistics.median(plain / sealed for plain, sealed in pairs)
    return [
        speed("plain write", len(data), statistics.median(plain for plain, _ in pairs), "write(2), from a buffer"),
        speed("sealed write", len(data), statistics.median(sealed for _, sealed in pairs), "encrypted, the same bytes"),
        ("ratio", f"{ratio:.2f}", f"sealed to plain, median of {_PAIRS} pairs"),
    ]


@click.command()
@click.option("--size-mib", type=click.IntRange(1, 1 << 20), default=256, show_default=True, help="The child's memory.")
@click.option(
    "--keep", type=click.Path(path_type=Path), metavar="DIR", help="Keep the snapshot, and its key in DIR.key."
)
@threads_option
def demo(size_mib: int, keep: Path | None, threads: int | None) -> None:
    """Dump a child process, read it back, compare and measure.

    Needs nothing but this machine, and three times the memory's size in $TMPDIR for a while.
    """
    click.echo(
        f"vmsnap {vmsnap.__version__} (aead: {vmsnap.aead_provider()}): a child with {size_mib} MiB, half zero\n"
    )
    key = vmsnap.generate_key()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="vmsnap-demo-")))
        pid, address, sha256 = stack.enter_context(memory_holder(size_mib << 20))
        process = stack.enter_context(Process(pid))
        # Stopped to the end, so that there is one truth to compare with; the dump finds it so and leaves it so.
        stack.enter_context(process.stopped())

        began = perf_counter()
        root = keep or folder / "snapshot"
        with WritingKeys(key=key).stage(root, threads=threads) as writer:
            summary = store_process(writer, process, CHUNK_BYTES)
            dump_seconds = perf_counter() - began
            if keep is not None:
                with open(f"{keep}.key", "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
                    file.write(key.hex() + "\n")
        files_size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())

        memory = vmsnap.open(root, True, require_sealed=True, key=key, threads=threads).namespace("mem")
        read_size, read_seconds = compare_all(memory, process)
        # The kernel may have joined the child's memory and a neighbour to one mapping.
        name = next(n for n in memory.list_fragments() if addresses_of(n)[0] <= address < addresses_of(n)[1])
        data = memoryview(bytearray(size_mib << 20))
        with memory.raw_fragment(name) as fragment:
            base, _ = addresses_of(name)
            page_seconds = read_at_random(fragment, base, process)
            fragment.readinto_at(address - base, data)
        check(hashlib.sha256(data).hexdigest() == sha256, "SHA-256 as the child computed it of its own memory")
        flip_a_bit(root, folder / "copy", name, key)
        rows = [
            ("logical size", human_size(summary.size), f"{summary.fragments} fragments: all that the child maps"),
            ("stored size", human_size(files_size), "all files of the snapshot"),
            speed("dump", summary.size, dump_seconds, "from the stopped child, encrypted, not yet synced"),
            speed("read back", read_size, read_seconds, "everything, decrypted"),
            ("random read", f"{page_seconds * 1e6:.1f} us", "4 KiB out of chunks of 64 KiB, mean"),
            *race_plain_write(folder, data, key, threads),
        ]
    click.echo()
    if to_terminal():
        print_table(rows, right=frozenset({1}))
    else:
        click.echo("".join(f"{label:<14}{value:>12}  {note}\n" for label, value, note in rows), nl=False)
    summary.tell_left_out()
    if keep is not None:
        kept, key_file = shlex.quote(str(keep)), shlex.quote(f"{keep}.key")
        click.echo(f"kept: vmsnap ls {printable(kept)} --key-file {printable(key_file)}")
