"""Snapshots that crosvm itself wrote, of both eras: every fragment value for value, as decoded and built by `type=`."""

import hashlib
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypedDict

import numpy as np
import pytest
import vmsnap
from support import read

# The snapshots of ../shared/golden; its README says what expected.json holds, and by which rules.
SNAPSHOTS = [
    "crosvm-cbor/plain",
    "crosvm-cbor/lz4",
    "crosvm-cbor/mem-only-lz4-256k-blocks",
    "crosvm-json/plain",
    "crosvm-json/lz4",
]
RAW = {"devices/raw_blob", "mem"}


@dataclass
class Golden:
    folder: Path
    expected: dict[str, Any]

    def reader_and_name(self, path: str) -> tuple[vmsnap.SnapshotReader, str]:
        *namespaces, name = path.split("/")
        reader = vmsnap.SnapshotReader(self.folder)
        for namespace in namespaces:
            reader = reader.namespace(namespace)
        return reader, name

    def value(self, path: str, type: Any = None) -> Any:
        reader, name = self.reader_and_name(path)
        # The one kind of value that cannot be told from CBOR.
        is_bare_number = "crosvm-json" in self.folder.parts and path in {"newtype_struct", "option_some"}
        return reader.read_fragment(name, type, format="json" if is_bare_number else None)


@pytest.fixture(scope="module", params=SNAPSHOTS)
def golden(request: pytest.FixtureRequest, shared_dir: Path) -> Golden:
    folder = shared_dir / "golden" / request.param
    if not folder.is_dir():
        pytest.skip("no snapshots of crosvm's in ../shared/golden")
    return Golden(folder / "snapshot", json.loads((folder / "expected.json").read_text()))


def rendered(value: Any, path: str) -> Any:
    """A value as expected.json gives it."""
    if path == "numbers/vectors/vec_10000_u32" and isinstance(value, list):
        return summary(value)
    if isinstance(value, (bytes, bytearray)):
        return {"hex": value.hex()}
    if isinstance(value, np.floating):
        value = float(value)
    if isinstance(value, float) and (not math.isfinite(value) or (value == 0 and math.copysign(1, value) < 0)):
        return {"nan": "NaN", "inf": "inf", "-inf": "-inf", "-0.0": "-0.0"}[repr(value)]
    if type(value) is int and path == "numbers/wide_ints":
        return str(value)
    if is_dataclass(value):
        names = [(f.name, f.metadata.get("name", f.name)) for f in fields(value)]
        return {wire: rendered(getattr(value, name), path) for name, wire in names}
    if isinstance(value, dict):
        if all(isinstance(key, str) for key in value):
            return {key: rendered(item, path) for key, item in value.items()}
        # JSON has them in the order of their digits as text.
        return [[key, rendered(item, path)] for key, item in sorted(value.items())]
    if isinstance(value, (list, tuple)):
        return [rendered(item, path) for item in value]
    return value


def identical(left: Any, right: Any) -> bool:
    """Equal, and of the same types: 3 is not 3.0, and not True."""
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(identical(left[key], right[key]) for key in left)
    if isinstance(left, list):
        return len(left) == len(right) and all(map(identical, left, right))
    return bool(left == right)


def summary(values: list[int]) -> dict[str, Any]:
    """vec_10000_u32 is given as a rule."""
    assert values == [i * 2654435761 % 2**32 for i in range(10000)]
    rule = "(i * 2654435761) mod 2^32"
    return {"count": len(values), "first": values[:3], "last": values[-1], "rule": rule, "sum": sum(values)}


def fragments(golden: Golden) -> Iterator[tuple[str, dict[str, Any]]]:
    for entry in golden.expected["fragments"]:
        if entry["path"] not in RAW:
            yield entry["path"], entry


def listed(reader: vmsnap.SnapshotReader) -> Iterator[str]:
    prefix = f"{reader.namespace_path}/" if reader.namespace_path else ""
    yield from (prefix + name for name in reader.list_fragments())
    for name in reader.list_namespaces():
        yield from listed(reader.namespace(name))


