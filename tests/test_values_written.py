"""Values as fragments: the bytes for each kind, and the same value after reading in both formats."""

import array
import collections
import ctypes
import dataclasses
import datetime as dt
import enum
import math
import mmap
import pickle
import types
import uuid
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
import pytest
import vmsnap
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as numpy_st
from independent import check_independently
from support import Place, read, run_python_well, temporary_place, tree, write
from vmsnap.serialization import decode, encode

UTC = dt.UTC
ID = uuid.UUID("0123456789abcdef0123456789abcdef")
NOON = dt.datetime(2013, 3, 21, 20, 4, tzinfo=UTC)
NESTED_IN = 127


class Text(str): ...


class Whole(int): ...


class Real(float): ...


class Octets(bytes): ...


class Moment(dt.datetime): ...


class Subarray(np.ndarray): ...


class Colour(enum.Enum):
    RED = "red"
    ONE = 1
    PAIR = (1, 2)


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Level(enum.IntEnum):
    LOW = 1


class Point(NamedTuple):
    x: int
    y: int


@dataclasses.dataclass
class Segment:
    base: int
    kind: str = dataclasses.field(default="data", metadata={"name": "type"})


@dataclasses.dataclass
class Holder:
    content: Any


@dataclasses.dataclass
class Ambiguous:
    kind: int = dataclasses.field(metadata={"name": "type"})
    type: int


def nested(levels: int, inner: Any = 1, around: Callable[[Any], Any] = lambda value: [value]) -> Any:
    for _ in range(levels):
        inner = around(inner)
    return inner


def matrix(order: str = "C") -> np.ndarray:
    return np.array([[1, 2, 3], [4, 5, 6]], dtype="u1", order=order)


# Bytes that a standard defines ----------------------------------------------------------------------------------------

# RFC 8949, appendix A, without values that cbor2 writes in another allowed way (short floats), and with dates.
RFC_8949 = {
    "00": 0,
    "17": 23,
    "1818": 24,
    "1903e8": 1000,
    "1a000f4240": 1000000,
    "1b000000e8d4a51000": 1000000000000,
    "1bffffffffffffffff": 18446744073709551615,
    "c249010000000000000000": 18446744073709551616,
    "3bffffffffffffffff": -18446744073709551616,
    "c349010000000000000000": -18446744073709551617,
    "20": -1,
    "3903e7": -1000,
    "fb3ff199999999999a": 1.1,
    "fb7e37e43c8800759c": 1.0e300,
    "fbc010666666666666": -4.1,
    "f97c00": math.inf,
    "f9fc00": -math.inf,
    "f4": False,
    "f5": True,
    "f6": None,
    "c074323031332d30332d32315432303a30343a30305a": NOON,
    "40": b"",
    "4401020304": b"\1\2\3\4",
    "60": "",
    "6449455446": "IETF",
    "62225c": '"\\',
    "62c3bc": "ü",
    "64f0908591": "\U00010151",
    "80": [],
    "8301820203820405": [1, [2, 3], [4, 5]],
    "98190102030405060708090a0b0c0d0e0f101112131415161718181819": list(range(1, 26)),
    "a0": {},
    "a201020304": {1: 2, 3: 4},
    "a26161016162820203": {"a": 1, "b": [2, 3]},
    "a56161614161626142616361436164614461656145": {"a": "A", "b": "B", "c": "C", "d": "D", "e": "E"},
    # RFC 8943, and the registrations of the tags 37 and 258.
    "d903ec6a323031332d30332d3231": dt.date(2013, 3, 21),
    "d825500123456789abcdef0123456789abcdef": ID,
    "d9010283010203": {3, 1, 2},
}


@pytest.mark.parametrize("expected", RFC_8949)
def test_cbor_is_written_as_the_standards_show_it_and_reads_back(expected: str) -> None:
    value = RFC_8949[expected]
    assert encode(value).hex() == expected
    assert decode(bytes.fromhex(expected)) == value
    assert type(decode(bytes.fromhex(expected))) is type(value)


