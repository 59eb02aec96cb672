# ruff: noqa: SIM115 (files are opened here to be given away)
"""Files as guest memory: accepted objects, data that Python still buffers, and files without a size."""

import bz2
import gc
import gzip
import io
import lzma
import os
import re
import resource
import socket
import stat
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vmsnap
from commands import error_of, run
from refusals import refused, row
from support import pattern, run_python_well
from vmsnap import GuestMemory, GuestRegion

PAGE = 4096
RAM = pattern(4 * PAGE, seed=21)


def stored(folder: Path, *sources: object) -> GuestMemory:
    """Return the memory in a snapshot of these sources, each one region."""
    root = folder / f"vm{len(list(folder.glob('vm*')))}"
    regions = [GuestRegion(number << 32, source) for number, source in enumerate(sources)]  # type: ignore[arg-type]
    vmsnap.SnapshotWriter(root).write_memory(regions)
    return vmsnap.open(root).memory()


def bytes_of(memory: GuestMemory, region: int = 0) -> bytes:
    addresses = memory.regions[region]
    return memory[addresses.start : addresses.stop]


@pytest.fixture
def ram(tmp_path: Path) -> Path:
    path = tmp_path / "ram.img"
    path.write_bytes(RAM)
    return path


@pytest.fixture
def memory(tmp_path: Path) -> GuestMemory:
    return stored(tmp_path, RAM)


# Objects that are a file ---------------------------------------------------------------------------------------------


class Named(io.FileIO):
    """A file with something beside its bytes."""

    purpose = "ram"


def spooled(folder: Path) -> Any:
    file = tempfile.SpooledTemporaryFile(dir=folder)
    file.rollover()
    return file


FILES: dict[str, Callable[[Path], Any]] = {
    "raw": lambda path: open(path, "r+b", buffering=0),
    "buffered": lambda path: open(path, "r+b"),
    "text": lambda path: open(path, "r+", encoding="latin-1", newline=""),
    "subclass": lambda path: Named(path, "r+"),
    "named temporary file": lambda path: tempfile.NamedTemporaryFile(dir=path.parent),
    "temporary file": lambda path: tempfile.TemporaryFile(dir=path.parent),
    "temporary text file": lambda path: tempfile.NamedTemporaryFile(
        "w+", encoding="latin-1", newline="", dir=path.parent
    ),
    "spooled file, rolled over": lambda path: spooled(path.parent),
}


@pytest.mark.parametrize("kind", FILES)
def test_an_open_file_is_a_source_and_a_destination(tmp_path: Path, kind: str, memory: GuestMemory) -> None:
    (tmp_path / "image").touch()
    with FILES[kind](tmp_path / "image") as file:
        text = isinstance(file.read(), str)
        file.write(RAM.decode("latin-1") if text else RAM)
        # Neither was flushed by the caller, nor are they at the file's start.
        assert bytes_of(stored(tmp_path, file)) == RAM
        assert file.tell() == len(RAM)
        file.seek(0)
        file.write("x" * 2 * PAGE if text else b"x" * 2 * PAGE)
        memory.restore([GuestRegion(0, file)])
        assert file.tell() == 2 * PAGE
        file.seek(0)
        again = file.read()
        assert (again.encode("latin-1") if text else again) == RAM


def test_what_was_read_ahead_is_dropped(tmp_path: Path, memory: GuestMemory) -> None:
    image = tmp_path / "image"
    for mode, options in (("r+b", {}), ("r+", {"encoding": "latin-1", "newline": ""})):
        image.write_bytes(b"\n" * len(RAM))
        with open(image, mode, **options) as file:  # type: ignore[call-overload]
            file.read(10)
            memory.restore([file])
            rest = file.read()
            assert (rest if mode == "r+b" else rest.encode("latin-1")) == RAM[10:]


def test_what_is_flushed_late_does_not_write_over_what_was_restored(tmp_path: Path, memory: GuestMemory) -> None:
    for number, destination in enumerate((lambda file: file, lambda file: GuestRegion(0, file))):
        with open(tmp_path / f"image{number}", "wb") as file:
            file.write(b"x" * len(RAM))
            memory.restore([destination(file)])
        assert (tmp_path / f"image{number}").read_bytes() == RAM