def test_every_fragment_that_is_expected_is_listed_and_none_else(golden: Golden) -> None:
    expected = {entry["path"] for entry in golden.expected["fragments"]}
    assert set(listed(vmsnap.SnapshotReader(golden.folder))) == expected


def test_every_fragment_holds_the_bytes_it_was_written_with(golden: Golden) -> None:
    for path, file in golden.expected["files"].items():
        reader, name = golden.reader_and_name(path.removeprefix("snapshot/"))
        content = read(reader, name)
        assert len(content) == file["size"]
        assert hashlib.sha256(content).hexdigest() == file["sha256"]


def test_every_value_reads_as_a_decoder_that_knows_no_types_sees_it(golden: Golden) -> None:
    count = 0
    for path, entry in fragments(golden):
        expected = entry.get("decoded", entry["value"])
        assert identical(rendered(golden.value(path), path), expected), path
        count += 1
    assert count == sum(entry["path"] not in RAW for entry in golden.expected["fragments"])


# Structs and enums of the crosvm crate, as a Python program declares them ---------------------------------------------


@dataclass
class Queue:
    size: int
    ready: bool
    desc: int
    next: int | None


@dataclass
class Pair:
    left: int
    right: int


@dataclass
class Unit:
    pass


@dataclass
class Newtype:
    value: int


@dataclass
class NewtypeText:
    value: str


@dataclass
class NewtypeUnit:
    value: None


class Tuple(NamedTuple):
    first: int
    second: str
    third: bool | None


@dataclass
class Struct:
    id: int
    label: str


Kind = Unit | Newtype | NewtypeText | NewtypeUnit | Tuple | Struct


@dataclass
class Children:
    by_number: dict[int, str]
    bytes: bytes
    float: np.float32
    kind: Kind
    negative: int
    numbers: list[int]
    unit: None


@dataclass
class Device:
    name: str
    queues: list[Queue]
    inner: dict[str, Pair]
    children: Children


@dataclass
class Empty:
    pass


@dataclass
class NewtypeStruct:
    pair: Pair


@dataclass
class TupleStruct:
    number: int
    name: str
    flag: bool


@dataclass
class Blobs:
    plain_vec: bytes
    bytes: bytes
    empty_bytes: bytes
    bytes_300: bytes
    array: bytes


@dataclass
class Maps:
    by_number: dict[int, str]
    by_negative: dict[int, bool]
    by_name: dict[str, int]
    nested: dict[str, dict[int, list[Pair]]]
    empty: dict[int, str]


class PlainVariant(TypedDict):
    type: Literal["Plain"]


class FieldsVariant(TypedDict):
    type: Literal["Fields"]
    id: int
    name: str


@dataclass
class Ok:
    value: int


@dataclass
class Err:
    value: str


@dataclass
class Flattened:
    head: int
    left: int
    right: int
    x: int
    y: int


@dataclass
class Options:
    some: int | None
    some_zero: int | None
    none: int | None
    some_empty_text: str | None
    none_text: str | None
    some_pair: Pair | None
    list: "list[int | None]"


@dataclass
class Range:
    start: int
    end: int


@dataclass
class Duration:
    secs: int
    nanos: int


@dataclass
class RangesTuples:
    range: Range
    tuple: tuple[int, int, str]
    nested: list[list[int]]
    empty: list[int]
    unit: None
    duration: Duration


@dataclass
class Skips:
    kept: int
    other_name: int = field(metadata={"name": "other-name"})


def typed_floats(values: dict[str, Any]) -> dict[str, Any]:
    """JSON has the shortest digits that tell a 32-bit float from the others of that size."""
    return {name: (np.float32 if name.startswith("f32") else float)(value) for name, value in values.items()}


@dataclass
class Region:
    guest_base: int
    size: int
    data_ranges: list[Range]


@dataclass
class MemoryMetadata:
    regions: list[Region]
    compressed: bool


