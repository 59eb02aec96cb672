"""Every byte of an archive matters: a flipped one is found, and never read as something else."""

import fcntl
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import vmsnap
from support import Place, pattern

# The manifest begins here; before it are key metadata and a pax header of spaces.
FRONT_BYTES = 1 << 16


@dataclass(frozen=True)
class Whole:
    """An archive, its bytes, and the contents of its fragments."""

    path: Path
    key: bytes | None
    seal_digest: bytes
    content: bytes
    fragments: dict[str, bytes]

    def flipped(self, offsets: Iterable[int]) -> Iterator[int]:
        """Flip a bit of each byte in turn."""
        with open(self.path, "r+b", buffering=0) as file:
            for offset in offsets:
                os.pwrite(file.fileno(), bytes([self.content[offset] ^ 1 << offset % 8]), offset)
                yield offset
                os.pwrite(file.fileno(), self.content[offset : offset + 1], offset)

    def telling_offsets(self) -> list[int]:
        """Return the offsets of all bytes but most of the spaces and zeros of the front."""
        front = range(FRONT_BYTES)
        filler = {offset for offset in front if self.content[offset] in b" \0" and offset % 97}
        near = {other for offset in set(front) - filler for other in range(offset - 2, offset + 3)}
        return [offset for offset in range(len(self.content)) if offset not in filler or offset in near]

    def verifies(self) -> bool:
        try:
            report = vmsnap.verify(self.path, key=self.key, threads=1, expect_seal_digest=self.seal_digest)
        except vmsnap.VmsnapError:
            return False
        assert report.ok or report.problems
        return report.ok

    def unpacks(self, target: Path) -> bool:
        try:
            vmsnap.unpack(
                self.path, target, key=self.key, threads=1, durable=False, expect_seal_digest=self.seal_digest
            )
        except vmsnap.VmsnapError:
            assert not target.exists()
            return False
        return True

    def wrong_reads(self) -> list[str]:
        """Return the fragments that can be read and have other contents."""
        wrong = []
        for path, expected in self.fragments.items():
            try:
                reader = vmsnap.open(self.path, key=self.key, threads=1)
                for name in path.split("/")[:-1]:
                    reader = reader.namespace(name)
                with reader.raw_fragment(path.rpartition("/")[2]) as fragment:
                    found = fragment.read()
            except vmsnap.VmsnapError:
                continue
            if found != expected:
                wrong.append(path)
        return wrong


@pytest.fixture
def whole(place: Place, tmp_path: Path) -> Whole:
    fragments = {"empty": b"", "small": pattern(700), "ram/one": pattern(1100, 1), "ram/large": bytes(70_000)}
    with vmsnap.create(place.location, key=place.key) as snap:
        ram = snap.add_namespace("ram")
        for path, content in fragments.items():
            writer = ram if path.startswith("ram/") else snap
            with writer.raw_fragment(path.rpartition("/")[2], chunk_size_bytes=65536) as fragment:
                fragment.write(content)
    path = tmp_path / "archives/vm1.vmsnap.tar"
    path.parent.mkdir()
    seal = vmsnap.pack(place.location, path, key=place.key)
    return Whole(path, place.key, seal.seal_digest, path.read_bytes(), fragments)


def check(whole: Whole, offsets: Iterable[int], every: int) -> None:
    assert whole.verifies()
    tried = 0
    for number, offset in enumerate(whole.flipped(offsets)):
        assert not whole.verifies(), offset
        if number % every == 0:
            assert not whole.unpacks(whole.path.parent / "vm2"), offset
            assert whole.key is None or not whole.wrong_reads(), offset
        tried += 1
    print(f"{tried} of {len(whole.content)} bytes")
    assert os.listdir(whole.path.parent) == [whole.path.name]
    assert whole.verifies()
    assert whole.unpacks(whole.path.parent / "vm2")
    assert not whole.wrong_reads()


def test_a_flipped_byte_is_found(whole: Whole) -> None:
    telling = whole.telling_offsets()
    large = len(whole.content) - 70_000
    # The contents of the large fragment are all alike.
    check(whole, [offset for offset in telling if offset < large or offset % 97 == 0], 7)


@pytest.mark.torture
def test_every_flipped_byte_is_found(whole: Whole) -> None:
    check(whole, range(len(whole.content)), 1)


def test_every_truncation_is_found(whole: Whole) -> None:
    lengths = random.Random(1).sample(range(len(whole.content)), 300)
    for length in sorted([*lengths, len(whole.content) - 1, len(whole.content) - 1024], reverse=True):
        os.truncate(whole.path, length)
        assert not whole.verifies(), length
        assert not whole.unpacks(whole.path.parent / "vm2"), length


def test_a_pipe_that_ends_early_leaves_nothing(whole: Whole) -> None:
    """As if the process that packs was killed."""
    end = len(whole.content)
    for length in (0, 1, 511, 1024, 40_000, FRONT_BYTES + 1, FRONT_BYTES + 2000, end - 1024, end - 512, end - 1):
        ours, theirs = os.pipe()
        fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 1 << 20)
        with open(theirs, "wb") as full:
            full.write(whole.content[:length])
        with (
            open(ours, "rb", buffering=0) as pipe,
            pytest.raises(vmsnap.CorruptSnapshotError, match=r"cannot unpack the stream.*: it is (empty|truncated)"),
        ):
            vmsnap.unpack(pipe, whole.path.parent / "vm2", key=whole.key)
        assert os.listdir(whole.path.parent) == [whole.path.name]


def test_an_archive_that_grows_is_not_read_as_a_whole(whole: Whole) -> None:
    reader = vmsnap.open(whole.path, key=whole.key)
    with open(whole.path, "ab") as file:
        file.write(b"more")
    assert not whole.verifies()
    assert not whole.unpacks(whole.path.parent / "vm2")
    # The bytes of a fragment are where they were.
    with reader.raw_fragment("small") as fragment:
        assert fragment.read() == whole.fragments["small"]