def test_a_file_that_only_its_region_holds_stays_open(tmp_path: Path) -> None:
    for number in range(8):
        (tmp_path / f"ram{number}").write_bytes(bytes([number]) * PAGE)
    root = tmp_path / "vm"
    regions = (GuestRegion(number << 20, open(tmp_path / f"ram{number}", "rb")) for number in range(8))
    vmsnap.SnapshotWriter(root).write_memory(regions)
    memory = vmsnap.open(root).memory()
    assert [memory.read(number << 20, 1) for number in range(8)] == [bytes([number]) for number in range(8)]
    gc.collect()


def test_a_file_is_buffered_text_or_bytes_and_any_integer_is_a_descriptor(tmp_path: Path, ram: Path) -> None:
    descriptor = os.open(ram, os.O_RDONLY)
    try:
        assert bytes_of(stored(tmp_path, np.int64(descriptor))) == RAM
    finally:
        os.close(descriptor)


def test_a_closed_file_is_refused_in_pythons_words(tmp_path: Path, ram: Path, memory: GuestMemory) -> None:
    for mode in ("rb", "r+b"):
        with open(ram, mode) as file:
            raw = file.raw  # type: ignore[attr-defined]
        for closed in (file, raw):
            with pytest.raises(ValueError, match="closed file"):
                stored(tmp_path, closed)
            with pytest.raises(ValueError, match="closed file"):
                memory.restore([closed])
    assert ram.read_bytes() == RAM


# Objects that are not ------------------------------------------------------------------------------------------------


class Doubling(io.FileIO):
    """A file that reads as something else."""

    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size) * 2


class BufferedDoubling(io.BufferedReader):
    def read(self, size: int | None = -1, /) -> bytes:
        return super().read(size) * 2


def member_of_a_zip(folder: Path, stack: ExitStack) -> Any:
    with zipfile.ZipFile(folder / "a.zip", "w") as archive:
        archive.writestr("ram", RAM)
    return stack.enter_context(stack.enter_context(zipfile.ZipFile(folder / "a.zip")).open("ram"))


def member_of_a_tar(folder: Path, stack: ExitStack) -> Any:
    with tarfile.open(folder / "a.tar", "w") as archive:
        archive.add(folder / "ram.img", "ram")
    member = stack.enter_context(tarfile.open(folder / "a.tar")).extractfile("ram")
    assert member is not None
    return stack.enter_context(member)


def compressed(module: Any) -> Callable[[Path, ExitStack], Any]:
    def opened(folder: Path, stack: ExitStack) -> Any:
        (folder / "ram.z").write_bytes(module.compress(RAM))
        return stack.enter_context(module.open(folder / "ram.z"))

    return opened


def connection(folder: Path, stack: ExitStack) -> socket.socket:
    here, there = socket.socketpair()
    stack.enter_context(there)
    return stack.enter_context(here)


# Each with the name in its error.
NO_FILES: dict[str, tuple[Callable[[Path, ExitStack], Any], str]] = {
    "gzip": (compressed(gzip), "GzipFile"),
    "bz2": (compressed(bz2), "BZ2File"),
    "lzma": (compressed(lzma), "LZMAFile"),
    "zip": (member_of_a_zip, "ZipExtFile"),
    "tar": (member_of_a_tar, "ExFileObject"),
    "BytesIO": (lambda _, stack: stack.enter_context(io.BytesIO(RAM)), r"BytesIO .*getbuffer\(\)"),
    "StringIO": (lambda _, stack: stack.enter_context(io.StringIO("x")), "StringIO"),
    "spooled": (
        lambda folder, stack: stack.enter_context(tempfile.SpooledTemporaryFile(dir=folder)),
        r"rollover\(\)",
    ),
    "socket": (connection, "socket"),
    "makefile": (lambda folder, stack: connection(folder, stack).makefile("rwb"), "BufferedRWPair"),
    "text of gzip": (
        lambda folder, stack: stack.enter_context(io.TextIOWrapper(compressed(gzip)(folder, stack))),
        "TextIOWrapper",
    ),
    "buffer over no file": (lambda *_: io.BufferedReader(io.BytesIO(RAM)), "BufferedReader"),  # type: ignore[arg-type]
    "overridden": (lambda folder, stack: stack.enter_context(Doubling(folder / "ram.img")), "Doubling"),
    "overridden buffer": (
        lambda folder, stack: BufferedDoubling(stack.enter_context(io.FileIO(folder / "ram.img", "r+"))),
        "BufferedDoubling",
    ),
    "None": (lambda *_: None, "None is not"),
    "True": (lambda *_: True, "True is not a file descriptor"),
    "float": (lambda *_: 3.0, "float"),
    "list": (lambda *_: [1, 2], "list"),
}