TYPES: dict[str, Any] = {
    "bool_false": bool,
    "bool_true": bool,
    "devices/block0": Device,
    "devices/vcpu/vcpu0": Pair,
    "devices/vcpu/vcpu1": Pair,
    "empty_struct": Empty,
    "mem_metadata": MemoryMetadata,
    "newtype_of_struct": NewtypeStruct,
    "newtype_struct": Newtype,
    "numbers/floats": typed_floats,
    "numbers/floats_special": dict[str, float],
    "numbers/ints": dict[str, int],
    "numbers/vectors/vec_10000_u32": list[int],
    "numbers/vectors/vec_empty": list[int],
    "numbers/vectors/vec_small_ints": list[int],
    "numbers/wide_ints": dict[str, int],
    "option_none": int | None,
    "option_some": int | None,
    "shapes/blobs": Blobs,
    "shapes/enums/internally_tagged": list[PlainVariant | FieldsVariant],
    "shapes/enums/newtype_text_variant": Kind,
    "shapes/enums/newtype_unit_variant": Kind,
    "shapes/enums/newtype_variant": Kind,
    "shapes/enums/result_ok_err": list[Ok | Err],
    "shapes/enums/struct_variant": Kind,
    "shapes/enums/tuple_variant": Kind,
    "shapes/enums/unit_variant": Kind,
    "shapes/enums/vec_of_variants": list[Kind],
    "shapes/flattened": Flattened,
    "shapes/map_string_u64": dict[str, int],
    "shapes/map_u32_string": dict[int, str],
    "shapes/maps": Maps,
    "shapes/options": Options,
    "shapes/ranges_tuples": RangesTuples,
    "shapes/skips": Skips,
    "shapes/strings": dict[str, str],
    "string_unicode": str,
    "tuple_struct": TupleStruct,
    # None itself asks for no type.
    "unit_struct": type(None),
    "unit_value": type(None),
}


def as_variant(value: Any) -> Any:
    """A value of a union of classes as serde has it: the variant's name, alone or with its data."""
    if isinstance(value, (Unit, Newtype, NewtypeText, NewtypeUnit, Tuple, Struct, Ok, Err)):
        name = type(value).__name__
        if isinstance(value, Unit):
            return name
        if isinstance(value, Tuple):
            return {name: list(value)}
        return {name: {"id": value.id, "label": value.label} if isinstance(value, Struct) else value.value}
    if isinstance(value, NewtypeStruct):
        return value.pair
    return value


def test_every_value_is_built_into_the_types_that_rust_has(golden: Golden) -> None:
    for path, entry in fragments(golden):
        if path == "numbers/floats_special" and "decoded" in entry:
            # JSON has null for all of them; crosvm cannot read it back either.
            with pytest.raises(vmsnap.CorruptSnapshotError, match=r"floats_special.*expected float, found nothing"):
                golden.value(path, TYPES[path])
            continue
        value = golden.value(path, TYPES[path])
        if path == "devices/block0":
            value.children.kind = as_variant(value.children.kind)
        elif path.startswith("shapes/enums/"):
            value = [as_variant(item) for item in value] if isinstance(value, list) else as_variant(value)
        elif path == "newtype_of_struct":
            value = value.pair
        elif path == "newtype_struct":
            value = value.value
        elif path == "tuple_struct":
            value = [value.number, value.name, value.flag]
        expected = entry["value"]
        found = rendered(value, path)
        if path == "shapes/maps":
            # Maps of no entries are lists there, or maps, as they come.
            assert (expected["nested"].pop("two"), found["nested"].pop("two")) == ([], {})
        assert identical(found, expected), path


def test_a_plain_snapshot_of_ours_has_nothing_at_its_root_but_its_own_fragments(tmp_path: Path) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
    writer.write_fragment("clock", 12)
    writer.add_namespace("vcpu").write_fragment("vcpu0", {"left": 1})
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        "vm1",
        "vm1/clock",
        "vm1/vcpu",
        "vm1/vcpu/vcpu0",
    ]
