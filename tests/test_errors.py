"""Bad input: each row of docs/errors.md by its intended exception and text, nothing lost and nothing left behind."""

import array
import builtins
import dataclasses
import errno
import functools
import gc
import io
import itertools
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path

import floe
import numpy as np
import pytest
import vmsnap
from independent import check_independently
from refusals import ERRORS_PAGE, refused, refused_elsewhere, rows
from support import (
    HEADER_BYTES,
    MIB,
    Place,
    pattern,
    read,
    run_python,
    run_python_well,
    segment_offset,
    stored_size,
    tree,
    write,
)
from vmsnap import serialization

REPOSITORY = ERRORS_PAGE.parents[1]


@pytest.fixture(params=["plain", "encrypted"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(tmp_path / "vm1", vmsnap.generate_key() if request.param == "encrypted" else None)


@pytest.fixture
def encrypted_place(tmp_path: Path, key: bytes) -> Place:
    return Place(tmp_path / "vm1", key)


# The table itself ----------------------------------------------------------------------------------------------------


def test_every_row_of_the_table_has_a_test_and_every_test_a_row() -> None:
    tested = set()
    for file in sorted(Path(__file__).parent.glob("test_*.py")):
        tested |= set(re.findall(r"\brefused(?:_elsewhere)?\(\s*\"([^\"]+)\"", file.read_text()))
    assert tested == set(rows())


def test_the_table_names_exceptions_and_predicates_that_belong_together() -> None:
    classes = {
        "AuthenticationError": "is_authentication",
        "CorruptSnapshotError": "is_corrupt",
        "FragmentStateError": "is_state",
        "InvalidArgumentError": "is_invalid_argument",
        "KeyUnavailableError": "is_key_unavailable",
        "NotEncryptedError": "is_not_encrypted",
        "NotSealedError": "is_not_sealed",
        "SerializationError": "is_serialization",
        "UnsupportedFormatError": "is_unsupported_format",
        "KeyboardInterrupt": "is_interrupted",
    }
    predicates = set(re.findall(r"pub fn (is_\w+)\(", (REPOSITORY / "src/error.rs").read_text()))
    for row in rows().values():
        if row.predicate is None:
            continue
        assert row.predicate in predicates, row.name
        if row.predicate == "is_io":
            assert issubclass(getattr(builtins, row.exception), OSError), row.name
        else:
            assert classes[row.exception] == row.predicate, row.name
    # Nothing is left out either.
    own = {name for name in vmsnap.__all__ if name.endswith("Error")} - {"VmsnapError"}
    assert own <= {row.exception for row in rows().values()}
    assert {row.predicate for row in rows().values()} >= predicates


def test_the_exceptions_have_one_base_and_bad_arguments_are_value_errors() -> None:
    for name in vmsnap.__all__:
        if name.endswith("Error"):
            assert issubclass(getattr(vmsnap, name), vmsnap.VmsnapError)
    assert issubclass(vmsnap.InvalidArgumentError, ValueError)
    assert issubclass(vmsnap.SerializationError, ValueError)
    assert not issubclass(vmsnap.VmsnapError, OSError)


# Arguments -----------------------------------------------------------------------------------------------------------

BAD_NAMES = {
    "": "empty",
    ".": "relative path",
    "..": "relative path",
    "/": "contains '/'",
    "/etc/passwd": "contains '/'",
    "../escaped": "contains '/'",
    "disks/sda": "contains '/'.* nest with add_namespace",
    "sda/": "contains '/'",
    "a\\b": r"'\\' or NUL",
    "a\0b": "NUL",
    "x" * 256: "255 bytes",
    "é" * 128: "255 bytes",
    ".vmsnap": "its own files",
    ".vmsnap-0123456789abcdef": "its own files",
    ".vmsnapshot": "its own files",
    "enc_metadata": "its own files",
    "ENC_metadata": "its own files",
    "vmsnap_manifest": "its own files",
    "VMSNAP_MANIFEST": "its own files",
}


@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_is_refused_by_writers_and_readers(place: Place, name: str) -> None:
    writer = place.create()
    inner = writer.add_namespace("disks")
    reader = place.open()
    message = f"cannot be the name of a fragment or a namespace: .*{BAD_NAMES[name]}"
    for refusing in (
        writer.raw_fragment,
        writer.add_namespace,
        inner.raw_fragment,
        inner.add_namespace,
        reader.raw_fragment,
        reader.namespace,
        reader.namespace("disks").raw_fragment,
        reader.namespace("disks").namespace,
    ):
        with refused("bad-name", message, place.root.parent):
            refusing(name)


@pytest.mark.parametrize("path", ["", b"", "vm\0", "\0"])
def test_a_path_that_no_snapshot_can_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str | bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (vmsnap.SnapshotWriter, vmsnap.SnapshotReader):
        for key in (None, bytes(32)):
            with refused("bad-path", "path of a snapshot", tmp_path):
                call(path, key=key)


@pytest.mark.parametrize("name", ["\udcff", "a\ud800"])
def test_a_name_that_is_not_utf_8_is_refused(place: Place, name: str) -> None:
    writer = place.create()
    for refusing in (writer.raw_fragment, writer.add_namespace, place.open().raw_fragment, place.open().namespace):
        with refused("name-without-utf-8", "surrogates not allowed", place.root):
            refusing(name)


@pytest.mark.parametrize("size", [0, 1, 31, (64 << 20) + 1, 1 << 32, (1 << 64) - 1, -1, 2**70, -(2**70)])
def test_a_chunk_size_out_of_range_is_refused(place: Place, size: int) -> None:
    writer = place.create()
    with refused("chunk-size", rf"chunk_size_bytes .*{size}", place.root):
        writer.raw_fragment("mem", chunk_size_bytes=size)
    with refused("chunk-size", rf"chunk_size_bytes .*{size}", place.root):
        writer.raw_fragment_with_chunk_size("mem", size)


@pytest.mark.parametrize("length", [0, 1, 16, 31, 33, 64])
def test_a_key_of_another_length_is_refused(encrypted_place: Place, tmp_path: Path, length: int) -> None:
    encrypted_place.create()
    with refused("key-length", f"32 bytes, this one {length}; generate_key", tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "vm2", key=bytes(length))
    with refused("key-length", f"32 bytes, this one {length}; generate_key", tmp_path):
        vmsnap.SnapshotReader(tmp_path / "vm1", key=bytes(length))


def test_the_length_of_a_key_is_counted_in_bytes(tmp_path: Path) -> None:
    with refused("key-length", "this one 256", tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "vm2", key=np.zeros(32).data)
    with refused("key-length", "this one 128", tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "vm2", key=array.array("i", [0] * 32))


@pytest.mark.parametrize("threads", [0, -1, 1025, 2**70])
def test_a_number_of_threads_out_of_range_is_refused(place: Place, tmp_path: Path, threads: int) -> None:
    place.create()
    with refused("thread-count", f"threads (must be|cannot be {threads})", tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "vm2", key=place.key, threads=threads)
    with refused("thread-count", f"threads (must be|cannot be {threads})", tmp_path):
        vmsnap.SnapshotReader(tmp_path / "vm1", key=place.key, threads=threads)


@pytest.mark.parametrize("value", ["", "0", "-1", "1025", "many", "2.5", "18446744073709551617"])
def test_a_bad_number_of_threads_in_the_environment_is_refused(tmp_path: Path, value: str) -> None:
    vmsnap.SnapshotWriter(tmp_path / "vm1")
    message = f"VMSNAP_THREADS={re.escape(value)} must be a number from 1 to 1024"
    for call in ("vmsnap.SnapshotWriter(sys.argv[1] + '/vm2')", "vmsnap.SnapshotReader(sys.argv[1] + '/vm1')"):
        refused_elsewhere("threads-variable", message, tmp_path, call, tmp_path, VMSNAP_THREADS=value)
    # What the caller says goes first.
    call = "import sys, vmsnap; vmsnap.SnapshotWriter(sys.argv[1], threads=2)"
    run_python_well(call, tmp_path / "vm3", VMSNAP_THREADS=value)


@pytest.mark.parametrize("value", ["", "openssl", "AES-GCM", "aws-lc-rs"])
def test_an_unknown_provider_in_the_environment_is_refused(tmp_path: Path, value: str) -> None:
    write(vmsnap.SnapshotWriter(tmp_path / "encrypted", key=bytes(32)), "mem", b"x")
    message = f"VMSNAP_AEAD={value} is none of the providers in this build .*aes-gcm"
    for call in (
        "vmsnap.aead_provider()",
        "vmsnap.SnapshotWriter(sys.argv[1] + '/vm2', key=bytes(32))",
        "vmsnap.SnapshotReader(sys.argv[1] + '/encrypted', key=bytes(32))",
    ):
        refused_elsewhere("provider-variable", message, tmp_path, call, tmp_path, VMSNAP_AEAD=value)


def test_an_offset_that_no_fragment_has_is_refused(place: Place) -> None:
    write(place.create(), "mem", pattern(100))
    with place.open().raw_fragment("mem") as fragment:
        fragment.seek(10)
        buffer = bytearray(b"\xaa" * 10)
        calls: list[Callable[[], object]] = [
            lambda: fragment.read_at(-1, 1),
            lambda: fragment.read_at(1 << 64, 1),
            lambda: fragment.read_at(0, -1),
            lambda: fragment.read_at(0, 1 << 64),
            lambda: fragment.readinto_at(-1, buffer),
            lambda: fragment.readinto_at(1 << 64, buffer),
            lambda: fragment.seek(-1),
            lambda: fragment.seek(-11, os.SEEK_CUR),
            lambda: fragment.seek(-101, os.SEEK_END),
            lambda: fragment.seek(1 << 64),
            lambda: fragment.seek(1 << 63, os.SEEK_CUR),
            lambda: fragment.seek(0, 3),
        ]
        for call in calls:
            with refused("offset", "cannot be|before its start|whence is", place.root):
                call()
            assert fragment.tell() == 10
        assert buffer == b"\xaa" * 10
        # Beyond the end is no error.
        assert fragment.read_at((1 << 64) - 1, 10) == b""
        assert fragment.seek((1 << 63) - 1) == (1 << 63) - 1
        assert fragment.read(10) == b""


def test_a_damaged_pickle_is_refused(place: Place) -> None:
    for handle in (place.create().add_namespace("disks"), place.open()):
        rebuild, (state,) = handle.__reduce__()
        outside = state.replace(b"disks", b"../..")
        damaged = [b"", b"\x00", b"garbage", *(state[:length] for length in range(len(state)))]
        damaged += [outside] if outside != state else []
        for each in damaged:
            with refused("damaged-pickle", "not a pickled handle", place.root):
                rebuild(each)


def test_what_is_no_buffer_is_refused(place: Place, tmp_path: Path) -> None:
    writer = place.create()
    with writer.raw_fragment("mem") as fragment:
        for nothing in ("text", 7, None, [1]):
            with refused("not-a-buffer", "bytes-like", tmp_path):
                fragment.write(nothing)  # type: ignore[arg-type]
        fragment.write(b"kept")
    with place.open().raw_fragment("mem") as reader:
        with refused("not-a-buffer", "bytes-like", tmp_path):
            reader.readinto("text")  # type: ignore[arg-type]
        assert reader.read() == b"kept"
    for call in (vmsnap.SnapshotWriter, vmsnap.SnapshotReader):
        with refused("not-a-buffer", "bytes-like", tmp_path):
            call(tmp_path / "vm2", key="0" * 32)  # type: ignore[arg-type]


def test_a_scattered_buffer_is_refused(place: Place, tmp_path: Path) -> None:
    scattered = memoryview(bytearray(64))[::2]
    with place.create().raw_fragment("mem") as fragment:
        with refused("scattered-buffer", r"contiguous.* bytes\(\)", tmp_path):
            fragment.write(scattered)
        fragment.write(b"kept")
    with place.open().raw_fragment("mem") as reader:
        with refused("scattered-buffer", "contiguous", tmp_path):
            reader.readinto(scattered)
        assert reader.read() == b"kept"
    with refused("scattered-buffer", r"contiguous.* bytes\(\)", tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "vm2", key=scattered)


def test_a_buffer_that_cannot_be_written_to_is_refused(place: Place) -> None:
    write(place.create(), "mem", pattern(100))
    with place.open().raw_fragment("mem") as reader:
        for call in (reader.readinto, lambda buffer: reader.readinto_at(0, buffer)):
            with refused("read-only-buffer", "written to", place.root):
                call(bytes(10))
        assert reader.read() == pattern(100)


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


@pytest.mark.parametrize("what", ["a snapshot", "an empty folder", "a file", "a link that leads nowhere", "a FIFO"])
def test_nothing_is_written_over(place: Place, tmp_path: Path, what: str) -> None:
    something_at(place.root, what)
    with refused("root-exists", r"vm1: a snapshot needs a path at which nothing is yet", tmp_path):
        place.create()


def test_two_snapshots_cannot_have_one_path(place: Place, tmp_path: Path) -> None:
    writer = write(place.create(), "mem", b"x")
    with refused("root-exists", "nothing is yet", tmp_path):
        vmsnap.SnapshotWriter(place.root, key=bytes(32))
    write(writer, "more", b"y")
    check_independently(place.root, place.key, {"mem": b"x", "more": b"y"})


def test_the_folder_it_lies_in_must_exist(place: Place, tmp_path: Path) -> None:
    with refused("parent-missing", "absent/vm1: the folder it is to lie in does not exist", tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "absent/vm1", key=place.key)


# Creating fragments --------------------------------------------------------------------------------------------------


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
    with refused("fragment-exists", 'fragment "sda" in namespace "disks" of .*vm1 exists already', place.root.parent):
        inner.raw_fragment("sda")
    with refused("fragment-exists", 'namespace "disks/sda" of .*vm1 exists already', place.root.parent):
        inner.add_namespace("sda")
    if fragment is not None:
        fragment.write(b", second")
        fragment.close()
        check_independently(place.root, place.key, {"disks/other": b"other", "disks/sda": b"first, second"})


def test_a_namespace_that_was_removed_is_missed(place: Place) -> None:
    writer = place.create()
    inner = writer.add_namespace("disks").add_namespace("deep")
    place.file("disks/deep").rmdir()
    for call in (inner.raw_fragment, inner.add_namespace):
        with refused("namespace-removed", 'namespace "disks/deep" of .*vm1 does not exist', place.root.parent):
            call("sda")
    shutil.rmtree(place.root)
    for call in (writer.raw_fragment, writer.add_namespace):
        with refused("namespace-removed", "cannot open the snapshot .*vm1", place.root.parent):
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


def test_an_identity_that_cannot_be_read_or_made_is_told_and_nothing_is_written_plain(open_folder: Path) -> None:
    is_root = os.geteuid() == 0
    file = open_folder / "id.txt"
    file.write_text(vmsnap.generate_identity())
    file.chmod(0o600 if is_root else 0)
    create = "os.environ['XDG_CONFIG_HOME'] = sys.argv[1]\n{}vmsnap.SnapshotWriter(sys.argv[1] + '/vm1', True)"
    named = create.format("os.environ['VMSNAP_IDENTITY_FILE'] = sys.argv[1] + '/id.txt'\n")
    missing = (
        f"cannot make the identity file {open_folder}/vmsnap/identity.txt; set .VMSNAP_IDENTITY_FILE, or pass a key"
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


# A full disk ---------------------------------------------------------------------------------------------------------


def until_full(step: Callable[[], object]) -> None:
    def forever() -> None:
        while True:
            step()

    with pytest.raises(OSError, match="No space left"):
        forever()


def fill(disk: Path) -> None:
    """Use up all the room."""
    with open(disk / "filler", "wb", buffering=0) as filler:
        for piece in (bytes(1 << 16), bytes(1 << 12), bytes(1)):
            until_full(functools.partial(filler.write, piece))


def use_all_inodes(disk: Path) -> None:
    numbers = itertools.count()
    until_full(lambda: (disk / f"empty {next(numbers)}").touch())


@pytest.fixture(params=["plain", "encrypted"])
def small_place(request: pytest.FixtureRequest, small_disk: Path) -> Place:
    return Place(small_disk / "vm1", vmsnap.generate_key() if request.param == "encrypted" else None)


def write_in_pieces(fragment: vmsnap.Fragment, data: bytes, piece: int) -> None:
    for at in range(0, len(data), piece):
        fragment.write(data[at : at + piece])


@pytest.mark.parametrize("piece", [100, 3000, 60_000, MIB, 6 * MIB])
@pytest.mark.parametrize("chunk", [33, 4096, 65536])
def test_a_disk_that_gets_full_fails_the_write_and_poisons_the_fragment(
    small_place: Place, piece: int, chunk: int
) -> None:
    writer = small_place.create()
    write(writer.add_namespace("others"), "kept", pattern(1000))
    before = tree(small_place.root)
    fragment = writer.raw_fragment("mem", chunk_size_bytes=chunk)
    with pytest.raises(OSError, match=r'fragment "mem" of .*vm1: cannot be written: No space left on device') as caught:
        write_in_pieces(fragment, pattern(6 * MIB), piece)
    assert caught.value.errno == errno.ENOSPC

    message = 'fragment "mem" of .*vm1: an earlier write failed'
    for call in (lambda: fragment.write(b"x"), lambda: fragment.write(pattern(MIB)), fragment.flush):
        with refused("after-failed-write", message, small_place.file("others")):
            call()
    with pytest.raises(vmsnap.FragmentStateError, match=message):
        fragment.close()
    assert fragment.closed
    assert tree(small_place.root) == before

    # There is room again, and the name is free.
    write(writer, "mem", b"anew")
    check_independently(small_place.root, small_place.key, {"others/kept": pattern(1000), "mem": b"anew"})


def test_a_fragment_whose_write_failed_does_not_tell_a_position(small_place: Place) -> None:
    writer = small_place.create()
    writer.add_namespace("others")
    with writer.raw_fragment("mem") as fragment:
        with pytest.raises(OSError, match="No space left"):
            fragment.write(pattern(6 * MIB))
        with refused("after-failed-write", "an earlier write failed", small_place.file("others")):
            fragment.tell()
        fragment.discard()


def ends_by_with(writer: vmsnap.SnapshotWriter, piece: int) -> None:
    with writer.raw_fragment("mem") as fragment:
        write_in_pieces(fragment, pattern(6 * MIB), piece)


def ends_by_discard(writer: vmsnap.SnapshotWriter, piece: int) -> None:
    fragment = writer.raw_fragment("mem")
    try:
        write_in_pieces(fragment, pattern(6 * MIB), piece)
    finally:
        fragment.discard()


def ends_by_drop(writer: vmsnap.SnapshotWriter, piece: int) -> None:
    fragment = writer.raw_fragment("mem")
    failure = None
    try:
        write_in_pieces(fragment, pattern(6 * MIB), piece)
    except OSError as error:
        failure = error.with_traceback(None)  # which holds on to the fragment
    del fragment
    gc.collect()
    if failure:
        raise failure


@pytest.mark.parametrize("end", [ends_by_with, ends_by_discard, ends_by_drop])
@pytest.mark.parametrize("piece", [60_000, 6 * MIB])
def test_a_fragment_that_a_full_disk_cut_off_goes_however_it_ends(
    small_place: Place, piece: int, end: Callable[[vmsnap.SnapshotWriter, int], None]
) -> None:
    writer = small_place.create()
    with refused("disk-full", "No space left", small_place.root):
        end(writer, piece)


@pytest.mark.parametrize("length", [5000, 60_000])
def test_a_disk_that_is_full_at_the_end_fails_the_close(small_place: Place, length: int) -> None:
    fragment = small_place.create().raw_fragment("mem")
    fragment.write(pattern(length))
    fill(small_place.root.parent)
    with pytest.raises(OSError, match=r'fragment "mem" of .*vm1: cannot be written: No space left') as caught:
        fragment.close()
    assert caught.value.errno == errno.ENOSPC
    assert fragment.closed
    assert not small_place.file("mem").exists()


def test_a_fragment_that_is_dropped_on_a_full_disk_leaves_nothing(small_place: Place) -> None:
    fragment = small_place.create().raw_fragment("mem")
    fragment.write(pattern(60_000))
    fill(small_place.root.parent)
    del fragment
    gc.collect()
    assert not small_place.file("mem").exists()


def test_a_buffered_writer_over_a_full_disk_leaves_nothing(small_place: Place) -> None:
    stream = io.BufferedWriter(small_place.create().raw_fragment("mem"), buffer_size=1 << 17)
    stream.write(pattern(100_000))
    fill(small_place.root.parent)
    with pytest.raises((OSError, vmsnap.FragmentStateError)):
        stream.close()
    assert not small_place.file("mem").exists()


def test_a_full_disk_has_no_room_for_a_fragment(small_place: Place) -> None:
    writer = small_place.create()
    fill(small_place.root.parent)
    if small_place.key:  # which begins with a header
        with refused("disk-full", 'fragment "mem" of .*vm1: cannot be written: No space', small_place.root.parent):
            writer.raw_fragment("mem")
    (small_place.root.parent / "filler").unlink()
    use_all_inodes(small_place.root.parent)
    with refused("disk-full", 'fragment "mem" of .*vm1 cannot be created: No space', small_place.root.parent):
        writer.raw_fragment("mem")
    with refused("disk-full", 'namespace "disks" of .*vm1 cannot be created: No space', small_place.root.parent):
        writer.add_namespace("disks")


def test_a_full_disk_has_no_room_for_a_snapshot(small_disk: Path, key: bytes) -> None:
    fill(small_disk)
    with refused("disk-full", "cannot write enc_metadata of .*vm1: No space", small_disk):
        vmsnap.SnapshotWriter(small_disk / "vm1", key=key)
    (small_disk / "filler").unlink()
    use_all_inodes(small_disk)
    for each in (None, key):
        with refused("disk-full", "cannot create the snapshot .*vm1: .*No space", small_disk):
            vmsnap.SnapshotWriter(small_disk / "vm1", key=each)
    # Room for the folder, and not for the file in it.
    (small_disk / "empty 0").unlink()
    with refused("disk-full", "cannot write enc_metadata of .*vm1: No space", small_disk):
        vmsnap.SnapshotWriter(small_disk / "vm1", key=key)


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_disk_that_is_full_at_the_commit_leaves_nothing(small_disk: Path, key: bytes, encrypted: bool) -> None:
    staged = vmsnap.create(small_disk / "vm1", key=key if encrypted else None)
    staged.writer.write_fragment("clock", 1)
    use_all_inodes(small_disk)
    with refused("disk-full", "cannot commit the snapshot .*vm1: .*No space", small_disk):
        staged.commit()
    (small_disk / "empty 0").unlink()
    staged.commit()
    assert vmsnap.verify(small_disk / "vm1", key=key if encrypted else None).ok


def test_what_cannot_be_staged_on_a_full_disk_leaves_nothing(small_disk: Path, key: bytes) -> None:
    fill(small_disk)
    for each in (None, key):
        names = set(os.listdir(small_disk))
        with pytest.raises(OSError, match="No space"), vmsnap.create(small_disk / "vm1", key=each) as snap:
            snap.write_fragment("mem", bytes(5000))
        assert set(os.listdir(small_disk)) == names


@pytest.mark.parametrize("encrypted", [False, True])
def test_a_read_only_disk_is_read_and_nothing_else(small_disk: Path, key: bytes, encrypted: bool) -> None:
    given = key if encrypted else None
    vmsnap.SnapshotWriter(small_disk / "unsealed", key=given).write_fragment("clock", 1)
    with vmsnap.create(small_disk / "vm1", key=given) as snap:
        snap.write_fragment("clock", 1)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert vmsnap.verify(small_disk / "vm1", key=given).ok
    assert vmsnap.open(small_disk / "vm1", key=given, require_sealed=True).read_fragment("clock") == 1
    assert vmsnap.clean(small_disk) == vmsnap.Cleaned([], [])
    with pytest.raises(OSError, match=r"cannot create the snapshot .*vm2: .*Read-only"):
        vmsnap.create(small_disk / "vm2", key=given)
    with pytest.raises(OSError, match="Read-only"):
        vmsnap.seal(small_disk / "unsealed", key=given)


# Use at the wrong time -----------------------------------------------------------------------------------------------


def writer_calls(fragment: vmsnap.Fragment) -> list[Callable[[], object]]:
    return [
        lambda: fragment.write(b""),
        lambda: fragment.write(b"x"),
        lambda: fragment.write(pattern(5 * MIB)),
        fragment.tell,
        fragment.flush,
    ]


def reader_calls(fragment: vmsnap.FragmentReader) -> list[Callable[[], object]]:
    return [
        fragment.read,
        lambda: fragment.read(1),
        lambda: fragment.readinto(bytearray(1)),
        lambda: fragment.read_at(0, 1),
        lambda: fragment.read_at(0, MIB),
        lambda: fragment.readinto_at(0, bytearray(1)),
        fragment.readall,
        lambda: fragment.seek(0),
        fragment.tell,
    ]


@pytest.mark.parametrize("end", ["close", "discard"])
def test_a_fragment_that_was_closed_is_not_written_to(place: Place, end: str) -> None:
    fragment = place.create().raw_fragment("mem")
    fragment.write(b"x")
    fragment.close() if end == "close" else fragment.discard()
    more: list[Callable[[], object]] = [fragment.writable, fragment.__enter__, lambda: fragment.writelines([b"x"])]
    for call in [*writer_calls(fragment), *more]:
        with refused("closed", "closed file", place.root):
            call()


def test_a_fragment_that_was_closed_is_not_read(place: Place) -> None:
    write(place.create(), "mem", b"x")
    fragment = place.open().raw_fragment("mem")
    fragment.close()
    more: list[Callable[[], object]] = [
        fragment.readable,
        fragment.seekable,
        fragment.__enter__,
        fragment.flush,
        fragment.readline,
        lambda: fragment.size,
        lambda: fragment.stored_size,
        lambda: fragment.chunk_size_bytes,
    ]
    for call in [*reader_calls(fragment), *more]:
        with refused("closed", "closed file", place.root):
            call()


def in_forked_child(check: Callable[[], None]) -> None:
    """Run `check` in a process forked from this one, and fail as it fails."""
    from_child, to_parent = os.pipe()
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        status = 1
        try:
            check()
            status = 0
        except BaseException:
            os.write(to_parent, traceback.format_exc().encode()[-60_000:])
        finally:
            os._exit(status)
    os.close(to_parent)
    with open(from_child, "rb") as stream:
        report = stream.read().decode()
    _, status = os.waitpid(child, 0)
    assert status == 0, report


@pytest.mark.parametrize("before", [0, 10, 300_000, 5 * MIB])
def test_a_forked_child_cannot_use_a_fragment_and_the_parent_goes_on(place: Place, before: int) -> None:
    data = pattern(before + 700_000)
    writer = place.create(threads=2)
    # The fragment's own file still grows by what the parent's threads have to do, so that it is not compared.
    writer.add_namespace("others")
    others = place.file("others")
    fragment = writer.raw_fragment("mem")
    write_in_pieces(fragment, data[:before], 50_000)
    fragment.flush()

    def child() -> None:
        for call in [*writer_calls(fragment), fragment.discard]:
            with refused("forked", "forked from", others):
                call()
            assert place.file("mem").exists()

    def child_closes() -> None:
        with refused("forked", "forked from", others):
            fragment.close()

    def child_drops() -> None:
        nonlocal fragment
        del fragment
        gc.collect()

    for check in (child, child_closes, child_drops):
        size = place.file("mem").stat().st_size
        in_forked_child(check)
        assert place.file("mem").stat().st_size >= size
    write_in_pieces(fragment, data[before:], 50_000)
    assert fragment.tell() == len(data)
    fragment.close()
    check_independently(place.root, place.key, {"mem": data})


@pytest.mark.parametrize("length", [100, 2 * MIB])
def test_a_forked_child_cannot_read_a_fragment_and_the_parent_goes_on(place: Place, length: int) -> None:
    write(place.create(), "mem", pattern(length))
    fragment = place.open(threads=2).raw_fragment("mem")
    assert fragment.read(10) == pattern(length)[:10]  # the chunk it came from is at hand, and yet not for the child

    def child() -> None:
        for call in reader_calls(fragment):
            with refused("forked", "forked from", place.root):
                call()
        fragment.close()
        # By the handle it reads as ever.
        assert read(place.open(), "mem") == pattern(length)

    in_forked_child(child)
    assert fragment.read() == pattern(length)[10:]


FORKING = """
import os, sys, vmsnap
root, key = sys.argv[1], bytes.fromhex(sys.argv[2]) or None
writer = vmsnap.SnapshotWriter(root, key=key)
fragments = [writer.raw_fragment(str(number)) for number in range(3)]
for fragment in fragments:
    for _ in range(40):
        fragment.write(bytes(range(250)) * 100)
reader = vmsnap.SnapshotReader(root, key=key)
if os.fork() == 0:
    if sys.argv[3] == "drops":
        del fragments[:]
    sys.exit()  # by way of the interpreter's end, not around it
assert os.wait()[1] == 0
for fragment in fragments:
    fragment.write(b"after")
    fragment.close()
"""


@pytest.mark.parametrize("how", ["drops", "ends"])
def test_the_end_of_a_forked_child_leaves_the_parents_fragments_alone(place: Place, how: str) -> None:
    run_python_well(FORKING, place.root, (place.key or b"").hex(), how)
    data = bytes(range(250)) * 4000 + b"after"
    check_independently(place.root, place.key, {str(number): data for number in range(3)})


# Opening a snapshot --------------------------------------------------------------------------------------------------


def test_a_snapshot_that_is_not_there_is_missed(place: Place, tmp_path: Path) -> None:
    with refused("root-missing", "cannot open the snapshot .*vm1", tmp_path):
        place.open()


def test_a_file_is_no_snapshot(place: Place, tmp_path: Path) -> None:
    place.root.write_bytes(b"x")
    with refused("root-no-folder", "cannot open the snapshot .*vm1", tmp_path):
        place.open()


def test_an_encrypted_snapshot_needs_its_key(encrypted_place: Place) -> None:
    write(encrypted_place.create(), "mem", b"x")
    for require_encrypted in (False, True):
        with refused("no-key", "enc_metadata of .*vm1: .*pass the key it was written with", encrypted_place.root):
            vmsnap.SnapshotReader(encrypted_place.root, require_encrypted)


def test_a_plain_snapshot_is_refused_where_an_encrypted_one_is_required(tmp_path: Path, key: bytes) -> None:
    write(vmsnap.SnapshotWriter(tmp_path / "vm1"), "mem", b"x")
    for require_encrypted, given_key in ((True, None), (False, key), (True, key)):
        with refused("not-encrypted", "vm1 is not encrypted, and was required to be", tmp_path):
            vmsnap.SnapshotReader(tmp_path / "vm1", require_encrypted, key=given_key)


def test_a_snapshot_whose_enc_metadata_was_removed_does_not_count_as_plain(encrypted_place: Place) -> None:
    write(encrypted_place.create(), "mem", b"x")
    encrypted_place.file("enc_metadata").unlink()
    with refused("not-encrypted", "not encrypted", encrypted_place.root):
        encrypted_place.open()


def test_another_key_is_refused(encrypted_place: Place) -> None:
    write(encrypted_place.create(), "mem", b"x")
    assert encrypted_place.key is not None
    one_bit = bytearray(encrypted_place.key)
    one_bit[31] ^= 1
    for other in (bytes(32), bytes(one_bit), vmsnap.generate_key()):
        message = "enc_metadata of .*vm1: authentication failed: the key is wrong, or the file is damaged"
        with refused("wrong-key", message, encrypted_place.root):
            vmsnap.SnapshotReader(encrypted_place.root, key=other)


def test_any_changed_bit_of_the_key_metadata_is_found(encrypted_place: Place) -> None:
    encrypted_place.create()
    file = encrypted_place.file("enc_metadata")
    stored = file.read_bytes()
    for position in range(len(stored)):
        for bit in range(8):
            changed = bytearray(stored)
            changed[position] ^= 1 << bit
            file.write_bytes(changed)
            if position < 10:
                with refused("key-metadata-foreign", "no wrapped key of vmsnap's", encrypted_place.root):
                    encrypted_place.open()
            else:
                with refused("key-metadata-damaged", "authentication failed", encrypted_place.root):
                    encrypted_place.open()
    file.write_bytes(stored)
    encrypted_place.open()


def test_key_metadata_cut_off_or_extended_anywhere_is_found(encrypted_place: Place) -> None:
    encrypted_place.create()
    file = encrypted_place.file("enc_metadata")
    stored = file.read_bytes()
    for length in range(len(stored)):
        file.write_bytes(stored[:length])
        if length < 10:
            with refused("key-metadata-foreign", "no wrapped key of vmsnap's", encrypted_place.root):
                encrypted_place.open()
        else:
            with refused("key-metadata-damaged", "authentication failed", encrypted_place.root):
                encrypted_place.open()
    for more in [*range(1, 200), 1056, 2000]:
        file.write_bytes(stored + bytes(more))
        with refused("key-metadata-damaged", "authentication failed", encrypted_place.root):
            encrypted_place.open()


@pytest.mark.parametrize("contents", [b"", b"\0", b"garbage" * 100, b"-----BEGIN", b"\xa1\x61a\x01", b"{}"])
def test_what_does_not_begin_as_key_metadata_is_refused(encrypted_place: Place, contents: bytes) -> None:
    encrypted_place.create()
    encrypted_place.file("enc_metadata").write_bytes(contents)
    for key in (encrypted_place.key, None):
        with refused("key-metadata-foreign", "no wrapped key of vmsnap's", encrypted_place.root):
            vmsnap.SnapshotReader(encrypted_place.root, key=key)


def test_key_metadata_of_megabytes_is_not_even_read(encrypted_place: Place) -> None:
    encrypted_place.create()
    file = encrypted_place.file("enc_metadata")
    stored = file.read_bytes()
    for length in (MIB + 1, 2 * MIB):
        file.write_bytes(stored.ljust(length, b"\0"))
        with refused("key-metadata-too-long", f"{length} bytes are too many", encrypted_place.root):
            encrypted_place.open()
    os.truncate(file, 1 << 40)  # a hole: whoever reads it runs out of memory
    with pytest.raises(vmsnap.CorruptSnapshotError, match="too many"):
        encrypted_place.open()


def with_payload(place: Place, payload: object) -> Place:
    """A snapshot made by hand: with a payload of ours, and one fragment."""
    assert place.key is not None
    place.root.mkdir()
    place.file("enc_metadata").write_bytes(floe.key_metadata(place.key, payload))
    place.file("mem").write_bytes(floe.seal(floe.DATA_KEY, floe.fragment_aad("mem"), b"by hand", 32))
    return place


def test_a_snapshot_made_by_hand_from_the_format_page_is_read(encrypted_place: Place) -> None:
    assert read(with_payload(encrypted_place, floe.payload_fields()).open(), "mem") == b"by hand"


def test_unknown_keys_of_the_payload_are_ignored_and_the_order_means_nothing(encrypted_place: Place) -> None:
    fields = {"comment": ["any", {"thing": 1}]} | dict(reversed(floe.payload_fields().items()))
    assert read(with_payload(encrypted_place, fields).open(), "mem") == b"by hand"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"version": 2}, "version 2"),
        ({"version": 0}, "version 0"),
        ({"version": 2, "data_key": "elsewhere"}, "version 2"),
        ({"requires": ["zstd"]}, '"zstd"'),
        ({"requires": ["zstd", "lz4"], "data_key": 0}, '"zstd"'),
    ],
)
def test_what_a_newer_version_wrote_is_told(encrypted_place: Place, changes: dict[str, object], message: str) -> None:
    with_payload(encrypted_place, floe.payload_fields() | changes)
    message = f"enc_metadata of .*vm1: the snapshot needs .*{message}.* use a newer one"
    with refused("newer-format", message, encrypted_place.root):
        encrypted_place.open()