@row("memory-object")
@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_not_a_file_is_refused(tmp_path: Path, ram: Path, memory: GuestMemory, kind: str) -> None:
    make, named = NO_FILES[kind]
    with ExitStack() as stack:
        given = make(tmp_path, stack)
        writer = vmsnap.SnapshotWriter(tmp_path / "new")
        with refused("memory-object", named, tmp_path):
            writer.write_memory([GuestRegion(0, RAM), GuestRegion(1 << 32, given)])
        with refused("memory-object", named, tmp_path):
            memory.restore([GuestRegion(0, given)])
        if given is not None:  # a region that is left out
            with refused("memory-object", named, tmp_path):
                memory.restore([given])


@row("read-only-buffer")
def test_bytes_are_memory_and_not_a_path(tmp_path: Path, ram: Path, memory: GuestMemory) -> None:
    assert bytes_of(stored(tmp_path, b"name")) == b"name"
    for destination in (b"name", GuestRegion(0, b"name")):
        with refused("read-only-buffer", r"a path as a str or an os\.PathLike", tmp_path):
            memory.restore([destination])  # type: ignore[list-item]


@row("destinations")
def test_a_process_is_not_a_destination(tmp_path: Path, memory: GuestMemory) -> None:
    own = vmsnap.ProcessMemory(os.getpid())
    for destination in (own, GuestRegion(0, own)):
        with refused("destinations", "cannot be restored into a process", tmp_path):
            memory.restore([destination])  # type: ignore[list-item]


# Files without a size -------------------------------------------------------------------------------------------------


def unsized(folder: Path) -> dict[str, str]:
    """Return paths of files without a size, each with the text of its error."""
    os.mkfifo(folder / "fifo")
    (folder / "directory").mkdir()
    (folder / "empty").touch()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(folder / "socket"))
    return {
        str(folder / "fifo"): "is a FIFO or a pipe",
        str(folder / "directory"): "is a directory",
        str(folder / "socket"): "is a socket",
        "/dev/zero": "is a character device",
        str(folder / "empty"): "a size of 0",
        "/proc/self/maps": "a size of 0",
        f"/proc/{os.getpid()}/mem": "a size of 0",
    }


@row("memory-no-size")
def test_what_does_not_tell_its_size_is_not_a_source(tmp_path: Path) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "new")
    for path, told in unsized(tmp_path).items():
        name = re.escape(os.path.basename(path))
        with refused("memory-no-size", f"{name}.* {told}", tmp_path):
            writer.write_memory([GuestRegion(0, path)])
        if stat.S_ISSOCK(os.stat(path).st_mode):
            continue
        # By descriptor; a FIFO opens without waiting for one who reads and writes.
        descriptor = os.open(path, os.O_RDWR if "fifo" in path else os.O_RDONLY)
        try:
            for source in (descriptor, GuestRegion(0, descriptor, size=0)):
                region = source if isinstance(source, GuestRegion) else GuestRegion(0, source)
                with refused("memory-no-size", f"{name}.* {told}", tmp_path):
                    writer.write_memory([region])
        finally:
            os.close(descriptor)


@row("memory-regions")
def test_nothing_from_an_offset_on_is_refused_unless_a_size_of_0_is_asked_for(tmp_path: Path, ram: Path) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "new")
    with refused("memory-regions", r"ram\.img: has 16384 bytes, too few for offset 16384", tmp_path):
        writer.write_memory([GuestRegion(0, ram, offset=len(RAM))])
    writer.write_memory([GuestRegion(0, ram, offset=len(RAM), size=0), GuestRegion(0, ram, size=PAGE)])
    assert vmsnap.open(tmp_path / "new").memory().regions == [range(0), range(PAGE)]


@row("memory-no-size")
def test_what_does_not_tell_its_size_is_not_a_destination(tmp_path: Path, memory: GuestMemory) -> None:
    for path, told in unsized(tmp_path).items():
        if "size of 0" in told:
            continue
        for destination in (path, GuestRegion(0, path)):
            with refused("memory-no-size", f"{os.path.basename(path)} {told}", tmp_path):
                memory.restore([destination])


