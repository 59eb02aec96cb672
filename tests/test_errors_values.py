"""Errors of values: they cannot be written, or do not have the type that is asked for."""

import dataclasses
import io
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import vmsnap
from refusals import refused, refused_elsewhere, row
from support import Place, read, write
from vmsnap import serialization


@dataclasses.dataclass
class Regs:
    rip: int
    gdt: list[int]


@row("unwritable-value")
def test_a_value_that_cannot_be_written_is_refused(place: Place) -> None:
    writer = place.create().add_namespace("vcpus")
    value = {"regs": {"rip": 1j}}
    message = r"the value for 'vcpus/0' of .*/vm1 cannot be serialized: at regs\.rip: .*complex.*default="
    with refused("unwritable-value", message, place.location):
        writer.write_fragment("0", value)
    writer.write_fragment("0", value, default=str)
    assert place.open().namespace("vcpus").read_fragment("0") == {"regs": {"rip": "1j"}}


NO_VALUES = {
    b"": "it is truncated, at byte 0",
    b"\x82\x01": "a container declares 2 items, but only 1 bytes are left, at byte 0",
    b"\x81\x19\x01": "it is truncated, at byte 3",
    b"\x01\x01": "bytes follow its end, at byte 1",
    b"{}{}": "trailing characters, at byte 2",
    b"[1,": "EOF while parsing a value",
    b"\x9b" + b"\xff" * 8: "a container declares 18446744073709551615 items, but only 0 bytes are left, at byte 0",
    b"\xa2\x01\x02\x01\x03": "a key of a map comes twice, before byte 5",
    b'{"a":1,"a":2}': "a key of a map comes twice, at byte 9",
    b"\xd8\x1c\x80": "tag 28 is unknown",
    b"\x81" * 128 + b"\x01": "deeper than 127 levels, at byte 127",
    bytes(8): "bytes follow its end",
}


@row("no-value")
@pytest.mark.parametrize("content", NO_VALUES)
def test_a_fragment_that_holds_no_value_is_refused(place: Place, content: bytes) -> None:
    write(place.create().add_namespace("vcpus"), "0", content)
    reader = place.open().namespace("vcpus")
    message = rf'"0" in namespace "vcpus" of .*/vm1 does not contain a serialized value: .*{NO_VALUES[content]}'
    with refused("no-value", message, place.location):
        reader.read_fragment("0")
    with refused("no-value", message, place.location):
        reader.read_fragment("0", Regs)
    assert read(reader, "0") == content


@row("value-of-another-type")
def test_a_value_of_another_type_is_refused(place: Place) -> None:
    place.create().write_fragment("cpu", {"rip": 1, "gdt": [1, "hunter2"]})
    reader = place.open()
    message = r"cpu.* does not have the requested type: at gdt\[1\]: expected int, found str$"
    with refused("value-of-another-type", message, place.location):
        reader.read_fragment("cpu", Regs)
    assert reader.read_fragment("cpu")["rip"] == 1


@row("value-too-large")
def test_a_fragment_that_is_too_large_for_a_value_is_refused(place: Place) -> None:
    place.create().write_fragment("cpu", bytes(97))
    reader = place.open()
    with refused("value-too-large", "cpu.*: 99 bytes are too many for a value: raise max_size_bytes", place.location):
        reader.read_fragment("cpu", max_size_bytes=98)
    assert reader.read_fragment("cpu", max_size_bytes=99) == bytes(97)


@row("unbuildable-type")
@pytest.mark.parametrize("kind", [5, "Regs", list["Regs"], Callable[[int], int], io.RawIOBase | Iterator[int]])
def test_a_type_that_cannot_be_built_is_refused(place: Place, kind: object) -> None:
    place.create().write_fragment("cpu", 1)
    with refused("unbuildable-type", "cannot build .* from a value: pass a class", place.location):
        place.open().read_fragment("cpu", kind)


@row("format-name")
@pytest.mark.parametrize("format", ["", "CBOR", "yaml"])
def test_a_format_that_there_is_not_is_refused(place: Place, tmp_path: Path, format: str) -> None:
    place.create().write_fragment("cpu", 1)
    message = f'"{format}" is not a format: use "cbor" or "json"'
    with refused("format-name", message, tmp_path):
        vmsnap.SnapshotWriter(tmp_path / "vm2", format=format)
    with refused("format-name", message, tmp_path):
        place.open().read_fragment("cpu", format=format)
    with refused("format-name", message, tmp_path):
        serialization.encode(1, format=format)
    with refused("format-name", message, tmp_path):
        serialization.decode(b"\x01", format=format)


@row("arrays-without-numpy")
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
    message = r"array.* contains typed arrays, which need numpy: pip install 'vmsnap\[numpy\]'"
    printed = refused_elsewhere("arrays-without-numpy", message, place.location, script, place.location, key)
    assert printed.startswith("{'a': [1, b'x']}\n")