def test_not_a_number_reads_back() -> None:
    assert encode(math.nan).hex() == "f97e00"
    assert math.isnan(decode(encode(math.nan)))


# RFC 8746, table 1; without the clamped bytes and the 128-bit floats.
TYPED_ARRAYS = {
    64: "u1", 65: ">u2", 66: ">u4", 67: ">u8", 69: "<u2", 70: "<u4", 71: "<u8",
    72: "i1", 73: ">i2", 74: ">i4", 75: ">i8", 77: "<i2", 78: "<i4", 79: "<i8",
    80: ">f2", 81: ">f4", 82: ">f8", 84: "<f2", 85: "<f4", 86: "<f8",
}  # fmt: skip


@pytest.mark.parametrize("tag", TYPED_ARRAYS)
def test_an_array_is_the_typed_array_of_its_dtype_and_keeps_its_shape(tag: int) -> None:
    flat = np.arange(6, dtype=TYPED_ARRAYS[tag])
    elements = bytes([0xD8, tag, *([0x40 + flat.nbytes] if flat.nbytes < 24 else [0x58, flat.nbytes])]) + flat.tobytes()
    assert encode(flat) == elements
    assert encode(flat.reshape(2, 3)) == bytes.fromhex("d82882820203") + elements
    for value in (flat, flat.reshape(3, 1, 2), flat[0:1].reshape(()), flat[:0], flat[:0].reshape(0, 3)):
        back = decode(encode(value))
        assert (back.dtype, back.shape) == (value.dtype, value.shape)
        np.testing.assert_array_equal(back, value)
        assert back.flags.writeable


def test_the_order_in_memory_does_not_show(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(matrix().tobytes())
    mapped = np.memmap(tmp_path / "file", dtype="u1", mode="r", shape=(2, 3))
    wide = np.repeat(matrix(), 2, axis=1)[:, ::2]
    same = [matrix("F"), wide, matrix()[::-1][::-1], mapped]
    assert {encode(value) for value in same} == {encode(matrix())} == {bytes.fromhex("d82882820203d84046010203040506")}
    np.testing.assert_array_equal(decode(bytes.fromhex("d9041082820203d84046010402050306")), matrix())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (matrix(), [[1, 2, 3], [4, 5, 6]]),
        (np.array([True, False]), [True, False]),
        (np.array(["a", "é"]), ["a", "é"]),
        (np.array([2**64 - 1], dtype="u8"), [2**64 - 1]),
        (np.array([1, "a", None], dtype=object), [1, "a", None]),
        (np.array(5), 5),
        (np.zeros((0, 3)), []),
    ],
)
def test_arrays_are_lists_where_asked_for_and_in_json(value: np.ndarray, expected: Any) -> None:
    assert decode(encode({"a": value}, as_list=True)) == {"a": expected}
    assert decode(encode({"a": value}, format="json")) == {"a": expected}


# The output of serde_json.
JSON = [
    (None, "null"),
    (True, "true"),
    (-1, "-1"),
    (2**64, "18446744073709551616"),
    (1.0, "1.0"),
    (-0.0, "-0.0"),
    (1.5, "1.5"),
    ("é\U0001d11e\u2028/", '"é\U0001d11e\u2028/"'),
    ('"\\\n\t\x08\x0c\r\x00\x1f\x7f', '"\\"\\\\\\n\\t\\b\\f\\r\\u0000\\u001f\x7f"'),
    (b"\0\xff", "[0,255]"),
    ([1, [2, {}], []], "[1,[2,{}],[]]"),
    ({"b": 1, "a": None}, '{"b":1,"a":null}'),
    ({1: 2, -3: 4, 2**70: 6, False: 7}, '{"1":2,"-3":4,"1180591620717411303424":6,"false":7}'),
    ({np.bool_(True): 1, np.uint8(3): 2}, '{"true":1,"3":2}'),
    ({Level.LOW: 1, Colour.RED: 2, ID: 3}, f'{{"1":1,"red":2,"{ID}":3}}'),
    ({"bb", "a"}, '["a","bb"]'),
    (ID, f'"{ID}"'),
    (NOON, '"2013-03-21T20:04:00+00:00"'),
    (dt.date(2013, 3, 21), '"2013-03-21"'),
    (Segment(1), '{"base":1,"type":"data"}'),
]


