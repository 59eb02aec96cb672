"""Errors of opening a snapshot: it is missing, its key is wrong, or its key metadata is damaged."""

import os
from pathlib import Path

import floe
import pytest
import vmsnap
from refusals import refused, row
from support import MIB, Place, read, write


@row("root-missing")
def test_a_snapshot_that_is_not_there_is_missed(place: Place, tmp_path: Path) -> None:
    with refused("root-missing", "cannot open the snapshot .*vm1", tmp_path):
        place.open()


@row("root-not-directory")
def test_a_special_file_is_no_snapshot(place: Place, tmp_path: Path) -> None:
    os.mkfifo(place.location)
    with refused("root-not-directory", "cannot open the snapshot .*vm1", tmp_path):
        place.open()


@row("no-key")
def test_an_encrypted_snapshot_needs_its_key(encrypted_place: Place) -> None:
    write(encrypted_place.create(), "mem", b"x")
    for require_encrypted in (False, True):
        with refused(
            "no-key", "enc_metadata of .*vm1: .*pass the key that it was written with", encrypted_place.location
        ):
            vmsnap.SnapshotReader(encrypted_place.location, require_encrypted)


@row("not-encrypted")
def test_a_plain_snapshot_is_refused_where_an_encrypted_one_is_required(tmp_path: Path, key: bytes) -> None:
    write(vmsnap.SnapshotWriter(tmp_path / "vm1"), "mem", b"x")
    for require_encrypted, given_key in ((True, None), (False, key), (True, key)):
        with refused(
            "not-encrypted", "vm1 is not encrypted .*, but encryption is required or a key was given", tmp_path
        ):
            vmsnap.SnapshotReader(tmp_path / "vm1", require_encrypted, key=given_key)


@row("not-encrypted")
def test_a_snapshot_whose_enc_metadata_was_removed_does_not_count_as_plain(encrypted_place: Place) -> None:
    write(encrypted_place.create(), "mem", b"x")
    encrypted_place.file("enc_metadata").unlink()
    with refused("not-encrypted", "not encrypted", encrypted_place.location):
        encrypted_place.open()


@row("wrong-key")
def test_another_key_is_refused(encrypted_place: Place) -> None:
    write(encrypted_place.create(), "mem", b"x")
    assert encrypted_place.key is not None
    one_bit = bytearray(encrypted_place.key)
    one_bit[31] ^= 1
    for other in (bytes(32), bytes(one_bit), vmsnap.generate_key()):
        message = "enc_metadata of .*vm1: authentication failed: the key is wrong, or the file is damaged"
        with refused("wrong-key", message, encrypted_place.location):
            vmsnap.SnapshotReader(encrypted_place.location, key=other)


@row("key-metadata-foreign", "key-metadata-damaged")
def test_any_changed_bit_of_the_key_metadata_is_found(encrypted_place: Place) -> None:
    encrypted_place.create()
    stored = encrypted_place.stored("enc_metadata")
    for position in range(len(stored)):
        for bit in range(8):
            encrypted_place.damage("enc_metadata", position, bit)
            if position < 10:
                with refused("key-metadata-foreign", "does not contain a wrapped vmsnap key", encrypted_place.location):
                    encrypted_place.open()
            else:
                with refused("key-metadata-damaged", "authentication failed", encrypted_place.location):
                    encrypted_place.open()
            encrypted_place.damage("enc_metadata", position, bit)  # which repairs it
    assert encrypted_place.stored("enc_metadata") == stored
    encrypted_place.open()


@row("key-metadata-foreign", "key-metadata-damaged")
def test_key_metadata_cut_off_or_extended_anywhere_is_found(encrypted_place: Place) -> None:
    encrypted_place.create()
    stored = encrypted_place.stored("enc_metadata")
    for length in range(len(stored)):
        encrypted_place.store("enc_metadata", stored[:length])
        if length < 10:
            with refused("key-metadata-foreign", "does not contain a wrapped vmsnap key", encrypted_place.location):
                encrypted_place.open()
        else:
            with refused("key-metadata-damaged", "authentication failed", encrypted_place.location):
                encrypted_place.open()
    for more in [*range(1, 200), 1056, 2000]:
        encrypted_place.store("enc_metadata", stored + bytes(more))
        with refused("key-metadata-damaged", "authentication failed", encrypted_place.location):
            encrypted_place.open()


@row("key-metadata-foreign")
@pytest.mark.parametrize("contents", [b"", b"\0", b"garbage" * 100, b"-----BEGIN", b"\xa1\x61a\x01", b"{}"])
def test_what_does_not_begin_as_key_metadata_is_refused(encrypted_place: Place, contents: bytes) -> None:
    encrypted_place.create()
    encrypted_place.store("enc_metadata", contents)
    for key in (encrypted_place.key, None):
        with refused("key-metadata-foreign", "does not contain a wrapped vmsnap key", encrypted_place.location):
            vmsnap.SnapshotReader(encrypted_place.location, key=key)


@row("key-metadata-too-long")
def test_key_metadata_of_megabytes_is_not_even_read(encrypted_place: Place) -> None:
    encrypted_place.create()
    stored = encrypted_place.stored("enc_metadata")
    for length in (MIB + 1, 2 * MIB):
        encrypted_place.store("enc_metadata", stored.ljust(length, b"\0"))
        with refused(
            "key-metadata-too-long", f"is {length} bytes long; the limit is 1048576", encrypted_place.location
        ):
            encrypted_place.open()
    os.truncate(encrypted_place.file("enc_metadata"), 1 << 40)  # a hole: a program that reads it runs out of memory
    with pytest.raises(vmsnap.CorruptSnapshotError, match="the limit is"):
        encrypted_place.open()


def with_payload(place: Place, payload: object) -> Place:
    """A snapshot made by hand: with the given payload, and one fragment."""
    assert place.key is not None
    place.location.mkdir()
    place.store("enc_metadata", floe.key_metadata(place.key, payload))
    place.store("mem", floe.seal(floe.DATA_KEY, floe.fragment_aad("mem"), b"by hand", 32))
    return place


def test_a_snapshot_made_by_hand_from_the_format_page_is_read(encrypted_place: Place) -> None:
    assert read(with_payload(encrypted_place, floe.payload_fields()).open(), "mem") == b"by hand"


def test_unknown_keys_of_the_payload_are_ignored_and_the_order_means_nothing(encrypted_place: Place) -> None:
    fields = {"comment": ["any", {"thing": 1}]} | dict(reversed(floe.payload_fields().items()))
    assert read(with_payload(encrypted_place, fields).open(), "mem") == b"by hand"


@row("newer-format")
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
    message = f"enc_metadata of .*vm1: the snapshot needs .*{message}.* install a newer one"
    with refused("newer-format", message, encrypted_place.location):
        encrypted_place.open()


@row("payload-malformed")
@pytest.mark.parametrize("what", floe.MALFORMED_PAYLOADS)
def test_an_authentic_but_malformed_payload_is_refused(encrypted_place: Place, what: str) -> None:
    with_payload(encrypted_place, floe.MALFORMED_PAYLOADS[what])
    message = "enc_metadata of .*vm1: the key metadata is authentic but malformed"
    with refused("payload-malformed", message, encrypted_place.location):
        encrypted_place.open()
