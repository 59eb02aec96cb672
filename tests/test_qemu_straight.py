"""The memory of a guest that stands still is written to the snapshot as QEMU sends it: nothing is stored twice."""

import asyncio
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import vmsnap
import vmsnap.qemu
from guest import ended, qemu_command, running
from migration_files import FOOTER, number
from qemu_states import is_as_before
from qemus import Qemu
from refusals import refused, row
from small_disks import mounted
from support import MIB
from toy_guest import Toy
from vmsnap.migration import BlockRegion, MigrationStream
from vmsnap.qemu.background import with_progress

STILL_MIB = 32
#: Room for the data of the guest, and for no second copy of it.
DISK_MIB = 52


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A file system that is too small for the guest memory twice."""
    with mounted(tmp_path / "disk", f"size={DISK_MIB}m") as path:
        yield path


@pytest.fixture
def toy(tmp_path: Path) -> Iterator[Toy]:
    made = Toy(tmp_path, still_mib=STILL_MIB)
    yield made
    made.close()


def loads(command: list[str], toy: Toy, snapshot: Path, tmp_path: Path, key: bytes | None) -> None:
    """Check a copy of the guest beside it. It checks its own memory."""
    copy = Toy(tmp_path, "copy")
    words = [each.replace(str(toy.path), str(copy.path)).replace("/qmp,", "/qmp2,") for each in command]
    with ended(vmsnap.qemu.load(snapshot, words, key=key).process):
        copy.ticks(100)
    copy.close()


@pytest.mark.parametrize("kind", ["plain", "encrypted"])
@pytest.mark.parametrize("numa", [False, True])
def test_no_space_is_needed_beside_the_snapshot(
    disk: Path, tmp_path: Path, toy: Toy, key: bytes, qemu: Qemu, kind: str, numa: bool
) -> None:
    qmp, location = tmp_path / "qmp", disk / "vm1"
    nodes = [
        *("-object", "memory-backend-ram,id=m0,size=128M", "-object", "memory-backend-ram,id=m1,size=128M"),
        *("-numa", "node,memdev=m0", "-numa", "node,memdev=m1"),
    ]
    command = qemu_command(qmp, *toy.options, *(nodes if numa else []), memory="", qemu=qemu)
    given = key if kind == "encrypted" else None
    told: list[tuple[int, int]] = []
    with running(command, qmp):
        toy.ticks(3)
        report = vmsnap.qemu.save(qmp, location, key=given, progress=lambda *step: told.append(step))
        assert is_as_before(qmp)
        toy.catch_up()
        assert (report.way, report.rounds, report.repeated_bytes) == ("stream", 1, 0)
        assert report.memory.logical_bytes == 256 * MIB
        assert STILL_MIB * MIB < report.memory.data_bytes < DISK_MIB * MIB
        assert told[-1] == (256 * MIB, 256 * MIB)
        assert vmsnap.verify(location, key=given, expect_seal_digest=report.seal_digest).ok
        loads(command, toy, location, tmp_path, given)
        # A guest that runs is sent in several rounds, and needs the space.
        with pytest.raises(OSError, match="No space left"):
            vmsnap.qemu.save(qmp, disk / "vm2", key=given, live=True)
        toy.catch_up()
    assert [each.name for each in disk.iterdir()] == ["vm1"]


def test_a_full_disk_is_the_reason_if_qemu_notices_the_closed_pipe_first(
    disk: Path, tmp_path: Path, toy: Toy, qemu: Qemu, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def seen_late(call: Callable[[Any], MigrationStream], progress: Any) -> MigrationStream:
        try:
            return await with_progress(call, progress)
        finally:
            # It is cancelled when the failure of QEMU is seen.
            await asyncio.Event().wait()

    monkeypatch.setattr(vmsnap.qemu.migration, "with_progress", seen_late)
    qmp = tmp_path / "qmp"
    (disk / "other").write_bytes(bytes((DISK_MIB - 8) * MIB))
    with running(qemu_command(qmp, *toy.options, memory="", qemu=qemu), qmp):
        toy.ticks(1)
        with pytest.raises(OSError, match="No space left"):
            vmsnap.qemu.save(qmp, disk / "vm1")
        assert is_as_before(qmp)
        toy.catch_up()
        toy.ticks(1)
    assert [each.name for each in disk.iterdir()] == ["other"]


def test_a_full_disk_when_a_page_comes_again_leaves_nothing(disk: Path, tmp_path: Path) -> None:
    """The pages so far are written to the disk at that moment, because they become a temporary file."""
    size, mark = 1 << 20, number(16, 8) + FOOTER
    pages = [number(page % 200 << 12 | 8, 8) + b"\6pc.ram" + bytes([1]) * 4096 for page in range(201)]
    begin = b"QEVM" + number(3) + b"\1" + number(2) + b"\3ram" + number(0) + number(4) + number(size | 4, 8)
    end = b"\4" + number(3) + b"\5timer" + number(0) + number(2) + b"\x7e" + number(3) + b"\0"
    stream = tmp_path / "stream"
    stream.write_bytes(begin + b"\6pc.ram" + number(size, 8) + mark + b"\3" + number(2) + b"".join(pages) + mark + end)
    regions = [BlockRegion(0, "pc.ram", 0, size)]
    with vmsnap.create(disk / "vm1") as writer:
        filler = disk / "other"
        filler.write_bytes(bytes((DISK_MIB << 20) - (600 << 10)))
        for _ in range(2):
            with stream.open("rb") as file, pytest.raises(OSError, match="No space left"):
                writer.receive_migration(file.fileno(), None, regions=regions)
            assert os.listdir(writer.location) == []
        filler.unlink()
        with stream.open("rb") as file:
            received = writer.receive_migration(file.fileno(), None, regions=regions)
        assert received.written is None
        received.close()


@row("migration-closed")
def test_a_dump_of_the_received_memory_is_the_same(tmp_path: Path, toy: Toy, qemu: Qemu) -> None:
    """The fragments are those that `write_memory` would write from a copy of the memory."""
    qmp = tmp_path / "qmp"
    with running(qemu_command(qmp, *toy.options, memory="", qemu=qemu), qmp):
        toy.ticks(3)
        vmsnap.qemu.save(qmp, tmp_path / "vm1")
    source = vmsnap.open(tmp_path / "vm1")
    (region,) = source.memory().regions
    stream = tmp_path / "stream"
    with stream.open("wb") as file:
        blocks = [vmsnap.migration.SentBlock("pc.ram", "pc.ram", [(0, region.start, len(region))], zeros=True)]
        source.send_migration(file.fileno(), blocks)

    def received(name: str, regions: list[BlockRegion]) -> tuple[MigrationStream, Any]:
        with (
            vmsnap.create(tmp_path / name) as writer,
            stream.open("rb") as file,
            writer.receive_migration(file.fileno(), ["pc.ram"], regions=regions) as got,
        ):
            if got.written is None:
                writer.write_memory([vmsnap.GuestRegion(region.start, got.memory("pc.ram"))])
            else:
                with refused("migration-closed", "was written to the snapshot as it came", Path(writer.location)):
                    got.memory("pc.ram")
        reader = vmsnap.open(tmp_path / name)
        return got, [reader.raw_fragment(each).read() for each in ("mem", "mem_metadata", "device_state")]

    straight, fragments = received("straight", [BlockRegion(region.start, "pc.ram", 0, len(region))])
    dumped, same = received("dumped", [])
    assert straight.written is not None
    assert dumped.written is None
    assert straight.page_bytes == dumped.page_bytes == len(region)
    assert straight.written.data_bytes == source.memory().data_bytes
    assert fragments == same
    assert fragments[0] == source.raw_fragment("mem").read()