@pytest.mark.parametrize("what", floe.MALFORMED_PAYLOADS)
def test_an_authentic_but_malformed_payload_is_refused(encrypted_place: Place, what: str) -> None:
    with_payload(encrypted_place, floe.MALFORMED_PAYLOADS[what])
    message = "enc_metadata of .*vm1: the key metadata is authentic but malformed"
    with refused("payload-malformed", message, encrypted_place.root):
        encrypted_place.open()


# Links and special files ---------------------------------------------------------------------------------------------


def special_file(path: Path, kind: str) -> None:
    match kind:
        case "a FIFO":
            os.mkfifo(path)
        case "a socket":
            # Its path may be no longer than 107 bytes, so it is bound from nearby.
            here = os.getcwd()
            os.chdir(path.parent)
            try:
                with socket.socket(socket.AF_UNIX) as unix:
                    unix.bind(path.name)
            finally:
                os.chdir(here)
        case "a device":
            try:
                os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))  # zeros without end
                os.close(os.open(path, os.O_RDONLY))
            except PermissionError as error:
                pytest.skip(f"a device cannot be made or opened here: {error}")


SPECIAL = ["a FIFO", "a socket", "a device"]


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_among_the_fragments_is_refused_and_not_waited_for(place: Place, kind: str) -> None:
    inner = write(place.create().add_namespace("disks"), "sda", b"x")
    special_file(place.file("disks/sdb"), kind)
    message = f"is {kind}, which a snapshot never holds"
    reader = place.open().namespace("disks")
    with refused("special-file", f'fragment "sdb" in namespace "disks" of .*vm1: {message}', place.root):
        reader.raw_fragment("sdb")
    message = f'"sdb" {message}'
    with refused("special-file", f'namespace "disks/sdb" of .*vm1: {message}', place.root):
        reader.namespace("sdb")
    for listing in (reader.list_fragments, reader.list_namespaces):
        with refused("special-file", f"disks of .*vm1: {message}", place.root):
            listing()
    with refused("fragment-exists", "exists already", place.root):
        inner.raw_fragment("sdb")
    # The others can be read all the same.
    assert read(reader, "sda") == b"x"


