"""Values written and read: every kind in both formats, what `type=` builds, and what is refused."""

import mmap
import pickle
from collections import OrderedDict, deque, namedtuple
from collections.abc import Callable
from dataclasses import InitVar, dataclass, field
from datetime import UTC, date, datetime, timedelta, timezone
from enum import Enum, IntEnum, IntFlag, StrEnum
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal, NamedTuple, NewType, Optional, TypedDict
from uuid import UUID

import numpy as np
import numpy.typing as npt
import pytest
import vmsnap
from hypothesis import given
from hypothesis import strategies as st
from independent import check_independently
from refusals import refused, refused_elsewhere
from support import Place, run_python_well, tree, write
from vmsnap.serialization import decode, encode


class Color(Enum):
    RED = "red"
    TWO = 2


class Level(IntEnum):
    HIGH = 5


class Word(StrEnum):
    HELLO = "hello"


class Flags(IntFlag):
    A = 1
    B = 2


Point = namedtuple("Point", "x y")
AN_ID = UUID("12345678-1234-5678-1234-567812345678")
MOMENT = datetime(2026, 11, 23, 1, 2, 3, 4, tzinfo=UTC)


@dataclass
class Regs:
    rip: int
    gdt: bytes = b""
    renamed: int = field(default=0, metadata={"name": "other-name"})


# Value, its CBOR in hex, and what is read.
CBOR: list[tuple[Any, str, Any]] = [
    # RFC 8949, appendix A
    (0, "00", 0),
    (23, "17", 23),
    (24, "1818", 24),
    (1000000000000, "1b000000e8d4a51000", 1000000000000),
    (18446744073709551616, "c249010000000000000000", 18446744073709551616),
    (-18446744073709551616, "3bffffffffffffffff", -18446744073709551616),
    (-18446744073709551617, "c349010000000000000000", -18446744073709551617),
    (-1000, "3903e7", -1000),
    (1.1, "fb3ff199999999999a", 1.1),
    (False, "f4", False),
    (None, "f6", None),
    (b"\1\2\3\4", "4401020304", b"\1\2\3\4"),
    ("\u6c34", "63e6b0b4", "\u6c34"),
    ([1, [2, 3]], "8201820203", [1, [2, 3]]),
    ({1: 2, 3: 4}, "a201020304", {1: 2, 3: 4}),
    ({"a": 1, "b": [2, 3]}, "a26161016162820203", {"a": 1, "b": [2, 3]}),
    # what Python has
    ((1, "a"), "82016161", [1, "a"]),
    (bytearray(b"a"), "4161", b"a"),
    (memoryview(b"abcd")[::2], "426163", b"ac"),
    ([memoryview(b"a")], "814161", [b"a"]),
    (memoryview(np.arange(2, dtype="i4")), "820001", [0, 1]),
    (deque([1]), "8101", [1]),
    (range(2), "820001", [0, 1]),
    (OrderedDict(a=1), "a1616101", {"a": 1}),
    (MappingProxyType({"a": 1}), "a1616101", {"a": 1}),
    ({(1, "a"): True, b"k": None}, "a2820161 61f5416bf6", {(1, "a"): True, b"k": None}),
    (Color.RED, "63726564", "red"),
    ({Color.TWO: Level.HIGH}, "a10205", {2: 5}),
    (Word.HELLO, "6568656c6c6f", "hello"),
    (Flags.A | Flags.B, "03", 3),
    (Point(1, 2), "820102", [1, 2]),
    (Regs(1, b"a", 7), "a36372697001636764744161 6a6f746865722d6e616d6507", {"rip": 1, "gdt": b"a", "other-name": 7}),
    ({3, 1, 2}, "d9010283010203", {1, 2, 3}),
    ({"b", "a", "c"}, "d90102836161616261 63", {"a", "b", "c"}),
    (frozenset({(1, 2)}), "d9010281820102", {(1, 2)}),
    (AN_ID, "d82550" + AN_ID.hex, AN_ID),
    (MOMENT, "c0781b" + b"2026-11-23T01:02:03.000004Z".hex(), MOMENT),
    (date(2026, 11, 23), "d903ec6a" + b"2026-11-23".hex(), date(2026, 11, 23)),
    (Path("/a/b"), "642f612f62", "/a/b"),
    (np.float32(1.5), "fb3ff8000000000000", 1.5),
    (np.int64(-1), "20", -1),
    (np.True_, "f5", True),
    (np.str_("a"), "6161", "a"),
]


