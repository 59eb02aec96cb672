"""Loading a QEMU guest into every kind of memory, whatever memory it was saved with, by every QEMU."""

import os
import select
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from typing import Any

import pytest
import qemus
import vmsnap
import vmsnap.qemu
from commands import run
from guest import PATIENCE, ask, ended, qemu_command, running
from qemus import Qemu
from refusals import refused, row
from support import MIB, write
from toy_guest import Toy

SIZE = 64 * MIB
MACHINE = "pc-i440fx-7.2"

#: By name: the memory backend, where {path} is a new file. "plain" is the memory of `-m`.
BACKENDS = {
    "memfd": "memory-backend-memfd,share=on",
    "file": "memory-backend-file,share=on,mem-path={path}",
    "private-file": "memory-backend-file,share=off,mem-path={path}",
    "private-memfd": "memory-backend-memfd,share=off",
    "ram": "memory-backend-ram,share=off",
    "plain": "",
    "hugetlb": "memory-backend-memfd,share=on,hugetlb=on,hugetlbsize=2M",
    "private-hugetlb": "memory-backend-memfd,share=off,hugetlb=on,hugetlbsize=2M",
}
#: vmsnap fills these; the memory of all others is in the stream.
FILLED = ("memfd", "file", "private-file", "private-memfd", "hugetlb")

HugePages = Callable[[int], AbstractContextManager[None]]


def command_for(qmp: Path, toy: Toy, backend: str, qemu: Qemu, path: Path, *more: str) -> list[str]:
    memory = f"{BACKENDS[backend].format(path=path)},id=mem,size=64M" if BACKENDS[backend] else ""
    return qemu_command(qmp, *toy.options, *more, machine=MACHINE, memory=memory, size="64M", qemu=qemu)


class Source:
    """A toy guest that was saved, and loaded more than once: its console begins anew each time."""

    def __init__(self, toy: Toy) -> None:
        self._toy = toy
        self._read()
        while b"\n" in toy._rest:
            toy.tick()
        self._saved = toy.number, toy._rest

    def _read(self) -> None:
        while select.select([self._toy._out], [], [], 0)[0]:
            self._toy._rest += os.read(self._toy._out, 1 << 16)

    def goes_on(self) -> None:
        """Check that the guest counts on from where it was saved, with its memory."""
        self._toy.number, self._toy._rest = self._saved
        self._toy.ticks(3)

    def ends(self) -> None:
        """Throw away the output of a guest that has ended."""
        self._read()


#: All memory of a guest that is saved live is in the stream, so its kind matters little.
SAVED = [
    *(
        pytest.param(each, False, id=f"{each}-stopped")
        for each in ("memfd", "file", "private-file", "plain", "hugetlb")
    ),
    *(pytest.param(each, True, id=f"{each}-live") for each in ("memfd", "plain")),
    *(
        pytest.param(each, True, id=f"{each}-live", marks=pytest.mark.torture)
        for each in ("file", "private-file", "hugetlb")
    ),
]