@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_in_a_namespaces_place_is_not_written_into(place: Place, kind: str) -> None:
    inner = place.create().add_namespace("disks").add_namespace("deep")
    place.file("disks/deep").rmdir()
    special_file(place.file("disks/deep"), kind)
    for call in (inner.raw_fragment, inner.add_namespace):
        with refused("special-file", f'namespace "disks/deep" of .*vm1: "deep" is {kind}', place.root):
            call("sda")


@pytest.mark.parametrize("kind", [*SPECIAL, "a symbolic link", "a link that leads nowhere"])
def test_key_metadata_that_is_no_file_is_refused_and_not_waited_for(encrypted_place: Place, kind: str) -> None:
    encrypted_place.create()
    file = encrypted_place.file("enc_metadata")
    if kind == "a symbolic link":
        file.rename(encrypted_place.root.parent / "elsewhere")
        file.symlink_to("../elsewhere")
    else:
        file.unlink()
        file.symlink_to("nowhere") if kind == "a link that leads nowhere" else special_file(file, kind)
    what = kind if kind in SPECIAL else "a symbolic link"
    for key in (encrypted_place.key, None):
        message = f"enc_metadata of .*vm1: is {what}"
        with refused("key-metadata-no-file", message, encrypted_place.root):
            vmsnap.SnapshotReader(encrypted_place.root, key=key)