@pytest.mark.parametrize(("value", "written", "read"), CBOR, ids=lambda value: str(value)[:30])
def test_a_value_is_written_in_cbor_as_the_standards_say_and_read_back(value: Any, written: str, read: Any) -> None:
    assert encode(value).hex() == written.replace(" ", "")
    found = decode(encode(value))
    assert found == read
    assert type(found) is type(read)


# Value, its JSON, and what is read.
JSON: list[tuple[Any, str, Any]] = [
    ({"ä": [1, -1.5, None, True, "\n"]}, '{"ä":[1,-1.5,null,true,"\\n"]}', {"ä": [1, -1.5, None, True, "\n"]}),
    (b"\0\xff", "[0,255]", [0, 255]),
    ({1: 3, "a": 4}, '{"1":3,"a":4}', {"1": 3, "a": 4}),
    ({False: 0}, '{"false":0}', {"false": 0}),
    ([2**100], "[1267650600228229401496703205376]", [2**100]),
    ({"b", "a"}, '["a","b"]', ["a", "b"]),
    (AN_ID, f'"{AN_ID}"', str(AN_ID)),
    (MOMENT, '"2026-11-23T01:02:03.000004+00:00"', "2026-11-23T01:02:03.000004+00:00"),
    (np.array([[1, 2]], dtype="u1"), "[[1,2]]", [[1, 2]]),
    (Regs(1, b"a"), '{"rip":1,"gdt":[97],"other-name":0}', {"rip": 1, "gdt": [97], "other-name": 0}),
]


@pytest.mark.parametrize(("value", "written", "read"), JSON, ids=lambda value: str(value)[:30])
def test_a_value_is_written_in_json_as_serde_writes_it_and_read_back(value: Any, written: str, read: Any) -> None:
    assert encode(value, format="json") == written.encode()
    assert decode(written.encode()) == read


ARRAYS = [
    *(np.arange(6, dtype=dtype) for dtype in ("u1", "<u2", ">u2", "<u4", ">u4", "<u8", ">u8")),
    *(np.arange(-3, 3, dtype=dtype) for dtype in ("i1", "<i2", ">i2", "<i4", ">i4", "<i8", ">i8")),
    *(np.linspace(-1, 1, 6).astype(dtype) for dtype in ("<f2", ">f2", "<f4", ">f4", "<f8", ">f8")),
    np.arange(6).reshape(2, 3),
    np.asfortranarray(np.arange(6).reshape(2, 3)),
    np.arange(12).reshape(3, 4)[::2, ::-1],
    np.zeros((0, 3)),
    np.array(5),
    np.array([np.nan, -0.0, np.inf]),
]


@pytest.mark.parametrize("array", ARRAYS, ids=lambda array: f"{array.dtype.str}{array.shape}")
def test_an_array_keeps_its_type_its_shape_and_every_bit(array: npt.NDArray[Any]) -> None:
    found = decode(encode({"a": array}))["a"]
    assert (found.dtype, found.shape) == (array.dtype, array.shape)
    assert found.tobytes() == array.tobytes()
    assert found.flags.writeable
    as_list = decode(encode(array, as_list=True))
    np.testing.assert_array_equal(as_list, array) if array.size else None
    assert isinstance(as_list, list) or array.ndim == 0


def test_the_tag_of_an_array_is_that_of_rfc_8746() -> None:
    assert encode(np.array([1], dtype="<u4")).hex() == "d8464401000000"
    assert encode(np.array([1.0], dtype=">f8")).hex() == "d852483ff0000000000000"
    assert encode(np.array([[1, 2]], dtype="u1")).hex() == "d82882820102d840420102"
    # By columns, and clamped, as others may write.
    np.testing.assert_array_equal(decode(bytes.fromhex("d9041082820202d8404401020304")), [[1, 3], [2, 4]])
    np.testing.assert_array_equal(decode(bytes.fromhex("d844420102")), [1, 2])


def test_a_set_is_written_alike_in_every_process() -> None:
    script = "from vmsnap.serialization import encode; print(encode({str(i) for i in range(50)}).hex())"
    assert len({run_python_well(script, PYTHONHASHSEED=str(seed)) for seed in range(4)}) == 1