@pytest.mark.parametrize(("saved_with", "live"), SAVED)
def test_a_guest_is_loaded_into_every_backend(
    tmp_path: Path, qemu: Qemu, huge_pages: HugePages, saved_with: str, live: bool
) -> None:
    toy, qmp, location = Toy(tmp_path), tmp_path / "qmp", tmp_path / "vm1"
    newer = [each for each in map(qemus.found, qemus.NAMES) if each.number >= qemu.number]
    with ExitStack() as stack:
        backends = list(BACKENDS)
        try:
            stack.enter_context(huge_pages(SIZE // (2 * MIB)))
        except pytest.skip.Exception:
            if saved_with == "hugetlb":
                raise
            backends = [each for each in backends if "hugetlb" not in each]
        with running(command_for(qmp, toy, saved_with, qemu, tmp_path / "saved"), qmp) as process:
            toy.ticks(3)
            vmsnap.qemu.save(qmp, location, live=live, then="quit")
            process.wait(PATIENCE)
        source = Source(toy)
        for loading in newer:
            for backend in backends:
                command = command_for(qmp, toy, backend, loading, tmp_path / "loaded")
                report = vmsnap.qemu.load(location, command)
                source.goes_on()
                assert [each for each in ask(qmp, "query-migrate-capabilities") if each["state"]] == []
                assert (report.streamed_bytes < 4 * MIB) == (backend in FILLED), backend
                report.end()
                source.ends()
                (tmp_path / "loaded").unlink(missing_ok=True)
    toy.close()


@row("qemu-other-machine")
def test_a_guest_of_a_newer_qemu_is_refused_by_an_older_one(tmp_path: Path, folder: Path) -> None:
    old, new = map(qemus.found, qemus.NAMES)
    toy, qmp = Toy(tmp_path), tmp_path / "qmp"
    with running(command_for(qmp, toy, "plain", new, tmp_path), qmp) as process:
        vmsnap.qemu.save(qmp, folder / "vm1", then="quit")
        process.wait(PATIENCE)
    with refused("qemu-other-machine", f"saved by QEMU {new.version}, but the started QEMU is {old.version}", folder):
        vmsnap.qemu.load(folder / "vm1", command_for(qmp, toy, "plain", old, tmp_path))
    toy.close()


def saved_by(qemu: Qemu, folder: Path, qmp: Path, **options: Any) -> tuple[Toy, Path]:
    toy = Toy(folder.parent)
    with running(command_for(qmp, toy, "memfd", qemu, folder), qmp) as process:
        toy.ticks(3)
        vmsnap.qemu.save(qmp, folder / "vm1", then="quit", **options)
        process.wait(PATIENCE)
    return toy, folder / "vm1"


def no_qemu_with(qmp: Path) -> bool:
    return not any(
        f"unix:{qmp},".encode() in path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if path.exists()
    )


def test_a_guest_that_was_paused_stays_paused(folder: Path, qmp: Path, qemu: Qemu) -> None:
    toy = Toy(folder.parent)
    with running(command_for(qmp, toy, "memfd", qemu, folder), qmp) as process:
        toy.ticks(3)
        ask(qmp, "stop")
        vmsnap.qemu.save(qmp, folder / "vm1", then="quit")
        process.wait(PATIENCE)
    source = Source(toy)
    for backend in ("memfd", "plain"):
        report = vmsnap.qemu.load(folder / "vm1", command_for(qmp, toy, backend, qemu, folder))
        assert report.paused
        assert ask(qmp, "query-status")["status"] == "paused"
        ask(qmp, "cont")
        source.goes_on()
        report.end()
        source.ends()
    toy.close()


def test_a_guest_stays_paused_if_told_and_the_command_says_so(folder: Path, qmp: Path, qemu: Qemu) -> None:
    toy, location = saved_by(qemu, folder, qmp)
    source = Source(toy)
    report = vmsnap.qemu.load(location, command_for(qmp, toy, "plain", qemu, folder), paused=True)
    assert report.paused
    assert ask(qmp, "query-status")["status"] == "paused"
    ask(qmp, "cont")
    source.goes_on()
    report.end()
    toy.close()


@row("qemu-other-machine")
def test_another_processor_is_refused_and_can_be_forced(folder: Path, qmp: Path, qemu: Qemu) -> None:
    toy, location = saved_by(qemu, folder, qmp)
    other = command_for(qmp, toy, "plain", qemu, folder, "-cpu", "Nehalem")
    with refused("qemu-other-machine", r"CPU model \(-cpu\) of the saved guest is .* \(--force\)", folder):
        vmsnap.qemu.load(location, other)
    assert no_qemu_with(qmp)
    vmsnap.qemu.load(location, other, ignore_differences=True).end()
    told = run("qemu", "load", "--help").stdout.decode()
    assert "allow another processor" in " ".join(told.split())
    toy.close()


@row("qemu-other-process")
def test_a_process_that_is_not_qemu_is_refused(folder: Path, qmp: Path, qemu: Qemu) -> None:
    toy, location = saved_by(qemu, folder, qmp)
    with refused("qemu-other-process", "does not have the monitor's socket open", folder):
        vmsnap.qemu.load(location, command_for(qmp, toy, "plain", qemu, folder), pid=os.getpid())
    assert no_qemu_with(qmp)
    toy.close()


@row("changed")
def test_changed_memory_is_refused_in_the_stream(folder: Path, qmp: Path, qemu: Qemu, key: bytes) -> None:
    toy, location = saved_by(qemu, folder, qmp, key=key)
    memory = location / "mem"
    data = bytearray(memory.read_bytes())
    data[len(data) // 2] ^= 1
    memory.write_bytes(data)
    with refused("changed", "mem", folder):
        vmsnap.qemu.load(location, command_for(qmp, toy, "plain", qemu, folder), key=key)
    assert no_qemu_with(qmp)
    toy.close()


def test_a_load_that_is_cancelled_in_the_stream_ends_qemu(folder: Path, qmp: Path, qemu: Qemu) -> None:
    toy, location = saved_by(qemu, folder, qmp)

    def broken(_done: int, _total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        vmsnap.qemu.load(location, command_for(qmp, toy, "plain", qemu, folder), progress=broken)
    assert no_qemu_with(qmp)
    toy.close()


@pytest.mark.parametrize("backend", ["memfd", "plain"])
def test_the_progress_ends_at_the_size_of_memory(folder: Path, qmp: Path, qemu: Qemu, backend: str) -> None:
    toy, location = saved_by(qemu, folder, qmp)
    shown: list[tuple[int, int]] = []
    command = command_for(qmp, toy, backend, qemu, folder)
    vmsnap.qemu.load(location, command, progress=lambda done, total: shown.append((done, total))).end()
    assert shown[-1] == (SIZE, SIZE)
    assert shown == sorted(shown)
    toy.close()


def of_the_first_version(location: Path, copy: Path) -> None:
    """Copy a snapshot, with a description as vmsnap 0.1 wrote it: without the state and the processor."""
    known = vmsnap.open(location).read_fragment("machine")
    first = {name: known[name] for name in ("qemu_version", "target", "machine_type", "command_line", "format")}
    ram = [{name: each[name] for name in ("backend", "guest_base", "offset", "size")} for each in known["ram"]]
    with vmsnap.create(copy) as writer:
        for fragment in ("device_state", "mem", "mem_metadata"):
            write(writer, fragment, (location / fragment).read_bytes())
        writer.write_fragment("machine", first | {"ram": ram, "version": 1})


def test_a_snapshot_of_the_first_version_loads_into_every_backend(folder: Path, qmp: Path, qemu: Qemu) -> None:
    toy, location = saved_by(qemu, folder, qmp)
    source = Source(toy)
    of_the_first_version(location, folder / "vm2")
    for backend in ("memfd", "private-file", "plain"):
        with ended(
            vmsnap.qemu.load(folder / "vm2", command_for(qmp, toy, backend, qemu, folder / "ram")).process
        ) as process:
            source.goes_on()
        process.wait()
        source.ends()
    toy.close()


def test_a_snapshot_of_the_first_version_is_exported(folder: Path, qmp: Path, qemu: Qemu) -> None:
    """It has the id of the backend. In old machine types the stream has the path."""
    ram = folder.parent / "ram"
    memory = f"memory-backend-file,id=mem,size=16M,share=on,mem-path={ram},x-use-canonical-path-for-ramblock-id=on"
    with running(qemu_command(qmp, "-S", memory=memory, size="16M", qemu=qemu), qmp):
        ask(qmp, "query-status")  # it answers when it has its memory
        with ram.open("r+b") as file:
            file.seek(8 * MIB)
            file.write(b"found again")
        report = vmsnap.qemu.save(qmp, folder / "vm1")
    assert [each.stream_name for each in report.machine.ram] == ["/objects/mem"]
    of_the_first_version(folder / "vm1", folder / "vm2")
    vmsnap.export_file(folder / "vm2", folder / "exported", "qemu")
    vmsnap.import_file(folder / "exported", folder / "again")
    assert vmsnap.open(folder / "again").memory().read(8 * MIB, 11) == b"found again"


def test_memory_that_the_first_version_left_in_the_stream_is_not_sent_twice(folder: Path, qmp: Path) -> None:
    """vmsnap 0.1 used x-ignore-shared, which leaves a memfd in the stream of QEMU 8.1 and newer."""
    qemu, toy = qemus.found("10.0"), Toy(folder.parent)
    memory, stream = folder.parent / "memory", folder.parent / "stream"
    with running(command_for(qmp, toy, "memfd", qemu, folder), qmp):
        toy.ticks(3)
        vmsnap.qemu.save(qmp, folder / "vm1")
        ask(qmp, "stop")
        ask(qmp, "pmemsave", val=0, size=SIZE, filename=str(memory))
        ask(qmp, "migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": True}])
        ask(qmp, "migrate", uri=f"exec:cat > {stream}")
        while (status := ask(qmp, "query-migrate")["status"]) != "completed":
            assert status != "failed"
    source = Source(toy)
    assert stream.stat().st_size > 8 * MIB
    with vmsnap.create(folder / "vm2") as writer:
        writer.write_fragment("machine", vmsnap.open(folder / "vm1").read_fragment("machine"))
        writer.write_memory([vmsnap.GuestRegion(0, memory)])
        with writer.raw_fragment("device_state") as copy:
            copy.write(stream.read_bytes())
    for backend in ("memfd", "file", "plain"):
        command = command_for(qmp, toy, backend, qemu, folder.parent / "ram")
        report = vmsnap.qemu.load(folder / "vm2", command)
        source.goes_on()
        assert (report.streamed_bytes < 4 * MIB) == (backend in FILLED)
        report.end()
        source.ends()
    toy.close()


def test_shared_memory_without_a_file_comes_through_the_stream(folder: Path, qmp: Path, qemu: Qemu) -> None:
    """Also if the snapshot is one whose memory was read from a file, with x-ignore-shared.

    QEMU 10 has a memfd for such memory, which is filled.
    """
    toy, location = saved_by(qemu, folder, qmp)
    memory = "memory-backend-ram,id=mem,size=64M,share=on"
    command = qemu_command(qmp, *toy.options, machine=MACHINE, memory=memory, size="64M", qemu=qemu)
    source = Source(toy)
    report = vmsnap.qemu.load(location, command)
    assert (report.streamed_bytes > 4 * MIB) == (qemu.number < (10, 0))
    source.goes_on()
    report.end()
    toy.close()


def test_memory_that_qemu_wrote_before_is_zero_where_it_was_zero(folder: Path, qmp: Path, qemu: Qemu) -> None:
    """The device `loader` writes into memory as soon as QEMU starts."""
    toy, ram, at = Toy(folder.parent), folder.parent / "ram", 48 * MIB
    loader = ["-device", f"loader,addr={at},data=0x1122334455667788,data-len=8"]
    with running(command_for(qmp, toy, "file", qemu, ram, *loader), qmp) as process:
        toy.ticks(3)
        with open(ram, "r+b") as file:
            file.seek(at)
            assert any(file.read(8))
            file.seek(at)
            file.write(bytes(8))
        vmsnap.qemu.save(qmp, folder / "vm1", then="quit")
        process.wait(PATIENCE)
    for backend in ("memfd", "private-memfd", "plain"):
        command = command_for(qmp, toy, backend, qemu, ram, *loader)
        report = vmsnap.qemu.load(folder / "vm1", command, paused=True)
        ask(qmp, "pmemsave", val=at, size=8, filename=str(folder.parent / "dump"))
        assert (folder.parent / "dump").read_bytes() == bytes(8), backend
        report.end()
    toy.close()
