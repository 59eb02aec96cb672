"""Errors of arguments: names, paths, keys, numbers and buffers that vmsnap refuses."""

import array
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import vmsnap
from refusals import refused, refused_elsewhere, row
from support import Place, pattern, run_python_well, write

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
    ".vmsnap": "vmsnap's own files",
    ".vmsnap-0123456789abcdef": "vmsnap's own files",
    ".vmsnapshot": "vmsnap's own files",
    "enc_metadata": "vmsnap's own files",
    "ENC_metadata": "vmsnap's own files",
    "vmsnap_manifest": "vmsnap's own files",
    "VMSNAP_MANIFEST": "vmsnap's own files",
}


@row("bad-name")
@pytest.mark.parametrize("name", BAD_NAMES)
def test_a_bad_name_is_refused_by_writers_and_readers(place: Place, name: str) -> None:
    writer = place.create()
    inner = writer.add_namespace("disks")
    reader = place.open()
    message = f"cannot be the name of a fragment or namespace: .*{BAD_NAMES[name]}"
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
        with refused("bad-name", message, place.location.parent):
            refusing(name)


@row("bad-path")
@pytest.mark.parametrize("path", ["", b"", "vm\0", "\0"])
def test_a_path_that_no_snapshot_can_have_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str | bytes
) -> None:
    monkeypatch.chdir(tmp_path)
    for call in (vmsnap.SnapshotWriter, vmsnap.SnapshotReader):
        for key in (None, bytes(32)):
            with refused("bad-path", "path of a snapshot", tmp_path):
                call(path, key=key)


@row("name-without-utf-8")
@pytest.mark.parametrize("name", ["\udcff", "a\ud800"])
def test_a_name_that_is_not_utf_8_is_refused(place: Place, name: str) -> None:
    writer = place.create()
    for refusing in (writer.raw_fragment, writer.add_namespace, place.open().raw_fragment, place.open().namespace):
        with refused("name-without-utf-8", "surrogates not allowed", place.location):
            refusing(name)


@row("chunk-size")
@pytest.mark.parametrize("size", [0, 1, 31, (64 << 20) + 1, 1 << 32, (1 << 64) - 1, -1, 2**70, -(2**70)])
def test_a_chunk_size_out_of_range_is_refused(place: Place, size: int) -> None:
    writer = place.create()
    with refused("chunk-size", rf"chunk_size_bytes .*{size}", place.location):
        writer.raw_fragment("mem", chunk_size_bytes=size)
    with refused("chunk-size", rf"chunk_size_bytes .*{size}", place.location):
        writer.raw_fragment_with_chunk_size("mem", size)


@row("key-length")
@pytest.mark.parametrize("length", [0, 1, 16, 31, 33, 64])
def test_a_key_of_another_length_is_refused(encrypted_place: Place, tmp_path: Path, length: int) -> None:
    encrypted_place.create()
    with refused("key-length", f"32 bytes long, not {length}; generate_key", tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "vm2", key=bytes(length))
    with refused("key-length", f"32 bytes long, not {length}; generate_key", tmp_path):
        vmsnap.SnapshotReader(tmp_path / "vm1", key=bytes(length))


@row("key-length")
def test_the_length_of_a_key_is_counted_in_bytes(tmp_path: Path) -> None:
    with refused("key-length", "not 256", tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "vm2", key=np.zeros(32).data)
    with refused("key-length", "not 128", tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "vm2", key=array.array("i", [0] * 32))


@row("thread-count")
@pytest.mark.parametrize("threads", [0, -1, 1025, 2**70])
def test_a_number_of_threads_out_of_range_is_refused(place: Place, tmp_path: Path, threads: int) -> None:
    place.create()
    with refused("thread-count", f"threads (must be|cannot be {threads})", tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "vm2", key=place.key, threads=threads)
    with refused("thread-count", f"threads (must be|cannot be {threads})", tmp_path):
        vmsnap.SnapshotReader(tmp_path / "vm1", key=place.key, threads=threads)


@row("threads-variable")
@pytest.mark.parametrize("value", ["", "0", "-1", "1025", "many", "2.5", "18446744073709551617"])
def test_a_bad_number_of_threads_in_the_environment_is_refused(tmp_path: Path, value: str) -> None:
    vmsnap.SnapshotWriter(tmp_path / "vm1")
    message = f"VMSNAP_THREADS={re.escape(value)} must be a number from 1 to 1024"
    for call in ("vmsnap.SnapshotWriter(sys.argv[1] + '/vm2')", "vmsnap.SnapshotReader(sys.argv[1] + '/vm1')"):
        refused_elsewhere("threads-variable", message, tmp_path, call, tmp_path, VMSNAP_THREADS=value)
    # An argument takes precedence.
    call = "import sys, vmsnap; vmsnap.SnapshotWriter(sys.argv[1], threads=2)"
    run_python_well(call, tmp_path / "vm3", VMSNAP_THREADS=value)


@row("provider-variable")
@pytest.mark.parametrize("value", ["", "openssl", "AES-GCM", "aws-lc-rs"])
def test_an_unknown_provider_in_the_environment_is_refused(tmp_path: Path, value: str) -> None:
    write(vmsnap.SnapshotWriter(tmp_path / "encrypted", key=bytes(32)), "mem", b"x")
    message = f"VMSNAP_AEAD={value} is not an AEAD provider of this build; .*aes-gcm"
    for call in (
        "vmsnap.aead_provider()",
        "vmsnap.SnapshotWriter(sys.argv[1] + '/vm2', key=bytes(32))",
        "vmsnap.SnapshotReader(sys.argv[1] + '/encrypted', key=bytes(32))",
    ):
        refused_elsewhere("provider-variable", message, tmp_path, call, tmp_path, VMSNAP_AEAD=value)


@row("offset")
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
            with refused("offset", "cannot be|before its start|`whence` is", place.location):
                call()
            assert fragment.tell() == 10
        assert buffer == b"\xaa" * 10
        # An offset beyond the end is not an error.
        assert fragment.read_at((1 << 64) - 1, 10) == b""
        assert fragment.seek((1 << 63) - 1) == (1 << 63) - 1
        assert fragment.read(10) == b""


@row("damaged-pickle")
def test_a_damaged_pickle_is_refused(place: Place) -> None:
    for handle in (place.create().add_namespace("disks"), place.open()):
        rebuild, (state,) = handle.__reduce__()
        outside = state.replace(b"disks", b"../..")
        damaged = [b"", b"\x00", b"garbage", *(state[:length] for length in range(len(state)))]
        damaged += [outside] if outside != state else []
        for each in damaged:
            with refused("damaged-pickle", "not a pickled handle", place.location):
                rebuild(each)


@row("not-a-buffer")
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


@row("scattered-buffer")
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


@row("read-only-buffer")
def test_a_buffer_that_cannot_be_written_to_is_refused(place: Place) -> None:
    write(place.create(), "mem", pattern(100))
    with place.open().raw_fragment("mem") as reader:
        for call in (reader.readinto, lambda buffer: reader.readinto_at(0, buffer)):
            with refused("read-only-buffer", "a writable, contiguous buffer is required", place.location):
                call(bytes(10))
        assert reader.read() == pattern(100)