def test_key_metadata_that_is_a_folder_is_refused(encrypted_place: Place) -> None:
    encrypted_place.create()
    encrypted_place.file("enc_metadata").unlink()
    encrypted_place.file("enc_metadata").mkdir()
    for key in (encrypted_place.key, None):
        with refused("key-metadata-folder", "enc_metadata of .*vm1", encrypted_place.root):
            vmsnap.SnapshotReader(encrypted_place.root, key=key)


@pytest.mark.parametrize("target", ["real", "/etc/passwd", "nowhere", "sdb"])
def test_a_link_in_a_fragments_place_is_not_followed(place: Place, target: str) -> None:
    inner = write(place.create().add_namespace("disks"), "real", b"x")
    place.file("disks/sdb").symlink_to(target)  # to itself in the last case
    message = "is a symbolic link, which a snapshot never holds and vmsnap never follows"
    reader = place.open().namespace("disks")
    with refused("link", f'fragment "sdb" in namespace "disks" of .*vm1: {message}', place.root):
        reader.raw_fragment("sdb")
    message = f'"sdb" {message}'
    with refused("link", f'namespace "disks/sdb" of .*vm1: {message}', place.root):
        reader.namespace("sdb")
    for listing in (reader.list_fragments, reader.list_namespaces):
        with refused("link", message, place.root):
            listing()
    with refused("fragment-exists", "exists already", place.root):
        inner.raw_fragment("sdb")
    assert read(reader, "real") == b"x"


