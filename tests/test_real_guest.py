"""The memory of a real Linux guest, in every form and by every way, is restored byte for byte."""

import filecmp
import json
import mmap
import os
import random
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pytest
import vmsnap
from commands import run, write_private
from guest_ram import ABOUT, data_ranges
from support import MIB
from vmsnap import GuestRegion

PAGE = 4096

Words = npt.NDArray[np.uint64]


@dataclass(frozen=True)
class Ram:
    """The guest's memory as it was when the guest stopped."""

    path: Path
    words: Words

    @property
    def size(self) -> int:
        return self.words.nbytes

    def is_same(self, buffer: Any) -> bool:
        """Return whether a buffer is equal. It is compared in parts, because numpy needs a byte for each word."""
        other = np.frombuffer(buffer, np.uint64)
        step = 16 * MIB // 8
        return other.size == self.words.size and all(
            np.array_equal(self.words[at : at + step], other[at : at + step]) for at in range(0, other.size, step)
        )

    def bytes_at(self, address: int, size: int) -> bytes:
        return self.words.view(np.uint8)[address : address + size].tobytes()

    def zero_pages(self) -> int:
        pages = self.words.reshape(-1, PAGE // 8)
        return sum(int((~piece.any(axis=1)).sum()) for piece in np.array_split(pages, 64))


@dataclass(frozen=True)
class Stored:
    """A snapshot of it."""

    root: Path
    key: bytes | None
    key_file: list[str | Path]

    def memory(self) -> vmsnap.GuestMemory:
        return vmsnap.open(self.root, key=self.key).memory()


@pytest.fixture(scope="module")
def ram(guest_ram: Path) -> Ram:
    return Ram(guest_ram, np.memmap(guest_ram, np.uint64, mode="r"))


@pytest.fixture
def place() -> Iterator[Path]:
    """A directory that goes with the test: pytest keeps those of three runs, and this has gigabytes."""
    with tempfile.TemporaryDirectory(prefix="vmsnap-test-") as name:
        yield Path(name)


FORMS: list[tuple[Literal["lz4"] | None, bool]] = [(None, False), (None, True), ("lz4", False), ("lz4", True)]


@pytest.fixture(scope="module", params=FORMS, ids=["plain", "encrypted", "lz4", "lz4-encrypted"])
def stored(request: pytest.FixtureRequest, ram: Ram) -> Iterator[Stored]:
    compress, encrypted = request.param
    with tempfile.TemporaryDirectory(prefix="vmsnap-test-") as name:
        root, key = Path(name, "vm1"), vmsnap.generate_key() if encrypted else None
        key_file: list[str | Path] = ["--key-file", write_private(Path(name, "vm.key"), key)] if key else []
        with vmsnap.create(root, key=key) as snap:
            report = snap.write_memory([GuestRegion(0, ram.path)], compress=compress)
        assert report.logical_bytes == ram.size
        assert report.data_bytes == ram.size - ram.zero_pages() * PAGE
        assert report.ranges > 200
        assert report.unreadable == []
        assert report.stored_bytes < report.data_bytes * (0.9 if compress else 1.01)
        yield Stored(root, key, key_file)


def test_the_image_is_what_the_guest_left(ram: Ram) -> None:
    about = json.loads(ABOUT.read_text())
    with open(ram.path, "rb") as file:
        ranges = list(data_ranges(file.fileno()))
    assert (ram.size, len(ranges)) == (about["size"], about["ranges"])
    assert sum(end - start for start, end in ranges) == about["data_bytes"] > 256 * MIB
    assert ram.zero_pages() * PAGE > ram.size - about["data_bytes"]


def test_it_comes_back_to_a_file(stored: Stored, ram: Ram, place: Path) -> None:
    run("restore", stored.root, place / "out", *stored.key_file)
    assert ram.is_same(np.memmap(place / "out", mode="r"))
    assert (place / "out").stat().st_blocks * 512 < ram.path.stat().st_blocks * 512


def test_it_comes_back_to_a_memfd(stored: Stored, ram: Ram) -> None:
    descriptor = os.memfd_create("guest")
    os.truncate(descriptor, ram.size)
    # The old contents must go.
    os.pwrite(descriptor, b"\xee" * MIB, ram.size // 2)
    stored.memory().restore([descriptor])
    blocks = os.fstat(descriptor).st_blocks
    with mmap.mmap(descriptor, ram.size) as mapping:
        os.close(descriptor)
        assert ram.is_same(mapping)
    assert blocks * 512 < ram.path.stat().st_blocks * 512


@pytest.mark.parametrize("shared", [mmap.MAP_SHARED, mmap.MAP_PRIVATE], ids=["shared", "private"])
def test_it_comes_back_to_a_mapping(stored: Stored, ram: Ram, shared: int) -> None:
    with mmap.mmap(-1, ram.size, flags=shared | mmap.MAP_ANONYMOUS) as mapping:
        mapping[ram.size // 2 : ram.size // 2 + MIB] = b"\xee" * MIB
        stored.memory().restore([mapping])
        assert ram.is_same(mapping)


def test_it_is_read_at_random(stored: Stored, ram: Ram) -> None:
    memory, numbers = stored.memory(), random.Random(1)
    for _ in range(1000):
        # From a few bytes to several ranges with the holes between them.
        size = numbers.choice([1, 8, PAGE, 3 * PAGE, 100_000, 2 * MIB])
        address = numbers.randrange(ram.size - size)
        assert memory.read(address, size) == ram.bytes_at(address, size)


def test_the_command_line_shows_what_lies_at_an_address(stored: Stored, ram: Ram) -> None:
    [first, *_, last] = stored.memory().data_ranges(0)
    for address in (0, first.stop - 8, last.start - 8, ram.size - 16):
        told = json.loads(run("peek", stored.root, hex(address), 16, "--json", *stored.key_file).stdout)
        assert bytes.fromhex(told["hex"]) == ram.bytes_at(address, 16)


@pytest.mark.parametrize("stored", FORMS[:1], ids=["plain"], indirect=True)
def test_the_map_has_its_pages(stored: Stored, ram: Ram, place: Path) -> None:
    told = json.loads(run("map", stored.root, "-o", place / "map.png", "--json", *stored.key_file).stdout)
    [region] = told["regions"]
    assert (region["guest_base"], region["size"]) == (0, ram.size)
    pages = region["pages"]
    assert pages["hole"] + pages["zero"] == ram.zero_pages()
    assert sum(pages.values()) == ram.size // PAGE
    assert pages["text-like"] > 1000
    assert pages["dense"] > 10_000


def test_it_is_verified(stored: Stored) -> None:
    assert vmsnap.verify(stored.root, key=stored.key).ok


def test_every_source_of_it_stores_the_same(ram: Ram, place: Path) -> None:
    def dumped(name: str, source: object) -> Path:
        with vmsnap.create(place / name) as snap:
            snap.write_memory([GuestRegion(0, source)])  # type: ignore[arg-type]
        return place / name

    first = dumped("path", ram.path)
    with open(ram.path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapping:
        for name, source in (("file", file), ("descriptor", file.fileno()), ("mapping", mapping)):
            other = dumped(name, source)
            assert vmsnap.open(other).memory().data_ranges(0) == vmsnap.open(first).memory().data_ranges(0)
            assert filecmp.cmp(other / "mem", first / "mem", shallow=False)
            shutil.rmtree(other)
