"""QEMU's migration stream: QEMU's own streams are taken apart, and QEMU loads what is made of them again."""

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import qemus
import vmsnap
from guest import PATIENCE, ask, qemu_command, running
from migration_files import FOOTER, number
from qemus import Qemu
from refusals import refused, row
from support import MIB, write
from toy_guest import Toy
from vmsnap.migration import MigrationStream, SentBlock

KEY = bytes(range(32))
SIZE = 64 * MIB


def wait_for(qmp: Path, command: str, wanted: set[str]) -> str:
    """Ask until a status is one of those that are wanted."""
    until, status = time.monotonic() + PATIENCE, None
    while status not in wanted:
        assert time.monotonic() < until, f"{command}: {status}"
        time.sleep(0.01)
        status = ask(qmp, command).get("status")
    return str(status)


def migrate(qmp: Path, fd_path: Path, work: Callable[[int], Any]) -> Any:
    """Let QEMU migrate into a FIFO while `work` reads its other end."""
    os.mkfifo(fd_path)
    ask(qmp, "migrate", uri=f"exec:cat > {fd_path}")
    reading = os.open(fd_path, os.O_RDONLY)
    try:
        return work(reading)
    finally:
        os.close(reading)
        fd_path.unlink()


def load(qmp: Path, fd_path: Path, work: Callable[[int], Any]) -> Any:
    """Let a QEMU that waits for a migration read a FIFO while `work` writes to its other end."""
    os.mkfifo(fd_path)
    ask(qmp, "migrate-incoming", uri=f"exec:cat {fd_path}")
    writing = os.open(fd_path, os.O_WRONLY)
    try:
        return work(writing)
    finally:
        os.close(writing)
        fd_path.unlink()


def save(qmp: Path, path: Path, beside: Path, **options: Any) -> MigrationStream:
    """Save a guest with plain memory that runs, or stands still."""
    with vmsnap.create(path, **options) as writer:

        def work(fd: int) -> MigrationStream:
            return writer.receive_migration(fd, ["pc.ram"])

        with migrate(qmp, beside, work) as stream:
            writer.write_memory([vmsnap.GuestRegion(0, stream.memory("pc.ram"))], compress="lz4")
    assert isinstance(stream, MigrationStream)
    return stream


@pytest.mark.parametrize("memory", ["", "memory-backend-memfd,id=mem,size=64M,share=on"])
def test_a_guest_that_runs_is_received_and_goes_on_in_another_qemu(
    tmp_path: Path, qemu: Qemu, toy: Toy, memory: str
) -> None:
    qmp, path = tmp_path / "qmp", tmp_path / "vm1"
    with running(qemu_command(qmp, *toy.options, memory="", size="64M", qemu=qemu), qmp):
        toy.ticks(3)
        stream = save(qmp, path, tmp_path / "fifo", key=KEY)
        toy.catch_up()
    assert stream.machine_type == qemu.newest("pc")
    assert not stream.ignores_shared
    ram, *others = stream.blocks
    assert (ram.name, ram.size_bytes, ram.taken) == ("pc.ram", SIZE, True)
    assert "pc.bios" in [each.name for each in others if each.records and not each.taken]
    assert stream.page_bytes == ram.records * 4096 >= SIZE
    # It rewrites 4 MiB all the time.
    assert stream.repeated_bytes == stream.page_bytes - SIZE > 0
    assert stream.device_state_bytes < MIB

    reader = vmsnap.open(path, key=KEY)
    front = reader.migration_front()
    assert (front.machine_type, front.ignores_shared) == (stream.machine_type, False)
    assert front.blocks == [(each.name, each.size_bytes) for each in stream.blocks]
    name = "mem" if memory else "pc.ram"
    command = qemu_command(qmp, *toy.options, "-incoming", "defer", memory=memory, size="64M", qemu=qemu)
    with running(command, qmp):
        blocks = [SentBlock("pc.ram", name, [(0, 0, SIZE)], zeros=True)]
        told: list[tuple[int, int]] = []
        count = load(
            qmp, tmp_path / "fifo", lambda fd: reader.send_migration(fd, blocks, progress=lambda *n: told.append(n))
        )
        assert told[-1] == (SIZE, SIZE)
        assert count > reader.memory().data_bytes
        wait_for(qmp, "query-status", {"running"})
        toy.ticks(5)