@pytest.mark.parametrize(("value", "expected"), JSON)
def test_json_is_written_as_serde_json_does(value: Any, expected: str) -> None:
    assert encode(value, format="json").decode() == expected


# Kinds without a form of their own, and the kinds that they are written as.
ALIKE: list[tuple[Any, Any]] = [
    ((1, (2,)), [1, [2]]),
    (Point(1, 2), [1, 2]),
    (collections.deque([1, 2]), [1, 2]),
    (range(3), [0, 1, 2]),
    (collections.UserList([1]), [1]),
    (collections.UserString("abc"), "abc"),
    (collections.OrderedDict(b=1, a=[2]), {"b": 1, "a": [2]}),
    (collections.Counter("aab"), {"a": 2, "b": 1}),
    (collections.ChainMap({"a": 1}), {"a": 1}),
    (types.MappingProxyType({"a": 1}), {"a": 1}),
    (Segment(1, "code"), {"base": 1, "type": "code"}),
    (Holder([Holder(None)]), {"content": [{"content": None}]}),
    (Colour.RED, "red"),
    (Colour.PAIR, [1, 2]),
    (Access.READ | Access.WRITE, 3),
    (Level.LOW, 1),
    (Text("a"), "a"),
    (Whole(5), 5),
    (Real(1.5), 1.5),
    (Octets(b"a"), b"a"),
    (bytearray(b"ab"), b"ab"),
    (memoryview(b"abcd")[::2], b"ac"),
    (memoryview(b"ab").cast("c"), b"ab"),
    (memoryview(bytes(6)).cast("B", (2, 3)), [[0, 0, 0], [0, 0, 0]]),
    (memoryview(array.array("H", [1, 2])), [1, 2]),
    (memoryview(b"\0\1").cast("?"), [False, True]),
    (array.array("B", [1]), b"\1"),
    (array.array("b", [-1, 1]), [-1, 1]),
    (array.array("d", [1.5]), [1.5]),
    ((ctypes.c_ubyte * 2)(1, 2), b"\1\2"),
    (PurePosixPath("/a/é"), "/a/é"),
    (PureWindowsPath("c:\\x"), "c:\\x"),
    (np.uint64(2**64 - 1), 2**64 - 1),
    (np.float32(1.5), 1.5),
    (np.bool_(True), True),
    (np.str_("a"), "a"),
    (np.bytes_(b"a"), b"a"),
]


@pytest.mark.parametrize(("value", "like"), ALIKE)
@pytest.mark.parametrize("format", ["cbor", "json"])
def test_a_kind_is_written_like_another(value: Any, like: Any, format: Any) -> None:
    assert encode({"a": value}, format=format) == encode({"a": like}, format=format)


def test_a_memory_map_is_its_bytes() -> None:
    with mmap.mmap(-1, 4) as mapped:
        mapped[:] = b"abcd"
        assert encode(mapped) == encode(b"abcd")


def test_keys_are_of_many_kinds() -> None:
    keys = [1, -1, 2**70, "1", b"1", 1.5, None, (1, ("a", b"b")), frozenset({1, (2,)}), ID, NOON, dt.date(2013, 3, 21)]
    value = dict.fromkeys(keys, 0)
    assert decode(encode(value)) == value
    likes = {Level.LOW: 1, np.int64(2): 2, Colour.RED: 3, PurePosixPath("a"): 4, np.str_("b"): 5, Point(1, 2): 6}
    assert decode(encode(likes)) == {1: 1, 2: 2, "red": 3, "a": 4, "b": 5, (1, 2): 6}


