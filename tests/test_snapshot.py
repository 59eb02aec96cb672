"""Snapshots: namespaces, lists, roots, keys, threads, and handles that are copied, pickled and shown."""

import array
import copy
import ctypes
import mmap
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vmsnap
from hypothesis import given, settings
from hypothesis import strategies as st
from independent import check_independently
from refusals import refused, row
from support import MIB, Place, pattern, read, run_python_well, temporary_place, write

# Namespaces and lists ------------------------------------------------------------------------------------------------


def test_a_new_snapshot_is_empty(place: Place) -> None:
    writer = place.create()
    assert writer.encrypted == (place.key is not None)
    reader = place.open()
    assert (reader.list_fragments(), reader.list_namespaces()) == ([], [])
    assert reader.encrypted == (place.key is not None)
    check_independently(place.location, place.key, {})


def test_namespaces_nest_and_keep_equal_names_apart(place: Place) -> None:
    writer = place.create()
    pci = writer.add_namespace("pci")
    controller = pci.add_namespace("00:1f.2")
    disk = controller.add_namespace("disk")
    writers = {"": writer, "pci": pci, "pci/00:1f.2": controller, "pci/00:1f.2/disk": disk}
    for path, each in writers.items():
        assert each.namespace_path == path
        assert each.encrypted == writer.encrypted
        write(each, "state", f"of {path}".encode())

    reader = place.open()
    assert reader.list_namespaces() == ["pci"]
    for path in writers:
        namespace = reader
        for name in filter(None, path.split("/")):
            namespace = namespace.namespace(name)
        assert namespace.namespace_path == path
        assert namespace.list_fragments() == ["state"]
        assert read(namespace, "state") == f"of {path}".encode()
    check_independently(
        place.location, place.key, {f"{path}/state".lstrip("/"): f"of {path}".encode() for path in writers}
    )


def test_lists_are_sorted_and_tell_fragments_from_namespaces(place: Place) -> None:
    writer = place.create()
    names = ["mem", "b", "a", "é", "e\u0301", "A", "10", "9", "z z", "-x", ".hidden", "...", "𝄞", "\uffff", "\n"]
    for name in names:
        write(writer, name, b"")
        writer.add_namespace(f"{name} folder")
    # By UTF-8 bytes, which is by code point, as Python sorts.
    assert place.open().list_fragments() == sorted(names)
    assert place.open().list_namespaces() == sorted(f"{name} folder" for name in names)
    check_independently(place.location, place.key, dict.fromkeys(names, b""))


def test_names_are_kept_byte_for_byte_and_may_have_255_of_them(place: Place) -> None:
    writer = place.create()
    names = ["x" * 255, "é" * 127, "\u00e9", "e\u0301", "enc_metadata2", "vmsnap", "vmsnap_manifest.old"]
    for number, name in enumerate(names):
        write(writer, name, str(number).encode())
    check_independently(place.location, place.key, {name: str(number).encode() for number, name in enumerate(names)})
    assert sorted(set(os.listdir(place.location)) - {"enc_metadata"}) == sorted(names)


@given(st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=40), st.binary(max_size=50), max_size=4))
@settings(max_examples=60)
def test_any_name_is_either_refused_or_kept_as_it_is(contents: dict[str, bytes]) -> None:
    with temporary_place(encrypted=True) as place:
        writer = place.create()
        kept = {}
        for name, data in contents.items():
            try:
                write(writer, name, data)
                kept[name] = data
            except vmsnap.InvalidArgumentError:
                reserved = name.startswith(".vmsnap") or name.lower() in ("enc_metadata", "vmsnap_manifest")
                assert (
                    not name or reserved or set(name) & set("/\\\0") or name in (".", "..") or len(name.encode()) > 255
                )
        check_independently(place.location, place.key, kept)


def test_lists_leave_out_what_vmsnap_keeps_for_itself(place: Place) -> None:
    writer = place.create()
    inner = write(writer.add_namespace("disks"), "sda", b"x")
    write(writer, "mem", b"x")
    for folder in (place.location, place.location / "disks"):
        (folder / ".vmsnap-0123456789abcdef").mkdir()
        (folder / ".vmsnap.tmp").symlink_to("nowhere")
        (folder / "Vmsnap_Manifest").mkdir()
        (folder / "ENC_METADATA").write_bytes(b"")
    (place.location / "disks" / "enc_metadata").write_bytes(b"")
    (place.location / "disks" / "vmsnap_manifest").write_bytes(b"")
    reader = place.open()
    assert (reader.list_fragments(), reader.list_namespaces()) == (["mem"], ["disks"])
    reader = reader.namespace(inner.namespace_path)
    assert (reader.list_fragments(), reader.list_namespaces()) == (["sda"], [])


