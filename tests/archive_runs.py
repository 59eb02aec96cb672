"""Runs that make, unpack or change an archive, and the outcome of each: complete, absent or broken."""

import fcntl
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import vmsnap

KEY = bytes(range(32))
OTHER_KEY = bytes(range(1, 33))
KEYS = {"plain": None, "encrypted": KEY}
BULK_BYTES = 16 << 20


class RepeatedError(Exception):
    """A commit failed, and its repetition, too."""


@dataclass
class Run:
    """One run: its kind of snapshot, the snapshots to read from, and its own directory."""

    kind: str
    sources: Path
    folder: Path
    pipe: IO[bytes] | None = None

    @property
    def key(self) -> bytes | None:
        return KEYS[self.kind]

    @property
    def source(self) -> Path:
        return self.sources / self.kind

    @property
    def packed(self) -> Path:
        return self.sources / f"{self.kind}.vmsnap.tar"

    @property
    def archive(self) -> Path:
        return self.folder / "vm1.vmsnap.tar"

    @property
    def directory(self) -> Path:
        return self.folder / "vm1"


def fill(snap: vmsnap.SnapshotWriter) -> None:
    snap.write_fragment("clock", {"now": 12})
    with snap.add_namespace("ram").raw_fragment("one", chunk_size_bytes=65536) as fragment:
        fragment.write(bytes(range(256)) * 300)


def make_sources(folder: Path) -> None:
    """Make a sealed snapshot of each kind, as a directory and as an archive."""
    for kind, key in KEYS.items():
        with vmsnap.create(folder / kind, key=key) as snap:
            fill(snap)
        vmsnap.pack(folder / kind, folder / f"{kind}.vmsnap.tar", key=key)


def pack(run: Run) -> None:
    vmsnap.pack(run.source, run.archive, key=run.key, threads=1)


def pack_careless(run: Run) -> None:
    vmsnap.pack(run.source, run.archive, key=run.key, threads=1, durable=False)


def pack_stream(run: Run) -> None:
    with open(run.archive, "xb", buffering=0) as file:
        vmsnap.pack(run.source, file, key=run.key, threads=1)


def create(run: Run) -> None:
    with vmsnap.create(run.archive, key=run.key, threads=1) as snap:
        fill(snap)


def commit_twice(run: Run) -> None:
    """Create an archive, and repeat a commit that failed."""
    with_bulk(run, 0)


def grow(run: Run) -> None:
    """Create an archive from the file of a fragment, if the file system can insert room there."""
    with_bulk(run, BULK_BYTES)


def with_bulk(run: Run, size: int) -> None:
    staged = vmsnap.create(run.archive, key=run.key, threads=1)
    try:
        fill(staged.writer)
        if size:
            with staged.writer.raw_fragment("bulk", chunk_size_bytes=65536) as fragment:
                for piece in (b"begin", *[bytes(1 << 20)] * (size >> 20), b"end"):
                    fragment.write(piece)
        try:
            staged.commit()
        except (OSError, vmsnap.VmsnapError) as error:
            if "in place" in str(error):
                raise
            try:
                staged.commit()
            except (OSError, vmsnap.VmsnapError) as again:
                raise RepeatedError(f"{error}; again: {again}") from again
    except BaseException:
        staged.discard()
        raise


def unpack(run: Run) -> None:
    vmsnap.unpack(run.packed, run.directory, key=run.key, threads=1)


def unpack_pipe(run: Run) -> None:
    assert run.pipe is not None
    vmsnap.unpack(run.pipe, run.directory, key=run.key, threads=1)


def rekey(run: Run) -> None:
    vmsnap.rekey(run.archive, key=run.key, new_key=OTHER_KEY)


ACTIONS: dict[str, Callable[[Run], None]] = {
    action.__name__: action
    for action in (pack, pack_careless, pack_stream, create, commit_twice, grow, unpack, unpack_pipe, rekey)
}


def prepared(scenario: str, sources: Path, folder: Path) -> tuple[Callable[[Run], None], Run]:
    """Make the directory of a scenario, and everything that it finds there."""
    action, kind = scenario.split("-")
    folder.mkdir(parents=True)
    run = Run(kind, sources, folder)
    if action == "rekey":
        shutil.copy(run.packed, run.archive)
    if action == "unpack_pipe":
        ours, theirs = os.pipe()
        fcntl.fcntl(theirs, fcntl.F_SETPIPE_SZ, 1 << 20)
        with open(theirs, "wb") as full:
            full.write(run.packed.read_bytes())
        run.pipe = open(ours, "rb", buffering=0)  # noqa: SIM115
    return ACTIONS[action], run


def is_whole(path: Path, key: bytes | None) -> bool:
    """Return whether the snapshot is there and verifies with this key."""
    try:
        report = vmsnap.verify(path, key=key, threads=1)
    except (OSError, vmsnap.VmsnapError):
        return False
    return report.ok and [name for name in report.fragments if name != "bulk"] == ["clock", "ram/one"]


def outcome(scenario: str, folder: Path) -> str:
    """Return whether the snapshot is absent or complete, or else broken. `clean` removes everything else."""
    action, kind = scenario.split("-")
    run = Run(kind, folder, folder)
    path = run.directory if action.startswith("unpack") else run.archive
    cleaned = vmsnap.clean(folder)
    assert not cleaned.held, scenario
    assert set(os.listdir(folder)) <= {path.name}, scenario
    if not path.exists():
        return "broken" if action == "rekey" else "absent"
    if action == "rekey":
        opens = is_whole(path, KEY), is_whole(path, OTHER_KEY)
        return {(True, False): "absent", (False, True): "complete"}.get(opens, "broken")
    if action == "pack_stream":  # a part of a stream must not unpack
        try:
            vmsnap.unpack(path, run.directory, key=run.key, durable=False)
        except (OSError, vmsnap.VmsnapError):
            assert os.listdir(folder) == [path.name]
            return "absent"
        shutil.rmtree(run.directory)
    return "complete" if is_whole(path, run.key) else "broken"


if __name__ == "__main__":
    act, own = prepared(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
    act(own)