def test_a_paused_guest_of_one_qemu_is_loaded_by_a_newer_one(tmp_path: Path, toy: Toy) -> None:
    old, new = qemus.found("system"), qemus.found("10.0")
    machine = old.newest("q35")
    if not new.knows(machine):
        pytest.skip(f"{new} does not know {machine}")
    qmp, path = tmp_path / "qmp", tmp_path / "vm1"
    with running(qemu_command(qmp, *toy.options, machine=machine, memory="", size="64M", qemu=old), qmp):
        toy.ticks(3)
        ask(qmp, "stop")
        stream = save(qmp, path, tmp_path / "fifo")
        assert stream.repeated_bytes == 0
        toy.catch_up()
    reader = vmsnap.open(path)
    options = [*toy.options, "-incoming", "defer", "-S"]
    with running(qemu_command(qmp, *options, machine=machine, memory="", size="64M", qemu=new), qmp):
        blocks = [SentBlock("pc.ram", "pc.ram", [(0, 0, SIZE)])]
        load(qmp, tmp_path / "fifo", lambda fd: reader.send_migration(fd, blocks, threads=1))
        wait_for(qmp, "query-status", {"paused"})
        assert ask(qmp, "query-migrate")["status"] == "completed"
        ask(qmp, "cont")
        toy.ticks(5)


def test_a_stream_without_a_description_is_complete(tmp_path: Path, qemu: Qemu) -> None:
    qmp = tmp_path / "qmp"
    with running(qemu_command(qmp, "-S", machine="q35,suppress-vmdesc=on", memory="", size="64M", qemu=qemu), qmp):
        save(qmp, tmp_path / "vm1", tmp_path / "fifo")
    assert vmsnap.open(tmp_path / "vm1").raw_fragment("device_state").read()[-1:] == b"\0"


def test_a_block_that_qemu_leaves_out_has_no_records(tmp_path: Path, qemu: Qemu) -> None:
    qmp, ram = tmp_path / "qmp", tmp_path / "ram"
    memory = f"memory-backend-file,id=mem,size=64M,share=on,mem-path={ram}"
    with running(qemu_command(qmp, "-S", memory=memory, size="64M", qemu=qemu), qmp):
        ask(qmp, "migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
        writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
        stream = migrate(qmp, tmp_path / "fifo", lambda fd: writer.receive_migration(fd, ["mem"]))
    assert stream.ignores_shared
    assert (stream.blocks[0].records, stream.blocks[0].taken, stream.page_bytes) == (0, True, 0)
    with pytest.raises(vmsnap.InvalidArgumentError, match=r'"mem" is listed .* but QEMU left its pages out'):
        stream.memory("mem")


def test_pages_that_are_not_in_order_in_a_file_are_refused_by_name(tmp_path: Path) -> None:
    qmp, file = tmp_path / "qmp", tmp_path / "file"
    with running(qemu_command(qmp, "-S", memory="", size="64M", qemu=qemus.found("10.0")), qmp):
        ask(qmp, "migrate-set-capabilities", capabilities=[{"capability": "mapped-ram", "state": True}])
        ask(qmp, "migrate", uri=f"file:{file}")
        assert wait_for(qmp, "query-migrate", {"completed", "failed"}) == "completed"
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
    message = r'the migration capability "mapped-ram" was on; switch it off, at byte \d+ of the migration stream'
    with file.open("rb") as stream, pytest.raises(vmsnap.QemuError, match=message):
        writer.receive_migration(stream.fileno(), None)


# Without QEMU: the smallest stream, with one block of two pages.


FRONT = b"QEVM" + number(3) + b"\1" + number(2) + b"\3ram" + number(0) + number(4) + number(8192 | 4, 8)
STREAM = (
    FRONT
    + (b"\6pc.ram" + number(8192, 8) + number(16, 8) + FOOTER)
    + (b"\2" + number(2) + number(8, 8) + b"\6pc.ram" + b"x" * 4096 + number(16, 8) + FOOTER)
    + (b"\3" + number(2) + number(16, 8) + FOOTER)
    + (b"\4" + number(3) + b"\5timer" + number(0) + number(2) + b"\x7e" + number(3) + b"\0")
)


@contextmanager
def stream_of(path: Path, content: bytes) -> Iterator[int]:
    path.write_bytes(content)
    with path.open("rb") as file:
        yield file.fileno()


def received(tmp_path: Path, content: bytes = STREAM) -> tuple[vmsnap.SnapshotWriter, MigrationStream]:
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
    with stream_of(tmp_path / "stream", content) as fd:
        return writer, writer.receive_migration(fd, None)


@row("migration-stream")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the stream is truncated: it ends within its header, at byte 0 of the migration stream"),
        (b"RIFF", r'not a stream of QEMU: it begins with "RIFF", not "QEVM", at byte 0'),
        (STREAM[:-1], f"truncated: it ends within the state of the devices, at byte {len(STREAM) - 1}"),
        (STREAM[:4000], "the stream is truncated: it ends within a record"),
    ],
)
def test_a_stream_that_is_not_understood(tmp_path: Path, content: bytes, message: str) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
    with (
        stream_of(tmp_path / "stream", content) as fd,
        refused("migration-stream", message, tmp_path / "vm1"),
    ):
        writer.receive_migration(fd, None)


@row("migration-stream")
def test_a_stream_without_the_block_that_is_wanted(tmp_path: Path) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
    with (
        stream_of(tmp_path / "stream", STREAM) as fd,
        refused("migration-stream", 'no RAM block "mem".*; its blocks are "pc.ram"', tmp_path / "vm1"),
    ):
        writer.receive_migration(fd, ["mem"])