def test_a_mapped_file_is_written_as_bytes() -> None:
    memory = mmap.mmap(-1, 4096)
    memory[:2] = b"ab"
    assert decode(encode({"ram": memory})) == {"ram": b"ab" + bytes(4094)}


def test_default_is_asked_for_what_nobody_knows() -> None:
    def default(value: object) -> object:
        if isinstance(value, complex):
            return {"re": value.real, "im": {value.imag}}
        raise TypeError("unknown")

    assert decode(encode([1 + 2j], default=default)) == [{"re": 1.0, "im": {2.0}}]
    with pytest.raises(TypeError, match="unknown"):
        encode(object(), default=default)
    with pytest.raises(vmsnap.SerializationError, match="contains itself"):
        encode(object(), default=lambda value: value)


SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), st.text(), st.binary(), st.uuids(), st.dates()
)
KEYS = st.one_of(st.text(), st.integers(), st.binary())
VALUES = st.recursive(
    SCALARS, lambda inner: st.one_of(st.lists(inner), st.dictionaries(KEYS, inner), st.sets(KEYS)), max_leaves=30
)


@given(VALUES)
def test_any_value_reads_back_as_it_was_written(value: Any) -> None:
    data = encode(value)
    assert decode(data) == value
    assert encode(decode(data)) == data


@pytest.fixture(params=["plain", "encrypted"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Place:
    return Place(tmp_path / "vm1", vmsnap.generate_key() if request.param == "encrypted" else None)


@pytest.mark.parametrize("format", ["cbor", "json"])
def test_fragments_hold_values_and_are_read_without_being_told_the_format(place: Place, format: Any) -> None:
    writer = vmsnap.SnapshotWriter(place.root, key=place.key, format=format)
    assert pickle.loads(pickle.dumps(writer.add_namespace("vcpu"))).format == writer.format == format
    values = {"a": {"ns": 12, "big": "x" * 300_000}, "b": None, "c": True, "d": "text", "e": [], "f": {}}
    for name, value in values.items():
        writer.write_fragment(name, value)
    reader = place.open()
    assert {name: reader.read_fragment(name) for name in reader.list_fragments()} == values
    check_independently(place.root, place.key)
    writer.write_fragment("number", 70)
    assert reader.read_fragment("number", format=format) == 70


def test_minus_three_is_not_a_text_in_json(place: Place) -> None:
    writer = place.create()
    for number in range(-300, 300):
        writer.write_fragment(str(number), number)
        assert place.open().read_fragment(str(number), int) == number


# What cannot be written ----------------------------------------------------------------------------------------------

CYCLE: list[Any] = []
CYCLE.append(CYCLE)


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


UNWRITABLE: list[tuple[Any, str]] = [
    (object(), "no way to write a value of type object: convert it, or give default="),
    ({"a": [1, {"b": object()}]}, r"at a\[1\]\.b: there is no way"),
    (Regs(rip=object()), "at rip: there is no way"),  # type: ignore[arg-type]
    (CYCLE, "contains itself"),
    (nested(128), "deeper than 127 levels"),
    ({float("nan"): 1}, "NaN cannot be a key"),
    ({np.float64("nan")}, "NaN cannot be a key"),
    ({"a": "\ud800"}, "surrogates not allowed"),
    ({"\udc00": 1}, "surrogates not allowed"),
    (Path("/\udcff"), "surrogates not allowed"),
    (datetime(2026, 1, 1), "without a time zone"),
    (np.array([1j]), "no typed array for dtype complex128"),
    (np.array([True]), "no typed array for dtype bool"),
    (np.ma.masked_array([1], [True]), "no way to write a value of type numpy.ma"),
    ({Color.TWO: 1, 2: 2}, "two of its keys are the same"),
    ({Color.TWO, 2}, "two members of a set are the same"),
    ({object()}, "as a key or member of a set"),
    (Regs, "no way to write a value of type type"),
    (1j, "no way to write a value of type complex"),
]


@pytest.mark.parametrize(("value", "message"), UNWRITABLE, ids=lambda value: str(value)[:30])
def test_what_cannot_be_written_is_told_before_a_file_exists(place: Place, value: Any, message: str) -> None:
    writer = place.create()
    with refused("unwritable-value", f"value for 'odd' cannot be serialized.*{message}", place.root.parent):
        writer.write_fragment("odd", value)
    writer.write_fragment("odd", 1)


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([float("nan")], "not JSON compliant"),
        ({(1, 2): 3}, "use CBOR"),
        ({1: 2, "1": 3}, "two of its keys"),
        (10**400, "number out of range"),
        (nested(128), "deeper"),
    ],
)
def test_what_json_does_not_have_is_refused(tmp_path: Path, value: Any, message: str) -> None:
    writer = vmsnap.SnapshotWriter(tmp_path / "vm1", format="json")
    with refused("unwritable-value", message, tmp_path):
        writer.write_fragment("odd", value)