@pytest.mark.parametrize("offset", [0, 330, -720])
def test_moments_keep_their_offset(offset: int) -> None:
    zone = dt.timezone(dt.timedelta(minutes=offset))
    for moment in (NOON.astimezone(zone), dt.datetime(1, 1, 1, microsecond=1, tzinfo=zone)):
        back = decode(encode(moment))
        assert (back, back.utcoffset()) == (moment, moment.utcoffset())
        assert dt.datetime.fromisoformat(decode(encode(moment, format="json"))) == moment


def test_an_offset_of_seconds_becomes_utc_which_the_standard_can_write() -> None:
    moment = NOON.astimezone(dt.timezone(dt.timedelta(seconds=30)))
    assert decode(encode(moment)) == moment
    assert decode(encode(moment)).utcoffset() == dt.timedelta(0)


@pytest.mark.parametrize("format", ["cbor", "json"])
def test_equal_values_have_equal_bytes_in_every_process(format: str) -> None:
    script = """
import sys
from vmsnap.serialization import encode
members = [f"name {i}" for i in range(50)]
mixed = [(1, "a"), "c", b"d", 5, None, *members]
value = [set(members), frozenset(mixed)]
if sys.argv[1] == "cbor":
    value += [{frozenset(members): 1}, {frozenset(mixed), (frozenset(members),)}]
print(encode(value, format=sys.argv[1]).hex())
"""
    assert len({run_python_well(script, format, PYTHONHASHSEED=seed) for seed in ("0", "1", "2")}) == 1


def test_what_is_given_is_not_changed_and_shared_parts_are_written_twice() -> None:
    part = [Point(1, 2)]
    value = {"a": part, "b": part, 3: {4: Colour.RED}}
    back = decode(encode(value))
    assert value == {"a": [Point(1, 2)], "b": [Point(1, 2)], 3: {4: Colour.RED}}
    assert back == {"a": [[1, 2]], "b": [[1, 2]], 3: {4: "red"}}
    assert back["a"] is not back["b"]


# Any value ------------------------------------------------------------------------------------------------------------

# Up to where JSON's numbers end, as serde_json reads them.
INTEGERS = st.integers(-(10**308), 10**308)
TEXTS = st.text(st.characters(codec="utf-8"), max_size=10)
OFFSETS = st.integers(-23 * 60, 23 * 60).map(lambda minutes: dt.timezone(dt.timedelta(minutes=minutes)))
KEYS = INTEGERS | TEXTS
ARRAYS = numpy_st.arrays(st.sampled_from(list(TYPED_ARRAYS.values())), numpy_st.array_shapes(min_dims=0, min_side=0))


@dataclasses.dataclass
class Written:
    """A value, and the result of reading it, by format."""

    value: Any
    cbor: Any
    json: Any


def same(value: Any) -> Written:
    return Written(value, value, value)


def _as_json_list(value: np.ndarray) -> Any:
    return value.tolist()


SCALARS = st.one_of(
    (st.none() | st.booleans() | INTEGERS | st.floats(allow_nan=False, allow_infinity=False) | TEXTS).map(same),
    st.binary(max_size=20).map(lambda value: Written(bytearray(value), value, list(value))),
    st.uuids().map(lambda value: Written(value, value, str(value))),
    st.dates().map(lambda value: Written(value, value, value.isoformat())),
    st.datetimes(timezones=OFFSETS).map(lambda value: Written(value, value, value.isoformat())),
    st.sampled_from(Colour).map(lambda member: Written(member, *2 * [decode(encode(member.value))])),
    st.sets(st.integers() | TEXTS, max_size=1).map(lambda value: Written(value, value, list(value))),
    TEXTS.filter(bool).map(PurePosixPath).map(lambda value: Written(value, str(value), str(value))),
    st.integers(0, 2**64 - 1).map(np.uint64).map(lambda value: Written(value, int(value), int(value))),
    ARRAYS.filter(lambda value: bool(np.isfinite(value).all())).map(
        lambda value: Written(value, value, _as_json_list(value))
    ),
)


