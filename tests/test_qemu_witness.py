"""A Linux guest that works while it is saved: all its processes go on, in the guest and in each copy of it."""

import functools
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import qemus
import vmsnap.qemu
from guest import PATIENCE, ended, qemu_command, running
from qemus import Qemu
from support import MIB
from toy_guest import Toy
from witness import SIZE, SIZE_BYTES, Witness, make_disk

# How a guest is saved: the memory that it has, and the options.
WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "files": ("file", {}),
    "stream": ("plain", {}),
    "live": ("plain", {"live": True}),
}

# How a guest's memory is backed; "" is a plain -m.
BACKENDS = {
    "file": f"memory-backend-file,id=mem,size={SIZE},share=on,mem-path={{folder}}/ram",
    "memfd": f"memory-backend-memfd,id=mem,size={SIZE},share=on",
    "private": f"memory-backend-memfd,id=mem,size={SIZE},share=off",
    "huge": f"memory-backend-memfd,id=mem,size={SIZE},share=on,hugetlb=on,hugetlbsize=2M",
    "plain": "",
}


class Host:
    """A directory for a guest: its console, monitor, disk and memory."""

    def __init__(self, folder: Path, machine: str, image: str, backend: str = "file") -> None:
        folder.mkdir()
        self.folder, self.machine, self.image, self.backend = folder, machine, image, backend
        self.witness = Witness(folder)
        self.qmp, self.disk = folder / "qmp", folder / "disk"

    def command(self, qemu: Qemu) -> list[str]:
        memory = BACKENDS[self.backend].format(folder=self.folder)
        options = self.witness.options(self.disk, self.image)
        return qemu_command(self.qmp, *options, machine=self.machine, memory=memory, size=SIZE, qemu=qemu)

    @contextmanager
    def boots(self, qemu: Qemu) -> Iterator[Any]:
        make_disk(self.disk, self.image)
        with running(self.command(qemu), self.qmp) as process:
            yield process

    @contextmanager
    def loads(self, qemu: Qemu, snapshot: Path, disk: Path, **options: Any) -> Iterator[Any]:
        """Load a guest, with a copy of the disk that it had."""
        shutil.copyfile(disk, self.disk)
        with ended(vmsnap.qemu.load(snapshot, self.command(qemu), **options).process) as process:
            yield process

    def close(self) -> None:
        self.witness.close()
        (self.folder / "ram").unlink(missing_ok=True)


@pytest.fixture
def host(tmp_path: Path) -> Iterator[Callable[..., Host]]:
    """Make a host for the guest of another one, with memory of its own kind."""
    hosts: list[Host] = []

    def make(name: str, like: Host, backend: str = "file") -> Host:
        hosts.append(Host(tmp_path / name, like.machine, like.image, backend))
        return hosts[-1]

    yield make
    for each in hosts:
        each.close()


@pytest.fixture(scope="session")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Host]:
    """Boot a guest in one of the QEMUs, once in a session, and quit it: `vm` in its directory is the snapshot."""

    @functools.cache
    def boot(name: str, machine: str) -> Host:
        qemu = qemus.found(name)
        image = {"pc": "raw", "q35": "qcow2"}[machine]
        host = Host(tmp_path_factory.mktemp("booted") / machine, qemu.newest(machine), image)
        with host.boots(qemu) as process:
            host.witness.goes_on()
            vmsnap.qemu.save(host.qmp, host.folder / "vm", compress="lz4", then="quit", durable=False)
            process.wait(PATIENCE)
        host.close()
        return host

    return boot


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(("name", "machine"), [("system", "pc"), ("10.0", "q35")])
def test_a_guest_that_works_goes_on_when_it_is_saved_and_a_copy_begins_there(
    booted: Callable[[str, str], Host],
    host: Callable[..., Host],
    name: str,
    machine: str,
    way: str,
    key: bytes,
) -> None:
    """Its disk is copied while it stands still."""
    first, qemu = booted(name, machine), qemus.found(name)
    backend, options = WAYS[way]
    source, copy = host("source", first, backend), host("copy", first)
    disk = source.folder / "disk at the save"
    with source.loads(qemu, first.folder / "vm", first.disk):
        source.witness.goes_on()
        for number in range(2):
            disk.unlink(missing_ok=True)
            report = vmsnap.qemu.save(
                source.qmp,
                source.folder / f"vm{number}",
                key=key,
                compress="lz4",
                durable=False,
                while_paused=lambda: shutil.copyfile(source.disk, disk),
                **options,
            )
            assert report.way == way
            assert report.machine.machine_type == first.machine
            source.witness.goes_on()
        with copy.loads(qemu, source.folder / "vm1", disk, key=key):
            copy.witness.goes_on()
            source.witness.goes_on()


