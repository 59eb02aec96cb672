"""Errors of creating snapshots and fragments: something is there already, or permission is missing."""

import os
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import vmsnap
from independent import check_independently
from refusals import refused, refused_elsewhere, row
from support import Place, run_python, run_python_well, write

# Creating a snapshot -------------------------------------------------------------------------------------------------


def something_at(path: Path, what: str) -> None:
    match what:
        case "a snapshot":
            write(vmsnap.SnapshotWriter(path), "mem", b"x")
        case "an empty folder":
            path.mkdir()
        case "a file":
            path.write_bytes(b"x")
        case "a link that leads nowhere":
            path.symlink_to("nowhere")
        case "a FIFO":
            os.mkfifo(path)


@row("root-exists")
@pytest.mark.parametrize("what", ["a snapshot", "an empty folder", "a file", "a link that leads nowhere", "a FIFO"])
def test_nothing_is_written_over(place: Place, tmp_path: Path, what: str) -> None:
    something_at(place.location, what)
    with refused("root-exists", r"vm1: the path already exists", tmp_path):
        place.create()


@row("root-exists")
def test_two_snapshots_cannot_have_one_path(place: Place, tmp_path: Path) -> None:
    writer = write(place.create(), "mem", b"x")
    with refused("root-exists", "the path already exists", tmp_path):
        vmsnap.SnapshotWriter(place.location, key=bytes(32))
    write(writer, "more", b"y")
    check_independently(place.location, place.key, {"mem": b"x", "more": b"y"})


@row("parent-missing")
def test_the_folder_it_lies_in_must_exist(place: Place, tmp_path: Path) -> None:
    with refused("parent-missing", "absent/vm1: the parent directory does not exist", tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "absent/vm1", key=place.key)


# Creating fragments --------------------------------------------------------------------------------------------------


@row("fragment-exists")
@pytest.mark.parametrize(
    "what", ["a fragment", "an open fragment", "a namespace", "a link", "a dangling link", "a FIFO"]
)
def test_fragments_and_namespaces_are_made_once(place: Place, what: str) -> None:
    writer = place.create()
    inner = writer.add_namespace("disks")
    write(inner, "other", b"other")
    fragment = None
    match what:
        case "a fragment":
            write(inner, "sda", b"first")
        case "an open fragment":
            fragment = inner.raw_fragment("sda")
            fragment.write(b"first")
        case "a namespace":
            inner.add_namespace("sda")
        case "a link":
            place.file("disks/sda").symlink_to("other")
        case "a dangling link":
            place.file("disks/sda").symlink_to("nowhere")
        case "a FIFO":
            os.mkfifo(place.file("disks/sda"))
    with refused(
        "fragment-exists", 'fragment "sda" in namespace "disks" of .*vm1 exists already', place.location.parent
    ):
        inner.raw_fragment("sda")
    with refused("fragment-exists", 'namespace "disks/sda" of .*vm1 exists already', place.location.parent):
        inner.add_namespace("sda")
    if fragment is not None:
        fragment.write(b", second")
        fragment.close()
        check_independently(place.location, place.key, {"disks/other": b"other", "disks/sda": b"first, second"})


@row("namespace-removed")
def test_a_namespace_that_was_removed_is_missed(place: Place) -> None:
    writer = place.create()
    inner = writer.add_namespace("disks").add_namespace("deep")
    place.file("disks/deep").rmdir()
    for call in (inner.raw_fragment, inner.add_namespace):
        with refused("namespace-removed", 'namespace "disks/deep" of .*vm1 does not exist', place.location.parent):
            call("sda")
    shutil.rmtree(place.location)
    for call in (writer.raw_fragment, writer.add_namespace):
        with refused("namespace-removed", "cannot open the snapshot .*vm1", place.location.parent):
            call("sda")


AS_NOBODY = """
import os, sys, vmsnap
if os.geteuid() == 0:  # whom permissions do not stop
    os.setgid(65534)
    os.setuid(65534)
root, key = sys.argv[1] + "/folder/vm1", bytes.fromhex(sys.argv[2]) or None
"""

MAKE = """
os.mkdir(sys.argv[1] + "/folder")
writer = vmsnap.SnapshotWriter(root, key=key)
for each, name in ((writer.add_namespace("disks"), "sda"), (writer, "mem")):
    with each.raw_fragment(name) as fragment:
        fragment.write(b"x")
"""


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder anybody may write to, which pytest's own are not."""
    with tempfile.TemporaryDirectory(prefix="vmsnap-test-") as folder:
        os.chmod(folder, 0o777)
        yield Path(folder)


@row("not-permitted")
@pytest.mark.parametrize("encrypted", [False, True])
@pytest.mark.parametrize(
    ("forbidden", "mode", "call", "message"),
    [
        ("", 0o500, "vmsnap.SnapshotWriter(root + '2', key=key)", "cannot create the snapshot .*vm12"),
        ("vm1", 0, "vmsnap.SnapshotReader(root, key=key)", "cannot open the snapshot .*vm1"),
        (
            "vm1/disks",
            0,
            "vmsnap.SnapshotReader(root, key=key).namespace('disks')",
            'cannot open namespace "disks" of .*vm1',
        ),
        (
            "vm1/mem",
            0,
            "vmsnap.SnapshotReader(root, key=key).raw_fragment('mem')",
            'fragment "mem" of .*vm1: cannot be opened',
        ),
    ],
)
def test_what_is_not_permitted_is_told(
    open_folder: Path, encrypted: bool, forbidden: str, mode: int, call: str, message: str
) -> None:
    key = bytes(32 * encrypted)
    run_python_well(AS_NOBODY + MAKE, open_folder, key.hex())
    closed = open_folder / "folder" / forbidden
    before = closed.stat().st_mode
    closed.chmod(mode)
    if os.geteuid() == 0:
        refused_elsewhere("not-permitted", message, open_folder, AS_NOBODY + call, open_folder, key.hex())
    else:  # what is closed to us as well cannot be compared
        result = run_python(AS_NOBODY + call, open_folder, key.hex())
        assert re.search(f"PermissionError: .*{message}", result.stderr), result.stderr
    closed.chmod(before)
    check_independently(open_folder / "folder/vm1", key or None, {"disks/sda": b"x", "mem": b"x"})


@row("not-permitted")
def test_an_identity_that_cannot_be_read_or_made_is_told_and_nothing_is_written_plain(open_folder: Path) -> None:
    is_root = os.geteuid() == 0
    file = open_folder / "id.txt"
    file.write_text(vmsnap.generate_identity())
    file.chmod(0o600 if is_root else 0)
    create = "os.environ['XDG_CONFIG_HOME'] = sys.argv[1]\n{}vmsnap.SnapshotWriter(sys.argv[1] + '/vm1', True)"
    named = create.format("os.environ['VMSNAP_IDENTITY_FILE'] = sys.argv[1] + '/id.txt'\n")
    missing = (
        f"cannot create the identity file {open_folder}/vmsnap/identity.txt; set .VMSNAP_IDENTITY_FILE, or pass a key"
    )
    for call, mode, message in ((named, 0o777, f"{file}.*cannot be read"), (create.format(""), 0o555, missing)):
        open_folder.chmod(mode)
        if is_root:
            refused_elsewhere("not-permitted", message, open_folder, AS_NOBODY + call, open_folder, "")
        else:  # what is closed to us as well cannot be compared
            result = run_python(AS_NOBODY + call, open_folder, "")
            assert re.search(f"PermissionError: .*{message}", result.stderr), result.stderr
            assert not (open_folder / "vm1").exists()
    open_folder.chmod(0o777)