def _lists(parts: st.SearchStrategy[Written]) -> st.SearchStrategy[Written]:
    def listed(items: list[Written], kind: Callable[[list[Any]], Any]) -> Written:
        return Written(kind([i.value for i in items]), [i.cbor for i in items], [i.json for i in items])

    return st.builds(listed, st.lists(parts, max_size=4), st.sampled_from([list, tuple, collections.deque]))


def _maps(parts: st.SearchStrategy[Written]) -> st.SearchStrategy[Written]:
    def mapped(items: dict[Any, Written], kind: Callable[[dict[Any, Any]], Any]) -> Written:
        return Written(
            kind({key: item.value for key, item in items.items()}),
            {key: item.cbor for key, item in items.items()},
            {str(key): item.json for key, item in items.items()},
        )

    by_text = st.dictionaries(KEYS, parts, max_size=4).filter(lambda items: len(set(map(str, items))) == len(items))
    return st.builds(mapped, by_text, st.sampled_from([dict, types.MappingProxyType]))


def _records(parts: st.SearchStrategy[Written]) -> st.SearchStrategy[Written]:
    return parts.map(lambda p: Written(Holder(p.value), {"content": p.cbor}, {"content": p.json}))


VALUES = st.recursive(SCALARS, lambda parts: _lists(parts) | _maps(parts) | _records(parts), max_leaves=12)


def assert_same(back: Any, expected: Any) -> None:
    """Equal, and of the same types throughout."""
    assert type(back) is type(expected)
    if isinstance(expected, np.ndarray):
        assert (back.dtype, back.shape) == (expected.dtype, expected.shape)
        np.testing.assert_array_equal(back, expected)
    elif isinstance(expected, dict):
        assert list(back) == list(expected)
        for key, item in expected.items():
            assert_same(back[key], item)
    elif isinstance(expected, list):
        assert len(back) == len(expected)
        for one, other in zip(back, expected, strict=True):
            assert_same(one, other)
    else:
        assert back == expected
        assert str(back) == str(expected)  # -0.0


@given(VALUES)
def test_any_value_reads_back(written: Written) -> None:
    assert_same(decode(encode(written.value)), written.cbor)
    # A bare number in JSON cannot be told from CBOR.
    assert_same(decode(encode(written.value, format="json"), format="json"), written.json)


@given(st.lists(VALUES, max_size=3), st.booleans(), st.sampled_from(["cbor", "json"]))
@settings(max_examples=40)
def test_any_values_are_fragments_of_a_snapshot(values: list[Written], encrypted: bool, format: Any) -> None:
    with temporary_place(encrypted) as place:
        writer = vmsnap.SnapshotWriter(place.location, key=place.key, format=format)
        inner = writer.add_namespace("vcpus")
        for index, written in enumerate(values):
            inner.write_fragment(str(index), written.value)
        reader = place.open().namespace("vcpus")
        for index, written in enumerate(values):
            assert_same(reader.read_fragment(str(index), format=format), getattr(written, format))
        expected = {f"vcpus/{index}": encode(written.value, format=format) for index, written in enumerate(values)}
        check_independently(place.location, place.key, expected)


# Values that cannot be written ----------------------------------------------------------------------------------------


BOTH, CBOR_ALONE, JSON_ALONE = ("cbor", "json"), ("cbor",), ("json",)
NO_WAY = "cannot write a value of type "
TOO_DEEP = "deeper than 127 levels, or contains itself"
CYCLE: list[Any] = []
CYCLE.append(CYCLE)