def test_a_guest_that_works_is_saved_live_and_quit(
    booted: Callable[[str, str], Host], host: Callable[..., Host]
) -> None:
    first, qemu = booted("10.0", "q35"), qemus.found("10.0")
    backend, options = WAYS["live"]
    source, copy = host("source", first, backend), host("copy", first, backend)
    with source.loads(qemu, first.folder / "vm", first.disk) as process:
        source.witness.goes_on()
        vmsnap.qemu.save(source.qmp, source.folder / "vm", then="quit", durable=False, **options)
        assert process.wait(PATIENCE) == 0
    with copy.loads(qemu, source.folder / "vm", source.disk):
        copy.witness.goes_on()


@pytest.mark.parametrize(
    ("name", "machine", "backend"),
    [("system", "pc", "private"), ("system", "pc", "huge"), ("10.0", "q35", "memfd"), ("10.0", "q35", "plain")],
)
def test_a_guest_goes_on_in_memory_of_another_kind(
    booted: Callable[[str, str], Host],
    host: Callable[..., Host],
    huge_pages: Callable[[int], AbstractContextManager[None]],
    name: str,
    machine: str,
    backend: str,
) -> None:
    first = booted(name, machine)
    other = host("other", first, backend)
    pages = huge_pages(SIZE_BYTES // (2 * MIB)) if backend == "huge" else nullcontext()
    with pages, other.loads(qemus.found(name), first.folder / "vm", first.disk):
        other.witness.goes_on()


def test_the_witness_tells_a_disk_of_another_moment(
    tmp_path: Path, booted: Callable[[str, str], Host], host: Callable[..., Host]
) -> None:
    first = booted("system", "pc")
    other = host("other", first)
    make_disk(tmp_path / "empty", first.image)
    with (
        other.loads(qemus.found("system"), first.folder / "vm", tmp_path / "empty"),
        pytest.raises(AssertionError, match="the guest says b'bad disk: word 0 of block"),
    ):
        other.witness.goes_on()


def newer_than(older: Qemu, machine_type: str) -> Qemu:
    newer = qemus.found("10.0")
    if not newer.knows(machine_type):
        pytest.skip(f"{newer} does not know {machine_type} of the system's {older}")
    return newer


def test_a_guest_of_the_systems_qemu_goes_on_in_10_0(
    booted: Callable[[str, str], Host], host: Callable[..., Host]
) -> None:
    """And comes back once more from there."""
    first = booted("system", "pc")
    newer = newer_than(qemus.found("system"), first.machine)
    second, third = host("second", first), host("third", first)
    with second.loads(newer, first.folder / "vm", first.disk) as process:
        second.witness.goes_on()
        vmsnap.qemu.save(second.qmp, second.folder / "vm", live=True, then="quit", durable=False)
        assert process.wait(PATIENCE) == 0
    with third.loads(newer, second.folder / "vm", second.disk):
        third.witness.goes_on()


@pytest.mark.parametrize("machine", ["pc", "q35"])
@pytest.mark.parametrize("way", WAYS)
def test_a_toy_guest_of_the_systems_qemu_goes_on_in_10_0(tmp_path: Path, machine: str, way: str) -> None:
    """With the machine type of the older one, and in memory of another kind."""
    older = qemus.found("system")
    machine_type = older.newest(machine)
    newer = newer_than(older, machine_type)
    backend, options = WAYS[way]
    memory = BACKENDS[backend].format(folder=tmp_path)
    toy, qmp = Toy(tmp_path), tmp_path / "qmp"
    command = functools.partial(qemu_command, qmp, *toy.options, machine=machine_type, size=SIZE)
    with running(command(qemu=older, memory=memory), qmp) as process:
        toy.ticks(3)
        report = vmsnap.qemu.save(qmp, tmp_path / "vm", then="quit", **options)
        assert report.way == way
        assert process.wait(PATIENCE) == 0
    with ended(vmsnap.qemu.load(tmp_path / "vm", command(qemu=newer, memory=BACKENDS["private"])).process):
        toy.ticks(5)
    toy.close()
