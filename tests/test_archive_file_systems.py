"""Archives on file systems that share blocks or insert room, and on one that is full."""

import errno
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
import vmsnap
from archive_runs import BULK_BYTES, KEY, KEYS, OTHER_KEY, Run, fill, grow, is_whole, make_sources, rekey
from block_devices import mounted
from faults import traced_children
from support import pattern

MIB = 1 << 20
SHARING = ["xfs", "btrfs"]
BOTH = pytest.mark.parametrize("kind", list(KEYS))


@pytest.fixture(scope="module", params=[*SHARING, "ext4"])
def disk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with mounted(request.param, tmp_path_factory.mktemp("disk")) as folder:
        yield folder


@pytest.fixture
def folder(disk: Path) -> Iterator[Path]:
    """A new directory on it."""
    path = disk / "snapshots"
    path.mkdir()
    yield path
    shutil.rmtree(path)


def calls_of(action: Callable[[], object], folder: Path) -> list[str]:
    """Return the calls of an action, in a process of its own, that move contents in the file system."""
    log = folder / "log"
    (ended,) = traced_children([action], folder, "-o", str(log), "-e", "trace=ioctl,fallocate,copy_file_range")
    assert ended.status == 0, ended
    lines = log.read_text().splitlines()
    log.unlink()
    # A number of the process, the call, its arguments, the result.
    found = [re.match(r"\d+ +(ioctl\(.*FICLONERANGE|fallocate|copy_file_range).* = (-?\d+)", line) for line in lines]
    return [call[1].partition("(")[0] for call in found if call and int(call[2]) >= 0]


def shared_bytes(folder: Path, path: Path) -> int:
    """Return how many bytes of a file are in extents that another file has, too."""
    # The flags of extents are known once they are written.
    os.sync()
    done = subprocess.run(["filefrag", "-v", path], capture_output=True, text=True, check=True)
    return sum(
        int(extent[1]) * 4096 for extent in re.finditer(r"^ *\d+:.*?: +(\d+):.*\bshared", done.stdout, re.MULTILINE)
    )


def with_bulk(location: Path, key: bytes | None) -> vmsnap.StagedSnapshot:
    staged = vmsnap.create(location, key=key)
    fill(staged.writer)
    with staged.writer.raw_fragment("bulk") as fragment:
        fragment.write(pattern(BULK_BYTES + 12_345))
    return staged


def with_bulk_committed(location: Path, key: bytes | None) -> None:
    with_bulk(location, key).commit()


@BOTH
def test_a_pack_shares_the_blocks_of_the_fragments(folder: Path, kind: str) -> None:
    key = KEYS[kind]
    with_bulk(folder / "vm1", key).commit()
    archive = folder / "vm1.vmsnap.tar"
    calls = calls_of(partial(vmsnap.pack, folder / "vm1", archive, key=key), folder)
    assert is_whole(archive, key)
    shares = folder.parent.name in SHARING
    assert ("ioctl" in calls) == shares
    assert (shared_bytes(folder, archive) >= BULK_BYTES) == shares
    assert vmsnap.unpack(archive, folder / "vm2", key=key).seal_digest == vmsnap.open(archive, key=key).seal_digest


@BOTH
def test_a_commit_moves_the_bulk_of_an_archive(folder: Path, kind: str) -> None:
    key, archive = KEYS[kind], folder / "vm1.vmsnap.tar"
    calls = calls_of(partial(with_bulk_committed, archive, key), folder)
    assert is_whole(archive, key)
    assert os.listdir(folder) == [archive.name]
    if folder.parent.name in SHARING:
        assert "ioctl" in calls
        assert "fallocate" not in calls
    else:
        assert calls.count("fallocate") == 1
    with vmsnap.open(archive, key=key).raw_fragment("bulk") as fragment:
        assert fragment.read() == pattern(BULK_BYTES + 12_345)