UNWRITABLE: list[tuple[Any, tuple[str, ...], str]] = [
    (object(), BOTH, NO_WAY + "object: convert it, or pass default="),
    (1j, BOTH, NO_WAY + "complex"),
    (int, BOTH, NO_WAY + "type"),
    (Segment, BOTH, NO_WAY + "type"),
    ((i for i in ()), BOTH, NO_WAY + "generator"),
    ({}.values(), BOTH, NO_WAY + "dict_values"),
    (dt.timedelta(1), BOTH, NO_WAY + "datetime.timedelta"),
    (Moment(2013, 3, 21, tzinfo=UTC), BOTH, NO_WAY + ".*Moment"),
    (dt.datetime(2013, 3, 21), BOTH, r"without a time zone is ambiguous: set one with replace\(tzinfo="),
    (dt.datetime(1, 1, 1, tzinfo=dt.timezone(dt.timedelta(seconds=30))), BOTH, "before the year 1 or after 9999"),
    ((ctypes.c_int * 2)(), BOTH, NO_WAY),
    (Ambiguous(1, 2), BOTH, "two fields of Ambiguous have the same name"),
    (CYCLE, BOTH, TOO_DEEP),
    (nested(NESTED_IN + 1), BOTH, TOO_DEEP),
    (nested(NESTED_IN + 1, around=lambda value: {"k": value}), BOTH, TOO_DEEP),
    ({nested(5000, 1, lambda value: (value,)): 1}, CBOR_ALONE, TOO_DEEP),
    ({1j: 1}, CBOR_ALONE, NO_WAY + "complex as a key"),
    ({math.nan: 1}, CBOR_ALONE, "NaN cannot be a key"),
    ({np.float32("nan"): 1}, CBOR_ALONE, "NaN cannot be a key"),
    ({math.nan}, CBOR_ALONE, "NaN cannot be a key"),
    ({(math.nan,): 1}, CBOR_ALONE, "NaN cannot be a key"),
    ({Level.LOW, Colour.ONE}, CBOR_ALONE, "two members of a set are equal"),
    ({Colour.RED: 1, "red": 2}, BOTH, "two keys of a dict are equal"),
    ({1: 1, "1": 2}, JSON_ALONE, "two keys of a dict are equal"),
    ({None: 1}, JSON_ALONE, "keys in JSON must be strings or whole numbers: use CBOR"),
    ({1.5: 1}, JSON_ALONE, "keys in JSON must be"),
    ({b"a": 1}, JSON_ALONE, "keys in JSON must be"),
    ({(1, 2): 1}, JSON_ALONE, "keys in JSON must be"),
    ("\ud800", BOTH, "surrogates not allowed"),
    ({"\ud800": 1}, BOTH, "surrogates not allowed"),
    (PurePosixPath("/\udcff"), BOTH, "surrogates not allowed"),
    (math.nan, JSON_ALONE, "JSON"),
    (-math.inf, JSON_ALONE, "JSON"),
    (np.array([1, np.nan]), JSON_ALONE, "JSON"),
    (10**309, JSON_ALONE, "could not be read back.*number out of range"),
    (-(10**309), JSON_ALONE, "could not be read back.*number out of range"),
    (10**5000, JSON_ALONE, "limit"),
    (np.array([True]), CBOR_ALONE, "no typed array of bool: convert it, or pass as_list=True"),
    (np.array(["a"]), CBOR_ALONE, "no typed array of <U1.*as_list=True"),
    (np.array([None]), CBOR_ALONE, "no typed array of object.*as_list=True"),
    (np.zeros(1, "c8"), BOTH, "numpy.ndarray of complex64"),
    (np.zeros(1, "f16"), BOTH, "float128"),
    (np.zeros(1, [("a", "i4")]), BOTH, "numpy.ndarray of .*'a'"),
    (np.zeros(1, [("a", "i4")])[0], BOTH, "numpy.void"),
    (np.zeros(1, "M8[ns]"), BOTH, r"numpy.ndarray of datetime64\[ns\]"),
    (np.zeros(1, "m8[s]"), BOTH, r"timedelta64\[s\]"),
    (np.datetime64(5, "ns"), BOTH, "numpy.datetime64"),
    (np.datetime64("2013-03-21"), BOTH, "numpy.datetime64"),
    (np.datetime64("NaT"), BOTH, "numpy.datetime64"),
    (np.timedelta64(5, "ns"), BOTH, "numpy.timedelta64"),
    (np.complex64(1), BOTH, "numpy.complex64"),
    (np.longdouble(1), BOTH, "numpy.longdouble"),
    (np.ma.array([1, 2], mask=[0, 1]), BOTH, "MaskedArray"),
    (np.ma.masked, BOTH, "MaskedConstant"),
    (matrix().view(Subarray), BOTH, "Subarray"),
]