@pytest.mark.parametrize("level", ["disks", "disks/deep"])
@pytest.mark.parametrize("target", ["inside", "outside", "nowhere"])
def test_a_link_in_a_namespaces_place_is_not_followed(place: Place, tmp_path: Path, level: str, target: str) -> None:
    writer = place.create()
    inner = write(writer.add_namespace("disks").add_namespace("deep"), "sda", b"x")
    reader = place.open()
    inner_reader = reader.namespace("disks").namespace("deep")
    # The same folder, still with the right contents, but behind a link.
    destinations = {"inside": place.file("moved"), "outside": tmp_path / "moved", "nowhere": tmp_path / "nowhere"}
    moved = destinations["outside" if target == "nowhere" else target]
    place.file(level).rename(moved)
    place.file(level).symlink_to(destinations[target])

    name = level.rpartition("/")[2]
    message = f'namespace "disks.*" of .*vm1: "{name}" is a symbolic link'
    calls: list[Callable[[], object]] = [
        lambda: reader.namespace("disks").namespace("deep"),
        lambda: inner_reader.raw_fragment("sda"),
        inner_reader.list_fragments,
        inner_reader.list_namespaces,
        lambda: inner_reader.namespace("more"),
        lambda: inner.raw_fragment("sdb"),
        lambda: inner.add_namespace("more"),
    ]
    for call in calls:
        with refused("link", message, tmp_path):
            call()
    holder = reader if level == "disks" else reader.namespace("disks")
    with refused("link", f'"{name}" is a symbolic link', tmp_path):
        holder.list_namespaces()