@BOTH
def test_a_commit_that_failed_is_repeated(folder: Path, kind: str) -> None:
    """Without reflinks, room is inserted in front of a fragment, taken away, and inserted again."""
    trace = ["-e", "trace=ioctl,renameat2", "-e", "inject=ioctl:error=EOPNOTSUPP", "-o", os.devnull]
    for number in (1, 2):
        run = Run(kind, folder, folder / str(number))
        run.folder.mkdir()
        inject = f"inject=renameat2:error=EIO:when={number}"
        (ended,) = traced_children([partial(grow, run)], folder, *trace, "-e", inject)
        assert (ended.status, ended.error) == (0, ""), ended
        assert is_whole(run.archive, run.key)
        assert os.listdir(run.folder) == [run.archive.name]


def test_a_new_key_shares_everything_behind_the_manifest(folder: Path) -> None:
    archive = folder / "vm1.vmsnap.tar"
    with_bulk(archive, KEY).commit()
    run = Run("encrypted", folder, folder)
    calls = calls_of(partial(rekey, run), folder)
    assert (calls == ["ioctl"]) == (folder.parent.name in SHARING)
    assert is_whole(archive, OTHER_KEY)
    assert os.listdir(folder) == [archive.name]


# A full disk ---------------------------------------------------------------------------------------------------------


def free_blocks(disk: Path) -> int:
    return os.statvfs(disk).f_bavail


def with_room_for(disk: Path, blocks: int, call: Callable[[], object]) -> bool:
    """Call with that many free blocks; return whether that was enough."""
    filler = disk / "filler"
    filler.write_bytes(bytes((free_blocks(disk) - blocks) * os.statvfs(disk).f_bsize))
    names = set(os.listdir(disk))
    assert free_blocks(disk) == blocks
    refusal: OSError | None = None
    try:
        call()
    except OSError as error:
        refusal = error.with_traceback(None)
        assert set(os.listdir(disk)) == names
        assert free_blocks(disk) == blocks
    finally:
        filler.unlink()
    assert refusal is None or (refusal.errno, "No space left on device" in str(refusal)) == (errno.ENOSPC, True)
    return refusal is None


def contents(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@BOTH
@pytest.mark.parametrize("action", ["pack", "unpack", "create", "rekey"])
def test_without_room_for_any_block_nothing_is_left(small_disk: Path, tmp_path: Path, kind: str, action: str) -> None:
    """The disk gets full at the first block, at each further one, and at the last."""
    if (action, kind) == ("rekey", "plain"):
        return  # it does not have a key
    sources = tmp_path / "sources"
    sources.mkdir()
    make_sources(sources)
    run = Run(kind, sources, small_disk)
    key = run.key
    if action == "rekey":
        shutil.copy(run.packed, run.archive)
        run.archive.chmod(0o600)

    def create() -> None:
        with vmsnap.create(run.archive, key=key, threads=1) as snap:
            fill(snap)

    def act() -> object:
        match action:
            case "pack":
                return vmsnap.pack(run.source, run.archive, key=key)
            case "unpack":
                return vmsnap.unpack(run.packed, run.directory, key=key)
            case "create":
                return create()
            case _:
                return vmsnap.rekey(run.archive, key=key, new_key=OTHER_KEY)

    before = contents(sources), contents(small_disk)
    enough = 0
    while not with_room_for(small_disk, enough, act):
        assert (contents(sources), contents(small_disk)) == before
        enough += 1
    print(f"{action} of a {kind} snapshot takes {enough} blocks")
    assert enough > 20
    made = run.directory if action == "unpack" else run.archive
    assert os.listdir(small_disk) == [made.name]
    assert is_whole(made, OTHER_KEY if action == "rekey" else key)


@BOTH
def test_a_commit_without_room_is_repeated_with_room(small_disk: Path, kind: str) -> None:
    staged = vmsnap.create(small_disk / "vm1.vmsnap.tar", key=KEYS[kind])
    fill(staged.writer)
    assert not with_room_for(small_disk, 10, staged.commit)
    assert with_room_for(small_disk, 100, staged.commit)
    assert os.listdir(small_disk) == ["vm1.vmsnap.tar"]
    assert is_whole(small_disk / "vm1.vmsnap.tar", KEYS[kind])