def test_127_levels_are_written_and_read_in_both_formats() -> None:
    for format in ("cbor", "json"):
        assert decode(encode(nested(127), format=format)) == nested(127)  # type: ignore[arg-type]


def test_a_format_is_cbor_or_json(place: Place, tmp_path: Path) -> None:
    place.create().write_fragment("a", 1)
    for call in (
        lambda: vmsnap.SnapshotWriter(tmp_path / "vm2", format="yaml"),  # type: ignore[arg-type]
        lambda: place.open().read_fragment("a", format="CBOR"),  # type: ignore[call-overload]
    ):
        with refused("format-name", 'format is "cbor" or "json"', tmp_path):
            call()


# type= ---------------------------------------------------------------------------------------------------------------


@dataclass
class Node:
    value: int
    children: list["Node"]
    name: Optional[str]  # noqa: UP045
    extra: dict[str, "Node"] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Strict:
    a: int
    made: InitVar[int] = 0
    derived: int = field(init=False, default=1)


class Pair(NamedTuple):
    first: int
    second: str = "x"


class Typed(TypedDict, total=False):
    a: int


@dataclass
class Unit:
    pass


@dataclass
class Newtype:
    regs: dict[str, int]


@dataclass
class Tagged:
    type: Literal["Tagged"]
    id: int


@dataclass
class Other:
    type: Literal["Other"]
    id: str


Handle = NewType("Handle", int)

BUILT: list[tuple[Any, Any, Any]] = [
    ({"value": 1, "children": [{"value": 2, "children": []}]}, Node, Node(1, [Node(2, [], None)], None)),
    ({"rip": 1, "gdt": [1, 2], "other-name": 3, "more": 4}, Regs, Regs(1, b"\1\2", 3)),
    ([1, [2]], Regs, Regs(1, b"\2")),
    ({"a": 5}, Strict, Strict(a=5)),
    ([1], tuple[int, ...], (1,)),
    ([1, "a"], Pair, Pair(1, "a")),
    ({"first": 1}, Pair, Pair(1)),
    ({"a": 1, "b": 2}, Typed, {"a": 1}),
    (None, Unit, Unit()),
    ({}, Unit, Unit()),
    ([], type(None), None),
    ({"a": 1}, Newtype, Newtype({"a": 1})),
    (5, Handle, 5),
    (5, Annotated[int, "unit"], 5),
    (5, float, 5.0),
    ([1, 2, 2], set[int], {1, 2}),
    ([1, "a"], tuple[int, str], (1, "a")),
    ({"1": True, "-2": False}, dict[int, bool], {1: True, -2: False}),
    ({"true": 1}, dict[bool, int], {True: 1}),
    ({"red": 1, "TWO": 2}, dict[Color, int], {Color.RED: 1, Color.TWO: 2}),
    ("red", Color, Color.RED),
    ("TWO", Color, Color.TWO),
    (3, Flags, Flags.A | Flags.B),
    ([0, 255], bytes, b"\0\xff"),
    (b"a", bytearray, bytearray(b"a")),
    (np.array([1, 2], dtype="u1"), bytes, b"\1\2"),
    (str(AN_ID), UUID, AN_ID),
    (AN_ID.bytes, UUID, AN_ID),
    ("2026-11-23T01:02:03.000004Z", datetime, MOMENT),
    ("2026-11-23", date, date(2026, 11, 23)),
    ("/a", Path, Path("/a")),
    (None, int | None, None),
    ("x", int | str, "x"),
    ("Unit", Unit | Regs, Unit()),
    ({"Regs": {"rip": 1}}, Unit | Regs, Regs(1)),
    ({"rip": 1}, Unit | Regs, Regs(1)),
    ({"type": "Other", "id": "a"}, Tagged | Other, Other("Other", "a")),
    ({"type": "Tagged", "id": 1}, Tagged | Other, Tagged("Tagged", 1)),
    ([1, None, "a"], list[int | str | None], [1, None, "a"]),
    ({"a": 1}, dict, {"a": 1}),
    ([1], Any, [1]),
    ("a", Literal["a", "b"], "a"),
    (12, lambda value: value + 1, 13),
]


