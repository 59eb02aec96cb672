"""Directories that are not snapshots, and snapshots without guest memory: refused with a reason."""

import json
import os
from pathlib import Path

import pytest
import vmsnap
from commands import error_of, run

READING = {
    "verify": [],
    "info": [],
    "ls": [],
    "tree": [],
    "peek": ["0", "16"],
}


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """A directory of somebody's files."""
    root = tmp_path / "srv"
    (root / "tools/bin").mkdir(parents=True)
    (root / "readme").write_bytes(b"text")
    (root / "tools/bin/kvm").symlink_to("qemu")
    return root


@pytest.mark.parametrize("misfit", ["link", "FIFO", "not UTF-8"])
@pytest.mark.parametrize("command", READING)
def test_a_directory_with_something_that_does_not_fit_is_refused(tmp_path: Path, command: str, misfit: str) -> None:
    root = tmp_path / "srv"
    root.mkdir()
    (root / "readme").write_bytes(b"text")
    match misfit:
        case "link":
            (root / "kvm").symlink_to("qemu")
        case "FIFO":
            os.mkfifo(root / "kvm")
        case _:
            (root / os.fsdecode(b"kvm\xff")).touch()
    line = error_of(run(command, root, *READING[command], status=4))
    assert f"{root} is not a vmsnap snapshot: it contains neither enc_metadata nor vmsnap_manifest, and " in line
    assert "kvm" in line


@pytest.mark.parametrize("command", ["verify", "info", "ls", "tree"])
def test_what_does_not_fit_is_found_below(directory: Path, command: str) -> None:
    line = error_of(run(command, directory, status=4))
    assert "is not a vmsnap snapshot" in line
    assert "tools/bin" in line


def test_a_snapshot_with_a_mark_is_damaged_instead(tmp_path: Path, key: bytes, key_file: Path) -> None:
    vmsnap.SnapshotWriter(tmp_path / "vm1", key=key).write_fragment("clock", 12)
    (tmp_path / "vm1/kvm").symlink_to("qemu")
    for command in ("info", "ls", "tree"):
        line = error_of(run(command, tmp_path / "vm1", "--key-file", key_file, status=4))
        assert "is not a vmsnap snapshot: it contains neither" not in line
    done = run("verify", tmp_path / "vm1", "--key-file", key_file, status=1)
    assert b"link: kvm: " in done.stderr
    assert done.stdout.endswith(b"FAILED: 2 problems, all fragments were read\n")


def test_a_plain_snapshot_that_is_not_sealed_is_legal(tmp_path: Path) -> None:
    """As crosvm writes them."""
    vmsnap.SnapshotWriter(tmp_path / "vm1").add_namespace("cpu").write_fragment("clock", 12)
    assert run("ls", tmp_path / "vm1").stdout == b"cpu/clock\t1\n"
    assert b"sealed\tno\n" in run("info", tmp_path / "vm1").stdout
    done = run("verify", tmp_path / "vm1", status=1)
    # There is nothing that it could be compared with.
    assert done.stdout == b"read  cpu/clock\nFAILED: 1 problem, all fragments were read\n"
    assert (
        b" has neither enc_metadata nor vmsnap_manifest: it is a plain snapshot that is not sealed, or not a"
        in done.stderr
    )
    assert b"\nnot sealed: " in done.stderr


def test_the_last_line_of_verify_counts(tmp_path: Path, key: bytes, key_file: Path) -> None:
    with vmsnap.create(tmp_path / "vm1", key=key) as snapshot:
        snapshot.write_fragment("clock", 12)
    text = run("verify", tmp_path / "vm1", "--key-file", key_file).stdout.decode()
    assert text.startswith("ok  clock\nok: 1 fragment checked, 1 byte, sealed\nseal digest: ")
    without = run("verify", tmp_path / "vm1", status=1)
    skipped = without.stderr.count(b"not checked: ")
    assert skipped
    assert f"FAILED: 0 problems, {skipped} check{'' if skipped == 1 else 's'} skipped\n" in without.stdout.decode()


@pytest.mark.parametrize("sealed", [False, True])
def test_a_snapshot_without_guest_memory_says_so(tmp_path: Path, key: bytes, key_file: Path, sealed: bool) -> None:
    vmsnap.SnapshotWriter(tmp_path / "vm1", key=key).add_namespace("vm7").write_fragment("clock", 12)
    if sealed:
        vmsnap.seal(tmp_path / "vm1", key=key)
    out = tmp_path / "out"
    for arguments in (["peek", "vm1", "0", "16"], ["map", "vm1", "-o", out], ["restore", "vm1", out]):
        for namespace, named in (([], "vm1"), (["--namespace", "vm7"], "namespace vm7 of vm1")):
            done = run(*arguments, *namespace, "--key-file", key_file, cwd=tmp_path, status=1)
            text = f"vmsnap: error: {named} contains no guest memory: it has no fragment mem_metadata"
            assert error_of(done) == text
            assert not out.exists()
    snapshot = vmsnap.open(tmp_path / "vm1", key=key)
    for reader, named in ((snapshot, f"{tmp_path}/vm1"), (snapshot.namespace("vm7"), 'the namespace "vm7" of ')):
        with pytest.raises(FileNotFoundError, match="contains no guest memory") as refused:
            reader.memory()
        assert named in str(refused.value)


def test_guest_memory_that_was_deleted_is_not_memory_that_never_was(tmp_path: Path) -> None:
    with vmsnap.create(tmp_path / "vm1") as snapshot:
        snapshot.write_memory([vmsnap.GuestRegion(0, bytes(4096))])
    (tmp_path / "vm1/mem_metadata").unlink()
    line = error_of(run("peek", tmp_path / "vm1", 0, 16, status=4))
    assert "contains no guest memory" not in line
    assert "mem_metadata" in line


def test_a_directory_without_memory_may_not_be_a_snapshot(tmp_path: Path) -> None:
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/hosts").touch()
    line = error_of(run("peek", tmp_path / "etc", 0, 16, status=1))
    assert "contains no guest memory" in line
    assert "it may not be a snapshot: it has no enc_metadata and no vmsnap_manifest" in line
    assert json.loads(run("ls", tmp_path / "etc", "--json").stdout)[0]["path"] == "hosts"