@pytest.mark.parametrize("name", [b"\xff", b"caf\xe9", b"a\\b", b"ab\xed\xa0\x80"])
def test_an_entry_that_no_snapshot_can_hold_is_told(place: Place, name: bytes) -> None:
    write(place.create().add_namespace("disks"), "sda", b"x")
    with open(os.fsencode(place.file("disks")) + b"/" + name, "wb"):
        pass
    reader = place.open()
    assert reader.list_namespaces() == ["disks"]
    for listing in (reader.namespace("disks").list_fragments, reader.namespace("disks").list_namespaces):
        message = "disks of .*vm1: .*(is not UTF-8|is not a name that a snapshot can hold)"
        with refused("foreign-entry", message, place.root):
            listing()
    assert read(reader.namespace("disks"), "sda") == b"x"


# Fragments that are not what was written -----------------------------------------------------------------------------


def test_what_is_not_there_is_missed_by_name(place: Place) -> None:
    writer = place.create()
    write(writer.add_namespace("disks").add_namespace("deep"), "sda", b"x")
    reader = place.open()
    with refused("fragment-missing", 'fragment "sdb" of .*vm1: does not exist', place.root):
        reader.raw_fragment("sdb")
    with refused("fragment-missing", 'fragment "sdb" in namespace "disks/deep" of .*vm1: does not exist', place.root):
        reader.namespace("disks").namespace("deep").raw_fragment("sdb")
    with refused("namespace-missing", 'namespace "disk" of .*vm1 does not exist', place.root):
        reader.namespace("disk")
    with refused("namespace-missing", 'namespace "disks/deeper" of .*vm1 does not exist', place.root):
        reader.namespace("disks").namespace("deeper")


def test_fragments_and_namespaces_are_told_apart(place: Place) -> None:
    writer = place.create()
    inner = write(writer.add_namespace("disks"), "sda", b"x")
    inner.add_namespace("deep")
    reader = place.open()
    with refused("fragment-is-namespace", 'fragment "deep" in namespace "disks" of .*: is a namespace', place.root):
        reader.namespace("disks").raw_fragment("deep")
    with refused("fragment-is-namespace", 'fragment "disks" of .*vm1: is a namespace', place.root):
        reader.raw_fragment("disks")
    with refused("namespace-is-fragment", 'namespace "disks/sda" of .*vm1', place.root):
        reader.namespace("disks").namespace("sda")


@pytest.mark.parametrize("length", [0, 1, 40, 105, 106, 4096, 100_000])
def test_a_plain_file_in_an_encrypted_snapshot_is_refused(encrypted_place: Place, length: int) -> None:
    encrypted_place.create()
    encrypted_place.file("mem").write_bytes(pattern(length))
    message = 'fragment "mem" of .*vm1: .*plain file in an encrypted snapshot'
    with refused("no-header", message, encrypted_place.root):
        encrypted_place.open().raw_fragment("mem")


CHUNK = 32


@pytest.fixture
def segmented(encrypted_place: Place) -> Place:
    """A fragment of three segments, the last not full, in a namespace."""
    write(encrypted_place.create().add_namespace("disks"), "sda", pattern(2 * CHUNK + 6), CHUNK)
    assert encrypted_place.file("disks/sda").stat().st_size == stored_size(2 * CHUNK + 6, CHUNK)
    return encrypted_place


WHERE = 'fragment "sda" in namespace "disks" of .*vm1'
NOT_AUTHENTIC = f"{WHERE}: authentication failed: the key is wrong, or the file is damaged, truncated, renamed"


def test_a_fragment_cut_off_anywhere_does_not_open(segmented: Place) -> None:
    file = segmented.file("disks/sda")
    stored = file.read_bytes()
    reader = segmented.open().namespace("disks")
    for length in range(len(stored)):
        file.write_bytes(stored[:length])
        if length < HEADER_BYTES + 32:
            with refused("no-header", f"{WHERE}: has {length} bytes, fewer than any", segmented.root):
                reader.raw_fragment("sda")
        else:
            with refused("changed", NOT_AUTHENTIC, segmented.root):
                reader.raw_fragment("sda")


@pytest.mark.parametrize("length", [0, 1, CHUNK, CHUNK + 1, 3 * CHUNK])
def test_a_fragment_that_was_extended_does_not_open(encrypted_place: Place, length: int) -> None:
    write(encrypted_place.create(), "sda", pattern(length), CHUNK)
    file = encrypted_place.file("sda")
    stored = file.read_bytes()
    for more in range(1, 2 * (CHUNK + 32) + 2):
        for addition in (bytes(more), stored[-more:], b"\xff" * more):
            file.write_bytes(stored + addition)
            with refused("changed", "authentication failed", encrypted_place.root):
                encrypted_place.open().raw_fragment("sda")