@pytest.mark.parametrize(("value", "kind", "built"), BUILT, ids=lambda v: str(v)[:40])
def test_a_type_is_built_of_what_serde_would_write_for_it(value: Any, kind: Any, built: Any) -> None:
    found = decode(encode(value), kind)
    assert found == built
    assert type(found) is type(built)


def test_arrays_are_built_of_arrays_and_lists() -> None:
    array = decode(encode([1, 2]), npt.NDArray[np.uint8])
    assert array.dtype == np.uint8
    assert decode(encode(np.ones(2, dtype="f4")), np.ndarray).dtype == np.float32
    for value, kind in [([300], npt.NDArray[np.uint8]), ([1.5], npt.NDArray[np.int64]), (["a"], npt.NDArray[np.int64])]:
        with pytest.raises(vmsnap.CorruptSnapshotError, match="expected an array of"):
            decode(encode(value), kind)


MISMATCHES: list[tuple[Any, Any, str]] = [
    (
        {"value": 1, "children": [{"value": "secret", "children": []}]},
        Node,
        r"at children\[0\]\.value: expected int, found str$",
    ),
    ({"value": 1}, Node, "Node lacks 'children'"),
    (True, int, "expected int, found bool"),
    (1.0, int, "expected int, found float"),
    (1, bool, "expected bool, found int"),
    (None, int, r"expected int, found nothing \(null\)"),
    ([1, "a"], bytes, "expected bytes, found list"),
    ([256], bytes, "expected bytes"),
    ({"a": 1}, list[int], "expected a list, found dict"),
    ([1], tuple[int, str], "expected a list of 2"),
    ("green", Color, "expected a value or name of Color"),
    ("c", Literal["a", "b"], "expected one of 'a', 'b'"),
    ({"x": {"1": "a"}}, dict[str, dict[int, int]], r"at x\['1'\]: expected int"),
    ({"Nope": 1}, Unit | Regs, "expected a value for one member of the union"),
    ("not-a-uuid", UUID, "expected UUID"),
]


@pytest.mark.parametrize(("value", "kind", "message"), MISMATCHES, ids=lambda value: str(value)[:40])
def test_a_value_of_another_type_is_refused_by_its_place(place: Place, value: Any, kind: Any, message: str) -> None:
    place.create().add_namespace("vcpu").write_fragment("odd", value)
    message = f'(?s)fragment "odd" in namespace "vcpu" of .*is not of the type asked for: .*{message}'
    with refused("other-type", message, place.root.parent):
        place.open().namespace("vcpu").read_fragment("odd", kind)


def test_what_a_callable_raises_is_passed_on_with_the_fragment_named(place: Place) -> None:
    def refuse(value: object) -> object:
        raise KeyError("mine")

    place.create().write_fragment("a", {"b": 1})
    for kind in (refuse, dict[str, refuse]):  # type: ignore[valid-type]
        with pytest.raises(KeyError, match="mine") as caught:
            place.open().read_fragment("a", kind)
        assert 'fragment "a"' in caught.value.__notes__[0]


def test_what_nobody_can_build_is_refused_before_anything_is_read(place: Place) -> None:
    place.create()
    with refused("unknown-type", "no way to build 'int'", place.root.parent):
        place.open().read_fragment("missing", "int")