def test_the_command_line_refuses_what_does_not_tell_its_size(tmp_path: Path) -> None:
    for path, told in unsized(tmp_path).items():
        before = sorted(os.listdir(tmp_path))
        line = error_of(run("dump", path, tmp_path / "vm", status=1))
        assert path in line
        assert told in line
        if path.startswith("/proc"):
            assert "for a process, give its ID" in line
        assert sorted(os.listdir(tmp_path)) == before


def test_a_pipe_is_refused_and_put_stores_it_to_its_end(tmp_path: Path) -> None:
    data = pattern(300_000)
    command = [sys.executable, "-m", "vmsnap"]
    refused = subprocess.run([*command, "dump", "/dev/stdin", tmp_path / "vm"], input=data, capture_output=True)
    assert refused.returncode == 1
    assert "/dev/stdin is a FIFO or a pipe, and guest memory needs a size: " in error_of(refused)
    assert list(tmp_path.iterdir()) == []
    for source in ("-", "/dev/stdin"):
        put = [*command, "put", source, tmp_path / f"vm{len(source)}", "ram", "--create"]
        subprocess.run(put, input=data, check=True, capture_output=True)
        with vmsnap.open(tmp_path / f"vm{len(source)}").raw_fragment("ram") as fragment:
            assert fragment.read() == data


# New files, and descriptors ------------------------------------------------------------------------------------------


@row("destinations", "memory-object")
def test_a_file_that_a_failed_restore_made_is_removed(tmp_path: Path) -> None:
    memory = stored(tmp_path, RAM, RAM)
    new, older, link = tmp_path / "new", tmp_path / "older", tmp_path / "link"
    older.write_bytes(b"")
    link.symlink_to("target")

    def interrupt(done: int, total: int) -> None:
        assert new.exists()
        raise KeyboardInterrupt

    for destinations in ([new, new], [new, bytearray(5)], [new, GuestRegion(7, older)], [link, link]):
        with refused("destinations", "", tmp_path):
            memory.restore(destinations)  # type: ignore[arg-type]
    with refused("memory-object", "list", tmp_path):
        memory.restore([new, []])  # type: ignore[list-item]
    with pytest.raises(KeyboardInterrupt):
        memory.restore([new, older], progress=interrupt)
    assert not new.exists()
    assert older.exists()
    memory.restore([new, link])
    assert new.read_bytes() == (tmp_path / "target").read_bytes() == RAM
    assert stat.S_IMODE(new.stat().st_mode) == 0o600


def test_a_path_is_opened_once_however_many_regions_it_has(tmp_path: Path) -> None:
    script = """
import resource
from vmsnap import GuestRegion
ram, root = sys.argv[1:]
resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
descriptor = os.open(ram, os.O_RDONLY)
for number, source in enumerate((ram, descriptor, open(ram, "rb"))):
    regions = [GuestRegion(page * 4096, source, offset=page * 4096, size=4096) for page in range(1100)]
    report = vmsnap.SnapshotWriter(f"{root}{number}").write_memory(regions)
    print(report.logical_bytes)
"""
    (tmp_path / "ram").write_bytes(pattern(1100 * PAGE))
    printed = run_python_well("import os, sys, vmsnap\n" + script, tmp_path / "ram", tmp_path / "vm")
    assert printed.split() == [str(1100 * PAGE)] * 3
    for number in range(3):
        memory = vmsnap.open(tmp_path / f"vm{number}").memory()
        assert memory.read(1099 * PAGE, PAGE) == pattern(1100 * PAGE)[1099 * PAGE :]


def test_a_dump_of_1100_ranges_needs_few_descriptors(tmp_path: Path) -> None:
    (tmp_path / "ram").write_bytes(pattern(1100 * PAGE))
    ranges = [part for page in range(1100) for part in ("--range", f"{page * PAGE:x}-{(page + 1) * PAGE:x}")]

    def few() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))

    command = [sys.executable, "-m", "vmsnap", "dump", str(tmp_path / "ram"), str(tmp_path / "vm"), *ranges]
    done = subprocess.run(command, capture_output=True, preexec_fn=few)
    assert done.returncode == 0, done.stderr
    assert len(vmsnap.open(tmp_path / "vm").memory().regions) == 1100