@pytest.mark.parametrize(("value", "formats", "message"), UNWRITABLE, ids=lambda value: type(value).__name__)
def test_what_cannot_be_written_is_refused_with_the_place_and_leaves_nothing(
    tmp_path: Path, value: Any, formats: tuple[Any, ...], message: str
) -> None:
    for format in formats:
        writer = vmsnap.SnapshotWriter(tmp_path / format, format=format)
        before = tree(tmp_path)
        with pytest.raises(vmsnap.SerializationError, match=f"^the value for 'cpu' of .* serialized: .*{message}"):
            writer.write_fragment("cpu", value)
        deep = {"regs": [0, Holder({"a b": {7: value}})]}
        path = r"at regs\[1\]\.content\['a b'\]\[('7'|7)\]"
        with pytest.raises(vmsnap.SerializationError, match=rf"{path}(: |\[|\.\w| and deeper).*{message}"):
            writer.write_fragment("cpu", deep)
        assert tree(tmp_path) == before
        writer.write_fragment("cpu", 1)


def test_a_path_is_cut_where_it_is_long() -> None:
    with pytest.raises(vmsnap.SerializationError) as caught:
        encode({"x" * 10_000: {10**5000: {(1, 2): 1j}}})
    assert "[a int][a tuple]: " in str(caught.value)
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("format", ["cbor", "json"])
def test_127_levels_are_allowed(format: Any) -> None:
    for inner, around in (([], lambda v: [v]), ({}, lambda v: {"k": v}), ({}, Holder)):
        deepest = nested(NESTED_IN - 1, inner, around)
        assert decode(encode(deepest, format=format), format=format) is not None
        with pytest.raises(vmsnap.SerializationError, match=TOO_DEEP):
            encode(around(deepest), format=format)


def test_levels_of_tags_count_as_well() -> None:
    """The decoders accept every written value, for every type that cbor2 writes with a tag."""
    for value in ({1}, np.zeros((1, 1)), np.zeros(1), ID, NOON, 2**70, {(1, 2): 3}):
        for levels in range(NESTED_IN - 4, NESTED_IN + 1):
            with suppress(vmsnap.SerializationError):
                decode(encode(nested(levels, value)))


# default= -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["cbor", "json"])
def test_default_returns_what_is_written_instead(format: Any) -> None:
    def default(value: Any) -> Any:
        if isinstance(value, complex):
            return [value.real, value.imag]
        if isinstance(value, np.ndarray):
            return value.astype(complex).tolist()
        return {"type": type(value).__name__, "value": str(value)}

    value = {"a": 1j, "b": np.array([1j]), "c": [Moment(2013, 3, 21)], "d": np.timedelta64(1, "s")}
    assert decode(encode(value, format=format, default=default)) == {
        "a": [0.0, 1.0],
        "b": [[0.0, 1.0]],
        "c": [{"type": "Moment", "value": "2013-03-21 00:00:00"}],
        "d": {"type": "timedelta64", "value": "1 seconds"},
    }
    assert decode(encode({1j: 1}, format=format, default=str)) == {"1j": 1}