def test_any_changed_bit_of_a_fragment_is_found_and_other_segments_still_read(segmented: Place) -> None:
    data = pattern(2 * CHUNK + 6)
    file = segmented.file("disks/sda")
    stored = file.read_bytes()
    reader = segmented.open().namespace("disks")
    for position in range(len(stored)):
        for bit in range(8):
            changed = bytearray(stored)
            changed[position] ^= 1 << bit
            file.write_bytes(changed)
            before_last = HEADER_BYTES <= position < segment_offset(2, CHUNK)
            chunk_size = int.from_bytes(changed[2:6], "big") - 32
            if position < 10 and not (2 <= position < 6 and 32 <= chunk_size <= 64 * MIB):
                with refused("no-header", f"{WHERE}: not encrypted by vmsnap", segmented.root):
                    reader.raw_fragment("sda")
            elif not before_last:
                with refused("changed", NOT_AUTHENTIC, segmented.root):
                    reader.raw_fragment("sda")
            else:
                bad = (position - HEADER_BYTES) // (CHUNK + 32)
                with reader.raw_fragment("sda") as fragment:
                    buffer = bytearray(b"\xaa" * len(data))
                    with refused("changed", NOT_AUTHENTIC, segmented.root):
                        fragment.readinto_at(0, buffer)
                    assert buffer == bytes(len(data))
                    for index in range(3):
                        at = index * CHUNK
                        if index != bad:
                            assert fragment.read_at(at, CHUNK) == data[at : at + CHUNK]
                            continue
                        # Neither whole nor in part, neither in place nor in order.
                        for offset, size in ((at, CHUNK), (at + 5, 1)):
                            with refused("changed", NOT_AUTHENTIC, segmented.root):
                                fragment.read_at(offset, size)
                            fragment.seek(offset)
                            with refused("changed", NOT_AUTHENTIC, segmented.root):
                                fragment.read(size)
    file.write_bytes(stored)
    assert read(reader, "sda") == data


@pytest.mark.parametrize("start", [0, 1, CHUNK - 1])
def test_a_read_that_fails_gives_nothing_out_and_keeps_the_position(segmented: Place, start: int) -> None:
    file = segmented.file("disks/sda")
    stored = bytearray(file.read_bytes())
    stored[segment_offset(1, CHUNK) + 20] ^= 1
    file.write_bytes(stored)
    with segmented.open().namespace("disks").raw_fragment("sda") as fragment:
        fragment.seek(start)
        buffer = bytearray(b"\xaa" * (2 * CHUNK))
        with refused("changed", NOT_AUTHENTIC, segmented.root):
            fragment.readinto(buffer)
        assert buffer == bytes(len(buffer))
        assert fragment.tell() == start
        with refused("changed", NOT_AUTHENTIC, segmented.root):
            fragment.read()
        assert fragment.tell() == start


def test_a_large_read_of_a_damaged_fragment_fails_by_any_number_of_threads(encrypted_place: Place) -> None:
    write(encrypted_place.create(), "mem", pattern(3 * MIB))
    file = encrypted_place.file("mem")
    stored = bytearray(file.read_bytes())
    stored[segment_offset(500, 4096) + 1000] ^= 0x80
    file.write_bytes(stored)
    for threads in (1, 2, 8):
        with encrypted_place.open(threads).raw_fragment("mem") as fragment:
            buffer = bytearray(b"\xaa" * (3 * MIB))
            with refused("changed", "authentication failed", encrypted_place.root):
                fragment.readinto_at(0, buffer)
            assert not any(buffer)
            with refused("changed", "authentication failed", encrypted_place.root):
                fragment.readall()
            assert fragment.read_at(501 * 4096, MIB) == pattern(3 * MIB)[501 * 4096 :][:MIB]


def swap(one: Path, other: Path) -> None:
    aside = one.with_name("aside")
    one.rename(aside)
    other.rename(one)
    aside.rename(other)


def test_fragments_open_nowhere_but_in_their_own_place(encrypted_place: Place) -> None:
    writer = write(encrypted_place.create(), "sda", pattern(100))
    inner = write(writer.add_namespace("disks"), "sda", pattern(100, seed=1))
    write(inner, "sdb", pattern(100, seed=2))
    file = encrypted_place.file

    def refuse(path: str) -> None:
        reader = encrypted_place.open()
        namespace, _, name = path.rpartition("/")
        with refused("misplaced", f'fragment "{name}".*: authentication failed', encrypted_place.root):
            (reader.namespace(namespace) if namespace else reader).raw_fragment(name)

    for one, other in (("disks/sda", "disks/sdb"), ("sda", "disks/sda")):
        swap(file(one), file(other))
        refuse(one)
        refuse(other)
        swap(file(one), file(other))
    for one, other in (("sda", "SDA"), ("sda", "sda "), ("disks/sda", "sdb"), ("sda", "disks/sdc")):
        file(one).rename(file(other))
        refuse(other)
        file(other).rename(file(one))
    file("disks").rename(file("disk"))
    refuse("disk/sda")
    file("disk").rename(file("disks"))
    shutil.copy(file("sda"), file("copy"))
    refuse("copy")
    file("copy").unlink()
    check_independently(
        encrypted_place.root,
        encrypted_place.key,
        {"sda": pattern(100), "disks/sda": pattern(100, seed=1), "disks/sdb": pattern(100, seed=2)},
    )


def test_fragments_and_key_metadata_of_another_snapshot_are_refused(tmp_path: Path, key: bytes) -> None:
    places = [Place(tmp_path / name, key) for name in ("vm1", "vm2")]
    for number, place in enumerate(places):
        write(place.create(), "mem", pattern(100, seed=number))
    swap(places[0].file("mem"), places[1].file("mem"))
    for place in places:
        with refused("misplaced", 'fragment "mem" of .*: authentication failed', tmp_path):
            place.open().raw_fragment("mem")
    # With the key metadata moved too, each is a whole snapshot again, if not the one that the path says.
    swap(places[0].file("enc_metadata"), places[1].file("enc_metadata"))
    assert [read(place.open(), "mem") for place in places] == [pattern(100, seed=1), pattern(100)]
    swap(places[0].file("mem"), places[1].file("mem"))
    for place in places:
        with refused("misplaced", 'fragment "mem" of .*: authentication failed', tmp_path):
            place.open().raw_fragment("mem")


def test_an_older_version_of_a_fragment_under_another_data_key_is_refused(encrypted_place: Place) -> None:
    write(encrypted_place.create(), "mem", b"old")
    old = encrypted_place.file("mem").read_bytes()
    shutil.rmtree(encrypted_place.root)
    write(encrypted_place.create(), "mem", b"new")
    encrypted_place.file("mem").write_bytes(old)
    with refused("misplaced", "authentication failed", encrypted_place.root):
        encrypted_place.open().raw_fragment("mem")


def test_segments_open_nowhere_but_in_their_own_place(encrypted_place: Place) -> None:
    data = pattern(4 * CHUNK)
    write(encrypted_place.create(), "mem", data, CHUNK)
    write(vmsnap.SnapshotWriter(encrypted_place.root.parent / "vm2", key=encrypted_place.key), "mem", data, CHUNK)
    file = encrypted_place.file("mem")
    stored = file.read_bytes()
    header, first, second, third, last = stored[:74], *(stored[74 + 64 * index :][:64] for index in range(4))
    other = (encrypted_place.root.parent / "vm2/mem").read_bytes()

    for segments, bad in (
        ([second, first, third, last], [0, 1]),
        ([first, third, second, last], [1, 2]),
        ([first, first, third, last], [1]),
        ([first, other[74 + 64 : 74 + 128], third, last], [1]),
    ):
        file.write_bytes(header + b"".join(segments))
        with encrypted_place.open().raw_fragment("mem") as fragment:
            for index in range(4):
                at = index * CHUNK
                if index not in bad:
                    assert fragment.read_at(at, CHUNK) == data[at : at + CHUNK]
                    continue
                with refused("segments-misplaced", "authentication failed", encrypted_place.root):
                    fragment.read_at(at, CHUNK)
    # What moves the last one shows at once.
    for segments in ([first, second, third], [first, second, third, third], [first, second, last], [last]):
        file.write_bytes(header + b"".join(segments))
        with refused("segments-misplaced", "authentication failed", encrypted_place.root):
            encrypted_place.open().raw_fragment("mem")
    file.write_bytes(other[:74] + stored[74:])
    with refused("misplaced", "authentication failed", encrypted_place.root):
        encrypted_place.open().raw_fragment("mem")