# Fragments that hold something else ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "format", "message"),
    [
        (b"", None, "cut off, at byte 0"),
        (b"\x82\x01", None, "declares 2 items, and 1 bytes are left, at byte 0"),
        (b"\x9b" + b"\xff" * 8, None, "declares 18446744073709551615 items"),
        (b"\x01\x01", None, "bytes follow its end, at byte 1"),
        (b"\x81" * 128 + b"\x01", None, "deeper than 127 levels, at byte 127"),
        (b"\x81" * 10**6, None, "deeper than 127 levels"),
        (b"\xa2\x01\x02\x01\x03", None, "Duplicate map key: 1.* byte 5"),
        (b"\xd8\x1c\x81\xd8\x1d\x00", None, "tag 28 is none that vmsnap knows, at byte 0"),
        (b"\x81\xd8\x23\x61a", None, "tag 35 is none that vmsnap knows, at byte 1"),
        (b"\xa1\xf9\x7e\x00\x01", None, r"a key is not a number \(NaN\), at byte 1"),
        (b"\x63\xed\xa0\x80", None, "not UTF-8, at byte 0"),
        (b"\xf7", None, "simple value"),
        (b"\xc0\x61a", None, "string-form datetime.* byte 3"),
        (b"\xd9\x01\x02\x82\x01\x01", None, "a set has a member twice.* byte 6"),
        (b"\xd8\x28\x82\x81\x03\xd8\x40\x42ab", None, "reshape"),
        (b'{"a":1,"a":2}', None, 'key "a" comes twice, at byte 9'),
        (b'["\\ud800"]', None, "hex escape, at byte 8"),
        (b"[1e999]", None, "number out of range"),
        (b"[NaN]", None, "expected value, at byte 1"),
        (b"[" * 10**6, None, "recursion limit exceeded, at byte 127"),
        (b"{}{}", None, "trailing characters, at byte 2"),
        (b"9" * 10**6, "json", "number out of range"),
    ],
    ids=lambda value: repr(value)[:30],
)
def test_what_is_no_value_is_refused_by_its_byte(place: Place, content: bytes, format: Any, message: str) -> None:
    write(place.create().add_namespace("devices"), "odd", content)
    message = f'fragment "odd" in namespace "devices" of .*does not hold a serialized value: .*{message}'
    with refused("no-value", message, place.root.parent):
        place.open().namespace("devices").read_fragment("odd", format=format)


def test_no_prefix_of_a_value_is_a_value() -> None:
    value = {"a": [1, b"bytes", "text", 1.5, {2: np.arange(3), 3: AN_ID}], "b": {1, 2}, "c": MOMENT, "d": 2**70}
    data = encode(value)
    for length in range(len(data)):
        with pytest.raises(vmsnap.CorruptSnapshotError, match="at byte"):
            decode(data[:length], format="cbor")


@given(st.binary(max_size=200), st.sampled_from([None, "cbor", "json"]))
def test_any_bytes_are_a_value_or_corrupt(data: bytes, format: Any) -> None:
    try:
        value = decode(data, format=format)
    except vmsnap.CorruptSnapshotError:
        return
    encode(value)


def test_a_fragment_larger_than_allowed_is_refused_unread(place: Place) -> None:
    place.create().write_fragment("a", "x" * 100)
    assert place.open().read_fragment("a", max_size_bytes=102) == "x" * 100
    with refused("large-value", "102 bytes are too many for a value: raise max_size_bytes", place.root.parent):
        place.open().read_fragment("a", max_size_bytes=101)


def test_arrays_without_numpy_say_what_is_missing(tmp_path: Path) -> None:
    vmsnap.SnapshotWriter(tmp_path / "vm1").write_fragment("a", np.arange(3))
    call = "sys.modules['numpy'] = None\nvmsnap.SnapshotReader(sys.argv[1]).read_fragment('a')"
    refused_elsewhere("no-numpy", r"need numpy: pip install 'vmsnap\[numpy\]'", tmp_path, call, tmp_path / "vm1")


def test_a_bad_name_or_a_name_in_use_leaves_everything_as_it_is(place: Place) -> None:
    writer = place.create()
    writer.write_fragment("a", 1)
    before = tree(place.root)
    calls: list[tuple[Callable[[], None], type[Exception]]] = [
        (lambda: writer.write_fragment("a", 2), FileExistsError),
        (lambda: writer.write_fragment("../b", 2), vmsnap.InvalidArgumentError),
    ]
    for call, kind in calls:
        with pytest.raises(kind):
            call()
    assert tree(place.root) == before


def test_a_time_zone_with_seconds_is_written_in_utc() -> None:
    moment = datetime(1900, 1, 1, tzinfo=timezone(timedelta(seconds=3208)))
    assert decode(encode(moment)) == moment
