"""Errors of links, special files and foreign names inside a snapshot."""

import os
import socket
import stat
from collections.abc import Callable
from pathlib import Path

import pytest
import vmsnap
from refusals import refused, row
from support import Place, read, write


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


@row("special-file", "fragment-exists")
@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_among_the_fragments_is_refused_and_not_waited_for(place: Place, kind: str) -> None:
    inner = write(place.create().add_namespace("disks"), "sda", b"x")
    special_file(place.file("disks/sdb"), kind)
    message = f"is {kind}, but a snapshot contains only files and directories"
    reader = place.open().namespace("disks")
    with refused("special-file", f'fragment "sdb" in namespace "disks" of .*vm1: {message}', place.location):
        reader.raw_fragment("sdb")
    message = f'"sdb" {message}'
    with refused("special-file", f'namespace "disks/sdb" of .*vm1: {message}', place.location):
        reader.namespace("sdb")
    for listing in (reader.list_fragments, reader.list_namespaces):
        with refused("special-file", f"disks of .*vm1: {message}", place.location):
            listing()
    with refused("fragment-exists", "exists already", place.location):
        inner.raw_fragment("sdb")
    # The others can be read all the same.
    assert read(reader, "sda") == b"x"


@row("special-file")
@pytest.mark.parametrize("kind", SPECIAL)
def test_a_special_file_in_a_namespaces_place_is_not_written_into(place: Place, kind: str) -> None:
    inner = place.create().add_namespace("disks").add_namespace("deep")
    place.file("disks/deep").rmdir()
    special_file(place.file("disks/deep"), kind)
    for call in (inner.raw_fragment, inner.add_namespace):
        with refused("special-file", f'namespace "disks/deep" of .*vm1: "deep" is {kind}', place.location):
            call("sda")


@row("key-metadata-no-file")
@pytest.mark.parametrize("kind", [*SPECIAL, "a symbolic link", "a link that leads nowhere"])
def test_key_metadata_that_is_no_file_is_refused_and_not_waited_for(encrypted_place: Place, kind: str) -> None:
    encrypted_place.create()
    file = encrypted_place.file("enc_metadata")
    if kind == "a symbolic link":
        file.rename(encrypted_place.location.parent / "elsewhere")
        file.symlink_to("../elsewhere")
    else:
        file.unlink()
        file.symlink_to("nowhere") if kind == "a link that leads nowhere" else special_file(file, kind)
    what = kind if kind in SPECIAL else "a symbolic link"
    for key in (encrypted_place.key, None):
        message = f"enc_metadata of .*vm1: is {what}"
        with refused("key-metadata-no-file", message, encrypted_place.location):
            vmsnap.SnapshotReader(encrypted_place.location, key=key)


@row("key-metadata-directory")
def test_key_metadata_that_is_a_folder_is_refused(encrypted_place: Place) -> None:
    encrypted_place.create()
    encrypted_place.file("enc_metadata").unlink()
    encrypted_place.file("enc_metadata").mkdir()
    for key in (encrypted_place.key, None):
        with refused("key-metadata-directory", "enc_metadata of .*vm1", encrypted_place.location):
            vmsnap.SnapshotReader(encrypted_place.location, key=key)


@row("link", "fragment-exists")
@pytest.mark.parametrize("target", ["real", "/etc/passwd", "nowhere", "sdb"])
def test_a_link_in_a_fragments_place_is_not_followed(place: Place, target: str) -> None:
    inner = write(place.create().add_namespace("disks"), "real", b"x")
    place.file("disks/sdb").symlink_to(target)  # to itself in the last case
    message = "is a symbolic link, but a snapshot contains only files and directories"
    reader = place.open().namespace("disks")
    with refused("link", f'fragment "sdb" in namespace "disks" of .*vm1: {message}', place.location):
        reader.raw_fragment("sdb")
    message = f'"sdb" {message}'
    with refused("link", f'namespace "disks/sdb" of .*vm1: {message}', place.location):
        reader.namespace("sdb")
    for listing in (reader.list_fragments, reader.list_namespaces):
        with refused("link", message, place.location):
            listing()
    with refused("fragment-exists", "exists already", place.location):
        inner.raw_fragment("sdb")
    assert read(reader, "real") == b"x"


@row("link")
@pytest.mark.parametrize("level", ["disks", "disks/deep"])
@pytest.mark.parametrize("target", ["inside", "outside", "nowhere"])
def test_a_link_in_a_namespaces_place_is_not_followed(place: Place, tmp_path: Path, level: str, target: str) -> None:
    writer = place.create()
    inner = write(writer.add_namespace("disks").add_namespace("deep"), "sda", b"x")
    reader = place.open()
    inner_reader = reader.namespace("disks").namespace("deep")
    # The directory still has the right contents, but is behind a link.
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


@row("foreign-entry")
@pytest.mark.parametrize("name", [b"\xff", b"caf\xe9", b"a\\b", b"ab\xed\xa0\x80"])
def test_an_entry_that_no_snapshot_can_hold_is_told(place: Place, name: bytes) -> None:
    write(place.create().add_namespace("disks"), "sda", b"x")
    with open(os.fsencode(place.file("disks")) + b"/" + name, "wb"):
        pass
    reader = place.open()
    assert reader.list_namespaces() == ["disks"]
    for listing in (reader.namespace("disks").list_fragments, reader.namespace("disks").list_namespaces):
        message = "disks of .*vm1: .*(is not UTF-8|a snapshot cannot contain the name)"
        with refused("foreign-entry", message, place.location):
            listing()
    assert read(reader.namespace("disks"), "sda") == b"x"