@pytest.mark.parametrize("format", ["cbor", "json"])
@pytest.mark.parametrize("value", [1j, {1j: 1}, {1j}])
def test_default_that_returns_what_it_got_is_refused(format: Any, value: Any) -> None:
    with pytest.raises(vmsnap.SerializationError, match=TOO_DEEP):
        encode(value, format=format, default=lambda value: value)


def test_default_is_not_called_for_what_can_be_written() -> None:
    def never(value: Any) -> Any:
        pytest.fail(f"called with {value!r}")

    for value, _ in ALIKE:
        encode(value, default=never)


@pytest.mark.parametrize("error", [ValueError("mine"), TypeError("mine"), KeyError("mine"), KeyboardInterrupt()])
def test_what_default_raises_is_passed_on(tmp_path: Path, error: BaseException) -> None:
    def default(_: Any) -> Any:
        raise error

    writer = vmsnap.SnapshotWriter(tmp_path / "vm1")
    before = tree(tmp_path)
    with pytest.raises(type(error)) as caught:
        writer.write_fragment("cpu", {"a": [1j]}, default=default)
    assert caught.value is error
    assert tree(tmp_path) == before
    if isinstance(error, Exception):
        assert error.__notes__ == [f"while the value for 'cpu' of {writer.path} was serialized"]


# Fragments ------------------------------------------------------------------------------------------------------------


def test_an_existing_fragment_or_a_bad_name_is_refused_and_nothing_changes(place: Place) -> None:
    writer = write(place.create(), "cpu", b"x")
    writer.add_namespace("disks")
    before = tree(place.location)
    for name in ("cpu", "disks"):
        with pytest.raises(FileExistsError, match=name):
            writer.write_fragment(name, 1)
    for name in ("", "..", "a/b", "enc_metadata", ".vmsnap"):
        with pytest.raises(vmsnap.InvalidArgumentError, match="cannot be the name"):
            writer.write_fragment(name, 1)
    assert tree(place.location) == before
    assert read(place.open(), "cpu") == b"x"


@pytest.mark.parametrize("format", ["cbor", "json"])
def test_a_writer_keeps_its_format_through_a_pickle_and_into_namespaces(place: Place, format: Any) -> None:
    writer = pickle.loads(pickle.dumps(vmsnap.SnapshotWriter(place.location, key=place.key, format=format)))
    inner = pickle.loads(pickle.dumps(writer.add_namespace("vcpus")))
    assert (writer.format, inner.format) == (format, format)
    inner.write_fragment("0", {"a": ["é"]})
    expected = {"cbor": bytes.fromhex("a161618162c3a9"), "json": '{"a":["é"]}'.encode()}[format]
    check_independently(place.location, place.key, {"vcpus/0": expected})


def test_cbor_is_the_usual_format(tmp_path: Path) -> None:
    assert vmsnap.SnapshotWriter(tmp_path / "vm1").format == "cbor"


def test_a_fragment_is_read_without_being_told_its_format(place: Place) -> None:
    values = {"a": {"ns": 12, "big": "x" * 300_000}, "b": None, "c": True, "d": "text", "e": [], "f": {}}
    writer = vmsnap.SnapshotWriter(place.location, key=place.key, format="json")
    for name, value in values.items():
        writer.write_fragment(name, value)
    reader = place.open()
    assert {name: reader.read_fragment(name) for name in reader.list_fragments()} == values


def test_no_number_in_cbor_is_taken_for_json(place: Place) -> None:
    writer = place.create()
    for number in range(-300, 300):
        writer.write_fragment(str(number), number)
        assert place.open().read_fragment(str(number), int) == number


@pytest.mark.parametrize("size", [0, 4000, 4096, 5000, 300_000])
def test_a_value_of_any_size_reads_back(place: Place, size: int) -> None:
    place.create().write_fragment("mem", bytes(size))
    assert place.open().read_fragment("mem") == bytes(size)