@row("migration-closed")
def test_memory_of_a_closed_stream(tmp_path: Path) -> None:
    writer, stream = received(tmp_path)
    with stream:
        memory = stream.memory("pc.ram", 4096)
    assert stream.page_bytes == 4096
    with refused("migration-closed", "the migration stream is closed", tmp_path / "vm1"):
        stream.memory("pc.ram")
    with refused("migration-closed", "the migration stream is closed", tmp_path / "vm1"):
        writer.write_memory([vmsnap.GuestRegion(0, memory)])
    stream.close()


@row("migration-blocks")
def test_blocks_that_do_not_fit(tmp_path: Path) -> None:
    writer, stream = received(tmp_path)
    for name, offset, size, message in (
        ("mem", 0, None, '"mem" is not in the migration stream'),
        ("pc.ram", 0, 8193, "has 8192 bytes, too few for 8193 bytes from offset 0"),
        ("pc.ram", 8193, None, "has 8192 bytes, too few"),
    ):
        with refused("migration-blocks", message, tmp_path / "vm1"):
            stream.memory(name, offset, size)
    with refused("migration-blocks", "the memory of the stream has 4096 bytes, too few", tmp_path / "vm1"):
        writer.write_memory([vmsnap.GuestRegion(0, stream.memory("pc.ram", 4096), 1, 4096)])
    writer.write_memory([vmsnap.GuestRegion(0, stream.memory("pc.ram"))])
    reader = vmsnap.open(tmp_path / "vm1")
    assert reader.memory().read(0, 8192) == b"x" * 4096 + bytes(4096)
    for block, message in (
        (SentBlock("mem", "mem"), 'there is no RAM block "mem"; the blocks are "pc.ram"'),
        (SentBlock("pc.ram", "pc.ram", [(1, 0, 4096)]), "are not pages of it: it has 8192 bytes"),
        (SentBlock("pc.ram", "pc.ram", [(0, 1 << 20, 4096)]), "no memory at guest-physical address 0x100000"),
        (SentBlock("pc.ram", "pc.ram", [(-1, 0, 4096)]), "offset cannot be -1"),
    ):
        with (
            open(tmp_path / "out", "wb") as out,
            refused("migration-blocks", message, tmp_path / "vm1"),
        ):
            reader.send_migration(out.fileno(), [block])
        assert (tmp_path / "out").read_bytes() == b""


def test_what_is_sent_is_the_stream_again(tmp_path: Path) -> None:
    writer, stream = received(tmp_path)
    with stream:
        writer.write_memory([vmsnap.GuestRegion(1 << 32, stream.memory("pc.ram"))])
    reader = vmsnap.open(tmp_path / "vm1")
    with open(tmp_path / "out", "wb") as out:
        count = reader.send_migration(out.fileno(), [SentBlock("pc.ram", "pc.ram", [(0, 1 << 32, 8192)])])
    assert (tmp_path / "out").read_bytes() == STREAM
    assert count == len(STREAM)


def test_a_reader_that_is_gone_and_a_callback_that_raises(tmp_path: Path) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
    write(writer, "device_state", STREAM)
    reading, writing = os.pipe()
    os.close(reading)
    with pytest.raises(BrokenPipeError):
        vmsnap.open(tmp_path / "vm1").send_migration(writing, [])
    os.close(writing)

    class StopError(Exception):
        pass

    def stop(done: int, total: int) -> None:
        raise StopError

    # Nobody writes: the call waits for the callback.
    reading, writing = os.pipe()
    failed: list[BaseException] = []

    def receive() -> None:
        try:
            writer.receive_migration(reading, None, fragment="other", progress=stop)
        except StopError as error:
            failed.append(error)

    thread = threading.Thread(target=receive)
    thread.start()
    thread.join(PATIENCE)
    assert [type(each) for each in failed] == [StopError]
    assert "other" not in vmsnap.open(tmp_path / "vm1").list_fragments()
    for end in (reading, writing):
        os.close(end)


def test_a_damaged_fragment_is_named(tmp_path: Path) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
    write(writer, "device_state", STREAM[:-4])
    write(writer, "other", b"no stream")
    reader = vmsnap.open(tmp_path / "vm1")
    assert reader.migration_front().blocks == [("pc.ram", 8192)]
    with pytest.raises(vmsnap.CorruptSnapshotError, match=r"device_state.*truncated"), open(os.devnull, "wb") as out:
        reader.send_migration(out.fileno(), [])
    with pytest.raises(vmsnap.CorruptSnapshotError, match=r"other.*not a stream of QEMU"):
        reader.migration_front("other")
    with pytest.raises(FileNotFoundError):
        reader.migration_front("absent")
    with pytest.raises(vmsnap.InvalidArgumentError, match="descriptor cannot be negative"):
        writer.receive_migration(-1, None, fragment="third")