def test_lists_show_what_there_is_now(place: Place) -> None:
    writer = place.create()
    reader = place.open()
    write(writer, "mem", b"x")
    assert reader.list_fragments() == ["mem"]
    writer.add_namespace("disks")
    assert reader.list_namespaces() == ["disks"]


def test_crosvms_name_for_the_call_with_a_chunk_size_is_there_too(tmp_path: Path, key: bytes) -> None:
    with vmsnap.SnapshotWriter(tmp_path / "vm1", True, key=key).raw_fragment_with_chunk_size("mem", 100) as fragment:
        fragment.write(pattern(1000))
    with vmsnap.SnapshotReader(tmp_path / "vm1", True, key=key).raw_fragment("mem") as reader:
        assert (reader.chunk_size_bytes, reader.read()) == (100, pattern(1000))


def test_the_usual_chunk_is_a_page(tmp_path: Path, key: bytes) -> None:
    vmsnap.SnapshotWriter(tmp_path / "vm1", key=key).raw_fragment("mem").close()
    assert vmsnap.SnapshotReader(tmp_path / "vm1", key=key).raw_fragment("mem").chunk_size_bytes == 4096


# The root ------------------------------------------------------------------------------------------------------------


def test_a_relative_root_stays_where_it_was(place: Place, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    writer = vmsnap.SnapshotWriter("vm1", key=place.key)
    reader = vmsnap.SnapshotReader("vm1", key=place.key)
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert writer.path == reader.path == tmp_path / "vm1"
    write(writer.add_namespace("disks"), "sda", b"x")
    assert read(reader.namespace("disks"), "sda") == b"x"
    assert os.listdir() == []


def test_a_root_may_be_reached_through_links(place: Place, tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to("real")
    through = Place(tmp_path / "link" / "vm1", place.key)
    write(through.create().add_namespace("disks"), "sda", b"x")
    (tmp_path / "itself").symlink_to("real/vm1")
    for root in (tmp_path / "real/vm1", tmp_path / "link/vm1", tmp_path / "itself"):
        assert read(vmsnap.SnapshotReader(root, key=place.key).namespace("disks"), "sda") == b"x"


@pytest.mark.parametrize("kind", [str, os.fsencode, Path, lambda path: f"{path}/", lambda path: f"{path}/../vm1"])
def test_a_root_is_text_bytes_or_path(place: Place, kind: Callable[[Path], Any]) -> None:
    root = kind(place.location)
    if str(root).endswith("/../vm1"):
        place.location.mkdir()
        root = f"{place.location}/../vm2"
    write(vmsnap.SnapshotWriter(root, key=place.key), "mem", b"x")
    assert read(vmsnap.SnapshotReader(root, key=place.key), "mem") == b"x"


def test_a_root_need_not_be_utf_8(place: Place, tmp_path: Path) -> None:
    root = os.fsencode(tmp_path) + b"/vm\xff\xfe"
    writer = vmsnap.SnapshotWriter(root, key=place.key)
    assert os.listdir(os.fsencode(tmp_path)) == [b"vm\xff\xfe"]
    assert os.fsencode(writer.path) == root
    write(pickle.loads(pickle.dumps(writer)).add_namespace("disks"), "sda", b"x")
    reader = pickle.loads(pickle.dumps(vmsnap.SnapshotReader(root, key=place.key)))
    assert os.fsencode(reader.path) == root
    assert read(reader.namespace("disks"), "sda") == b"x"
    assert "vm\\udcff\\udcfe" in repr(writer)


def test_a_snapshot_that_is_moved_as_a_whole_still_opens(place: Place, tmp_path: Path) -> None:
    write(place.create().add_namespace("disks"), "sda", b"x")
    place.location.rename(tmp_path / "archive")
    assert read(vmsnap.SnapshotReader(tmp_path / "archive", key=place.key).namespace("disks"), "sda") == b"x"


# Adding to a snapshot ------------------------------------------------------------------------------------------------


def test_an_existing_snapshot_is_added_to(place: Place) -> None:
    write(place.create().add_namespace("cpu"), "clock", b"old")
    writer = vmsnap.SnapshotWriter.open(place.location, key=place.key)
    assert writer.encrypted == (place.key is not None)
    write(writer, "new", b"beside")
    write(writer.namespace("cpu"), "timer", b"within")
    write(pickle.loads(pickle.dumps(writer)).add_namespace("disks"), "sda", b"below")
    check_independently(
        place.location,
        place.key,
        {"cpu/clock": b"old", "new": b"beside", "cpu/timer": b"within", "disks/sda": b"below"},
    )


@row("fragment-exists", "namespace-missing", "namespace-is-fragment", "bad-name")
def test_adding_never_writes_over_what_is_there(place: Place) -> None:
    write(write(place.create(), "mem", b"old").add_namespace("cpu"), "clock", b"old")
    writer = vmsnap.SnapshotWriter.open(os.fsencode(place.location), key=place.key)
    with refused("fragment-exists", '"mem" of .*exists', place.location):
        writer.raw_fragment("mem")
    with refused("fragment-exists", '"cpu" of .*exists already', place.location):
        writer.add_namespace("cpu")
    with refused("fragment-exists", '"clock" in namespace "cpu".*exists', place.location):
        writer.namespace("cpu").raw_fragment("clock")
    with refused("namespace-missing", '"disks" of .*does not exist', place.location):
        writer.namespace("disks")
    with refused("namespace-is-fragment", 'cannot open namespace "mem"', place.location):
        writer.namespace("mem")
    with refused("bad-name", "relative path", place.location):
        writer.namespace("..")


@row("root-missing", "no-key", "wrong-key", "not-encrypted")
def test_adding_needs_what_reading_needs(tmp_path: Path, key: bytes) -> None:
    with refused("root-missing", "cannot open the snapshot", tmp_path):
        vmsnap.SnapshotWriter.open(tmp_path / "vm1")
    vmsnap.SnapshotWriter(tmp_path / "vm1", key=key)
    with refused("no-key", "pass the key that it was written with", tmp_path):
        vmsnap.SnapshotWriter.open(tmp_path / "vm1")
    with refused("wrong-key", "enc_metadata of .*vm1", tmp_path):
        vmsnap.SnapshotWriter.open(tmp_path / "vm1", key=vmsnap.generate_key())
    vmsnap.SnapshotWriter(tmp_path / "plain")
    with refused("not-encrypted", "plain is not encrypted", tmp_path):
        vmsnap.SnapshotWriter.open(tmp_path / "plain", key=key)


@row("sealed")
def test_nothing_is_added_to_a_sealed_snapshot(place: Place) -> None:
    place.create()
    place.file("vmsnap_manifest").write_bytes(b"whatever it holds")
    with refused(
        "sealed",
        r"the snapshot .*vm1 is already sealed \(it has a vmsnap_manifest\): nothing can be added to it",
        place.location,
    ):
        vmsnap.SnapshotWriter.open(place.location, key=place.key)


# Keys ----------------------------------------------------------------------------------------------------------------


def mapped(data: bytes) -> mmap.mmap:
    memory = mmap.mmap(-1, len(data))
    memory[:] = data
    return memory


KEY_BUFFERS: dict[str, Callable[[bytes], Any]] = {
    "bytes": bytes,
    "bytearray": bytearray,
    "memoryview of a slice": lambda key: memoryview(b"x" + key + b"y")[1:-1],
    "mmap": mapped,
    "array": lambda key: array.array("q", key),
    "ctypes array": lambda key: (ctypes.c_ubyte * 32).from_buffer_copy(key),
    "numpy bytes": lambda key: np.frombuffer(key, np.uint8),
    "numpy words, 2-d": lambda key: np.frombuffer(key, np.uint64).reshape(2, 2),
}


@pytest.mark.parametrize("kind", KEY_BUFFERS)
def test_a_key_is_any_buffer_of_32_bytes(tmp_path: Path, key: bytes, kind: str) -> None:
    write(vmsnap.SnapshotWriter(tmp_path / "vm1", key=KEY_BUFFERS[kind](key)), "mem", b"x")
    assert read(vmsnap.SnapshotReader(tmp_path / "vm1", key=KEY_BUFFERS[kind](key)), "mem") == b"x"
    check_independently(tmp_path / "vm1", key, {"mem": b"x"})


def test_a_key_is_taken_over_at_once(tmp_path: Path, key: bytes) -> None:
    given_key = bytearray(key)
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1", key=given_key)
    given_key[:] = bytes(32)
    write(writer, "mem", b"x")
    check_independently(tmp_path / "vm1", key, {"mem": b"x"})


def test_a_key_alone_means_encryption(tmp_path: Path, key: bytes) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1", False, key=key)
    assert writer.encrypted
    assert vmsnap.SnapshotReader(tmp_path / "vm1", False, key=key).encrypted
    assert (tmp_path / "vm1/enc_metadata").exists()


def test_generated_keys_have_32_bytes_and_differ() -> None:
    keys = {vmsnap.generate_key() for _ in range(100)}
    assert len(keys) == 100
    assert {len(key) for key in keys} == {32}


def test_each_snapshot_has_a_data_key_of_its_own(tmp_path: Path, key: bytes) -> None:
    writers = [vmsnap.SnapshotWriter(tmp_path / str(number), key=key) for number in range(5)]
    assert len({state_of(writer)["data_key"] for writer in writers}) == 5


# Handles -------------------------------------------------------------------------------------------------------------


def by_pickle(protocol: int) -> Callable[[Any], Any]:
    return lambda handle: pickle.loads(pickle.dumps(handle, protocol))


COPIES: dict[str, Callable[[Any], Any]] = {
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    **{f"pickle, protocol {protocol}": by_pickle(protocol) for protocol in range(pickle.HIGHEST_PROTOCOL + 1)},
}


def state_of(handle: Any) -> dict[str, bytes]:
    """What a pickled handle holds of keys: the 32 bytes behind the name, in CBOR."""
    state = bytes(pickle.loads(pickle.dumps(handle.__reduce__()[1]))[0])
    at = state.index(b"data_key") + len(b"data_key")
    assert state[at : at + 2] == b"\x58\x20"
    return {"data_key": state[at + 2 : at + 34]}


@pytest.mark.parametrize("how", COPIES)
def test_handles_are_copied_and_pickled_and_go_on_in_the_same_snapshot(place: Place, how: str) -> None:
    writer = place.create(threads=2)
    inner = writer.add_namespace("disks")
    for each, name in ((writer, "mem"), (inner, "sda")):
        copied = COPIES[how](each)
        assert type(copied) is vmsnap.SnapshotWriter
        assert copied is not each
        assert (copied.path, copied.namespace_path, copied.encrypted) == (
            each.path,
            each.namespace_path,
            each.encrypted,
        )
        write(copied, name, b"by the copy")
        write(each, f"{name} 2", b"by the original")
    check_independently(
        place.location,
        place.key,
        {
            f"{path}{more}": text
            for path in ("mem", "disks/sda")
            for more, text in (("", b"by the copy"), (" 2", b"by the original"))
        },
    )
    reader = place.open(threads=2)
    for each_reader, name in ((reader, "mem"), (reader.namespace("disks"), "sda")):
        copied = COPIES[how](each_reader)
        assert type(copied) is vmsnap.SnapshotReader
        assert read(copied, name) == b"by the copy"
        assert repr(copied) == repr(each_reader)


def test_open_fragments_are_not_copied(place: Place) -> None:
    with place.create().raw_fragment("mem") as fragment:
        fragment.write(b"x")
        for how in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="pickle"):
                how(fragment)
    with place.open().raw_fragment("mem") as reader:
        for how in (copy.copy, copy.deepcopy, pickle.dumps):
            with pytest.raises(TypeError, match="pickle"):
                how(reader)
        assert reader.read() == b"x"


@pytest.mark.parametrize("state", [b"", b"\x00", b"garbage", b"\xa0"])
def test_a_damaged_pickle_is_an_invalid_argument(place: Place, state: bytes) -> None:
    rebuild, (whole,) = place.create().__reduce__()
    for damaged in (state, whole[:-1], whole.replace(b"namespace`", b"namespaceb..")):
        with pytest.raises(vmsnap.InvalidArgumentError, match="not a pickled handle"):
            rebuild(damaged)


def test_what_is_shown_tells_folder_and_state(place: Place) -> None:
    kind = "encrypted" if place.key else "plain"
    writer = place.create()
    assert repr(writer) == f"<vmsnap.SnapshotWriter {str(place.location)!r} {kind}>"
    assert (
        repr(writer.add_namespace("disks"))
        == f"<vmsnap.SnapshotWriter {str(place.location)!r} namespace='disks' {kind}>"
    )
    assert repr(place.open()) == f"<vmsnap.SnapshotReader {str(place.location)!r} {kind}>"
    fragment = writer.raw_fragment("mem")
    assert "'mem'" in repr(fragment)
    assert "open" in repr(fragment)
    fragment.write(b"x" * 100)
    fragment.close()
    assert "'mem'" in repr(fragment)
    assert "closed" in repr(fragment)
    reader = place.open().raw_fragment("mem")
    assert "'mem'" in repr(reader)
    assert "100 bytes" in repr(reader)
    reader.close()
    assert "closed" in repr(reader)


def test_no_key_is_ever_shown(tmp_path: Path, key: bytes) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1", key=key)
    write(writer, "mem", b"x")
    reader = vmsnap.SnapshotReader(tmp_path / "vm1", key=key)
    fragment = writer.raw_fragment("other")
    fragment_reader = reader.raw_fragment("mem")
    handles = [writer, reader, writer.add_namespace("disks"), fragment, fragment_reader]
    shown = [text(handle) for handle in handles for text in (repr, str)]
    shown += [repr(getattr(handle, "_raw", None)) for handle in handles]

    for failing in (
        lambda: vmsnap.SnapshotReader(tmp_path / "vm1", key=bytes(31) + key[:1]),
        lambda: vmsnap.SnapshotReader(tmp_path / "vm1", key=key[:31]),
        lambda: vmsnap.SnapshotWriter(tmp_path / "vm1", key=key),
        lambda: vmsnap.SnapshotWriter(tmp_path / "vm2", key=key, threads=0),
        lambda: writer.raw_fragment("mem"),
        lambda: reader.raw_fragment("absent"),
        lambda: reader.namespace("absent"),
        lambda: type(writer)._from_state(writer.__reduce__()[1][0][:-1]),
        lambda: type(writer)._from_state(writer.__reduce__()[1][0] + b"x"),
    ):
        try:
            failing()
        except (vmsnap.VmsnapError, OSError) as error:
            shown += [str(error), repr(error)]

    data_key = state_of(writer)["data_key"]
    assert data_key == state_of(reader)["data_key"]
    for secret in (key, data_key):
        # In any of the ways in which bytes get into text, and no part of them either.
        forms = [secret.hex(), secret.hex().upper(), str(list(secret))[1:-1], repr(secret)[2:-1]]
        parts = [form[at : at + 16] for form in forms for at in (0, 20)]
        assert not [text for text in shown for part in parts if part in text]


def test_the_pickle_holds_what_is_needed_without_the_callers_key(tmp_path: Path, key: bytes) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1", key=key)
    assert state_of(writer)["data_key"] in pickle.dumps(writer)
    assert key not in pickle.dumps(writer)
    assert key not in pickle.dumps(vmsnap.SnapshotReader(tmp_path / "vm1", key=key))


# Threads -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2, 3, 1024])
def test_any_number_of_threads_writes_and_reads_the_same(place: Place, threads: int) -> None:
    data = pattern(5 * MIB + 3)
    write(place.create(threads), "mem", data)
    assert read(place.open(threads), "mem") == data
    check_independently(place.location, place.key, {"mem": data})


THREADS_SCRIPT = """
import os, sys, vmsnap
root, threads = sys.argv[1], int(sys.argv[2]) or None
key = bytes(32)
with vmsnap.SnapshotWriter(root, key=key, threads=threads).raw_fragment("mem") as fragment:
    for _ in range(20):
        fragment.write(bytes(100_000))
    fragment.write(bytes(8 << 20))
with vmsnap.SnapshotReader(root, key=key, threads=threads).raw_fragment("mem") as fragment:
    fragment.read()
tasks = sorted(open(f"/proc/self/task/{task}/comm").read().strip() for task in os.listdir("/proc/self/task"))
print(*[task for task in tasks if task.startswith("vmsnap")], len(tasks))
"""


def test_one_thread_means_that_none_is_started(tmp_path: Path) -> None:
    assert run_python_well(THREADS_SCRIPT, tmp_path / "a", 1) == "1\n"
    assert run_python_well(THREADS_SCRIPT, tmp_path / "b", 0, VMSNAP_THREADS="1") == "1\n"


def test_the_environment_says_how_many_threads_the_process_has(tmp_path: Path) -> None:
    started = run_python_well(THREADS_SCRIPT, tmp_path / "a", 0, VMSNAP_THREADS="3")
    assert started == "vmsnap-0 vmsnap-1 vmsnap-2 4\n"


def test_the_provider_is_the_one_that_the_environment_names() -> None:
    for provider in ("aws-lc", "aes-gcm"):
        script = "import vmsnap; print(vmsnap.aead_provider())"
        assert run_python_well(script, VMSNAP_AEAD=provider) == f"{provider}\n"