@pytest.mark.parametrize("keep", [0, 50_000])
def test_a_fragment_that_gets_shorter_while_it_is_open_fails_the_read(place: Place, keep: int) -> None:
    write(place.create(), "mem", pattern(100_000))
    with place.open().raw_fragment("mem") as fragment:
        os.truncate(place.file("mem"), keep)
        buffer = bytearray(b"\xaa" * 100_000)
        if place.key:
            with refused("cut-while-open", 'fragment "mem" of .*vm1: became shorter', place.root):
                fragment.readinto_at(0, buffer)
        else:
            with refused("plain-cut-while-open", 'fragment "mem" of .*vm1: became shorter', place.root):
                fragment.readinto_at(0, buffer)
        assert not any(buffer)
        # What is still there reads on.
        if keep:
            assert fragment.read_at(0, 40_000) == pattern(100_000)[:40_000]


def test_a_header_that_asks_for_gigabytes_is_refused_before_anything_is_allocated(encrypted_place: Place) -> None:
    write(encrypted_place.create(), "mem", b"x")
    stored = bytearray(encrypted_place.file("mem").read_bytes())
    for segment_length in (0, 31, 32, 63, (64 << 20) + 33, 0xFFFFFFFF):
        stored[2:6] = segment_length.to_bytes(4, "big")
        encrypted_place.file("mem").write_bytes(stored)
        with refused("no-header", "not encrypted by vmsnap", encrypted_place.root):
            encrypted_place.open().raw_fragment("mem")


def test_no_error_shows_plaintext_or_keys(segmented: Place) -> None:
    assert segmented.key is not None
    file = segmented.file("disks/sda")
    stored = bytearray(file.read_bytes())
    stored[80] ^= 1
    file.write_bytes(stored)
    shown = []
    with (
        segmented.open().namespace("disks").raw_fragment("sda") as fragment,
        pytest.raises(vmsnap.AuthenticationError) as caught,
    ):
        fragment.read()
    shown += [str(caught.value), repr(caught.value), "".join(traceback.format_exception(caught.value))]
    for secret in (segmented.key, pattern(2 * CHUNK + 6)[:CHUNK]):
        for form in (secret.hex(), repr(secret)[2:-1], str(list(secret))[1:-1]):
            assert not [text for text in shown if form[:20] in text]


# Values --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Regs:
    rip: int
    gdt: list[int]


def test_a_value_that_cannot_be_written_is_refused(place: Place) -> None:
    writer = place.create().add_namespace("vcpus")
    value = {"regs": {"rip": 1j}}
    message = r"the value for 'vcpus/0' of .*/vm1 cannot be serialized: at regs\.rip: .*complex.*default="
    with refused("unwritable-value", message, place.root):
        writer.write_fragment("0", value)
    writer.write_fragment("0", value, default=str)
    assert place.open().namespace("vcpus").read_fragment("0") == {"regs": {"rip": "1j"}}


NO_VALUES = {
    b"": "it is cut off, at byte 0",
    b"\x82\x01": "a container declares 2 items, and 1 bytes are left, at byte 0",
    b"\x81\x19\x01": "it is cut off, at byte 3",
    b"\x01\x01": "bytes follow its end, at byte 1",
    b"{}{}": "trailing characters, at byte 2",
    b"[1,": "EOF while parsing a value",
    b"\x9b" + b"\xff" * 8: "a container declares 18446744073709551615 items, and 0 bytes are left, at byte 0",
    b"\xa2\x01\x02\x01\x03": "a key of a map comes twice, before byte 5",
    b'{"a":1,"a":2}': "a key of a map comes twice, at byte 9",
    b"\xd8\x1c\x80": "tag 28 is none that vmsnap knows",
    b"\x81" * 128 + b"\x01": "deeper than 127 levels, at byte 127",
    bytes(8): "bytes follow its end",
}


@pytest.mark.parametrize("content", NO_VALUES)
def test_a_fragment_that_holds_no_value_is_refused(place: Place, content: bytes) -> None:
    write(place.create().add_namespace("vcpus"), "0", content)
    reader = place.open().namespace("vcpus")
    message = rf'"0" in namespace "vcpus" of .*/vm1 does not hold a serialized value: .*{NO_VALUES[content]}'
    with refused("no-value", message, place.root):
        reader.read_fragment("0")
    with refused("no-value", message, place.root):
        reader.read_fragment("0", Regs)
    assert read(reader, "0") == content


def test_a_value_of_another_type_is_refused(place: Place) -> None:
    place.create().write_fragment("cpu", {"rip": 1, "gdt": [1, "hunter2"]})
    reader = place.open()
    message = r"cpu.* is not of the type asked for: at gdt\[1\]: expected int, found str$"
    with refused("value-of-another-type", message, place.root):
        reader.read_fragment("cpu", Regs)
    assert reader.read_fragment("cpu")["rip"] == 1


def test_a_fragment_that_is_too_large_for_a_value_is_refused(place: Place) -> None:
    place.create().write_fragment("cpu", bytes(97))
    reader = place.open()
    with refused("value-too-large", "cpu.*: 99 bytes are too many for a value: raise max_size_bytes", place.root):
        reader.read_fragment("cpu", max_size_bytes=98)
    assert reader.read_fragment("cpu", max_size_bytes=99) == bytes(97)


@pytest.mark.parametrize("kind", [5, "Regs", list["Regs"], Callable[[int], int], io.RawIOBase | Iterator[int]])
def test_a_type_that_cannot_be_built_is_refused(place: Place, kind: object) -> None:
    place.create().write_fragment("cpu", 1)
    with refused("unbuildable-type", "there is no way to build .*: give a class", place.root):
        place.open().read_fragment("cpu", kind)


@pytest.mark.parametrize("format", ["", "CBOR", "yaml"])
def test_a_format_that_there_is_not_is_refused(place: Place, tmp_path: Path, format: str) -> None:
    place.create().write_fragment("cpu", 1)
    message = f'format is "cbor" or "json", not "{format}"'
    with refused("format-name", message, tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "vm2", format=format)
    with refused("format-name", message, tmp_path):
        place.open().read_fragment("cpu", format=format)
    with refused("format-name", message, tmp_path):
        serialization.encode(1, format=format)
    with refused("format-name", message, tmp_path):
        serialization.decode(b"\x01", format=format)


def test_typed_arrays_need_numpy_and_nothing_else_does(place: Place) -> None:
    writer = place.create()
    writer.write_fragment("array", {"a": np.zeros((2, 2))})
    writer.write_fragment("plain", {"a": [1, b"x"]})
    script = """
sys.modules["numpy"] = None
reader = vmsnap.SnapshotReader(sys.argv[1], key=bytes.fromhex(sys.argv[2]) or None)
print(reader.read_fragment("plain", dict[str, list[int | bytes]]))
print(len(vmsnap.serialization.encode([bytearray(1), {1}, 2j], default=str)))
reader.read_fragment("array")
"""
    key = "" if place.key is None else place.key.hex()
    message = r"array.* has typed arrays, which need numpy: pip install 'vmsnap\[numpy\]'"
    printed = refused_elsewhere("arrays-without-numpy", message, place.root, script, place.root, key)
    assert printed.startswith("{'a': [1, b'x']}\n")
